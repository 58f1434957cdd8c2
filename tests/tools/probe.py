"""How well D's features and D's own classifier recognise breeds.

    python tests/tools/probe.py output                 # the run's own dogs
    python tests/tools/probe.py --split DOGS FOLDER    # FOLDER/train and FOLDER/held-out
    python train_dogs.py --data FOLDER/train --preset improved --out output
    python tests/tools/probe.py output --data FOLDER/held-out

The linear classifier follows Radford et al. 2015 (arXiv 1511.06434, section 5.1): the outputs of
all layers of D, each max-pooled to 4 x 4, in one vector; but ridge regression to the breeds'
indicators, which has an exact solution, instead of an SVM. It is also trained on the features of
the same D at its initialisation, and on pixels. If D has a classifier of breeds (`--classify`), its
own accuracy is in the table too, and so is that of always guessing the most frequent breed.

The photos are divided into five folds by a hash of their names, so that no photo is in two. Each
fold is tested once: the next one chooses the strength of the ridge, and the other three train the
linear classifier. Dogs that D was trained on make D's own accuracy too high: use `--split`, which
copies a fifth of the photos to `held-out` and the others to `train`. Features are standardised over
all dogs, and copies of a photo under other names may be in two folds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from ablation import copy_photos
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dogs
from train_dogs import Config, Photo, PhotoSet, UserError, digest

FOLDS = 5
RIDGES = (0.003, 0.03, 0.3, 3.0)  # of the mean squared length of a feature vector


def split(photos: PhotoSet, folder: Path) -> None:
    """Copy a fifth of the photos to `folder`/held-out and the others to `folder`/train."""

    def is_held_out(photo: Photo) -> bool:
        return int(digest(["held out", photo.name]), 16) % 5 == 0  # not the hash of the folds

    copy_photos(photos, folder / "held-out", is_held_out)
    copy_photos(photos, folder / "train", lambda photo: not is_held_out(photo))


def load_discriminators(out: Path) -> tuple[Config, list[str], dict[str, nn.Module]]:
    """The run's configuration, its breeds, and its D as trained and as initialised."""
    state = train_dogs.read_state(out / "checkpoint.pt", lambda state: state)
    config, trainer = state["config"], state["trainer"]
    weights = {k[2:]: v for k, v in trainer["tensors"].items() if k.startswith("D.")}
    breeds = trainer["breeds"]
    _, initial = train_dogs.build_networks(config, torch.device("cpu"), len(breeds))
    trained = copy.deepcopy(initial)
    trained.load_state_dict(weights)
    return config, breeds, {"D as trained": trained, "D as initialised": initial}


def views(photos: PhotoSet, config: Config) -> tuple[Tensor, list[str], Tensor]:
    """One view of each dog, float32 (N, 3, 64, 64) in [-1, 1], its breed, and its photo's fold,
    int64 (N,); in random order, so that no batch consists of one breed."""
    found, breeds, folds = [], [], []
    generator = torch.Generator().manual_seed(0)
    for fold in range(FOLDS):
        mine = [p for p in photos.photos if int(digest(p.name), 16) % FOLDS == fold]
        crops = train_dogs.prepare_crops(replace(photos, photos=mine, skipped=[]), config.crops)
        rows = torch.arange(len(crops.first))
        found.append(train_dogs.draw_reals(crops, rows, generator, mirror=0.0))
        breeds += [crops.breeds[k] for k in crops.breed.tolist()]
        folds += [fold] * len(rows)
    order = torch.randperm(len(breeds), generator=generator)
    return torch.cat(found)[order], [breeds[k] for k in order], torch.tensor(folds)[order]


@torch.no_grad()
def run_discriminator(
    D: nn.Module, images: Tensor, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 (N, F): the output of each layer of D, max-pooled to 4 x 4; and float32 (N, K): the
    logits of the breeds, K = 0 if D has no classifier.

    In batches of about `batch_size` reals, as in training: D's norms and its minibatch
    discrimination depend on the batch.
    """
    D, outputs = D.to(device).eval(), []
    layers = D.norms if hasattr(D, "norms") else D.blocks
    # The activation after a norm is in place, so the hook's tensor includes it.
    hooks = [k.register_forward_hook(lambda *args: outputs.append(args[2])) for k in layers]
    features, classes = [], []
    for batch in images.tensor_split(max(1, round(len(images) / batch_size))):
        outputs.clear()
        labels = torch.zeros(len(batch), dtype=torch.long, device=device)  # the classes ignore them
        verdict = D(batch.to(device), len(batch), labels)
        pooled = [F.adaptive_max_pool2d(x.float(), 4).flatten(1) for x in outputs]
        features.append(torch.cat(pooled, 1).cpu())
        classes.append(verdict.classes.cpu())
    for hook in hooks:
        hook.remove()
    return torch.cat(features), torch.cat(classes)


def linear_accuracies(x: Tensor, breed: Tensor, folds: Tensor, device: torch.device) -> list[float]:
    """Accuracy of the linear classifier on each fold, as the module's docstring says.

    `x`: float32 (N, F), `breed`, `folds`: int64 (N,). By the Gram matrix, N x N: there may be far
    more features than dogs.
    """
    x = x.to(device)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    gram, accuracies = x @ x.T, []
    indicators = F.one_hot(breed, int(breed.max()) + 1).float().to(device)
    for tested in range(FOLDS):
        choosing = (tested + 1) % FOLDS
        training = ((folds != tested) & (folds != choosing)).nonzero().flatten().to(device)
        known = gram[training][:, training]
        scale, mean = known.diagonal().mean(), indicators[training].mean(0)
        best = (-1.0, -1.0)
        for ridge in RIDGES:
            penalised = known + ridge * scale * torch.eye(len(known), device=device)
            factor = torch.linalg.cholesky(penalised)
            solved = torch.cholesky_solve(indicators[training] - mean, factor)
            correct = []
            for fold in (choosing, tested):
                rows = (folds == fold).nonzero().flatten().to(device)
                guess = (gram[rows][:, training] @ solved + mean).argmax(1).cpu()
                correct.append(float((guess == breed[rows.cpu()]).float().mean()))
            best = max(best, tuple(correct), key=lambda pair: pair[0])  # never by the tested fold
        accuracies.append(best[1])
    return accuracies


def by_fold(correct: Tensor, folds: Tensor) -> list[float]:
    """The share of each fold's dogs that are correct. `correct`: bool (N,)."""
    return [float(correct[folds == fold].float().mean()) for fold in range(FOLDS)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or make the two folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default="output", help="the --out of a run")
    parser.add_argument("--data", action="append", help="dogs; default: those of the run")
    parser.add_argument("--device", default="auto")
    folders = "copy DOGS into FOLDER/train and FOLDER/held-out, and stop"
    parser.add_argument("--split", nargs=2, metavar=("DOGS", "FOLDER"), type=Path, help=folders)
    args = parser.parse_args(argv)
    if args.split:
        split(train_dogs.find_photos(args.split[:1]), args.split[1])
        return 0
    device = train_dogs.choose_device(args.device)
    config, own_breeds, networks = load_discriminators(args.out)
    trained_on = {photo.name for photo in train_dogs.find_photos(config.data).photos}
    photos = train_dogs.find_photos(args.data or config.data)
    seen = sum(photo.name in trained_on for photo in photos.photos)
    images, names, folds = views(photos, config)
    breeds = sorted(set(names))
    if len(breeds) < 2:
        raise UserError("all dogs are of one breed: give --data with several breeds.")
    breed = torch.tensor([breeds.index(name) for name in names])
    labels = {"none": "no labels", "breed": "labels as input", "classes": "labels as classes"}
    share = f" of {config.labelled:.0%} of its dogs" * (config.labelled < 1)
    print(f"{len(images):,} dogs of {len(breeds)} breeds; {seen:,} of their {len(photos.photos):,}"
          f" photos are in the training set of {args.out}, whose D had {labels[config.condition]}"
          f"{share}")  # fmt: skip
    print(f"| classifier | inputs | accuracy, mean of {FOLDS} folds (least to most) |")
    print("| --- | --- | --- |")

    def show(name: str, count: int | str, accuracies: list[float]) -> None:
        spread = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
        print(f"| {name} | {count} | {statistics.mean(accuracies):.1%} ({spread}) |", flush=True)

    def show_linear(name: str, x: Tensor) -> None:
        show(f"linear, {name}", f"{x.shape[1]:,}", linear_accuracies(x, breed, folds, device))

    for name, D in networks.items():
        features, classes = run_discriminator(D, images, config.batch_size, device)
        if classes.shape[1] and D is networks["D as trained"]:
            if unknown := set(breeds) - set(own_breeds):
                raise UserError(f"D knows no {min(unknown)}: give --data with the run's breeds.")
            own = torch.tensor([own_breeds.index(name) for name in names])
            show("D's own classes", "-", by_fold(classes.argmax(1) == own, folds))
        show_linear(name, features)
    show_linear("pixels, 32 x 32", F.avg_pool2d(images, 2).flatten(1))
    show("the most frequent breed", "-", by_fold(breed == breed.bincount().argmax(), folds))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"probe: {error}")
