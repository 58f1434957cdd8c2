"""Fetches the Stanford Dogs archives into this folder, where `train_dogs.py` reads them in place.

    python data/download.py [--to DIR]

A broken transfer is resumed, here and in a later call, from the `.part` file that it leaves. A file
appears under its own name only when its size and SHA-256 are right. Exit codes: 0 both archives are
there, 2 with one sentence and the remedy on stderr, 130 interrupted.
"""

import argparse
import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

BASE_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
CHUNK = 1 << 18  # bytes to a read: small enough for a lively bar, large enough to cost nothing
SILENCE_SECONDS = 60  # without a byte for this long, a connection counts as broken


@dataclass(frozen=True)
class Archive:
    """One file of the set: its name on the server and here, its bytes, and their SHA-256 in hex."""

    name: str
    size: int
    sha256: str


ARCHIVES = (
    Archive(
        "images.tar",
        793_579_520,
        "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
    ),
    Archive(
        "annotation.tar",
        21_852_160,
        "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd",
    ),
)


class Refused(Exception):
    """Trying again would not help. Its text is one sentence for the user, with the remedy."""


class Broken(Exception):
    """The transfer failed in a way that may pass: the text says how."""


def bar(total: int, done: int, title: str) -> tqdm:
    """A progress bar in bytes on stderr, or none where that is no terminal."""
    return tqdm(
        total=total, initial=done, desc=title, unit="B", unit_scale=True, disable=None, leave=False
    )


def sha256_of(path: Path) -> "hashlib._Hash":
    """The running SHA-256 of a file's bytes, with a bar, as the files are large."""
    digest = hashlib.sha256()
    with path.open("rb") as file, bar(path.stat().st_size, 0, f"checking {path.name}") as progress:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest


class Part:
    """The beginning of an archive on the disk, and the running SHA-256 of those bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = sha256_of(path) if path.exists() else hashlib.sha256()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def restart(self) -> None:
        self.path.unlink(missing_ok=True)
        self.digest = hashlib.sha256()


def connect(url: str, offset: int) -> http.client.HTTPResponse:
    """Asks for the bytes from `offset` on. Raises Refused or Broken."""
    headers = {"User-Agent": "train-dogs-download", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        answer = f"the server answers {error.code} {error.reason} for {url}"
        error.close()
        if error.code >= 500 or error.code in (408, 416, 425, 429):
            raise Broken(answer) from error
        raise Refused(f"{answer}: check the address, or name a mirror with --base-url.") from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"no answer from {url} ({getattr(error, 'reason', error)})") from error


def start_of(response: http.client.HTTPResponse, archive: Archive, offset: int) -> int:
    """The place of the answer's first byte in the archive: `offset`, or 0 where Range is ignored.

    Raises Refused where the answer belongs to a file of another length, before anything is lost.
    """
    start, total = 0, response.headers.get("Content-Length", "")
    if response.status == http.client.PARTIAL_CONTENT:
        given = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", given)
        if not found or int(found[1]) != offset:
            raise Broken("the server sends another part of the file than was asked for")
        start, total = offset, found[2]
    if total.isdigit() and int(total) != archive.size:
        raise Refused(
            f"The server has {int(total):,} bytes under the name of {archive.name}, which has "
            f"{archive.size:,}: name another server with --base-url."
        )
    return start


def transfer(archive: Archive, part: Part, url: str) -> None:
    """One connection, which appends to `part` what is missing of the archive.

    Raises Refused or Broken; what has arrived stays in `part` in either case.
    """
    with connect(url, part.size) as response:
        done = start_of(response, archive, part.size)
        if done == 0:
            part.restart()
        with part.path.open("ab") as file, bar(archive.size, done, archive.name) as progress:
            while True:
                try:
                    chunk = response.read1(CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise Broken(f"the connection broke ({error})") from error
                if not chunk:
                    break
                done += len(chunk)
                if done > archive.size:
                    raise Refused(
                        f"The server sends more than the {archive.size:,} bytes of {archive.name}: "
                        f"name another server with --base-url."
                    )
                file.write(chunk)
                part.digest.update(chunk)
                progress.update(len(chunk))
    if done < archive.size:
        raise Broken(f"the connection broke after {done:,} of {archive.size:,} bytes")


def fetch(archive: Archive, folder: Path, base_url: str, tries: int, wait: float) -> None:
    """Brings one archive into the folder, whole and checked. Raises Refused."""
    url = base_url.rstrip("/") + "/" + archive.name
    part = Part(folder / (archive.name + ".part"))
    resumed = part.size > 0
    told = f"resuming after {part.size:,} of" if resumed else "fetching"
    print(f"{archive.name}: {told} {archive.size:,} bytes from {url}", flush=True)
    trouble = ""
    for attempt in range(tries):
        if attempt:
            print(f"{archive.name}: {trouble}; trying again", flush=True)
            time.sleep(wait)
        try:
            if part.size < archive.size:
                transfer(archive, part, url)
        except Broken as broken:
            trouble = str(broken)
            continue
        if part.digest.hexdigest() == archive.sha256:
            with part.path.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part.path, folder / archive.name)
            print(f"{archive.name}: complete, SHA-256 as it should be", flush=True)
            return
        wrong = part.digest.hexdigest()
        part.restart()
        if not resumed:
            raise Refused(
                f"The server's {archive.name} has the right length and the wrong SHA-256 "
                f"({wrong}): name another server with --base-url."
            )
        # What an earlier call left was not a beginning of this archive: once more, from 0.
        resumed, trouble = False, "the resumed file has the wrong SHA-256"
    raise Refused(
        f"Gave up on {archive.name} after {tries} tries ({trouble}); {part.size:,} bytes are kept: "
        f"start the same command again later."
    )


def missing(archives: Sequence[Archive], folder: Path) -> list[Archive]:
    """The archives still to be fetched. Raises Refused for a wrong file under a right name."""
    result = []
    for archive in archives:
        path = folder / archive.name
        if not path.exists():
            result.append(archive)
        elif path.stat().st_size != archive.size or sha256_of(path).hexdigest() != archive.sha256:
            raise Refused(
                f"{path} is not the official {archive.name} (wrong size or SHA-256): "
                f"delete or rename it and start again."
            )
        else:
            print(f"{archive.name}: already here and complete", flush=True)
    return result


def check_room(archives: Sequence[Archive], folder: Path) -> None:
    """Raises Refused where the disk cannot hold what is still to come."""
    parts = [folder / (archive.name + ".part") for archive in archives]
    have = sum(part.stat().st_size for part in parts if part.exists())
    need = sum(archive.size for archive in archives) - have
    free = shutil.disk_usage(folder).free
    if need > free:
        raise Refused(
            f"{folder} has {free:,} bytes free and {need:,} are needed: "
            f"make room, or name another folder with --to."
        )


def main(argv: Sequence[str] | None = None, archives: Sequence[Archive] = ARCHIVES) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Fetch the Stanford Dogs archives: resumed when broken off, checked at the end."
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--to", type=Path, default=here, help="folder (default: %(default)s)")
    parser.add_argument("--base-url", default=BASE_URL, help="server (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=20, help="connections to try for each archive")
    parser.add_argument("--wait", type=float, default=5.0, help="seconds between two tries")
    options = parser.parse_args(argv)
    folder: Path = options.to
    try:
        if not options.base_url.startswith(("http://", "https://")):
            raise Refused(f"--base-url {options.base_url} should start with http:// or https://.")
        if options.tries < 1 or options.wait < 0:
            raise Refused("--tries should be 1 or more, and --wait 0 or more.")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = missing(archives, folder)
        check_room(wanted, folder)
        for archive in wanted:
            fetch(archive, folder, options.base_url, options.tries, options.wait)
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 2
    except OSError as error:  # of this machine: the network's own are Broken or Refused by now
        remedy = "make room" if error.errno == errno.ENOSPC else "check the folder's permissions"
        print(f"{folder}: {error.strerror}; {remedy}, or name another with --to.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "Interrupted; what has arrived is kept, and the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
