"""How a run descends: its optimiser, its learning rates over time, one step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from ..profiling import region
from .config import TrainConfig


def optimizer_of(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, whose decay is for parameters with two or more dimensions. Each layer's own linear maps have a rate of their own; they are
    groups of their own where it is another one."""
    named = list(model.named_parameters())
    maps = [p for name, p in named if config.maps_lr != 1 and "linear" in name.split(".")]
    own = {id(p) for p in maps}
    groups = []
    for parameters, rate in (([p for _, p in named if id(p) not in own], config.lr), (maps, config.lr * config.maps_lr)):
        matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups += [
            {"params": matrices, "weight_decay": config.weight_decay, "lr": rate},
            {"params": vectors, "weight_decay": 0.0, "lr": rate},
        ]
    groups = [*groups[:2], *(group for group in groups[2:] if group["params"])]
    # one pass over each parameter where torch loops over operators: a quarter of the time (a GPU has its own default)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True if device.type == "cpu" else None)


def cycle(config: TrainConfig, optimizer: torch.optim.Optimizer) -> OneCycleLR | None:
    """The learning rate's schedule over the whole run, None for a constant one."""
    if config.schedule != "onecycle":
        return None
    return OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=config.steps, pct_start=0.3)


def descend(
    total: Tensor,
    parts: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: OneCycleLR | None,
    clip: float | None,
) -> None:
    """One optimiser step down the gradient of ``total``. With ``clip`` the gradient's norm is at most that; what it was before is
    written to ``parts`` as ``gradient_norm``."""
    with region("backward"):
        optimizer.zero_grad(set_to_none=True)
        total.backward()
    with region("optimise"):
        if clip is not None:
            parts["gradient_norm"] = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    if schedule is not None:
        schedule.step()
