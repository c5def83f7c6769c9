"""Checkpoints, params and tokens as scripts of the published code have them."""

from __future__ import annotations

from typing import Any

import torch

from wslfast.architecture import Architecture
from wslfast.population import unstack
from wslfast.tokens import TokenLayout

NETS = {
    "CNN": (Architecture.cnn(), 1, 0), "CNN-dropout": (Architecture.cnn(3, "gelu", 0.3), 3, 0.3),
    "CNN3": (Architecture.cnn3(3, "tanh"), 3, 0), "LeNet5": (Architecture.lenet5(1), 1, 0),
}  # fmt: skip


def case(name: str, k: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]:
    """A checkpoint, params, originals ``[k, T, D]``, mask and positions as a script has them."""
    arch, channels, dropout = NETS[name]
    weights = arch.initial_weights(["kaiming_uniform"] * k, list(range(k)))
    nlin = {"CNN-dropout": "gelu", "CNN3": "tanh"}.get(name, "relu")
    params = {"model::type": name.partition("-")[0], "model::channels_in": channels, "model::nlin": nlin, "model::dropout": dropout}
    x, mask, positions = TokenLayout(arch).tokenize(weights)
    return {n: v[0] for n, v in unstack(weights, arch).items()}, params, x, mask.expand_as(x), positions.int().expand(k, -1, -1)
