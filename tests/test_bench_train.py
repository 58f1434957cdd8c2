"""The bench at a tiny size: its contestants are what they claim; its last line is JSON."""

import json
import math
from dataclasses import replace

import bench_train
import pytest
import torch

import train_dogs

CPU = torch.device("cpu")
TINY = train_dogs.Config(width=2, latent_dim=8, batch_size=4, seed=3)


@pytest.fixture(scope="module")
def printed():
    """What a tiny run of everything printed, and what it returned."""
    lines: list[str] = []
    tiny = ["--all", "--device", "cpu", "--widths", "2", "--batch-sizes", "4", "--presets", "dogs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        results = bench_train.main([*tiny, "--repeats", "1", "--seconds-per-point", "0.001"])
    return lines, results


def test_the_last_line_is_everything_as_json(printed):
    lines, results = printed
    assert json.loads(lines[-1]) == json.loads(json.dumps(results))
    assert {"device", "steps", "rooflines", "norms", "seconds"} <= results.keys()


def test_the_plain_loop_is_compared_with_itself_and_with_ours(printed):
    rows = {row["loop"]: row for row in printed[1]["steps"]}
    assert rows.keys() == {"eager", "plain"}
    assert rows["plain"]["times_plain"] == [1, 1, 1]
    for row in rows.values():
        median, least, most = row["ms_per_step"]
        assert 0 < least <= median <= most
        assert row["images_per_second"] == pytest.approx(4000 / median)
        assert 0 < row["convolution_share_of_step"] < 1


def test_nine_hours_on_a_p100_are_its_flops_over_those_of_an_image(printed):
    roofline = printed[1]["rooflines"][0]
    rows = {row["card"]: row for row in roofline["nine_hours"]}
    p100 = rows["P100, fp32"]
    assert p100["how"] == "computed"
    assert p100["images"] == pytest.approx(7.4e12 * 32400 / roofline["flops_per_image_step"])
    measured = [row for row in rows.values() if row["how"] == "measured"]
    assert [row["batch_size"] for row in measured] == [4]


def test_the_steps_convolutions_hold_all_the_flops_that_torch_counts():
    trainer = train_dogs.Trainer(TINY, train_dogs.random_crops(16), CPU)
    calls = bench_train.record_convolutions(trainer)
    expected = sum(train_dogs.flops_per_image(TINY).values())
    assert sum(sum(call.flops()) for call in calls) / TINY.batch_size == pytest.approx(expected)


def test_the_plain_discriminator_computes_what_split_batch_norm_does():
    D = train_dogs.build_networks(TINY, CPU)[1]
    reals, fakes = torch.rand(2, 4, 3, 64, 64).mul(2).sub(1)
    logits = D(torch.cat([reals, fakes]), 4)
    gradients = torch.autograd.grad(logits.square().sum(), list(D.parameters()))
    plain = bench_train.plain_discriminator(D)
    halves = [plain(images).flatten() for images in (reals, fakes)]
    torch.testing.assert_close(torch.cat(halves), logits, rtol=1e-4, atol=1e-5)
    # By name: the plain net lists its norms between its convolutions.
    torch.cat(halves).square().sum().backward()
    found = [p.grad for p in plain.parameters()]
    assert len(found) == len(gradients)
    norms = sorted(float(g.norm()) for g in gradients)
    assert sorted(float(g.norm()) for g in found) == pytest.approx(norms, rel=1e-3, abs=1e-5)


def test_the_plain_loop_trains_both_networks_and_stops_its_workers(tmp_path):
    files = bench_train.write_pictures(train_dogs.random_crops(8), tmp_path)
    loop = bench_train.PlainLoop(TINY, files, CPU)
    networks = [*loop.G.parameters(), *loop.D.parameters()]
    before = [p.detach().clone() for p in networks]
    loop.begin()
    loop.step()
    loop.end()
    assert not any(torch.equal(p, old) for p, old in zip(networks, before) if p.ndim == 4)
    assert all(map(math.isfinite, loop.losses))


def test_the_plain_loop_sees_the_same_pictures(tmp_path):
    dogs = train_dogs.random_crops(2)
    pictures = bench_train.Pictures(bench_train.write_pictures(dogs, tmp_path), length=4)
    expected = dogs.crops[1].permute(2, 0, 1) / 127.5 - 1
    got = pictures[3]
    assert len(pictures) == 4
    assert any(torch.allclose(got, e, atol=1e-6) for e in (expected, expected.flip(2)))


@pytest.mark.parametrize("layout", bench_train.LAYOUTS)
def test_every_way_of_norming_equals_two_forwards(layout):
    layout = bench_train.LAYOUTS[layout]
    norm = bench_train.norm_calls((12, 6, 5, 5), layout, CPU)
    D = train_dogs.build_networks(TINY, CPU)[1].to(memory_format=layout)
    whole = bench_train.discriminator_calls(D, 4, layout)
    assert max(bench_train.differences(norm).values()) < 1e-5
    assert max(bench_train.differences(whole).values()) < 1e-3


def test_a_norm_over_the_whole_batch_does_not_pass_for_split(monkeypatch):
    monkeypatch.setitem(bench_train.NORMS, "one call", bench_train.ordinary_norm)
    norm = bench_train.norm_calls((12, 6, 5, 5), torch.contiguous_format, CPU)
    assert bench_train.differences(norm)["one call"] > 1e-2


def test_d_of_the_default_width_norms_what_its_table_says():
    D = train_dogs.build_networks(replace(TINY, width=48), CPU)[1]
    shapes = [(4, 192, 16, 16), (4, 384, 8, 8), (4, 384, 8, 8), (4, 768, 4, 4)]
    assert bench_train.norm_shapes(D, 2) == shapes


def test_turns_alternate_within_a_repeat():
    order: list[str] = []
    turns = {name: lambda name=name: float(order.append(name) or len(order)) for name in "abc"}
    found = bench_train.in_turns(turns, 2)
    assert order == list("abccba")
    assert found == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("sm90_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128", True),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688wgrad_optimized_tf32>", True),
        ("maxwell_scudnn_128x128_stridedB_splitK_interior_nn_v0", True),
        ("void cudnn::cnn::dgrad2d_alg1_1<float, 0, 6, 7, 5, 4, 5, false, true>", True),
        ("void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1>", True),
        ("void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>", False),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<float, float, float>", False),
        ("void at::native::batch_norm_backward_reduce_channels_last_kernel<4>", False),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::tanh>", False),
        ("Memcpy DtoD (Device -> Device)", False),
    ],
)
def test_kernels_of_convolutions_are_told_by_their_names(kernel, expected):
    assert bench_train.is_convolution(kernel) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_timed_captured_and_eager():
    tiny = ["--device", "cuda", "--widths", "4", "--batch-sizes", "4", "--presets", "dogs"]
    results = bench_train.main([*tiny, "--repeats", "2", "--seconds-per-point", "0.01"])
    rows = {row["loop"]: row for row in results["steps"]}
    assert rows.keys() == {"captured", "eager", "plain"}
    assert all(row["peak_bytes"] > 0 for row in rows.values())
