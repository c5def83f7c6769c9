"""Training a zoo of networks with batch norm, dropout, or one image each: all models together, against one after another.

As in ``zoo_building.py``, modules, optimisers and the images' order of axes are no part of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast import engine
from wslfast.population import Population
from wslfast.testing import relative_error
from wslfast.zoo.adam import StackedAdam
from wslfast.zoo.coordinates import grid_points
from wslfast.zoo.fitting import dropout_generator

from .networks import NETWORKS, architecture_of_network
from .recording import Row, digits, environment, with_values
from .timing import take_turns
from .zoo_building import BOUNDS, OURS, TUNED, VARIANT

BATCH, IMAGES, LR = 32, 2048, 1e-3
ZOOS = ("cnn-batch-norm", "cnn-dropout-log-softmax", "mlp-batch-norm", "siren-32")


class Problem:
    """Inputs, and what each model is to answer: labels, or for a coordinate network the pixels of an image of its own."""

    def __init__(self, name: str, k: int) -> None:
        self.name, self.k, self.architecture = name, k, architecture_of_network(name)
        generator = torch.Generator().manual_seed(0)
        self.signals = self.architecture.input_shape == (2,)
        if self.signals:
            self.inputs = grid_points("grid:28x28:ij")[0]
            self.targets = torch.rand(k, 784, *self.architecture.output_shape, generator=generator)
        else:
            self.inputs = torch.randn(IMAGES, *self.architecture.input_shape, generator=generator)
            self.targets = torch.randint(self.architecture.num_classes, (IMAGES,), generator=generator)
        self.generator = generator
        self.last = self.inputs.contiguous(memory_format=torch.channels_last) if self.inputs.ndim == 4 else self.inputs

    def arguments(self, steps: int) -> tuple[Tensor, Tensor]:
        """Fresh weights, and each model's batches ``[k, steps, batch]``."""
        weights = self.architecture.initial_weights(["siren"] * self.k, range(self.k))
        count = len(self.inputs)
        return weights, torch.randint(count, (self.k, steps, count if self.signals else BATCH), generator=self.generator)

    def loop(self, weights: Tensor, tuned: bool = False) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
        """A module and its optimiser for every row, ready to train. ``tuned``: kernels channels-last, Adam fused."""
        population, made = Population(self.architecture, weights), []
        for j in range(len(weights)):
            module: nn.Module = NETWORKS[self.name][0]()
            module.load_state_dict(population.state_dict(j))
            module.to(memory_format=torch.channels_last if tuned else torch.contiguous_format).train()
            made.append((module, torch.optim.Adam(module.parameters(), lr=LR, fused=tuned or None)))
        return made

    def train(self, loop: list[tuple[nn.Module, torch.optim.Optimizer]], inputs: Tensor, order: Tensor) -> None:
        """Every module on its own batches, one module after another."""
        for j, ((module, optimizer), batches) in enumerate(zip(loop, order, strict=True)):
            for batch in batches:
                optimizer.zero_grad()
                if self.signals:
                    loss = F.mse_loss(module(inputs), self.targets[j])
                else:
                    loss = F.cross_entropy(module(inputs[batch]), self.targets[batch])
                loss.backward()
                optimizer.step()

    def one_after_another(self, weights: Tensor, order: Tensor, tuned: bool = False) -> Tensor:
        """Train every row as a module by ``torch.optim.Adam``; the rows. ``tuned``: images channels-last, Adam fused."""
        loop = self.loop(weights, tuned)
        self.train(loop, self.last if tuned else self.inputs, order)
        return Population.from_state_dicts(self.architecture, [module.state_dict() for module, _ in loop]).weights

    def together(self, weights: Tensor, order: Tensor) -> Tensor:
        """The same, all models at a time."""
        weights, architecture = weights.clone(), self.architecture
        k = len(weights)
        adam = StackedAdam(weights, [LR] * k, [0.0] * k)
        dropout = [dropout_generator(j) for j in range(k)]
        fixed = {slot.name: slice(slot.offset, slot.stop) for slot in architecture.parameters if slot.name in architecture.untrained}
        for step in range(order.shape[1]):
            if self.signals:
                scale = 2.0 / self.targets.shape[2:].numel()
                _, gradient, statistics = engine.training_step(weights, self.last, self.targets[:k], architecture, "mse")
                gradient *= scale
            else:
                chosen = order[:, step]
                _, gradient, statistics = engine.training_step(
                    weights, self.last, self.targets[chosen], architecture, "cross_entropy", index=chosen, generators=dropout
                )
            adam.step(gradient)
            for name, value in statistics.items():
                weights[:, fixed[name]] = value
        return weights


def measure(name: str, k: int = 64, rounds: int = 5, baseline_models: int = 3, steps: int = 4) -> list[Row]:
    """Milliseconds per model and step of all. The loops train fewer models: their cost is per model."""
    problem = Problem(name, k)
    loops = {"one-after-another": (problem.inputs, False), TUNED: (problem.last, True)}

    def arguments() -> tuple[Any, ...]:
        weights, order = problem.arguments(4 * steps)
        return weights, order, {which: problem.loop(weights[:baseline_models], tuned) for which, (_, tuned) in loops.items()}

    calls: dict[str, Callable[..., object]] = {
        **{
            which: lambda w, o, ready, which=which, x=x: problem.train(ready[which], x, o[:baseline_models])
            for which, (x, _) in loops.items()
        },
        OURS: lambda w, o, _: problem.together(w, o[:, :steps]),
    }
    per = {provider: k * steps if provider == OURS else baseline_models * 4 * steps for provider in calls}
    row = Row("", name, k, len(problem.inputs) if problem.signals else BATCH, "zoo", "highest", "wall_ms", **environment())
    error, rows = gradient_error(problem), list[Row]()
    if isinstance(error, float) and not error <= BOUNDS["highest"]:  # no number for what trains other models
        calls.pop(OURS)
        rows.append(replace(row, provider=OURS, relative_error=error, note=f"{VARIANT}; gate: not timed"))
    times = take_turns(calls, arguments, rounds)
    for provider, values in times.items():
        found = error if provider == OURS else ""
        each = [value / per[provider] for value in values]
        rows.append(with_values(replace(row, provider=provider, relative_error=found), each, f"{VARIANT}; Adam, batch {row.n}"))
    return rows


def gradient_error(problem: Problem) -> float | str:
    """Relative error of two models' weights after two steps, against one after another; nothing where dropout draws other numbers, or a
    bias ahead of a norm moves by rounding alone."""
    module = NETWORKS[problem.name][0]()
    if any(isinstance(part, (nn.Dropout, nn.modules.batchnorm._BatchNorm)) for part in module.modules()):
        return ""
    weights, order = problem.arguments(2)
    truth = problem.one_after_another(weights[:2], order[:2])
    return digits(relative_error(problem.together(weights[:2], order[:2]), truth), 2)
