"""State dicts of parametrised and wrapped modules, as the weights that torch's own modules compute from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import FP64
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from wslfast import WslfastError
from wslfast.tracing import effective_state


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.ConvTranspose1d])
def test_spectral_norm_of_as_many_channels_in_as_out(kind: type[nn.Module], norm: Any) -> None:
    """A transposed convolution is normed along its second axis, which is as long as the first here."""
    torch.manual_seed(0)
    layer = norm(kind(6, 6, 3).double())  # type: ignore[call-arg]
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    x = torch.randn(4, 6, *(8,) * (layer.weight.ndim - 2), dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    state = layer.eval().state_dict()
    layer(x)  # in evaluation mode the older form computes its weight in the forward
    torch.testing.assert_close(effective_state(state, {"weight", "bias"})["weight"], layer.weight.detach(), rtol=FP64, atol=FP64)


def test_weight_norm_of_a_vector() -> None:
    layer = weight_norm(nn.PReLU(4), "weight")
    with torch.no_grad():
        layer.weight_g.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    layer(torch.ones(1, 4))
    assert torch.allclose(effective_state(layer.state_dict(), {"weight"})["weight"], layer.weight.detach())


def test_two_keys_of_one_entry_have_to_agree() -> None:
    one = torch.randn(3)
    assert set(effective_state({"bias": one, "module.bias": one.clone()}, {"bias"})) == {"bias"}
    with pytest.raises(WslfastError, match=r"'module\.bias' and another key both name 'bias'"):
        effective_state({"bias": one, "module.bias": one + 1}, {"bias"})
