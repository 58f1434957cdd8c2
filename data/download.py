"""Fetches the Stanford Dogs archives into this folder, where `train_dogs.py` reads them in place.

    python data/download.py [--to DIR] [--base-url URL]

A broken transfer is resumed, here and in a later call, from the `.part` file that it leaves. A file
appears under its own name only when its SHA-256 is right. Exit codes: 0 both archives are there,
2 with one sentence and the remedy on stderr, 130 interrupted.
"""

import argparse
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

BASE_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
# The small archive first, so that a wrong server is found out soon.
SIZES = {"annotation.tar": 21_852_160, "images.tar": 793_579_520}  # bytes
SHA256 = {
    "annotation.tar": "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd",
    "images.tar": "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
}
TRIES, WAIT_SECONDS = 20, 5.0  # connections for each archive, and the pause between two
SILENCE_SECONDS = 60.0  # without a byte for this long, a connection counts as broken
CHUNK = 1 << 16  # bytes to a read, which is also the most that a break loses


class UserError(Exception):
    """Trying again at once would not help. Its text is one sentence with the remedy."""


class Broken(Exception):
    """The transfer failed in a way that may pass. Its text says how."""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def connect(url: str, start: int) -> http.client.HTTPResponse:
    """Asks for the bytes from `start` on. Raises Broken or UserError."""
    headers = {"User-Agent": "train-dogs-download", "Range": f"bytes={start}-"}
    try:
        request = urllib.request.Request(url, headers=headers)
        if request.type not in ("http", "https"):
            raise ValueError(url)
        return urllib.request.urlopen(request, timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"{url}: the server answers {error.code} {error.reason}"
        if error.code >= 500 or error.code in (408, 429):  # overloaded, too slow, too often
            raise Broken(answer) from error
        raise UserError(f"{answer}; name another one with --base-url.") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"{url} is no http(s) address: correct --base-url.") from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"{url}: no answer ({getattr(error, 'reason', error)})") from error


def chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The bytes of an answer up to where the server ends it. Raises Broken."""
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"the connection broke ({error})") from error


def transfer(url: str, part: Path, size: int) -> None:
    """One connection, which appends to `part` what it lacks. Raises Broken or UserError."""
    done = part.stat().st_size if part.exists() else 0
    if done >= size:
        return
    with connect(url, done) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            done = 0  # Range is ignored: all of it comes again
        if response.length != size - done:  # asked before anything is overwritten
            raise UserError(f"{url} is not of {size:,} bytes: name another server with --base-url.")
        with part.open("ab" if done else "wb") as file:
            for chunk in chunks(response):
                file.write(chunk)
                done += len(chunk)
                if sys.stderr.isatty():  # until the next line is written over it
                    text = f"{done // 10**6} of {size // 10**6} MB"
                    print(text, end="\r", file=sys.stderr, flush=True)
    if done < size:
        raise Broken(f"the connection broke after {done:,} of {size:,} bytes")


def fetch(name: str, folder: Path, base_url: str) -> None:
    """Brings one archive into the folder, whole and checked. Raises UserError."""
    path, part, url = folder / name, folder / f"{name}.part", f"{base_url.rstrip('/')}/{name}"
    if path.exists():
        if sha256_of(path) != SHA256[name]:
            raise UserError(f"{path} is not the official file: move it away and start again.")
        print(f"{name}: already here and complete, with the right SHA-256")
        return
    print(f"{name}: {SIZES[name]:,} bytes from {url}", flush=True)
    for attempt in range(1, TRIES + 1):
        try:
            transfer(url, part, SIZES[name])
            break
        except Broken as broken:
            print(f"{name}: {broken} (try {attempt} of {TRIES})", flush=True)
            time.sleep(WAIT_SECONDS)
    else:
        raise UserError(f"Gave up on {name}: start the same command again later, to resume it.")
    if sha256_of(part) != SHA256[name]:
        part.unlink()
        raise UserError(f"{url} has a wrong SHA-256: start again, or name another --base-url.")
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    print(f"{name}: complete, with the right SHA-256", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description="Fetch, resume and check the Stanford Dogs.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--to", type=Path, default=here, help="folder (default: %(default)s)")
    parser.add_argument("--base-url", default=BASE_URL, help="server (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        options.to.mkdir(parents=True, exist_ok=True)
        for name in SIZES:
            fetch(name, options.to, options.base_url)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # of this machine's disk: the network's own are Broken by now
        where = f"{error.filename or options.to}: {error.strerror}"
        print(f"{where}; make room, or name another folder with --to.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from what has arrived.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
