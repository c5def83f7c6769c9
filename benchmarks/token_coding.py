"""Weights to tokens and back: one gather for all models, against one model after another, channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from wslfast.tokens import layout

from .cases import architecture_of, models
from .providers import from_tokens, to_tokens
from .recording import Row, environment, with_values
from .timing import event_ms, take_turns

ENCODE, DECODE = "tokens of weights", "weights of tokens"


def measure(net: str, k: int, device: str, rounds: int = 9) -> list[Row]:
    """Milliseconds of both directions. The baseline builds and reads rows a layer at a time; both give the same tokens."""
    architecture, cuda = architecture_of(net), device == "cuda"
    coder, weights = layout(architecture), models(architecture, k, 0).to(device)
    tokens = coder.tokenize(weights).tokens
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("loop", ENCODE): lambda: torch.cat([to_tokens(w[None], architecture) for w in weights]),
        ("wslfast", ENCODE): lambda: coder.tokenize(weights).tokens,
        ("loop", DECODE): lambda: torch.stack([from_tokens(t, architecture) for t in tokens]),
        ("wslfast", DECODE): lambda: coder.detokenize(tokens),
    }
    expected = {ENCODE: tokens, DECODE: weights}
    row = Row("", net, k, coder.num_tokens, "forward", "highest", "gpu_ms" if cuda else "wall_ms", relative_error=0.0, **environment(cuda))
    rows, passed = [], {}
    for (name, variant), call in calls.items():
        if torch.equal(call(), expected[variant]):  # codes are exact: the gate is equality
            passed[name, variant] = call
        else:
            rows.append(replace(row, provider=name, relative_error="", note=f"{variant}; gate: other tokens, not timed"))
    if cuda:
        times = {which: event_ms(call, rounds) for which, call in passed.items()}
    else:
        times = take_turns(passed, tuple, rounds, 5.0)
    for (name, variant), values in times.items():
        rows.append(with_values(replace(row, provider=name), values, f"{variant}; n is the number of tokens"))
    return rows
