"""LSTM, GRU and plain recurrent layers of M models at once: a batched product a step, where torch's own would run one model after another.

Formulas and the order of gates are torch.nn's (LSTM: input, forget, cell, output; GRU: reset, update, new).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu.products import product
from .calls import Call, Layout, Values
from .filling import rows_and_weight
from .recurrence import direction


def recurrent(call: Call, a: Values, models: int, once: bool = False) -> list[Tensor]:
    """What ``torch.lstm`` and its kin return, ``[output, hidden]`` or ``[output, hidden, cell]``, each with the models in front.

    ``once``: nobody differentiates twice, and steps without a graph of their own will do (``recurrence.py``).
    """
    kind = call.operation.name.partition(".")[0]
    first = a["has_biases"], a["num_layers"], a["bidirectional"]
    parameters, layouts = a["params"], call.layouts["params"]
    parameters = [_stacked(p, layout, models) for p, layout in zip(parameters, layouts, strict=True)]
    x = _stacked(a["input"], call.layouts["input"], models)
    x = x.transpose(1, 2) if a["batch_first"] else x  # [M, steps, n, features]
    states, where = a["hx"], call.layouts["hx"]
    if isinstance(states, Tensor):
        states, where = [states], [where]
    states = [_stacked(state, layout, models) for state, layout in zip(states, where, strict=True)]  # [M, layers * directions, n, width]
    output, ends = _layers(kind, x, states, parameters, *first, once and not torch.is_autocast_enabled(x.device.type))
    return [output.transpose(1, 2) if a["batch_first"] else output, *ends]


def cell(call: Call, a: Values, models: int) -> Any:
    """One step of a cell: the next hidden state ``[M, n, width]``, of an LSTM with its cell state."""
    x, states, where = _stacked(a["input"], call.layouts["input"], models), a["hx"], call.layouts["hx"]
    if isinstance(states, Tensor):
        states, where = [states], [where]
    states = [_stacked(state, layout, models) for state, layout in zip(states, where, strict=True)]
    entering, hidden = (_product(call, a, value, key, models) for value, key in ((x, "ih"), (states[0], "hh")))
    made = _STEPS[call.operation.name.removesuffix("_cell")](entering, hidden, states)
    return made if len(made) > 1 else made[0]


def _product(call: Call, a: Values, x: Tensor, key: str, models: int) -> Tensor:
    return _filled(x, _stacked(a[f"w_{key}"], call.layouts[f"w_{key}"], models), a.get(f"b_{key}"))


def _filled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A layer's product, whose operands are filled up."""
    return product(*rows_and_weight(x, weight), bias)


def _stacked(x: Tensor, layout: Layout, models: int) -> Tensor:
    return x if layout is Layout.MODELS else x.expand(models, *x.shape)


def _layers(
    kind: str, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor], biases: bool, layers: int, both: bool, once: bool
) -> tuple[Tensor, list[Tensor]]:
    directions = 2 if both else 1
    each = len(parameters) // (layers * directions)  # weights and biases, and a projection where there is one
    ends: list[list[Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for back in range(directions):
            place = layer * directions + back
            own = parameters[place * each : (place + 1) * each]
            steps, before = x.flip(1) if back else x, [state[:, place] for state in states]
            projected = len(own) % 2 == 1
            made, last = direction(kind, steps, before, own) if once and not projected else _direction(kind, steps, before, own, biases)
            outputs.append(made.flip(1) if back else made)
            for kept, end in zip(ends, last, strict=True):
                kept.append(end)
        x = torch.cat(outputs, -1) if both else outputs[0]
    return x, [torch.stack(kept, 1) for kept in ends]


def _direction(kind: str, x: Tensor, states: list[Tensor], parameters: Sequence[Tensor], biases: bool) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction: ``[M, steps, n, features] -> [M, steps, n, width]``, and the last states ``[M, n, width]``."""
    weight_in, weight_h = parameters[:2]
    bias_in, bias_h = parameters[2:4] if biases else (None, None)
    projection = parameters[-1] if len(parameters) % 2 else None
    inputs = _filled(x.flatten(1, 2), weight_in, bias_in).unflatten(1, x.shape[1:3])
    made = []
    for step in inputs.unbind(1):
        states = _STEPS[kind](step, _filled(states[0], weight_h, bias_h), states)
        if projection is not None:
            states = [_filled(states[0], projection), *states[1:]]
        made.append(states[0])
    return torch.stack(made, 1), states


def _lstm(step: Tensor, hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    entering, forget, cell, leaving = (step + hidden).chunk(4, -1)
    kept = forget.sigmoid() * states[1] + entering.sigmoid() * cell.tanh()
    return [leaving.sigmoid() * kept.tanh(), kept]


def _gru(step: Tensor, hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    (reset, update, new), (reset_h, update_h, new_h) = step.chunk(3, -1), hidden.chunk(3, -1)
    reset, update = (reset + reset_h).sigmoid(), (update + update_h).sigmoid()
    new = (new + reset * new_h).tanh()
    return [new + update * (states[0] - new)]


_STEPS: dict[str, Any] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda step, hidden, _: [(step + hidden).tanh()],
    "rnn_relu": lambda step, hidden, _: [(step + hidden).relu()],
}
