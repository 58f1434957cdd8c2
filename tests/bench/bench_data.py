"""How much faster the crops are prepared than by the plain way, and how close they come to it.

    python tests/bench/bench_data.py [--data PATH] [--kind square] [--repeats 5]

The plain way is one process and one loop: open, convert to RGB, crop to whole pixels, resize. Both
read the same photos, alternate, and start warm; the prepared way works on an empty cache each time.
Without --data it takes $DOGS_DATA or the drawn sample.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from train_dogs import CROPS, CropSet, PhotoSet, find_photos, prepare_crops


def plainly(data: Path, photos: PhotoSet, kind: str) -> np.ndarray:
    """The crops by one loop over the photos, the first view of each dog: uint8 (n, 64, 64, 3)."""
    crops = []
    for photo in photos.photos:
        picture = Image.open(data / "Images" / photo.name).convert("RGB")
        annotation = data / "Annotation" / Path(photo.name).with_suffix("")
        for box in ElementTree.parse(annotation).iter("bndbox"):
            edges = [float(box.findtext(corner)) for corner in ("xmin", "ymin", "xmax", "ymax")]
            view = CROPS[kind](tuple(edges), *picture.size)[0]
            crop = picture.crop(tuple(int(edge) for edge in view))
            crops.append(np.asarray(crop.resize((64, 64), Image.Resampling.LANCZOS)))
    return np.stack(crops)


def prepared(photos: PhotoSet, kind: str) -> tuple[CropSet, float, float]:
    """The crops on an empty cache, and the seconds of the first and of a second start."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        begin = time.perf_counter()
        made = prepare_crops(photos, kind, show=False)
        between = time.perf_counter()
        prepare_crops(photos, kind, show=False).pixels.sum()
        return made, between - begin, time.perf_counter() - between


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each of (n, 64, 64, 3) images."""
    error = ((a.astype(np.float32) - b) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    data = Path(os.environ.get("DOGS_DATA", ROOT / "data" / "sample"))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--kind", choices=sorted(CROPS), default="square")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    photos, ratios = find_photos([options.data]), []
    count = len(photos.photos)
    print(f"{count} photos in {photos.where}")
    for repeat in range(options.repeats + 1):  # the first warms the disk's cache and is not counted
        begin = time.perf_counter()
        plain = plainly(options.data, photos, options.kind)
        plain_seconds = time.perf_counter() - begin
        made, seconds, again = prepared(photos, options.kind)
        if repeat:
            ratios.append(plain_seconds / seconds)
            print(
                f"plain {count / plain_seconds:.0f} photos/s, prepared {count / seconds:.0f}"
                f" photos/s, a second start {again:.2f} s: {ratios[-1]:.2f} x"
            )
    close = psnr(made.pixels[made.first[:, 0]].numpy(), plain)
    print(
        f"bench_data: prepare_crops is {statistics.median(ratios):.2f} x as fast as the plain loop"
        f" ({os.cpu_count()} cores, {len(ratios)} repeats: {min(ratios):.2f} to {max(ratios):.2f}),"
        f" median PSNR {np.median(close):.1f} dB (5 % are below {np.percentile(close, 5):.1f})"
    )


if __name__ == "__main__":
    main()
