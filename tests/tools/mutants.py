"""Plant one fault at a time in a copy of the project and run its tests: do they notice it?

    python tests/tools/mutants.py                       # all: some minutes of a core
    python tests/tools/mutants.py --only head-at-the-bottom seeds-of-uses-collide

A mutant is `killed` if a test fails. It has `survived` if all pass: then a test is missing. It is
`stale` if its text is not in the file exactly once (the program has changed: update `MUTANTS`), and
`broken` if pytest ended in another way, for example because the program cannot be imported. The
tests of the chosen mutants first run without a fault, and must pass. The exit code is 0 if all
mutants are killed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # of the tests of one mutant; a mutant that hangs is killed


class Mutant(NamedTuple):
    """A planted fault: `old` becomes `new` in `file`, and `tests` should fail."""

    file: str
    old: str
    new: str
    tests: str  # stems of test files, without test_


DOGS, SCORER = "train_dogs.py", "mifid.py"
MUTANTS = {
    # The story of train_dogs.py: networks, losses, step, averages.
    "one-norm-for-both-halves": Mutant(
        DOGS, "groups = [g for g in x.split([num_real, len(x) - num_real]) if len(g)]",
        "groups = [x]", "networks",
    ),
    "another-slope": Mutant(DOGS, "num_real), 0.2, inplace", "num_real), 0.1, inplace", "training"),
    "gains-begin-at-0": Mutant(
        DOGS, "(module.weight, 1.0, config", "(module.weight, 0.0, config", "networks"
    ),
    "margin-upside-down": Mutant(
        DOGS, "-math.log(seen.config.margin)", "-math.log(1 - seen.config.margin)", "networks"
    ),
    "fakes-are-real": Mutant(
        DOGS, "real + F.softplus(seen.fake", "real + F.softplus(-seen.fake", "networks"
    ),
    "g-loss-that-saturates": Mutant(
        DOGS, "return F.softplus(-seen.fake", "return -F.softplus(seen.fake", "networks"
    ),
    "betas-swapped": Mutant(
        DOGS, "(config.beta1, config.beta2)", "(config.beta2, config.beta1)", "training"
    ),
    "an-epoch-shows-dogs-twice": Mutant(
        DOGS, "cursor += config.batch_size", "cursor += 1", "training"
    ),
    "mirror-is-for-the-others": Mutant(
        DOGS, "(random[2] < mirror)", "(random[2] >= mirror)", "sources"
    ),
    "weights-of-crops-reversed": Mutant(
        DOGS, "crops.weights.cumsum", "crops.weights.flip(0).cumsum", "crops"
    ),
    "one-view-only": Mutant(
        DOGS, "(random[1] * crops.count[rows, kind])", "(0 * crops.count[rows, kind])", "crops"
    ),
    "fakes-of-other-breeds": Mutant(
        DOGS, "torch.cat([labels[: len(reals)], labels])",
        "torch.cat([labels[: len(reals)], labels.flip(0)])", "breeds",
    ),
    "rates-fall-too-soon": Mutant(
        DOGS, "(1 - progress) / (1 - start)", "(1 - progress)", "training"
    ),
    "sums-instead-of-means": Mutant(DOGS, "self.sums / self.summed", "self.sums / 1", "training"),
    "the-scale-grows-fast": Mutant(
        DOGS, "(2 ** (1 / 2000) - 0.5)", "(2 ** (1 / 200) - 0.5)", "precision"
    ),
    "a-dead-scale-is-healthy": Mutant(DOGS, "(scales >= 1)", "(scales >= 0)", "precision"),
    "ema-of-each-step": Mutant(DOGS, "min(beta**config.average_every,", "min(beta,", "averaging"),
    "swa-keeps-the-start": Mutant(
        DOGS, "1 / self.swa_updates", "1 / (self.swa_updates + 1)", "averaging"
    ),
    "norms-of-the-last-batches": Mutant(
        DOGS, "norm.momentum = None", "norm.momentum = 0.1", "averaging"
    ),
    "another-schedule": Mutant(DOGS, "in (200, 300, 400))", "in (200, 300, 500))", "presets"),
    # Recipes.
    "brighter-only": Mutant(DOGS, "x + (brightness - 0.5)", "x + brightness", "augmentation"),
    "shifts-too-far": Mutant(DOGS, "reach = side // 8", "reach = side // 4", "augmentation"),
    "black-squares": Mutant(DOGS, "None, None, :], 0.0)", "None, None, :], -1.0)", "augmentation"),
    "reals-among-fakes": Mutant(
        DOGS, "groups = m.split([num_real, len(m) - num_real])", "groups = [m]", "improved"
    ),
    "all-breeds-alike": Mutant(
        DOGS, "F.embedding(labels, p)", "F.embedding(labels * 0, p)", "breeds"
    ),
    "unknown-breeds-count": Mutant(
        DOGS, 'reduction="sum") / known', 'reduction="sum") / len(classes)', "improved"
    ),
    "fake-class-added": Mutant(
        DOGS, "verdict.classes - verdict.logits", "verdict.classes + verdict.logits", "improved"
    ),
    "the-image-counts-more": Mutant(
        DOGS, "share, gap = 1 / (n + 1)", "share, gap = 1 / n", "improved"
    ),
    "matching-by-absolutes": Mutant(
        DOGS, "return (real - fake).square()", "return (real - fake).abs()", "improved"
    ),
    "history-by-the-mean": Mutant(
        DOGS, "(weights - self.mean).square().sum()",
        "(weights - self.mean).square().mean()", "improved",
    ),
    "hinge-of-the-wrong-side": Mutant(
        DOGS, "(1 + seen.fake.logits).relu()", "(1 - seen.fake.logits).relu()", "presets"
    ),
    "rals-half-smooth": Mutant(DOGS, "(1 - 2 * smoothing)", "(1 - smoothing)", "presets"),
    "r1-twice": Mutant(
        DOGS, ".square().sum() / (2 * count)", ".square().sum() / count", "presets"
    ),
    "a-norm-that-stands-still": Mutant(
        DOGS, "                if self.training:\n",
        "                if not self.training:\n", "residual",
    ),
    "attention-of-the-keys": Mutant(DOGS, "@ key).softmax(2)", "@ key).softmax(1)", "residual"),
    # Data.
    "litter-is-pictures": Mutant(
        DOGS, 'startswith((".", "__MACOSX"))', 'startswith(("."))', "finding"
    ),
    "the-first-breed-of-a-stem": Mutant(
        DOGS, "path.parent.name if path.parent.name in named else next(iter(named))",
        "next(iter(named))", "finding",
    ),
    "turned-the-other-way": Mutant(
        DOGS, "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90", "reading"
    ),
    "black-behind-glass": Mutant(DOGS, 'picture.size, "white"', 'picture.size, "black"', "reading"),
    "16-bits-overflow": Mutant(
        DOGS, "np.asarray(picture) // 256", "np.asarray(picture)", "reading"
    ),
    "half-may-be-bad": Mutant(DOGS, "> 0.05 * items", "> 0.5 * items", "reading finding crops"),
    "boxes-over-the-edge": Mutant(
        DOGS, "left, top, right, bottom = max(left, 0), max(top",
        "_, top, right, bottom = max(left, 0), max(top", "crops",
    ),
    "decoded-too-small": Mutant(DOGS, ">= 2 * IMAGE_SIZE", ">= IMAGE_SIZE", "crops"),
    "square-outside-the-frame": Mutant(
        DOGS, "top = min(max(y - side / 2, 0), height - side)", "top = y - side / 2", "crops"
    ),
    "head-at-the-bottom": Mutant(
        DOGS, "[(x, top, x + side, top + side) for x in starts]",
        "[(x, bottom - side, x + side, bottom) for x in starts]", "crops",
    ),
    "mirrored-copies-stay": Mutant(
        DOGS, "torch.maximum(rows @ plain[:end].T, rows @ mirrored[:end].T)",
        "rows @ plain[:end].T", "sources",
    ),
    "a-dog-repeats-itself": Mutant(DOGS, ".tril(start - 1)", ".tril(start)", "sources"),
    "a-cache-for-all-limits": Mutant(
        DOGS, "PIL.__version__, dedupe, version", "PIL.__version__, version", "sources crops"
    ),
    # Device, state, images, the run.
    "replays-share-no-randomness": Mutant(
        DOGS, 's["tensors"] | {"rng": s["rng"]}', 's["tensors"] | {}', "guards"
    ),
    "no-room-for-an-overflow": Mutant(
        DOGS, '["tensors"][name] *= 0.25', '["tensors"][name] *= 1', "guards"
    ),
    "no-checkpoint-before": Mutant(
        DOGS, 'os.replace(current, out / "checkpoint.previous.pt")', "current.unlink()", "survival"
    ),
    "other-dogs-go-on": Mutant(
        DOGS, 'if state["trainer"]["data_key"] != trainer.crops.key', "if False", "survival"
    ),
    "the-same-luck-again": Mutant(DOGS, '"training") + rollbacks)', '"training") + 0)', "training"),
    "a-fourth-try": Mutant(DOGS, "return rollbacks <= 3", "return rollbacks <= 4", "training"),
    "half-truncated": Mutant(DOGS, "* (1 - 2 * tail)", "* (1 - tail)", "averaging presets"),
    "other-shares-of-breeds": Mutant(
        DOGS, "G.frequency.cpu().cumsum", "G.frequency.cpu().flip(0).cumsum", "breeds"
    ),
    "one-seed-for-all-uses": Mutant(
        DOGS, "(seed + SEED_USES.index(use) * 0x9E3779B1) % 2**32", "seed % 2**32", "averaging"
    ),
    "seeds-of-uses-collide": Mutant(
        DOGS, "(seed + SEED_USES.index(use) * 0x9E3779B1) % 2**32",
        "seed + SEED_USES.index(use)", "averaging",
    ),
    "zip-with-the-clock": Mutant(
        DOGS, "date_time=(1980, 1, 1, 0, 0, 0)",
        "date_time=(1980, 1, 1, 0, 0, time.time_ns() // 1000 % 60)", "submission",
    ),
    "levels-cut-off": Mutant(DOGS, "add(127.5).round()", "add(127.5)", "submission"),
    "four-digits": Mutant(DOGS, "{count:05d}.png", "{count:04d}.png", "submission"),
    "half-a-circle": Mutant(DOGS, "(2 * math.pi * place)", "(math.pi * place)", "breeds"),
    "each-part-a-new-budget": Mutant(
        DOGS, "self.origin = started - used_before", "self.origin = started", "training"
    ),
    "nothing-in-reserve": Mutant(
        DOGS, "run.zip_seconds + spare_seconds + rest)", "rest)", "survival"
    ),
    "deaf-to-a-second-signal": Mutant(
        DOGS, "if self.stopped or not self.armed", "if not self.armed", "survival"
    ),
    "the-import-is-free": Mutant(
        DOGS, "main(sys.argv[1:], STARTED)", "main(sys.argv[1:])", "survival"
    ),
    # mifid.py.
    "biased-covariance": Mutant(
        SCORER, "scatter / (len(x) - 1)", "scatter / len(x)", "mifid_numbers"
    ),
    "one-root-is-lost": Mutant(SCORER, "trace - 2 * roots", "trace - roots", "mifid_numbers"),
    "a-group-stays": Mutant(SCORER, "product - left_out.T @ left_out", "product", "mifid_numbers"),
    "another-epsilon": Mutant(
        SCORER, "fid / (distance + EPSILON)", "fid / (distance + 1e-3)", "mifid_numbers"
    ),
    "copies-have-a-score": Mutant(
        SCORER, "if distance < COPY_DISTANCE:\n        return math.inf",
        "if distance < 0:\n        return math.inf", "mifid_numbers",
    ),
    "the-farthest-reference": Mutant(
        SCORER, "cosine.argmax(1)", "cosine.argmin(1)", "mifid_numbers"
    ),
    "opposites-are-far": Mutant(SCORER, "candidates.T).abs_()", "candidates.T)", "mifid_numbers"),
    "rows-of-zeros-stay": Mutant(
        SCORER, "torch.nonzero(generated.sum(1)).flatten().split(1024)",
        "torch.arange(len(generated)).split(1024)", "mifid_numbers",
    ),
    "a-row-is-its-own-neighbour": Mutant(
        SCORER, "cosine > 1 - 1e-5", "cosine > 2", "mifid_numbers"
    ),
    "kid-with-the-diagonal": Mutant(
        SCORER, "(size * (size - 1))", "(size * size)", "mifid_numbers"
    ),
    "coverage-by-the-largest": Mutant(
        SCORER, "(nearest <= radius_t)", "(nearest <= radius_t.max())", "mifid_numbers"
    ),
    "jackknife-too-narrow": Mutant(
        SCORER, "math.sqrt((GROUPS - 1) / GROUPS", "math.sqrt(1 / GROUPS", "mifid_trust"
    ),
    "bias-taken-twice": Mutant(
        SCORER, "fid - (GROUPS - 1) * (mean - fid)",
        "fid - 2 * GROUPS * (mean - fid)", "mifid_trust",
    ),
    "over-fitting-reversed": Mutant(SCORER, "if seen < unseen", "if seen > unseen", "mifid_trust"),
    "the-padding-counts": Mutant(
        SCORER, "count_include_pad=False", "count_include_pad=True", "mifid_network"
    ),
    "half-a-pixel": Mutant(
        SCORER, "torch.arange(target, dtype=torch.float32) *",
        "0.5 + torch.arange(target, dtype=torch.float32) *", "mifid_network",
    ),
    "another-epsilon-of-norms": Mutant(
        SCORER, "variance + module.bn.eps", "variance + 1e-5", "mifid_network"
    ),
    "quota-upside-down": Mutant(
        SCORER, "max(1, quota // period)", "max(1, period // quota)", "mifid_network"
    ),
    "photos-stay-turned": Mutant(
        SCORER, "picture = ImageOps.exif_transpose(picture)",
        "ImageOps.exif_transpose(picture)", "mifid_sets",
    ),
    "a-cache-for-all-rules": Mutant(
        SCORER, "[3, content, side.about, ", "[3, content, ", "mifid_sets"
    ),
    "too-many-crops": Mutant(
        SCORER, "side.values = side.values[:limit]", "side.values = side.values", "mifid_sets"
    ),
    "all-photos-may-be-bad": Mutant(SCORER, "> MAX_BAD_SHARE * total", "> total", "mifid_sets"),
    "the-corner-of-a-photo": Mutant(
        SCORER, "(picture, size, Image.Resampling.LANCZOS))",
        "(picture, size, Image.Resampling.LANCZOS, 0, (0, 0)))", "mifid_sets",
    ),
    "boxes-rounded-inwards": Mutant(
        SCORER, "floor(y), ceil(right), ceil(low)",
        "floor(y), floor(right), ceil(low)", "mifid_sets",
    ),
}  # fmt: skip


def pytest(folder: Path, tests: str, seconds: float) -> int:
    """pytest's exit code for the tests in a copy, up to the first failure; 1 if they hang."""
    options = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "")  # slow tests too
    files = [f"tests/test_{stem}.py" for stem in tests.split()]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=folder, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1
    return done.returncode


def judge(folder: Path, mutant: Mutant) -> str:
    """Plant a mutant in a copy of the project, run its tests, and restore the file."""
    path = folder / mutant.file
    text = path.read_text("utf-8")
    if text.count(mutant.old) != 1:
        return "stale"
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    try:
        code = pytest(folder, mutant.tests, SECONDS)
    finally:
        path.write_text(text, "utf-8")
    return {0: "survived", 1: "killed"}.get(code, "broken")


def main(
    argv: Sequence[str] | None = None,
    mutants: Mapping[str, Mutant] = MUTANTS,
    root: Path = ROOT,
) -> int:
    """Print a line for each mutant, and how many were killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=list(mutants), default=list(mutants))
    args = parser.parse_args(argv)
    skipped = shutil.ignore_patterns(".git", "__pycache__", "output", ".venv", ".*_cache")
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        folder = Path(shutil.copytree(root, Path(place) / "project", ignore=skipped))
        tests = dict.fromkeys(word for name in args.only for word in mutants[name].tests.split())
        if pytest(folder, " ".join(tests), SECONDS * len(args.only)):
            print(f"the tests fail without a fault: {' '.join(tests)}")
            return 1
        counts: Counter[str] = Counter()
        for name in args.only:
            end = judge(folder, mutants[name])
            print(f"{end:8} {name}", flush=True)
            counts[end] += 1
    print(", ".join(f"{number} {end}" for end, number in counts.items()))
    return int(counts["killed"] < len(args.only))


if __name__ == "__main__":
    sys.exit(main())
