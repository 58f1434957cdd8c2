"""What D has learnt of dogs without being told: a linear classifier of breeds on its features.

    python tests/tools/probe.py output                 # the run's own dogs
    python tests/tools/probe.py output --data DOGS --device cuda

As Radford et al. 2015 (arXiv 1511.06434, section 5.1) did for CIFAR-10: the outputs of all of D's
layers, each max-pooled to 4 x 4, in one vector; here with ridge regression to the breeds'
indicators in the place of their SVM, since it is solved exactly. Beside it the same of the D that
the run began with, its weights still random, and the pixels themselves.

The photos are dealt into five folds by a hash of their names, so that no photo lies in two. Each
fold is tested once: the next one chooses the strength of the ridge, the other three are learnt
from. D has seen all of them in training, but no breed; where D was told breeds, the table says so.
Features are standardised over all dogs, and copies of a photo under other names may lie in two
folds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dogs
from train_dogs import Config, PhotoSet, UserError

FOLDS = 5
RIDGES = (0.003, 0.03, 0.3, 3.0)  # of the mean squared length of a feature vector


def load_discriminators(out: Path) -> tuple[Config, dict[str, nn.Module]]:
    """The run's configuration, and its D as trained and as begun."""
    state = train_dogs.read_state(out / "checkpoint.pt", lambda state: state)
    config, trainer = state["config"], state["trainer"]
    weights = {k[2:]: v for k, v in trainer["tensors"].items() if k.startswith("D.")}
    _, begun = train_dogs.build_networks(config, torch.device("cpu"), len(trainer["breeds"]))
    trained = copy.deepcopy(begun)
    trained.load_state_dict(weights)
    return config, {"D as trained": trained, "D as begun": begun}


def views(photos: PhotoSet, config: Config) -> tuple[Tensor, list[str], list[int]]:
    """One view of each dog, float32 (N, 3, 64, 64) in [-1, 1], its breed, and its photo's fold."""
    found, breeds, folds = [], [], []
    for fold in range(FOLDS):
        dealt = [p for p in photos.photos if int(train_dogs.digest(p.name), 16) % FOLDS == fold]
        crops = train_dogs.prepare_crops(replace(photos, photos=dealt, skipped=[]), config.crops)
        rows, generator = torch.arange(len(crops.first)), torch.Generator().manual_seed(0)
        found.append(train_dogs.draw_reals(crops, rows, generator, mirror=0.0))
        breeds += [crops.breeds[k] for k in crops.breed.tolist()]
        folds += [fold] * len(rows)
    return torch.cat(found), breeds, folds


@torch.no_grad()
def features(D: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """float32 (N, F): what each layer of D makes of each image, max-pooled to 4 x 4."""
    D, outputs = D.to(device).eval(), []
    layers = D.norms if hasattr(D, "norms") else D.blocks
    # An activation after a norm is in place, so that it is seen here too.
    hooks = [k.register_forward_hook(lambda *seen: outputs.append(seen[2])) for k in layers]
    found = []
    for batch in images.split(250):  # as many as D's norms take their statistics of
        outputs.clear()
        D(batch.to(device), len(batch), torch.zeros(len(batch), dtype=torch.long, device=device))
        pooled = [F.adaptive_max_pool2d(x.float(), 4).flatten(1) for x in outputs]
        found.append(torch.cat(pooled, 1).cpu())
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


def pixels(images: Tensor) -> Tensor:
    """float32 (N, 3072): the images at 32 x 32."""
    return F.avg_pool2d(images, 2).flatten(1)


def accuracies(x: Tensor, breed: Tensor, folds: Tensor, device: torch.device) -> list[float]:
    """The share of each fold's dogs whose breed is found, as the module's docstring says.

    `x`: float32 (N, F), `breed`, `folds`: int64 (N,). By the Gram matrix, N x N: there may be far
    more features than dogs.
    """
    x = x.to(device)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    gram, shares = x @ x.T, []
    indicators = F.one_hot(breed, int(breed.max()) + 1).float().to(device)
    for tested in range(FOLDS):
        choosing = (tested + 1) % FOLDS
        learnt = ((folds != tested) & (folds != choosing)).nonzero().flatten().to(device)
        known = gram[learnt][:, learnt]
        scale, mean = known.diagonal().mean(), indicators[learnt].mean(0)
        best = (-1.0, -1.0)
        for ridge in RIDGES:
            weighed = known + ridge * scale * torch.eye(len(known), device=device)
            factor = torch.linalg.cholesky(weighed)
            solved = torch.cholesky_solve(indicators[learnt] - mean, factor)
            right = []
            for fold in (choosing, tested):
                rows = (folds == fold).nonzero().flatten().to(device)
                guess = (gram[rows][:, learnt] @ solved + mean).argmax(1).cpu()
                right.append(float((guess == breed[rows.cpu()]).float().mean()))
            best = max(best, tuple(right), key=lambda pair: pair[0])  # never by the tested fold
        shares.append(best[1])
    return shares


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the --out of a run")
    parser.add_argument("--data", action="append", help="dogs; default: those of the run")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = train_dogs.choose_device(args.device)
    config, networks = load_discriminators(args.out)
    photos = train_dogs.find_photos(args.data or config.data)
    images, names, folds = views(photos, config)
    breeds = sorted(set(names))
    if len(breeds) < 2:
        raise UserError("the dogs are of one breed only: give --data with several.")
    breed, folds = torch.tensor([breeds.index(name) for name in names]), torch.tensor(folds)
    inputs: dict[str, Callable[[], Tensor]] = {
        name: lambda D=D: features(D, images, device) for name, D in networks.items()
    }
    inputs["pixels, 32 x 32"] = lambda: pixels(images)
    told = {"none": "", "breed": " (told breeds)", "classes": " (taught breeds)"}[config.condition]
    print(f"{len(images):,} dogs of {len(breeds)} breeds; the commonest is"
          f" {breed.bincount().max() / len(breed):.1%} of them; D{told}: {args.out}")  # fmt: skip
    print(f"| features | numbers | breed found, mean of {FOLDS} folds (least to most) |")
    print("| --- | --- | --- |")
    for name, make in inputs.items():
        x = make()
        found = accuracies(x, breed, folds, device)
        spread = f"{statistics.mean(found):.2%} ({min(found):.2%} to {max(found):.2%})"
        print(f"| {name} | {x.shape[1]:,} | {spread} |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"probe: {error}")
