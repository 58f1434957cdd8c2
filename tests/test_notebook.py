"""The whole file pasted into a cell of a real Jupyter kernel: defaults, options, interrupts."""

from __future__ import annotations

import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import (
    SAMPLE,
    SCRIPT,
    arguments,
    environment,
    left_over,
    load,
    log_of,
    pixels,
)

import train_dogs

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")


class Notebook:
    """A kernel, started in `folder`, and the output of its cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel, self.client = manager.start_new_kernel(
            startup_timeout=120, cwd=str(folder), env=environment()
        )

    def run(
        self, cell: str, interrupt_when: Callable[[str], bool] | None = None, seconds: float = 120
    ) -> tuple[str, str]:
        """Run a cell; returns its reply's status and all it printed.

        The kernel is interrupted, as by the stop button, once `interrupt_when` holds of the text.
        """
        message = self.client.execute(cell)
        printed, end = "", time.monotonic() + seconds
        while True:
            assert time.monotonic() < end, printed[-3000:]
            try:
                news = self.client.get_iopub_msg(timeout=0.1)
            except queue.Empty:
                news = None
            if news and news["parent_header"].get("msg_id") == message:
                content = news["content"]
                if content.get("execution_state") == "idle":
                    break
                printed += content.get("text", "") + "".join(content.get("traceback", []))
                printed += str(content.get("data", ""))
            if interrupt_when and interrupt_when(printed):
                self.kernel.interrupt_kernel()
                interrupt_when = None
        while True:
            reply = self.client.get_shell_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == message:
                return reply["content"]["status"], printed

    def close(self) -> None:
        """Stop the kernel."""
        self.client.stop_channels()
        self.kernel.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Iterator[Notebook]:
    """A notebook in a folder with the dogs in `data/`, as next to the script."""
    if Path("/kaggle").exists():
        pytest.skip("on Kaggle the defaults name other folders")
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copytree(SAMPLE / "Images", folder / "data" / "Images")
    shutil.copytree(SAMPLE / "Annotation", folder / "data" / "Annotation")
    book = Notebook(folder)
    yield book
    book.close()


@pytest.fixture(scope="module")
def pasted(notebook: Notebook) -> tuple[str, str]:
    """Status and output of the pasted file, interrupted before its first step."""
    return notebook.run(SCRIPT.read_text("utf-8"), lambda printed: "breeds" in printed)


def test_pasted_whole_it_runs_with_its_defaults_and_an_interrupt_ends_it_in_one_line(
    pasted, notebook
):
    status, printed = pasted
    assert status == "ok", printed
    assert "135 dogs of 6 breeds in data" in printed.replace(str(notebook.folder) + "/", "")
    assert "usage" not in printed and "Traceback" not in printed and "SystemExit" not in printed
    assert "interrupted" in printed
    assert (notebook.folder / "output").is_dir()  # the default of --out
    assert not (notebook.folder / "output" / "images.zip").exists()
    cell = """
import signal, sys
print("__file__" in globals(), Config().width, "-f" in sys.argv,
      signal.getsignal(signal.SIGINT) is signal.default_int_handler,
      signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""
    assert notebook.run(cell)[1].split() == ["False", "48", "True", "True", "True"]


def test_a_shell_below_the_kernels_is_a_notebook_too_and_a_terminals_is_not(monkeypatch):
    kernels = pytest.importorskip("ipykernel.zmqshell").ZMQInteractiveShell
    terminals = pytest.importorskip("IPython.terminal.interactiveshell").TerminalInteractiveShell
    colabs = type("Shell", (kernels,), {})  # as google.colab._shell.Shell is
    for kind, expected in ((kernels, True), (colabs, True), (terminals, False), (None, False)):
        shell = None if kind is None else object.__new__(kind)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda s=shell: s))
        assert train_dogs.in_notebook() == expected
    monkeypatch.delitem(sys.modules, "IPython")
    assert not train_dogs.in_notebook()


@pytest.mark.slow
def test_main_takes_options_shows_a_bar_and_returns(pasted, notebook):
    out = notebook.folder / "run"
    status, printed = notebook.run(f"code = main({arguments(out, steps=20, images=6)})")
    assert status == "ok", printed
    assert "images/s" in printed and "left" in printed and "|" in printed  # the bar
    assert notebook.run("print(code)")[1].strip() == "0"
    assert len(pixels(out / "images.zip")) == 6
    status, printed = notebook.run("codes = main(['--width', '0']), main(['--help'])")
    assert status == "ok" and "out of range" in printed and "Traceback" not in printed
    assert notebook.run("print(*codes)")[1].split() == ["2", "0"]


HELD = """
import gc, os, signal, threading
gc.collect()
links = [f"/proc/self/fd/{number}" for number in range(1000)]
opened = [os.readlink(link) for link in links if os.path.isfile(link)]
files = [path for path in opened if os.getcwd() in path or "train_dogs" in path]  # not IPython's
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print(files, sorted(thread.name for thread in threading.enumerate()), handlers)
"""


def test_the_stop_button_saves_and_writes_the_zip_and_three_runs_in_a_kernel_leave_nothing_open(
    pasted, notebook
):
    out, before = notebook.folder / "stopped", notebook.run(HELD)

    def training(_: str) -> bool:
        return (out / "log.jsonl").exists() and any("d_loss" in line for line in log_of(out))

    cell = f"code = main({arguments(out, steps=10**6, images=6)})"
    status, printed = notebook.run(cell, training)
    assert status == "ok" and "Traceback" not in printed, printed
    assert notebook.run("print(code)")[1].strip() == "130"
    done = load(out / "checkpoint.pt")["trainer"]["steps_done"]
    assert done > 0 and len(pixels(out / "images.zip")) == 6 and left_over(out) == []
    for more in (5, 10):
        status, printed = notebook.run(
            f"code = main({arguments(out, steps=done + more, images=6)})"
        )
        assert status == "ok" and "resumed at step" in printed
        assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == done + more
    assert notebook.run(HELD) == before
