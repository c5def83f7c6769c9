"""Training a zoo: all models together, against the same models one after another in plain torch.

The baseline is what a zoo script does: an ``nn.Sequential``, NCHW batches of 32, ``F.cross_entropy``, ``torch.optim.Adam``, all
threads. Both sides draw their batches from the same resident images and are timed per model and step, taking turns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast import engine
from wslfast.architecture import Architecture
from wslfast.kernels.plan import Activation, Conv2d, Dropout, Flatten, Linear, Pool2d
from wslfast.zoo.build import StackedAdam

from .providers import ARCHITECTURES, models
from .recording import Row, environment, quantiles, take_turns

BATCH, IMAGES, LR = 32, 2048, 1e-3


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


def one_after_another(architecture: Architecture, weights: Tensor, images: Tensor, labels: Tensor, order: Tensor) -> Tensor:
    """Train every row on its own batches ``order [k, steps, batch]``; returns the trained rows."""
    rows = []
    for row, batches in zip(weights, order, strict=True):
        module = plain_module(architecture, row)
        optimiser = torch.optim.Adam(module.parameters(), lr=LR, weight_decay=1e-4)
        for batch in batches:
            optimiser.zero_grad()
            F.cross_entropy(module(images[batch]), labels[batch]).backward()
            optimiser.step()
        rows.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    return torch.stack(rows)


def together(architecture: Architecture, weights: Tensor, images: Tensor, labels: Tensor, order: Tensor) -> Tensor:
    """The same through the engine: one step of all models at a time."""
    weights, images = weights.clone(), images.contiguous(memory_format=torch.channels_last)
    adam = StackedAdam(weights, [LR] * len(weights), [1e-4] * len(weights))
    for step in range(order.shape[1]):
        chosen = order[:, step]
        _, gradient = engine.loss_and_gradient(weights, images, labels[chosen], architecture, "cross_entropy", index=chosen)
        adam.step(gradient)
    return weights


def measure(architecture_name: str, k: int, rounds: int = 5, baseline_models: int = 3, steps: int = 4) -> list[Row]:
    """Milliseconds per model and step of both, and their ratio. The baseline trains fewer models: its cost is per model."""
    architecture = ARCHITECTURES[architecture_name]()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, *architecture.input_shape, generator=generator)
    labels = torch.randint(10, (IMAGES,), generator=generator)

    def arguments() -> tuple[Tensor, Tensor]:
        return models(architecture, k, 0), torch.randint(IMAGES, (k, 4 * steps, BATCH), generator=generator)

    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "one-after-another": lambda w, o: one_after_another(architecture, w[:baseline_models], images, labels, o[:baseline_models]),
        "wslfast": lambda w, o: together(architecture, w, images, labels, o[:, :steps]),
    }
    per = {"one-after-another": baseline_models * 4 * steps, "wslfast": k * steps}
    times = take_turns(calls, arguments, rounds)
    rows, medians = [], {}
    where = (architecture_name, k, BATCH, "training step", "fp32")
    for name, values in times.items():
        median, low, high = quantiles([v / per[name] for v in values])
        medians[name] = median
        rows.append(Row(name, *where, "ms/model", median, low, high, note="Adam", **environment()))
    ratio = float(f"{medians['one-after-another'] / medians['wslfast']:.3g}")
    rows.append(Row("wslfast", *where, "x one-after-another", ratio, **environment()))
    return rows


def suite(name: str, say: Callable[[str], None] = print) -> list[Row]:
    """Rows for every architecture."""
    rows: list[Row] = []
    for net in ("cnn",) if name == "quick" else tuple(ARCHITECTURES):
        rows += measure(net, 32 if name == "quick" else 128, rounds=3 if name == "quick" else 7)
        say(f"{net} zoo building: {rows[-1].median} {rows[-1].metric}")
    return rows
