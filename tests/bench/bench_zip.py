"""How much faster `write_zip` is than saving each PNG to a folder and archiving that.

    python tests/bench/bench_zip.py [--images 10000] [--repeats 3]

Both write the same pictures: crops of the drawn sample with smooth noise over them, which compress
about as generated dogs do. Then the choices that the PNG encoder leaves: size and time.
"""

import argparse
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from train_dogs import find_photos, prepare_crops, to_bytes, write_zip


def pictures(count: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3): a dog's crop under coarse and fine noise."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        photos = find_photos([ROOT / "data" / "sample"])
        pixels = prepare_crops(photos, "square", show=False).pixels.clone()
    generator, made = torch.Generator().manual_seed(0), []
    for block in torch.arange(count).split(500):
        image = pixels[block % len(pixels)].permute(0, 3, 1, 2).float() / 127.5 - 1
        for side, strength in ((4, 0.35), (16, 0.12), (64, 0.01)):
            noise = torch.randn(len(block), 3, side, side, generator=generator)
            image = image + strength * F.interpolate(noise, 64, mode="bicubic")
        made.append(to_bytes(image))
    return np.concatenate(made)


def plainly(images: np.ndarray, folder: Path) -> None:
    """The usual way: a folder of PNGs, then the folder as a zip."""
    loose = folder / "images"
    loose.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(loose / f"{k:05d}.png")
    shutil.make_archive(str(folder / "plain"), "zip", loose)
    shutil.rmtree(loose)


def content(path: Path) -> dict[str, bytes]:
    """The pixels of some of a zip's pictures, by name."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        some = [(n, io.BytesIO(archive.read(n))) for n in names[::97]]
    return {name: Image.open(data).tobytes() for name, data in some} | {"count": bytes(len(names))}


def settings(images: np.ndarray) -> None:
    """Print what each of the encoder's settings costs, in processor time of one thread."""
    ways = {f"level {n}, default": (n, zlib.Z_DEFAULT_STRATEGY) for n in (0, 1, 3, 6)}
    for name, (level, strategy) in (ways | {"level 1, run-length": (1, zlib.Z_RLE)}).items():
        times = []
        for _ in range(3):
            begin, size = time.process_time(), 0
            for image in images:
                buffer = io.BytesIO()
                png = Image.fromarray(image)
                png.save(buffer, "PNG", compress_level=level, compress_type=strategy)
                size += buffer.tell()
            times.append(time.process_time() - begin)
        each = 1e6 * min(times) / len(images)
        print(f"{name}: {each:.0f} us, {size / len(images):.0f} bytes each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    images, ratios = pictures(options.images), []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            written, plain = Path(folder, "images.zip"), Path(folder, "plain.zip")
            begin = time.perf_counter()
            plainly(images, Path(folder))
            between = time.perf_counter()
            write_zip(written, (images[k : k + 128] for k in range(0, len(images), 128)))
            end = time.perf_counter()
            assert content(written) == content(plain)
            sizes = [path.stat().st_size / 1e6 for path in (plain, written)]
        ratios.append((between - begin) / (end - between))
        print(
            f"plain {between - begin:.2f} s ({sizes[0]:.1f} MB), write_zip"
            f" {end - between:.2f} s ({sizes[1]:.1f} MB): {ratios[-1]:.2f} x"
        )
    settings(images[:2000])
    print(
        f"bench_zip: write_zip is {statistics.median(ratios):.2f} x as fast as saving each"
        f" ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} repeats, {len(images)} images,"
        f" {os.cpu_count()} cores)"
    )


if __name__ == "__main__":
    main()
