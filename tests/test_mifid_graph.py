"""TensorFlow's frozen Inception, as the competition gave it, read without TensorFlow.

Oracles: the encoder of `frozen_graph.py`; a table of the graph's names, here; the real tensors,
whose fingerprint is known.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from frozen_graph import constant, field, graph_of, varint

import mifid

# Scopes of the graph and torchvision's branches, block by block.
SMALL = {
    "conv": "branch1x1", "tower/conv": "branch5x5_1", "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1", "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3", "tower_2/conv": "branch_pool",
}  # fmt: skip
FIRST_HALVING = {
    "conv": "branch3x3", "tower/conv": "branch3x3dbl_1", "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}  # fmt: skip
SEVENS = {
    "conv": "branch1x1", "tower/conv": "branch7x7_1", "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3", "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2", "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4", "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}  # fmt: skip
SECOND_HALVING = {
    "tower/conv": "branch3x3_1", "tower/conv_1": "branch3x3_2", "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2", "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}  # fmt: skip
WIDE = {
    "conv": "branch1x1", "tower/conv": "branch3x3_1", "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b", "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2", "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b", "tower_2/conv": "branch_pool",
}  # fmt: skip
BLOCKS = {
    "mixed": ("5b", SMALL), "mixed_1": ("5c", SMALL), "mixed_2": ("5d", SMALL),
    "mixed_3": ("6a", FIRST_HALVING), "mixed_4": ("6b", SEVENS), "mixed_5": ("6c", SEVENS),
    "mixed_6": ("6d", SEVENS), "mixed_7": ("6e", SEVENS), "mixed_8": ("7a", SECOND_HALVING),
    "mixed_9": ("7b", WIDE), "mixed_10": ("7c", WIDE),
}  # fmt: skip
SCOPES = {
    "conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1", "conv_4": "Conv2d_4a_3x3",
    **{f"{mixed}/{scope}": f"Mixed_{block}.{branch}" for mixed, (block, branches) in BLOCKS.items()
       for scope, branch in branches.items()},
}  # fmt: skip


def constants(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The real tensors in the graph's names and order of axes, and a classifier."""
    found = {}
    for scope, ours in SCOPES.items():
        weight = named[f"{ours}.conv.weight"].numpy()
        found[f"{scope}/conv2d_params"] = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
        for part, name in (
            ("beta", "bias"), ("gamma", "weight"), ("moving_mean", "running_mean"),
            ("moving_variance", "running_var"),
        ):  # fmt: skip
            found[f"{scope}/batchnorm/{part}"] = named[f"{ours}.bn.{name}"].numpy()
    random_state = np.random.default_rng(0)
    found["softmax/weights"] = random_state.standard_normal((2048, 1008)).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def real(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The real network's constants."""
    return constants(tensors)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A graph's usual name."""
    return tmp_path / mifid.GRAPH_NAME


def test_the_frozen_graph_is_the_same_network_and_gives_the_same_features(
    real, script_file, pictures, path
):
    theirs = mifid.load_inception(script_file)
    for content in (False, True):  # numbers as floats, and as bytes
        path.write_bytes(graph_of(real, content=content))
        ours = mifid.load_inception(path)
        assert ours.fingerprint == theirs.fingerprint == mifid.WEIGHTS_FINGERPRINT
    features = [mifid.extract_features(model, pictures[:8]) for model in (ours, theirs)]
    np.testing.assert_allclose(*features, rtol=1e-6)
    np.testing.assert_array_equal(ours.classifier.numpy(), real["softmax/weights"].T)


@pytest.mark.slow
def test_a_graph_with_a_tensor_missing_or_of_another_shape_or_value_is_refused(real, path):
    name = "mixed_4/tower_1/conv_2/batchnorm/beta"
    less = {key: values for key, values in real.items() if key != name}
    longer = less | {name: np.append(real[name], np.float32(0))}
    empty = less | {name: real[name][:0]}
    for other in (less, longer, empty, real | {name: real[name] + 1}):
        path.write_bytes(graph_of(other))
        with pytest.raises(mifid.UserError, match=path.name) as caught:
            mifid.load_inception(path)
        assert "--weights" in str(caught.value) and "\n" not in str(caught.value)


def test_a_length_beyond_the_end_takes_no_memory():
    node = field(1, constant("conv/conv2d_params", np.ones((1 << 20,))))
    tracemalloc.start()
    for false in (b"\x0a" + varint(1 << 60), b"\x0a" + b"\xff" * 20, field(2, 1 << 60)):
        with pytest.raises((ValueError, LookupError)):
            mifid.tensors_of_graph(false + node)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
