"""How a run descends: its optimiser, its learning rates over time, one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from ..profiling import region
from .config import TrainConfig


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16 products, as far as torch says."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(ask() for ask in known if ask is not None)


def settled(config: TrainConfig, device: torch.device, saved: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config with a precision that is no longer ``auto``: that of the checkpoint ``saved``, so that a run keeps its own on any machine,
    or the device's."""
    if config.precision != "auto":
        return config
    if saved is not None:
        return replace(config, precision=TrainConfig.from_dict(saved["config"]).precision)
    return replace(config, precision="bf16" if has_bf16(device) else "fp32")


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
