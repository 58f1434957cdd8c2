"""`data/download.py` against a server on loopback that misbehaves in every way that servers do."""

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "download.py"
spec = importlib.util.spec_from_file_location("download", SCRIPT)
download = importlib.util.module_from_spec(spec)
sys.modules["download"] = download
spec.loader.exec_module(download)

BODIES = {"images.tar": os.urandom(700_001), "annotation.tar": os.urandom(30_000)}
TABLE = tuple(
    download.Archive(name, len(body), hashlib.sha256(body).hexdigest())
    for name, body in BODIES.items()
)
FIRST = TABLE[0]


class Handler(BaseHTTPRequestHandler):
    """Serves BODIES, spoiled by the behaviours that stand first in the server's queue."""

    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = BODIES[self.path.rsplit("/", 1)[-1]]
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        behaviour = self.server.behaviours.pop(0) if self.server.behaviours else "good"
        if isinstance(behaviour, int):
            self.send_error(behaviour)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if behaviour == "ignore-range":
            start = 0
        if behaviour == "wrong-bytes":
            body = bytes(len(body))
        if behaviour == "shorter":
            body = body[:-1000]
        if behaviour == "longer":
            body = body + b"more"
        if behaviour == "other-range":
            start += 1
        rest = body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if behaviour == "no-length-longer":
            rest = rest + b"more"
        else:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if behaviour == "break":
            rest = rest[: len(rest) // 2]
        if behaviour == "stall":
            self.wfile.write(rest[:100_000])
            self.wfile.flush()
            self.server.stalled.set()
            self.server.leave.wait(10)
            return
        try:
            self.wfile.write(rest)
        except ConnectionError:
            pass  # the client has seen enough


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server with `behaviours` to be used up, one a request, and the requests it `asked`."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.behaviours, made.asked = [], []
    made.stalled, made.leave = threading.Event(), threading.Event()
    made.url = f"http://127.0.0.1:{made.server_port}/dogs/"
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield made
    made.leave.set()
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between this process, or its children, and the loopback."""
    monkeypatch.setenv("no_proxy", "*")


def run(server: ThreadingHTTPServer, folder: Path, *extra: str, table: tuple = TABLE) -> int:
    return download.main(
        ["--to", str(folder), "--base-url", server.url, "--wait", "0.01", *extra], table
    )


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def whole(folder: Path) -> bool:
    """Both archives lie in the folder, right to the byte, and nothing else does."""
    return names(folder) == set(BODIES) and all(
        (folder / name).read_bytes() == body for name, body in BODIES.items()
    )


def one_sentence(text: str, *words: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    assert text.strip().endswith(".")
    for word in words:
        assert word in text


def test_the_official_table():
    assert [(a.name, a.size, a.sha256) for a in download.ARCHIVES] == [
        (
            "images.tar",
            793579520,
            "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
        ),
        (
            "annotation.tar",
            21852160,
            "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd",
        ),
    ]
    assert download.BASE_URL == "http://vision.stanford.edu/aditya86/ImageNetDogs/"


def test_fetches_both_and_then_only_verifies(server, tmp_path, capsys):
    assert run(server, tmp_path / "new" / "folder") == 0
    assert whole(tmp_path / "new" / "folder")
    assert [path for path, _ in server.asked] == ["/dogs/images.tar", "/dogs/annotation.tar"]
    assert run(server, tmp_path / "new" / "folder") == 0
    assert len(server.asked) == 2
    assert "already here and complete" in capsys.readouterr().out


def test_resumes_where_the_server_broke_off(server, tmp_path):
    server.behaviours = ["break", "break"]
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)
    half = FIRST.size // 2
    assert [asked for _, asked in server.asked[:2]] == [None, f"bytes={half}-"]
    assert int(server.asked[2][1][6:-1]) > half


def test_gives_up_after_the_bound_and_a_later_call_resumes(server, tmp_path, capsys):
    server.behaviours = ["break", "break"]
    assert run(server, tmp_path, "--tries", "2") == 2
    one_sentence(capsys.readouterr().err, "images.tar", "2 tries", "again")
    assert names(tmp_path) == {"images.tar.part"}
    kept = (tmp_path / "images.tar.part").read_bytes()
    assert kept == BODIES["images.tar"][: len(kept)]
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)
    assert server.asked[2] == ("/dogs/images.tar", f"bytes={len(kept)}-")


def test_starts_over_where_range_is_ignored(server, tmp_path):
    server.behaviours = ["break", "ignore-range"]
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    server.behaviours = ["break", "other-range"]
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


@pytest.mark.parametrize("behaviour", ["shorter", "longer", "no-length-longer"])
def test_a_lie_about_the_length_is_refused(server, tmp_path, capsys, behaviour):
    server.behaviours = [behaviour]
    assert run(server, tmp_path) == 2
    one_sentence(capsys.readouterr().err, "images.tar", f"{FIRST.size:,}", "--base-url")
    assert len(server.asked) == 1
    assert "images.tar" not in names(tmp_path)


def test_a_wrong_length_costs_nothing_of_what_has_arrived(server, tmp_path):
    server.behaviours = ["break", "shorter"]
    assert run(server, tmp_path) == 2
    assert (tmp_path / "images.tar.part").stat().st_size == FIRST.size // 2
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


def test_wrong_bytes_never_get_the_name(server, tmp_path, capsys):
    server.behaviours = ["wrong-bytes"]
    assert run(server, tmp_path) == 2
    one_sentence(capsys.readouterr().err, "images.tar", "SHA-256", "--base-url")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("size", [1000, FIRST.size, FIRST.size + 5])
def test_a_wrong_beginning_from_an_earlier_call_is_fetched_again(server, tmp_path, size):
    (tmp_path / "images.tar.part").write_bytes(bytes(size))
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


def test_a_complete_part_needs_no_connection(server, tmp_path):
    (tmp_path / "images.tar.part").write_bytes(BODIES["images.tar"])
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)
    assert [path for path, _ in server.asked] == ["/dogs/annotation.tar"]


def test_tries_again_after_the_servers_own_errors(server, tmp_path):
    server.behaviours = [500, 503, 429]
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


def test_404_is_final(server, tmp_path, capsys):
    server.behaviours = [404]
    assert run(server, tmp_path) == 2
    one_sentence(capsys.readouterr().err, "404", "--base-url")
    assert len(server.asked) == 1


def test_nobody_listening(server, tmp_path, capsys):
    server.server_close()
    assert run(server, tmp_path, "--tries", "2") == 2
    one_sentence(capsys.readouterr().err, "no answer", "again")


def test_a_wrong_file_under_the_right_name_is_left_alone(server, tmp_path, capsys):
    (tmp_path / "annotation.tar").write_bytes(bytes(30_000))
    assert run(server, tmp_path) == 2
    one_sentence(capsys.readouterr().err, "annotation.tar", "delete or rename")
    assert (tmp_path / "annotation.tar").read_bytes() == bytes(30_000)
    assert server.asked == []


def test_a_full_disk_is_told_beforehand(server, tmp_path, capsys):
    huge = (download.Archive("images.tar", 1 << 60, FIRST.sha256),)
    assert run(server, tmp_path, table=huge) == 2
    one_sentence(capsys.readouterr().err, "bytes free", "--to")
    assert server.asked == []


def test_a_folder_that_cannot_be(server, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(server, tmp_path / "file") == 2
    one_sentence(capsys.readouterr().err, "--to")


@pytest.mark.parametrize("wrong", [["--base-url", "ftp://x/"], ["--tries", "0"], ["--wait", "-1"]])
def test_a_wrong_option(tmp_path, capsys, wrong):
    assert download.main(["--to", str(tmp_path), *wrong], TABLE) == 2
    one_sentence(capsys.readouterr().err, wrong[0])


# ------------------------------------------------------------------- as processes of their own

WITH_TABLE = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import download
table = [download.Archive(*row) for row in {[(a.name, a.size, a.sha256) for a in TABLE]!r}]
sys.exit(download.main(archives=table))
"""


def started(server: ThreadingHTTPServer, folder: Path, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", WITH_TABLE, "--to", str(folder), "--base-url", server.url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--wait", "0.01"], **(pipes | options))


def test_ctrl_c_keeps_the_part_and_the_next_call_resumes(server, tmp_path):
    server.behaviours = ["stall"]
    process = started(server, tmp_path)
    assert server.stalled.wait(20)
    part = tmp_path / "images.tar.part"
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    one_sentence(err, "Interrupted", "goes on from there")
    kept = part.stat().st_size
    assert 0 < kept <= 100_000
    process = started(server, tmp_path)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert whole(tmp_path)
    assert server.asked[1][1] == f"bytes={kept}-"


def test_exit_code_and_one_sentence_from_a_real_process(server, tmp_path):
    server.behaviours = ["wrong-bytes"]
    process = started(server, tmp_path)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    one_sentence(err, "SHA-256")


def test_the_script_itself_asks_for_the_official_files(server, tmp_path):
    """As a user calls it; the server's files are too short to be the official ones."""
    command = [sys.executable, str(SCRIPT), "--to", str(tmp_path), "--base-url", server.url]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    one_sentence(done.stderr, "images.tar", "793,579,520")
    assert names(tmp_path) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_bar_on_a_terminal(server, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = started(server, tmp_path, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert b"images.tar:" in shown and b"B/s" in shown
