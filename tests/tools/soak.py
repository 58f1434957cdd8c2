"""Train for a while and log what the process holds: memory, open files, threads.

    python tests/tools/soak.py --minutes 10 --every 60 -- --preset sample --data data/sample

What follows `--` is for train_dogs.py. Each line is JSON: seconds since the start, resident memory
in MB, open files, threads. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "train_dogs.py"


def held(pid: int) -> dict[str, int]:
    """What a process holds now. Raises `OSError` once it has ended."""
    folder = Path("/proc") / str(pid)
    pages = int((folder / "statm").read_text().split()[1])
    return {
        "resident_mb": pages * os.sysconf("SC_PAGE_SIZE") // 2**20,
        "files": len(list((folder / "fd").iterdir())),
        "threads": len(list((folder / "task").iterdir())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="then the training is stopped")
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("training", nargs="*", help="after --: the options of train_dogs.py")
    options = parser.parse_args()
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, str(SCRIPT), *options.training], stdout=sys.stderr)
    while child.poll() is None:
        seconds = time.monotonic() - start
        print(json.dumps({"seconds": round(seconds)} | held(child.pid)), flush=True)
        if seconds >= 60 * options.minutes:
            child.send_signal(signal.SIGINT)  # it saves and writes its zip
            return child.wait()
        time.sleep(options.every)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
