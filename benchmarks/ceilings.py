"""What the machine can do, measured in the same run: a large copy, and a large matrix product in each precision."""

from __future__ import annotations

from functools import partial

import torch

from .cases import PRECISIONS, numerics
from .recording import Row, digits, environment, quantiles, with_values
from .timing import Call, event_ms, take_turns

COPY, PRODUCT = "large copy", "large matrix product"


def _times(call: Call, device: str, repeats: int) -> list[float]:
    if device == "cuda":
        for _ in range(3):
            call()
        return event_ms(call, repeats)
    return take_turns({"": lambda: call()}, tuple, repeats)[""]


def measure(device: str) -> list[Row]:
    """Rows ``ceiling``: bytes a second (reads plus writes, in the note) and FLOP a second, on random data."""
    cuda = device == "cuda"
    metric, size, numbers = ("gpu_ms", 8192, 1 << 30) if cuda else ("wall_ms", 2048, 1 << 26)
    known = environment(cuda)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    times = _times(partial(target.copy_, source), device, 20)
    moved = 2 * source.numel() * source.element_size()
    row = Row("ceiling", "copy", 1, numbers, "forward", "highest", metric, **known)
    rows = [with_values(row, times, f"{COPY}; {digits(1e3 * moved / quantiles(times)[0]):.4g} bytes/s, read plus written")]
    del source, target
    for precision in PRECISIONS if cuda else ("highest", "bf16"):
        a, b = (torch.randn(size, size, device=device) for _ in range(2))
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        a, b = (a, b) if half is None else (a.to(half), b.to(half))
        with numerics(precision, device):
            rates = [2e3 * size**3 / t for t in _times(partial(torch.mm, a, b), device, 20 if cuda else 8)]
        row = Row("ceiling", "matmul", size, size, "forward", precision, "flops", **known)
        rows.append(with_values(row, rates, PRODUCT))
    return rows


def of(rows: list[Row], precision: str, device: str) -> tuple[float | None, float | None]:
    """(FLOP/s, bytes/s) of a device in a precision, from rows that :func:`measure` made; None where there is none."""
    flops = [r.value for r in rows if (r.provider, r.architecture, r.precision, r.device) == ("ceiling", "matmul", precision, device)]
    copies = [r for r in rows if (r.provider, r.architecture, r.device) == ("ceiling", "copy", device)]
    rate = next((8e3 * r.n / r.value for r in copies if r.value), None)
    return (flops[0] if flops else None), rate
