"""What every test shares: the path to the two programs, the dogs, and caches of their own."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Before torch is imported anywhere: as many threads as there are cores to run on, in this process
# and in those that the tests start, so that byte-for-byte claims compare like with like.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("OMP_NUM_THREADS", str(min(CORES, 4)))
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
