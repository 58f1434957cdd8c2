"""The training bench at a tiny size: what its contestants compute, and its table."""

import math
import re

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


NUMBER = r"(\d+\.\d+)"
SPREAD = rf"{NUMBER} \({NUMBER}-{NUMBER}\)"
ROW = rf"(?m)^ *(\w[\w ]+?) +{NUMBER} +{SPREAD} +{SPREAD} +{NUMBER} +(-|{SPREAD})$"


@pytest.mark.slow
def test_a_row_has_the_numbers_of_a_contestant(capsys):
    bench_train.main(COMMAND)
    rows = {row[0]: row[1:] for row in re.findall(ROW, capsys.readouterr().out)}
    assert {"plain", "eager fp32", "convolutions fp32"} <= rows.keys()
    assert rows["plain"][4:7] == ("1.00",) * 3 and rows["plain"][8] == "-"
    assert rows["convolutions fp32"][9:] == ("1.00",) * 3
    for rate, *spread in rows.values():
        median, least, most = map(float, spread[:3])
        assert 0 < least <= median <= most
        assert float(rate) == pytest.approx(4000 / median, rel=0.01)


def test_a_step_that_cannot_be_captured_is_an_error(monkeypatch):
    monkeypatch.setattr(train_dogs, "capture", lambda trainer: "a replayed step ends elsewhere")
    with pytest.raises(train_dogs.UserError, match="ends elsewhere"):
        bench_train.our_step(TINY, bench_train.noise_crops(8), CPU, replay=True)


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
def test_a_gpu_is_timed_captured_and_eager(capsys):
    bench_train.main(["--device", "cuda", *COMMAND[2:]])
    names = {row[0] for row in re.findall(ROW, capsys.readouterr().out)}
    assert {"captured fp32", "eager fp32"} <= names
