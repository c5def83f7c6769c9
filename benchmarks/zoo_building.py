"""Training a zoo: all models together, against the same models one after another in plain torch.

The baseline is what a zoo script does: an ``nn.Sequential``, NCHW batches of 32, ``F.cross_entropy``, ``torch.optim.Adam``, all
threads. Beside it stands the loop that one would tune by hand: images and kernels channels-last, Adam's one fused call. All sides draw
their batches from the same resident images and are timed per model and step, taking turns.
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
OURS = "wslfast"  # both suites' zoo rows
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


def one_after_another(
    architecture: Architecture, weights: Tensor, images: Tensor, labels: Tensor, order: Tensor, tuned: bool = False
) -> Tensor:
    """Train every row on its own batches ``order [k, steps, batch]``; returns the trained rows. ``tuned``: channels-last, Adam fused."""
    rows = []
    layout = torch.channels_last if tuned else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    for row, batches in zip(weights, order, strict=True):
        module = plain_module(architecture, row).to(memory_format=layout)
        optimiser = torch.optim.Adam(module.parameters(), lr=LR, weight_decay=1e-4, fused=tuned or None)
        for batch in batches:
            optimiser.zero_grad()
            F.cross_entropy(module(images[batch]), labels[batch]).backward()
            optimiser.step()
        rows.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    return torch.stack(rows)


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

    def arguments() -> tuple[Tensor, Tensor]:
        order = torch.randint(IMAGES, (k, 4 * steps, BATCH), generator=generator)
        return models(architecture, k, 0).to(device), order.to(device)

    def finished(trained: Tensor) -> None:
        if cuda:
            torch.cuda.synchronize()

    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        **{
            name: lambda w, o, way=way: finished(way(architecture, w[:baseline_models], images, labels, o[:baseline_models]))  # type: ignore[misc]
            for name, way in (("one-after-another", one_after_another), (TUNED, tuned_loop))
        },
        OURS: lambda w, o: finished(together(architecture, w, images, labels, o[:, :steps])),
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
