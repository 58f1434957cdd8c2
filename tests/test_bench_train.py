"""The training bench at a tiny size: what its contestants compute, and how a failure is shown."""

import json
import math

import bench_train
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_dogs

CPU = torch.device("cpu")
TINY = train_dogs.Config(width=2, latent_dim=8, batch_size=4, seed=3, precision="fp32")
COMMAND = [
    "--device", "cpu", "--width", "2", "--batch-size", "4", "--repeats", "2", "--seconds", "0.001",
]  # fmt: skip


def rows_of(printed: str) -> dict[str, dict]:
    """The rows in the last line of what was printed, by contestant."""
    return {row["contestant"]: row for row in json.loads(printed.splitlines()[-1])["rows"]}


def test_the_last_line_has_the_results_of_each_contestant(capsys):
    assert bench_train.main(COMMAND) == 0
    rows = rows_of(capsys.readouterr().out)
    assert {"plain", "eager fp32", "convolutions fp32"} <= rows.keys()
    assert rows["plain"]["times_plain"] == [1, 1, 1] and rows["plain"]["of_bound"] is None
    assert rows["convolutions fp32"]["of_bound"] == [1, 1, 1]
    for row in rows.values():
        median, least, most = row["ms_per_step"]
        assert 0 < least <= median <= most
        assert row["images_per_second"] == pytest.approx(4000 / median)


def test_a_contestant_that_fails_is_shown_with_its_error_and_the_others_go_on(capsys, monkeypatch):
    def fail(trainer: train_dogs.Trainer, progress: float) -> None:
        raise RuntimeError("no such kernel\nat line 1")

    monkeypatch.setattr(train_dogs.Trainer, "step", fail)
    assert bench_train.main(COMMAND) == 1
    printed = capsys.readouterr().out
    assert "eager fp32 failed: no such kernel\n" in printed
    rows = rows_of(printed)
    assert rows["plain"]["times_plain"] == [1, 1, 1]
    assert rows["eager fp32"]["failed"] == "no such kernel"


def test_a_step_that_is_not_captured_counts_as_failed(monkeypatch):
    monkeypatch.setattr(bench_train, "capture", lambda trainer: "a replayed step ends elsewhere")
    one = bench_train.Contestant(
        "captured fp32",
        lambda: bench_train.our_step(TINY, bench_train.noise_crops(8), CPU, replay=True),
        tf32=False,
    )
    bench_train.race([one], CPU, 1, 0.001)
    assert one.failed == "a replayed step ends elsewhere" and not one.times


def test_turns_alternate_between_repeats():
    order: list[str] = []
    all_of = [
        bench_train.Contestant(name, lambda name=name: lambda: order.append(name), tf32=False)
        for name in "abc"
    ]
    bench_train.race(all_of, CPU, 2, 0.0)
    turns = [name for k, name in enumerate(order) if k == 0 or order[k - 1] != name]
    assert "".join(turns) == "abcabcba"  # prepared, forwards, and (c twice) backwards


def test_the_convolutions_alone_are_all_the_flops_of_a_step():
    again = bench_train.convolutions_alone(TINY, bench_train.noise_crops(8), CPU)
    with FlopCounterMode(display=False) as counter:
        again()
    assert counter.get_total_flops() == 4 * train_dogs.flops_per_image(TINY)


def test_the_plain_discriminator_computes_what_split_batch_norm_does():
    D = train_dogs.build_networks(TINY, CPU)[1]
    reals, fakes = torch.rand(2, 4, 3, 64, 64).mul(2).sub(1)
    logits = D(torch.cat([reals, fakes]), 4).logits
    plain = bench_train.plain_discriminator(D)
    halves = [plain(images).flatten() for images in (reals, fakes)]
    torch.testing.assert_close(torch.cat(halves), logits, rtol=1e-4, atol=1e-5)


def test_the_plain_loop_trains_both_networks():
    loop = bench_train.PlainLoop(TINY, bench_train.noise_crops(8), CPU)
    kernels = [p for p in (*loop.G.parameters(), *loop.D.parameters()) if p.ndim == 4]
    before = [p.detach().clone() for p in kernels]
    loop.step()
    assert not any(torch.equal(p, old) for p, old in zip(kernels, before))
    assert all(map(math.isfinite, loop.losses))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_timed_captured_and_eager(capsys):
    assert bench_train.main(["--device", "cuda", *COMMAND[2:]]) == 0
    assert {"captured fp32", "eager fp32"} <= rows_of(capsys.readouterr().out).keys()
