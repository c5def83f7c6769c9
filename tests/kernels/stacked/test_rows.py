"""Rows of a segment's weights: what norms are folded into, and the gradient that is written out beside autograd's."""

from __future__ import annotations

import pytest
import torch
from segment_cases import CASES, found, traced
from torch import Tensor

from wslfast.kernels.stacked.rows import Rows, rows_of


@pytest.mark.parametrize("name", CASES)
def test_gradients_written_out_are_those_of_autograd(name: str) -> None:
    _, _, graph = traced(CASES[name])
    generator = torch.Generator().manual_seed(0)
    values = {f"@w:{s.name}": torch.rand(3, *s.shape, generator=generator, dtype=torch.float64) + 0.3 for s in graph.slots}
    for segment in found(graph):
        own: dict[str, Tensor] = {r: values[r].clone().requires_grad_() for r in segment.references()}
        rows = rows_of(segment, own)
        g = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        expected = torch.autograd.grad(rows, list(own.values()), g, materialize_grads=True)
        rule = Rows(segment, frozenset(own))
        with torch.no_grad():
            made, saved = rule.forward({r: value.detach() for r, value in own.items()}, 3)
            slopes = rule.backward(g, saved, 3)
        torch.testing.assert_close(made, rows.detach())
        assert slopes.keys() == own.keys()
        for reference, slope in zip(own, expected, strict=True):
            torch.testing.assert_close(slopes[reference], slope, msg=lambda m, r=reference: f"{r}: {m}")
