"""Train on a machine without the photos: pack the crops here, train from the pack there.

    python tests/tools/elsewhere.py pack crops.zip --data DOGS [--crops square] [--lossless]
    python tests/tools/elsewhere.py run crops.zip RESULTS --minutes 7.4      # there

`pack` writes the prepared crops as JPEG of quality 95 (4:4:4, about 58 MiB for the 19,536 square
crops of Stanford Dogs) or, with `--lossless`, as PNG: then training gives the same bytes as from
the photos. `run` takes the options of train_dogs.py except --data and --out. RESULTS then holds the
log, the configuration, the last sheet, `progress.webp`, and the images in at most four zips of less
than 16 MiB (images that do not fit are left out). Until the run has ended its whole folder is
RESULTS/run, so a killed run leaves what it had.

Score at home: unzip the images into one folder, then `python mifid.py FOLDER DOGS`.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dogs
from train_dogs import CropSet, UserError

BLOCK = 1000  # crops in a picture: one column, as a JPEG has at most 65,500 rows
QUALITY = 95  # of JPEG
ZIPS, ZIP_BYTES = 4, 15 << 20
KEPT = ("log.jsonl", "config.json", "progress.webp")


def pack(path: Path, data: Sequence[str], crops: str, lossless: bool) -> None:
    """Write the crops and what is known of them."""
    found = train_dogs.prepare_crops(train_dogs.find_photos(data), crops)
    about = {f.name: getattr(found, f.name) for f in fields(CropSet) if f.name != "pixels"}
    how = {"format": "JPEG", "quality": QUALITY, "subsampling": 0}
    if lossless:
        how = {"format": "PNG"}
    else:  # other pixels, so a checkpoint of the photos' own crops does not fit
        about["key"] = f"{found.key}, JPEG {QUALITY}"
    with zipfile.ZipFile(path, "w") as archive:
        for number, block in enumerate(found.pixels.split(BLOCK)):
            column = Image.fromarray(block.numpy().reshape(-1, 64, 3))
            column.save(buffer := io.BytesIO(), **how)
            archive.writestr(f"{number:04d}", buffer.getvalue())
        torch.save({"crops": crops, "about": about}, buffer := io.BytesIO())
        archive.writestr("about.pt", buffer.getvalue())


def unpack(path: Path) -> tuple[str, CropSet]:
    """The crops in a pack, and the `--crops` that they are."""
    with zipfile.ZipFile(path) as archive:
        saved = torch.load(io.BytesIO(archive.read("about.pt")), weights_only=True)
        names = sorted(name for name in archive.namelist() if name != "about.pt")
        columns = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    pixels = torch.from_numpy(np.concatenate(columns).reshape(-1, 64, 64, 3))
    return saved["crops"], CropSet(pixels=pixels, **saved["about"])


def run(path: Path, results: Path, options: Sequence[str]) -> int:
    """Train from a pack and collect the results; returns the exit code of the training."""
    kinds, found = unpack(path)

    def packed(photos: object, crops: str, *_: object, **__: object) -> CropSet:
        if crops != kinds:
            raise UserError(f"{path} holds --crops {kinds}: give these, or pack --crops {crops}.")
        return found

    train_dogs.find_photos = lambda paths=(): SimpleNamespace(where=str(path), photos=[])
    train_dogs.prepare_crops = packed
    out = results / "run"
    code = train_dogs.main([*options, "--out", str(out)])
    for place in (*map(out.joinpath, KEPT), *sorted(out.glob("samples/step_*.png"))[-1:]):
        if place.exists():
            shutil.copy(place, results)
    if code == 0:
        split_zip(out / "images.zip", results)
        shutil.rmtree(out)
    return code


def split_zip(path: Path, results: Path) -> None:
    """Copy the files of a zip into at most `ZIPS` others of at most `ZIP_BYTES`, in order."""
    with zipfile.ZipFile(path) as source:
        left = source.infolist()
        for number in range(ZIPS):
            room = ZIP_BYTES
            with zipfile.ZipFile(results / f"images_{number}.zip", "w") as part:
                # A file needs two headers and its name twice, too.
                while left and (room := room - left[0].file_size - 200) >= 0:
                    part.writestr(left[0].filename, source.read(left.pop(0)))
            if not left:
                return
    print(f"{len(left):,} of the images do not fit in {ZIPS} zips and are left out")


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, or run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the crops to a file", allow_abbrev=False)
    packing.add_argument("pack", type=Path)
    packing.add_argument("--data", action="append", default=[], help="as for train_dogs.py")
    packing.add_argument("--crops", default="square", help="as for train_dogs.py; default square")
    packing.add_argument("--lossless", action="store_true", help="PNG: about three times as large")
    running = commands.add_parser("run", help="train from such a file", allow_abbrev=False)
    running.add_argument("pack", type=Path)
    running.add_argument("results", type=Path)
    args, options = parser.parse_known_args(argv)
    if args.command == "run":
        return run(args.pack, args.results, options)
    if options:
        parser.error(f"unknown: {' '.join(options)}")
    pack(args.pack, args.data, args.crops, args.lossless)
    print(f"{args.pack}: {args.pack.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"elsewhere: {error}")
