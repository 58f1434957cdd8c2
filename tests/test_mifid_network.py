"""mifid.py's network against torch-fidelity on the real weights, and where weights come from."""

import hashlib
import http.server
import importlib.util
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import mifid


@pytest.fixture(scope="session")
def pth_file(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of pytorch-fid's form, with a classifier (which has no part in the features)."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    classifier = {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(tensors | classifier, path)
    return path


@pytest.fixture(scope="session")
def model(script_file: Path) -> mifid.Inception:
    return mifid.load_inception(script_file, "cpu")


@pytest.fixture(scope="session")
def features(model: mifid.Inception, pictures: np.ndarray) -> np.ndarray:
    return mifid.extract_features(model, pictures)


def test_torch_fidelitys_network_gives_the_same_features_and_fid(pth_file, pictures, features):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    network = theirs.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(pth_file)
    )
    with torch.inference_mode():
        (expected,) = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert features.shape == (32, 2048) and features.dtype == np.float32
    assert np.abs(features - expected.numpy()).max() < 1e-4
    moments = [metric_fid.fid_features_to_statistics(part) for part in expected.double().split(16)]
    fid = metric_fid.fid_statistics_to_metric(*moments, verbose=False)
    ours = mifid.score(features[:16], features[16:])["fid"]
    assert ours == pytest.approx(fid["frechet_inception_distance"], rel=1e-4)


@pytest.mark.slow
def test_the_inception_score_is_that_of_torch_fidelitys_logits(pth_file, script_file, pictures):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = theirs.FeatureExtractorInceptionV3(
        "inception", ["logits_unbiased"], feature_extractor_weights_path=str(pth_file)
    )
    order = np.random.default_rng(0).permutation(len(pictures))
    with torch.inference_mode():
        (logits,) = network(torch.from_numpy(pictures[order]).permute(0, 3, 1, 2))
    sides = pictures, pictures[::-1].copy()
    result = mifid.score(*sides, weights=pth_file, device="cpu", everything=True)
    found = result["inception_score"], result["inception_score_std"]
    assert found == pytest.approx(mifid.inception_score(logits), rel=1e-3) and found[0] > 1
    bare = mifid.score(*sides, weights=script_file, device="cpu", everything=True)
    assert "inception_score" not in bare and "no classifier" in " ".join(bare["notes"])


@pytest.mark.parametrize("shape", [(64, 64), (31, 80), (400, 310)])
def test_the_resize_is_tensorflows(shape):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    pictures = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), np.uint8)
    planes = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    rows, columns = (mifid.resize_matrix(n, 299, torch.device("cpu")) for n in shape)
    resize = module.interpolate_bilinear_2d_like_tensorflow1x
    theirs = resize(planes, (299, 299), align_corners=False)
    assert (rows @ planes @ columns.T - theirs).abs().max() < 1e-3  # of 255


def test_features_depend_neither_on_the_batch_nor_on_the_layout_of_uint8_images(
    model, pictures, features
):
    order = np.random.default_rng(2).permutation(12)
    shuffled = mifid.extract_features(model, pictures[order], batch_size=5)
    np.testing.assert_allclose(shuffled, features[order], atol=2e-5)
    planes = torch.from_numpy(pictures[:4]).permute(0, 3, 1, 2)
    channels_first = mifid.extract_features(model, planes, batch_size=3)
    assert isinstance(channels_first, torch.Tensor)
    np.testing.assert_allclose(channels_first.numpy(), features[:4], atol=2e-5)
    assert mifid.extract_features(model, pictures[:0]).shape == (0, 2048)
    for bad in (pictures[:2] / 255, pictures[0]):
        with pytest.raises(ValueError, match="uint8"):
            mifid.extract_features(model, bad)


def test_fast_features_stay_near_the_exact_ones_and_say_so(
    script_file, pictures, features, monkeypatch
):
    monkeypatch.setattr(mifid, "has_bfloat16", lambda: True)
    model = mifid.load_inception(script_file, "cpu", fast=True)
    assert model.precision == "bfloat16"
    fast = mifid.extract_features(model, pictures[:8])
    assert fast.dtype == np.float32
    distance = mifid.nearest_references(fast, features[:8])[0]
    assert 0 < distance.max() < 5e-3
    monkeypatch.setattr(mifid, "has_bfloat16", lambda: False)
    assert mifid.load_inception(script_file, "cpu", fast=True).precision == "float32"


def test_the_average_of_a_block_counts_no_padding_and_the_last_block_takes_the_maximum():
    torch.manual_seed(0)
    x, weights = torch.randn(1, 4, 5, 5).relu(), torch.randn(2, 3, 4)
    for last in (False, True):
        parts = {}
        for name, weight in zip(("branch1x1", "branch_pool"), weights):
            parts[name] = torch.nn.Conv2d(4, 3, 1).requires_grad_(False)
            parts[name].weight.copy_(weight[..., None, None])
            parts[name].bias.zero_()
        found = mifid.mixed(parts, last=last)(x)[0]
        for i in range(5):
            for j in range(5):
                window = x[0, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].flatten(1)
                pooled = window.amax(1) if last else window.mean(1)
                expected = torch.cat([weights[0] @ x[0, :, i, j], weights[1] @ pooled]).relu()
                torch.testing.assert_close(found[:, i, j], expected)


def test_memory_is_contiguous_in_float32_on_cuda_alone(script_file):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert mifid.memory_format(cuda, torch.float32) == torch.contiguous_format
    for device, dtype in ((cuda, torch.float16), (cpu, torch.float32), (cpu, torch.bfloat16)):
        assert mifid.memory_format(device, dtype) == torch.channels_last
    weight = mifid.load_inception(script_file).layers[1][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_device_on_which_no_convolution_runs_is_left_out_or_refused(monkeypatch):
    def dropped(*inputs: object) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ARCH_MISMATCH\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", dropped)
    assert mifid.choose_device(None) == torch.device("cpu")  # "cuda" is not there at all
    with pytest.raises(mifid.UserError, match=r"ARCH_MISMATCH\).*--device cpu"):
        mifid.choose_device("cpu")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory.", "CUBLAS_STATUS_ALLOC_FAILED", "unable to find an engine",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)  # fmt: skip
def test_too_little_memory_in_any_stage_names_the_remedy(message, features, monkeypatch):
    def hungry(*inputs: object) -> None:
        raise RuntimeError(message)

    for stage in ("gaussian_of", "nearest_references", "kernel_distance"):
        with monkeypatch.context() as patch, pytest.raises(mifid.UserError, match="--device cpu"):
            patch.setattr(mifid, stage, hungry)
            mifid.score(features, features, everything=True)
    monkeypatch.setattr(mifid, "gaussian_of", hungry)
    message = "an illegal memory access was encountered"  # is no lack of memory
    with pytest.raises(RuntimeError, match="illegal"):
        mifid.score(features, features)


def test_no_product_is_rounded_because_a_training_allows_it(model, pictures, monkeypatch):
    found = []

    def watched(*inputs: object) -> torch.Tensor:
        found.append(torch.get_float32_matmul_precision())
        return forward(*inputs)

    forward, before = model.forward, torch.get_float32_matmul_precision()
    monkeypatch.setattr(model, "forward", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        features = mifid.extract_features(model, pictures[:2])
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "medium"
        assert mifid.memorization_distance(features, features) == pytest.approx(0, abs=1e-12)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_the_cpu(script_file, pictures):
    sides = pictures[:16], pictures[16:]
    how = {"weights": script_file, "everything": True, "cache": False}
    cpu, cuda = (mifid.score(*sides, device=device, **how) for device in ("cpu", "cuda"))
    for name in ("fid", "memorization_distance", "kid", "precision", "recall", "coverage"):
        assert cuda[name] == pytest.approx(cpu[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, 8), ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)  # fmt: skip
def test_a_containers_quota_limits_the_threads(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(mifid, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert mifid.usable_cpus() == expected
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(9)
        assert mifid.main([]) == 2 and torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- weights


def test_both_forms_with_and_without_classifier_are_the_same_network(
    model, pth_file, tensors, pictures, features, tmp_path
):
    torch.save(tensors, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    for path in (pth_file, tmp_path / "bare.pth"):
        other = mifid.load_inception(path, "cpu")
        assert other.fingerprint == model.fingerprint and other.sha256 != model.sha256
        again = mifid.extract_features(other, pictures[:4])
        np.testing.assert_allclose(again, features[:4], atol=2e-5)


def test_weights_that_are_not_the_network_are_refused_by_name(tensors, script_file, tmp_path):
    tampered = dict(tensors)
    key = "Mixed_6d.branch7x7_2.conv.weight"
    tampered[key] = tampered[key] * 1.0001
    missing = {k: v for k, v in tensors.items() if "Mixed_7c" not in k}
    for name, content in (("tampered", tampered), ("missing", missing), ("list", [1, 2])):
        torch.save(content, tmp_path / name)
    (tmp_path / "text").write_text("no weights")
    (tmp_path / "empty").touch()
    data = bytearray(script_file.read_bytes())
    (tmp_path / "cut").write_bytes(data[:1_000_000])
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    for path in (*sorted(tmp_path.iterdir()), tmp_path / "absent"):
        with pytest.raises(mifid.UserError, match=path.name) as caught:
            mifid.load_inception(path, "cpu")
        assert "--weights" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_looked_for_in_the_stated_order(script_file, tmp_path, monkeypatch):
    monkeypatch.setattr(mifid, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("MIFID_WEIGHTS", raising=False)
    assert mifid.find_weights() == script_file
    on_kaggle = tmp_path / "kaggle/input/some-dataset/deeper" / mifid.GRAPH_NAME
    in_hub = tmp_path / "hub/checkpoints" / mifid.WEIGHTS_NAME
    for path in (in_hub, on_kaggle, tmp_path / "from_variable", tmp_path / "given"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert mifid.find_weights() == on_kaggle
    monkeypatch.setenv("MIFID_WEIGHTS", str(tmp_path / "from_variable"))
    assert mifid.find_weights() == tmp_path / "from_variable"
    assert mifid.find_weights(tmp_path / "given") == tmp_path / "given"
    with pytest.raises(mifid.UserError, match="absent"):
        mifid.find_weights(tmp_path / "absent")
    monkeypatch.delenv("MIFID_WEIGHTS")
    shutil.rmtree(tmp_path / "kaggle")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mifid.find_weights() == in_hub
    in_hub.unlink()
    with pytest.raises(mifid.UserError, match=r"--offline.*another machine"):
        mifid.find_weights(offline=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_download_is_checked_before_it_gets_its_name(server, tmp_path, monkeypatch):
    body = np.random.default_rng(3).bytes(3_000_000)
    (tmp_path / "weights.pth").write_bytes(body)
    target = tmp_path / "hub" / mifid.WEIGHTS_NAME
    monkeypatch.setattr(mifid, "WEIGHTS_URL", f"{server}/weights.pth")
    with pytest.raises(mifid.UserError, match="sha256"):
        mifid.download_weights(target, offline=False)
    assert list(target.parent.iterdir()) == []
    monkeypatch.setattr(mifid, "WEIGHTS_SHA256", hashlib.sha256(body).hexdigest()[:8])
    assert mifid.download_weights(target, offline=False).read_bytes() == body
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    monkeypatch.setattr(mifid, "WEIGHTS_URL", f"{server}/absent.pth")
    with pytest.raises(mifid.UserError, match="404"):
        mifid.download_weights(tmp_path / "hub/other.pth", offline=False)


def test_a_download_without_an_answer_ends_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(mifid, "DOWNLOAD_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        monkeypatch.setattr(mifid, "WEIGHTS_URL", url)
        with pytest.raises(mifid.UserError, match=r"timed out.*another machine.*--weights"):
            mifid.download_weights(tmp_path / "hub" / "weights.pth", offline=False)
    assert list((tmp_path / "hub").iterdir()) == []
