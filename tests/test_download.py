"""`data/download.py` in processes of its own, against a server on loopback that misbehaves."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
BODIES = {"annotation.tar": os.urandom(700_001), "images.tar": os.urandom(300_000)}
FIRST = BODIES["annotation.tar"]
SIZES = {name: len(body) for name, body in BODIES.items()}
SHA256 = {name: hashlib.sha256(body).hexdigest() for name, body in BODIES.items()}
# The program with small archives and short pauses, as a script of its own.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(DATA)!r})
import download
download.SIZES, download.SHA256 = {SIZES}, {SHA256}
download.TRIES, download.WAIT_SECONDS, download.SILENCE_SECONDS = 3, 0.01, 0.5
"""


class Handler(BaseHTTPRequestHandler):
    """Serves BODIES, spoiled by the next behaviour in the server's queue."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name, asked = self.path.rsplit("/", 1)[-1], self.headers["Range"]
        self.server.asked.append((name, asked))
        behaviour = self.server.behaviours.pop(0) if self.server.behaviours else "good"
        if behaviour.isdigit():
            return self.send_error(int(behaviour))
        start = 0 if behaviour == "ignore-range" else int(asked.split("=")[1].rstrip("-"))
        body = BODIES[name]
        spoiled = {"wrong": bytes(len(body)), "shorter": body[:-1000], "longer": body + b"more"}
        body = spoiled.get(behaviour, body)
        rest = body[start:]
        self.send_response(200 if behaviour == "ignore-range" else 206)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if behaviour != "no-length":
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if behaviour in ("break", "stall"):
            rest = rest[: len(rest) // 2]
        with contextlib.suppress(ConnectionError):  # the client may have seen enough
            self.wfile.write(rest)
        if behaviour == "stall":
            self.server.leave.wait(60)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server with `behaviours`, one for each request, and the requests it was `asked`."""
    monkeypatch.setenv("no_proxy", "*")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.behaviours, made.asked, made.leave = [], [], threading.Event()
    made.url = f"http://127.0.0.1:{made.server_port}/dogs/"
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield made
    made.leave.set()
    made.shutdown()
    made.server_close()


def start(url: str, folder: Path, more: str = "", **options: object) -> subprocess.Popen:
    program = f"{PROGRAM}{more}\nsys.exit(download.main())"
    command = [sys.executable, "-c", program, "--to", str(folder), "--base-url", url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(pipes | options))


def succeeds(url: str, folder: Path) -> str:
    """Run the program: the folder has both archives, right to the byte, and nothing else."""
    process = start(url, folder)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BODIES
    return out


def fails(url: str, folder: Path, *words: str, more: str = "") -> None:
    """Run the program: exit code 2, and one sentence with the words."""
    process = start(url, folder, more)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2 and err.count("\n") == 1 and err.endswith(".\n"), err
    assert all(word in err for word in words), err


def test_fetches_both_into_a_new_folder_and_then_only_verifies(server, tmp_path):
    succeeds(server.url, tmp_path / "new" / "folder")
    assert "already here" in succeeds(server.url, tmp_path / "new" / "folder")
    assert [name for name, _ in server.asked] == ["annotation.tar", "images.tar"]


@pytest.mark.parametrize("trouble", ["break", "stall", "break ignore-range", "503 429"])
def test_arrives_whole_through_what_passes(server, tmp_path, trouble):
    server.behaviours = trouble.split()
    succeeds(server.url, tmp_path)
    assert server.behaviours == []


def test_gives_up_after_some_tries_and_a_later_call_goes_on(server, tmp_path):
    server.behaviours = ["break"] * 3
    fails(server.url, tmp_path, "annotation.tar", "again later")
    assert os.listdir(tmp_path) == ["annotation.tar.part"]
    kept = (tmp_path / "annotation.tar.part").read_bytes()
    assert len(kept) > len(FIRST) * 0.8 and FIRST.startswith(kept)
    succeeds(server.url, tmp_path)
    assert server.asked[3] == ("annotation.tar", f"bytes={len(kept)}-")


@pytest.mark.parametrize("lie", ["shorter", "longer", "no-length", "404"])
def test_another_file_is_refused_at_once_and_costs_nothing(server, tmp_path, lie):
    server.behaviours = ["break", lie]
    fails(server.url, tmp_path, "annotation.tar", "name another", "--base-url")
    assert (len(server.asked), os.listdir(tmp_path)) == (2, ["annotation.tar.part"])
    assert (tmp_path / "annotation.tar.part").read_bytes() == FIRST[: len(FIRST) // 2]


def test_wrong_bytes_never_get_the_name(server, tmp_path):
    server.behaviours = ["wrong"]
    fails(server.url, tmp_path, "annotation.tar", "SHA-256", "--base-url")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1000, len(FIRST) + 5])
def test_a_part_of_something_else_is_thrown_away(server, tmp_path, size):
    (tmp_path / "annotation.tar.part").write_bytes(bytes(size))
    fails(server.url, tmp_path, "SHA-256", "start again")
    succeeds(server.url, tmp_path)


def test_a_wrong_file_under_the_right_name_is_left_alone(server, tmp_path):
    (tmp_path / "annotation.tar").write_bytes(b"mine")
    fails(server.url, tmp_path, "annotation.tar", "not the official")
    assert (tmp_path / "annotation.tar").read_bytes() == b"mine" and not server.asked


@pytest.mark.parametrize("url", ["ftp://x/", "file:///x", "x", "http://[x", "http://x:y/"])
def test_what_is_no_address(tmp_path, url):
    fails(url, tmp_path, url, "--base-url")


def test_nobody_listens(server, tmp_path):
    server.server_close()
    fails(server.url, tmp_path, "annotation.tar", "again later")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk(server, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    fails(server.url, tmp_path, str(tmp_path), "too large", "make room", more=limit)
    assert (tmp_path / "annotation.tar.part").read_bytes() == FIRST[:400_000]
    succeeds(server.url, tmp_path)
    assert server.asked[1] == ("annotation.tar", "bytes=400000-")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_keeps_what_has_arrived(server, tmp_path):
    server.behaviours = ["stall"]
    process = start(server.url, tmp_path, "download.SILENCE_SECONDS = 60")
    part, deadline = tmp_path / "annotation.tar.part", time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].startswith("Interrupted;")
    assert process.returncode == 130
    kept = part.stat().st_size
    succeeds(server.url, tmp_path)
    assert kept and server.asked[1] == ("annotation.tar", f"bytes={kept}-")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_progress_on_a_terminal(server, tmp_path):
    leader, follower = os.openpty()
    process = start(server.url, tmp_path, stderr=follower)
    process.communicate(timeout=20)
    os.close(follower)
    assert process.returncode == 0 and b" of 0 MB" in os.read(leader, 4096)
    os.close(leader)


def test_the_program_itself_wants_the_official_files(server, tmp_path):
    """As a user calls it; the server's file is too short to be the official one."""
    command = [sys.executable, DATA / "download.py", "--to", tmp_path, "--base-url", server.url]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "21,852,160" in done.stderr
