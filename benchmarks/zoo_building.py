"""Training a zoo: all models together, against the same models one after another in plain torch.

The baseline is what a zoo script does: an ``nn.Sequential``, NCHW batches of 32, ``F.cross_entropy``, ``torch.optim.Adam``, all
threads. Beside it stands the loop that one would tune by hand: images and kernels channels-last, Adam's one fused call. All sides draw
their batches from the same resident images and are timed per model and step, taking turns. What a zoo needs once, however long it trains,
is not on the clock: modules, optimisers, and the images in the order of axes that a side wants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast import engine
from wslfast.architecture import Architecture
from wslfast.kernels.layers import Activation, Conv2d, Dropout, Flatten, Linear, Pool2d
from wslfast.testing import relative_error
from wslfast.zoo.build import StackedAdam

from .cases import ARCHITECTURES, models, numerics
from .recording import Row, digits, environment, quantiles, with_values
from .timing import take_turns

BATCH, IMAGES, LR = 32, 2048, 1e-3
BOUNDS = {"highest": 1e-4, "tf32": 1e-2}  # of the weights after two steps, against float64
VARIANT = "a model and step"
OURS = "wslfast"  # in zoo rows, of both suites
TUNED = "one-after-another-channels-last"


def plain_module(architecture: Architecture, row: Tensor) -> nn.Sequential:
    """The model with these weights, as torch users write it."""
    acts = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "gelu": nn.GELU}
    parts: list[nn.Module] = []
    for layer in architecture.layers:
        if isinstance(layer, Conv2d):
            parts.append(nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding))
        elif isinstance(layer, Linear):
            parts.append(nn.Linear(layer.in_features, layer.out_features))
        elif isinstance(layer, Pool2d):
            parts.append(nn.MaxPool2d(layer.kernel_size, layer.stride))
        elif isinstance(layer, Activation):
            parts.append(acts[layer.function]())
        elif isinstance(layer, Flatten):
            parts.append(nn.Flatten())
        elif isinstance(layer, Dropout):
            parts.append(nn.Dropout(layer.p))
    module = nn.Sequential(*parts)
    nn.utils.vector_to_parameters(row.clone(), module.parameters())  # parameters become views of what they are given
    return module


class Loop:
    """Models one after another, made ready to train; ``tuned``: kernels channels-last, Adam fused."""

    def __init__(self, architecture: Architecture, weights: Tensor, tuned: bool = False) -> None:
        self.layout = torch.channels_last if tuned else torch.contiguous_format
        self.modules = [plain_module(architecture, row).to(memory_format=self.layout) for row in weights]
        self.optimisers = [torch.optim.Adam(m.parameters(), lr=LR, weight_decay=1e-4, fused=tuned or None) for m in self.modules]

    def train(self, images: Tensor, labels: Tensor, order: Tensor) -> None:
        """Every model on its own batches ``order [k, steps, batch]``."""
        for module, optimiser, batches in zip(self.modules, self.optimisers, order, strict=True):
            for batch in batches:
                optimiser.zero_grad()
                F.cross_entropy(module(images[batch]), labels[batch]).backward()
                optimiser.step()

    @property
    def rows(self) -> Tensor:
        """The models' weights ``[k, P]``."""
        return torch.stack([torch.cat([p.detach().reshape(-1) for p in module.parameters()]) for module in self.modules])


def one_after_another(
    architecture: Architecture, weights: Tensor, images: Tensor, labels: Tensor, order: Tensor, tuned: bool = False
) -> Tensor:
    """Train every row on its own batches ``order [k, steps, batch]``; returns the trained rows. ``tuned``: channels-last, Adam fused."""
    loop = Loop(architecture, weights, tuned)
    loop.train(images.contiguous(memory_format=loop.layout), labels, order)
    return loop.rows


def tuned_loop(architecture: Architecture, weights: Tensor, images: Tensor, labels: Tensor, order: Tensor) -> Tensor:
    """The same, tuned by hand."""
    return one_after_another(architecture, weights, images, labels, order, tuned=True)


def together(architecture: Architecture, weights: Tensor, images: Tensor, labels: Tensor, order: Tensor) -> Tensor:
    """The same through the engine: one step of all models at a time."""
    weights, images = weights.clone(), images.contiguous(memory_format=torch.channels_last)
    adam = StackedAdam(weights, [LR] * len(weights), [1e-4] * len(weights))
    for step in range(order.shape[1]):
        chosen = order[:, step]
        _, gradient = engine.loss_and_gradient(weights, images, labels[chosen], architecture, "cross_entropy", index=chosen)
        adam.step(gradient)
    return weights


def _gate(architecture: Architecture, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Relative error of each way's weights after two steps, against float64."""
    weights, order = models(architecture, 3, 0).to(images.device), torch.arange(3 * 2 * BATCH, device=images.device).view(3, 2, BATCH)
    truth = one_after_another(architecture, weights.double(), images.double(), labels, order)
    ways = {"one-after-another": one_after_another, TUNED: tuned_loop, OURS: together}
    found = {name: way(architecture, weights, images, labels, order) for name, way in ways.items()}
    return {name: digits(relative_error(value, truth), 2) for name, value in found.items()}


def measure(architecture_name: str, k: int, rounds: int = 5, baseline_models: int = 3, steps: int = 4, device: str = "cpu") -> list[Row]:
    """Milliseconds per model and step of all. The loops train fewer models: their cost is per model."""
    architecture, cuda = ARCHITECTURES[architecture_name](), device == "cuda"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, *architecture.input_shape, generator=generator).to(device)
    labels = torch.randint(10, (IMAGES,), generator=generator).to(device)
    last = images.contiguous(memory_format=torch.channels_last)
    loops = {"one-after-another": (images, False), TUNED: (last, True)}

    def arguments() -> tuple[Tensor, Tensor, dict[str, Loop]]:
        order = torch.randint(IMAGES, (k, 4 * steps, BATCH), generator=generator)
        weights = models(architecture, k, 0).to(device)
        ready = {name: Loop(architecture, weights[:baseline_models], tuned) for name, (_, tuned) in loops.items() if name not in red}
        order = order.to(device)
        finished(None)
        return weights, order, ready

    def finished(_: object) -> None:
        if cuda:
            torch.cuda.synchronize()

    calls: dict[str, Callable[[Tensor, Tensor, dict[str, Loop]], object]] = {
        **{
            name: lambda w, o, ready, name=name, x=x: finished(ready[name].train(x, labels, o[:baseline_models]))  # type: ignore[misc]
            for name, (x, _) in loops.items()
        },
        OURS: lambda w, o, _: finished(together(architecture, w, last, labels, o[:, :steps])),
    }
    per = {name: k * steps if name == OURS else baseline_models * 4 * steps for name in calls}
    precision = "tf32" if cuda else "highest"
    row = Row("", architecture_name, k, BATCH, "zoo", precision, "wall_ms", **environment(cuda))
    with numerics(precision, device):
        errors = _gate(architecture, images, labels)
        red = [name for name in calls if not errors[name] <= BOUNDS[precision]]
        times = take_turns({name: call for name, call in calls.items() if name not in red}, arguments, rounds)
    rows = [replace(row, provider=name, relative_error=errors[name], note=f"{VARIANT}; gate: not timed") for name in red]
    for name, values in times.items():
        each = [v / per[name] for v in values]
        rate = 1e3 * BATCH / IMAGES / quantiles(each)[0]
        done = replace(row, provider=name, relative_error=errors[name])
        rows.append(with_values(done, each, f"{VARIANT}; Adam, batch {BATCH}; {rate:.3g} models/s at one epoch of {IMAGES:,} images each"))
    return rows
