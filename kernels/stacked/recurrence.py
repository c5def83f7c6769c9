"""One layer of a recurrent network in one direction as a single differentiable call: steps forward and back written out.

A graph of every step's operators is what makes small recurrent networks slow. Here each step keeps its gates, and the backward pass
collects the gates' gradients of all steps for one product a weight. Differentiable once. Twin: ``recurrent.py`` under autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cpu.products import product
from . import filling

_aten = torch.ops.aten


class Cell(Protocol):
    """One step of a kind of cell."""

    joint: bool  # whether what the input and the hidden state give is only ever added up
    states: int  # that go from step to step

    def forward(self, entering: Tensor, hidden: Tensor | None, states: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """The next states ``[M, n, width]``, and what :meth:`backward` needs. ``entering [M, n, gates * width]`` is what the input gives
        (where ``joint``, what both give); it may be written over."""
        ...

    def backward(self, slopes: list[Tensor], saved: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients of ``entering``, of ``hidden``, and of the states before the step beside what comes through ``hidden``."""
        ...


class Lstm:
    """Gates in torch's order: input, forget, cell, output. A sigmoid of all at once is faster than one of the three that have it."""

    joint, states = True, 2

    def forward(self, entering: Tensor, hidden: Tensor | None, states: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        width = entering.shape[-1] // 4
        new = entering[..., 2 * width : 3 * width].tanh()
        gates = entering.sigmoid_()
        into, forget, _, out = gates.chunk(4, -1)
        cell = torch.addcmul(forget * states[1], into, new)
        squashed = cell.tanh()
        return [out * squashed, cell], (gates, new, squashed, states[1])

    def backward(self, slopes: list[Tensor], saved: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        gates, new, squashed, before = saved
        into, forget, _, out = gates.chunk(4, -1)
        of_hidden, of_cell = slopes
        of_cell = of_cell + _aten.tanh_backward(of_hidden * out, squashed)
        g = _aten.sigmoid_backward(torch.cat((of_cell * new, of_cell * before, new, of_hidden * squashed), -1), gates)
        width = new.shape[-1]
        g[..., 2 * width : 3 * width] = _aten.tanh_backward(of_cell * into, new)  # no sigmoid: written over
        return g, g, [None, of_cell * forget]


class Gru:
    """Gates in torch's order: reset, update, new."""

    joint, states = False, 1

    def forward(self, entering: Tensor, hidden: Tensor | None, states: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        assert hidden is not None
        width = entering.shape[-1] // 3
        gates = (entering[..., : 2 * width] + hidden[..., : 2 * width]).sigmoid_()
        reset, update = gates.split(width, -1)
        remembered = hidden[..., 2 * width :]
        new = torch.addcmul(entering[..., 2 * width :], reset, remembered).tanh_()
        moved = states[0] - new
        return [torch.addcmul(new, update, moved)], (gates, remembered, new, moved)

    def backward(self, slopes: list[Tensor], saved: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        gates, remembered, new, moved = saved
        reset, update = gates.split(new.shape[-1], -1)
        kept = slopes[0] * update
        of_new = _aten.tanh_backward(slopes[0] - kept, new)
        of_gates = _aten.sigmoid_backward(torch.cat((of_new * remembered, slopes[0] * moved), -1), gates)
        return torch.cat((of_gates, of_new), -1), torch.cat((of_gates, of_new * reset), -1), [kept]


class Plain:
    """``tanh`` or ``relu`` of the sum."""

    joint, states = True, 1

    def __init__(self, relu: bool) -> None:
        self.relu = relu

    def forward(self, entering: Tensor, hidden: Tensor | None, states: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        made = entering.relu() if self.relu else entering.tanh()
        return [made], made

    def backward(self, slopes: list[Tensor], saved: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        g = _aten.threshold_backward(slopes[0], saved, 0) if self.relu else _aten.tanh_backward(slopes[0], saved)
        return g, g, [None]


CELLS: dict[str, Cell] = {"lstm": Lstm(), "gru": Gru(), "rnn_tanh": Plain(relu=False), "rnn_relu": Plain(relu=True)}


def direction(kind: str, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``[M, steps, n, features] -> [M, steps, n, width]``, and the last states ``[M, n, width]``.

    Parameters: weights of the input ``[M, gates * width, features]`` and of the hidden state, then, where there are any, their biases.
    """
    made, *last = _Direction.apply(kind, x, len(states), *states, *parameters)
    return made, last


class _Direction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, x: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        states, (weight_in, weight_h, *biases) = list(tensors[:count]), tensors[count:]
        cell, sizes = CELLS[kind], (x.shape[-1], weight_h.shape[-1])
        first, second = biases if biases else (None, None)
        if cell.joint and first is not None and second is not None:
            first = first + second
        rows, weight_in = filling.rows_and_weight(x.flatten(1, 2), weight_in)
        hidden_state, weight_h = filling.rows_and_weight(states[0], weight_h)
        turned, filled = weight_h.transpose(1, 2), hidden_state.shape
        before, made, saved = [], [], []
        for entering in product(rows, weight_in, first).unflatten(1, x.shape[1:3]).unbind(1):
            before.append(hidden_state)
            hidden = None
            if cell.joint:
                entering = torch.baddbmm(entering, hidden_state, turned)
            else:
                hidden = product(hidden_state, weight_h, second)
            states, kept = cell.forward(entering, hidden, states)
            made.append(states[0])
            saved.append(kept)
            hidden_state = filling.spread(states[0], filled)
        ctx.kept = cell, rows, x.shape, before, saved, weight_in, weight_h, len(biases), sizes
        return torch.stack(made, 1), states[0].clone(), *states[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, *last: Tensor) -> Any:
        cell, rows, shape, before, saved, weight_in, weight_h, biases, (features, width) = ctx.kept
        slopes = list(last)
        entering, hidden = [], []
        for slope, kept in zip(reversed(g.unbind(1)), reversed(saved), strict=True):
            slopes[0] = slopes[0] + slope
            of_entering, of_hidden, ahead = cell.backward(slopes, kept)
            through = filling.first(torch.bmm(of_hidden, weight_h), width)
            slopes = [through if ahead[0] is None else through + ahead[0], *(s for s in ahead[1:] if s is not None)]
            entering.append(of_entering)
            hidden.append(of_hidden)
        of_inputs = torch.stack(entering[::-1], 1).flatten(1, 2)
        of_hiddens = of_inputs if cell.joint else torch.stack(hidden[::-1], 1).flatten(1, 2)
        states = torch.stack(before, 1).flatten(1, 2)
        of_x = filling.first(torch.bmm(of_inputs, weight_in), features).reshape(shape) if ctx.needs_input_grad[1] else None
        of_parameters = [
            filling.first(torch.bmm(of_inputs.transpose(1, 2), rows), features),
            filling.first(torch.bmm(of_hiddens.transpose(1, 2), states), width),
        ]
        if biases:
            of_parameters += [of_inputs.sum(1), of_hiddens.sum(1)]
        return None, of_x, None, *slopes, *of_parameters


__all__ = ["direction"]
