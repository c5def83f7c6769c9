"""Adam for all models of a zoo at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's
_LONG_ROW = 16_384  # weights: with gradient and moments, 256 KiB a row


class StackedAdam:
    """``torch.optim.Adam`` (L2 weight decay, no amsgrad) on k rows, each with its own learning rate and weight decay.

    On a CPU, rows too long for the second-level cache are left to torch's fused Adam, one pass per row instead of fifteen over all
    rows. Otherwise every operation is one call for all rows, in place, with two moments and one workspace ``[k, P]``; each
    rounds once (no fused multiply-add, whose rounding could depend on where in the tensor an element lies), so a row's bits do
    not depend on how many there are.
    """

    def __init__(self, weights: Tensor, lr: Sequence[float], weight_decay: Sequence[float]) -> None:
        self.weights, self.steps = weights, 0
        self._fused: torch.optim.Adam | None = None
        if weights.device.type == "cpu" and weights.shape[1] >= _LONG_ROW:
            self._rows = [torch.nn.Parameter(row) for row in weights]  # they share the rows' memory
            alike: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for row, settings in zip(self._rows, zip(lr, weight_decay, strict=True), strict=True):
                alike.setdefault(settings, []).append(row)
            groups = [{"params": rows, "lr": rate, "weight_decay": decay} for (rate, decay), rows in alike.items()]
            self._fused = torch.optim.Adam(groups, betas=BETAS, eps=EPS, fused=True)
            return
        self.lr = torch.tensor(lr, dtype=torch.float64, device=weights.device)
        self.weight_decay = torch.tensor(weight_decay, dtype=weights.dtype, device=weights.device).unsqueeze(1)
        self.mean, self.square, self._work = torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros_like(weights)

    def step(self, gradient: Tensor) -> None:
        """Update the rows in place; ``gradient [k, P]`` is overwritten."""
        if self._fused is not None:
            for row, g in zip(self._rows, gradient, strict=True):
                row.grad = g
            self._fused.step()
            return
        self.steps += 1
        b1, b2 = BETAS
        work = self._work
        gradient += torch.mul(self.weights, self.weight_decay, out=work)
        self.mean.mul_(b1).add_(torch.mul(gradient, 1 - b1, out=work))
        self.square.mul_(b2).add_(gradient.mul_(gradient).mul_(1 - b2))
        torch.sqrt(self.square, out=work).div_(math.sqrt(1 - b2**self.steps)).add_(EPS)
        step_size = (self.lr / (1 - b1**self.steps)).to(work).unsqueeze(1)
        self.weights -= torch.div(self.mean, work, out=work).mul_(step_size)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` goes on from."""
        if self._fused is None:
            return {"steps": torch.tensor(self.steps), "mean": self.mean, "square": self.square}
        held = [self._fused.state[row] for row in self._rows]
        steps = int(held[0]["step"]) if held and held[0] else 0
        parts = ("exp_avg", "exp_avg_sq")
        mean, square = (torch.stack([one[name] for one in held]) if steps else torch.zeros_like(self.weights) for name in parts)
        return {"steps": torch.tensor(steps), "mean": mean, "square": square}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`."""
        steps = int(state["steps"])
        if self._fused is None:
            self.steps = steps
            self.mean.copy_(state["mean"])
            self.square.copy_(state["square"])
            return
        for row, mean, square in zip(self._rows, state["mean"], state["square"], strict=True):
            self._fused.state[row] = {
                "step": torch.tensor(float(steps), dtype=torch.float32),
                "exp_avg": mean.clone(),
                "exp_avg_sq": square.clone(),
            }
