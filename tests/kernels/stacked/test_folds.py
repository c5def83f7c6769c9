"""Batch norms folded into a layer's weights and biases: gradients written out beside autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wslfast.kernels.stacked.folds import Factor, FoldedBias, FoldedWeight


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2, 2)])
def test_gradients_written_out_are_those_of_autograd(shape: tuple[int, ...], bias: bool, affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.rand(3, *size, generator=generator, dtype=torch.float64) + 0.2

    numbers = {f"norm_{name}": random(4) for name in ("running_mean", "running_var", *(("weight", "bias") if affine else ()))}
    of_factor = {name: value for name, value in numbers.items() if name in ("norm_running_var", "norm_weight")}
    for rule, given in (
        (FoldedWeight(1e-3), {"weight": random(*shape), **of_factor}),
        (Factor(1e-3), of_factor),
        (FoldedBias(1e-3), {**({"bias": random(4)} if bias else {}), **numbers}),
    ):
        own = {name: value.clone().requires_grad_() for name, value in given.items()}
        made, _ = rule.forward(own, 3)
        g = torch.randn(made.shape, generator=generator, dtype=torch.float64)
        expected = dict(zip(own, torch.autograd.grad(made, list(own.values()), g), strict=True))
        with torch.no_grad():
            value, saved = rule.forward(given, 3)
            slopes = rule.backward(g, saved, 3)
        torch.testing.assert_close(value, made.detach())
        assert slopes.keys() == expected.keys()
        for name, slope in expected.items():
            torch.testing.assert_close(slopes[name], slope)
