"""A trained encoder on a code that is fitted: how an adaptive code's latents are moved is learnt over the training models.

    python examples/ablations/learnt_refinement.py --zoo runs/digits-600/zoo --out runs/scratch/learnt.csv

The decoder is the adaptive code's, the latent has its size. Encoding takes a few steps from the adaptive code's latent; a step is the
gradient of the behavioral loss on training images and the step before, each times a matrix of the token group's own. These matrices
are trained, one pair a step, to make the loss after the step small over the training models (learning to learn by gradient descent,
Andrychowicz et al. 2016, with a linear rule). After a step the moved network is encoded again, as its own bases are others. The number of
steps is chosen on validation models; each model keeps the latent of the step that was best for it on the training images.

Rows: the columns of docs/results/scratch.csv, of 30 test models, with those of the adaptive code itself.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from torch import Tensor

from wslfast import Population, batched_behavioral_loss, batched_forward
from wslfast.codes.adaptive import AdaptiveCodec
from wslfast.measure.evaluation import compare_models
from wslfast.measure.results import figures
from wslfast.study.loaded_zoo import LoadedZoo, Protocol, evenly

IMAGES, BATCH, BATCH_IMAGES = 1024, 32, 128
SIZES = (0.25, 0.5, 1.0, 2.0)  # of a step, the best of which is taken, model by model


class Models:
    """Some models on their way: originals' outputs, where they are now, and the best latents so far."""

    def __init__(self, code: AdaptiveCodec, weights: Tensor, images: Tensor) -> None:
        self.code, self.images = code, images
        self.targets = batched_forward(weights, images, code.architecture)
        self.unit = self.targets.var(1, unbiased=False).sum(1) / 2  # the loss of answering with the model's mean output
        self.weights, self.previous, self.best = weights, None, torch.full((len(weights),), float("inf"))
        self.rebuilt = weights.clone()
        self.encode()

    def encode(self) -> None:
        """Take the code of the present weights, and keep it where it is the best so far."""
        self.latents, self.decoder = self.code.held(self.weights)
        decoded = self.decoder(self.latents)
        values = self.losses(decoded)
        better = values < self.best
        self.best = torch.where(better, values, self.best)
        self.rebuilt[better] = decoded[better]

    def losses(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """Each model's behavioral loss, a share of the uninformed one."""
        images, targets = (self.images, self.targets) if rows is None else (self.images[rows], self.targets[:, rows])
        values = batched_behavioral_loss(weights, None, images, self.code.architecture, targets=targets, reduction="none")
        return values / self.unit

    def slopes(self) -> Tensor:
        """The losses' gradients to the latents."""
        latents = self.latents.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.losses(self.decoder(latents)).sum(), latents)
        return slope

    def move(self, step: Tensor) -> None:
        """Go the best part of the step, model by model."""
        values = torch.stack([self.losses(self.decoder(self.latents + size * step)) for size in SIZES])
        size = torch.tensor(SIZES)[values.argmin(0)][:, None, None]
        self.previous = size * step
        self.weights = self.decoder(self.latents + self.previous)
        self.encode()


class Step:
    """A trained rule: a pair of matrices a token group."""

    def __init__(self, code: AdaptiveCodec, slopes: Tensor, first: bool) -> None:
        groups, width = code.groups, code.mask.shape[1]
        self.groups, self.mask, self.first = groups, code.mask, first
        self.scale = torch.stack([s.square().mean().sqrt().clamp_min(1e-12) for s in groups.split(slopes)])
        eye = torch.eye(width).expand(len(groups), width, width)
        self.down = (-0.03 * eye).clone().requires_grad_()
        self.on = torch.zeros_like(eye).clone().requires_grad_()

    def __call__(self, slopes: Tensor, previous: Tensor | None) -> Tensor:
        step = self.groups.linear(slopes / self.scale[self.groups.of_token][:, None], self.down)
        if previous is not None and not self.first:
            step = step + self.groups.linear(previous, self.on)
        return torch.where(self.mask, step, 0)

    def train(self, models: Models, slopes: Tensor, steps: int, seed: int) -> None:
        """Descend the loss after the step."""
        generator = torch.Generator().manual_seed(seed)
        adam = torch.optim.Adam([self.down, self.on], 5e-3)
        cycle = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        targets, unit, architecture = models.targets, models.unit, models.code.architecture
        for _ in range(steps):
            with torch.enable_grad():
                step = self(slopes, models.previous)
                moved = models.decoder(models.latents + step)
                chosen = torch.randperm(len(slopes), generator=generator)[: 4 * BATCH]
                rows = torch.randperm(len(models.images), generator=generator)[:BATCH_IMAGES]
                values = batched_behavioral_loss(
                    moved[chosen], None, models.images[rows], architecture, targets=targets[chosen][:, rows], reduction="none"
                )
                loss = (values / unit[chosen]).mean()
                adam.zero_grad()
                loss.backward()
            adam.step()
            cycle.step()


def main() -> None:
    """Fit the code, train its steps, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", required=True)
    parser.add_argument("--out", required=True, help="CSV file; rows are added")
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--models", type=int, default=256, help="training models")
    parser.add_argument("--steps", type=int, default=8, help="of an encoding, at most")
    parser.add_argument("--train-steps", type=int, default=80, help="optimiser steps for each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    zoo = LoadedZoo(given.zoo, Protocol.whole())
    images = zoo.data.split("train")[0]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(given.seed))[:IMAGES]]
    code = AdaptiveCodec(zoo.train, queries=images[:512], latent=given.share, seed=given.seed)
    splits = {"train": evenly(zoo.train, given.models), "val": evenly(zoo.splits["val"], 30), "test": evenly(zoo.test, 30)}
    with torch.no_grad():
        moving = {name: Models(code, models.weights, images) for name, models in splits.items()}
        history: list[dict[str, Tensor]] = [{name: m.rebuilt.clone() for name, m in moving.items()}]
        for number in range(given.steps):
            begun = time.process_time()
            slopes = {name: m.slopes() for name, m in moving.items()}
            rule = Step(code, slopes["train"], number == 0)
            rule.train(moving["train"], slopes["train"], given.train_steps, given.seed + number)
            for name, m in moving.items():
                m.move(rule(slopes[name], m.previous))
            history.append({name: m.rebuilt.clone() for name, m in moving.items()})
            agreed = own(splits["val"], history[-1]["val"], zoo, "val")
            losses = "  ".join(f"{name} {float(m.best.mean()):.5f}" for name, m in moving.items())
            print(f"step {number + 1}: loss {losses}  validation agreement {agreed:.4f}  {time.process_time() - begun:.0f} s", flush=True)
    chosen = max(range(len(history)), key=lambda i: own(splits["val"], history[i]["val"], zoo, "val"))
    path = Path(given.out)
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["zoo", "variant", "seed", "metric", "median", "mean", "spread"])
        percent = round(100 * given.share)
        for variant, step in ((f"trained-{percent}-refinement", chosen), (f"adaptive-{percent}", 0)):
            result = compare_models(splits["test"], history[step]["test"], *zoo.data.split("test"))
            values = {name: figures(v) for name, v in result.metrics().items()}
            for name, number in (("latent_numbers", code.latent_size), ("steps", step), ("non_finite", result.non_finite)):
                values[name] = (float(number), float(number), None)
            for name, (median, mean, spread) in values.items():
                row = [f"{x:.6g}" if x is not None else "" for x in (median, mean, spread)]
                writer.writerow([zoo.name, variant, given.seed, name, *row])
            print(variant, {name: round(values[name][1], 4) for name in ("agreement", "agreement_others", "identified")}, "steps", step)


def own(models: Population, rebuilt: Tensor, zoo: LoadedZoo, split: str) -> float:
    """Mean agreement with the own original."""
    return float(compare_models(models, rebuilt, *zoo.data.split(split)).metrics()["agreement"].double().mean())


if __name__ == "__main__":
    main()
