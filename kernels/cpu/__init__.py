"""The CPU wing: hand-written forward and backward of plain chains, many models in one operator call."""

from .engine import forward, group_shape, loss_and_gradient, supports

__all__ = ["forward", "group_shape", "loss_and_gradient", "supports"]
