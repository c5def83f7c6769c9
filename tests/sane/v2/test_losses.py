"""The masked loss and the contrast of ``sane`` 2.x beside loops in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sane2_package import sane2  # noqa: F401 - a fixture
from tolerances import FP32, FP32_DEEP, FP32_ROUNDING, FP32_SMALL

from wslfast.sane.v2 import losses


def _never(*_: Any) -> None:
    pytest.fail("the original was asked")


def _tensors(suffix: str = "") -> dict[str, torch.Tensor]:
    mask = torch.rand(5, 7, 9) < 0.6
    x = torch.randn(5, 7, 9) * mask
    x_hat = (x + 0.3 * torch.randn(5, 7, 9)).requires_grad_()
    return {f"x{suffix}": x, f"x_hat{suffix}": x_hat, f"mask{suffix}": mask, f"z{suffix}": torch.randn(5, 7, 2)}


@pytest.mark.parametrize("normalize", [None, "batch", "window", "token"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients(sane2: SimpleNamespace, normalize: str | None, reduction: str) -> None:  # noqa: F811
    made = sane2.reconstruction.MSEReconstructionLoss(normalize=normalize, reduction=reduction)
    tensors = _tensors()
    expected = made.forward(tensors)
    (gradient,) = torch.autograd.grad(expected["loss"], tensors["x_hat"])
    found = losses.reconstruct(made, tensors, original=_never)
    (ours,) = torch.autograd.grad(found["loss"], tensors["x_hat"])
    assert list(found) == list(expected)
    for key in found:
        torch.testing.assert_close(found[key].double(), expected[key].double(), rtol=FP32, atol=FP32_ROUNDING)
    torch.testing.assert_close(ours, gradient, rtol=FP32, atol=FP32_SMALL)
    assert not ours[~tensors["mask"]].any()
    assert found["loss"] is found[made.name]


@pytest.mark.parametrize("normalize", [None, "batch", "window", "token"])
def test_second_derivatives(sane2: SimpleNamespace, normalize: str | None) -> None:  # noqa: F811
    made = sane2.reconstruction.MSEReconstructionLoss(normalize=normalize)
    tensors = _tensors()
    direction, found = torch.randn(5, 7, 9), []
    for loss in (made.forward(tensors)["loss"], losses.reconstruct(made, tensors, original=_never)["loss"]):
        (slope,) = torch.autograd.grad(loss, tensors["x_hat"], create_graph=True)
        found.append(torch.autograd.grad((slope * direction).sum(), tensors["x_hat"])[0])
    assert bool(found[0].any())
    torch.testing.assert_close(found[1], found[0], rtol=FP32, atol=FP32_SMALL)


def test_two_views_are_averaged_and_a_missing_mask_keeps_everything(sane2: SimpleNamespace) -> None:  # noqa: F811
    made = sane2.reconstruction.MSEReconstructionLoss(normalize="batch")
    both = _tensors("_i") | _tensors("_j")
    expected, found = made.forward(both), losses.reconstruct(made, both, original=_never)
    for key in expected:
        torch.testing.assert_close(found[key].double(), expected[key].double(), rtol=FP32, atol=FP32_ROUNDING)
    plain = {"x": torch.randn(3, 5), "x_hat": torch.randn(3, 5)}
    token = sane2.reconstruction.MSEReconstructionLoss()
    found = losses.reconstruct(token, plain, original=_never)
    torch.testing.assert_close(found["loss"].double(), token.forward(plain)["loss"], rtol=FP32, atol=FP32_ROUNDING)
    assert found["compression_ratio"] is None
    same = losses.reconstruct(token, {"x": plain["x"], "x_hat": plain["x"]}, original=_never)
    assert (float(same["loss"]), float(same["loss_mse_reconstruction_rsq"])) == (0.0, 1.0)


def test_half_precision_outputs_get_half_precision_gradients(sane2: SimpleNamespace) -> None:  # noqa: F811
    made = sane2.reconstruction.MSEReconstructionLoss(normalize="batch")
    tensors = _tensors()
    half = tensors["x_hat"].detach().bfloat16().requires_grad_()
    found = losses.reconstruct(made, tensors | {"x_hat": half}, original=_never)
    found["loss"].backward()
    assert found["loss"].dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    expected = made.forward(tensors | {"x_hat": half})["loss"]
    torch.testing.assert_close(found["loss"].double(), expected.double(), rtol=FP32_DEEP, atol=FP32_ROUNDING)


def test_what_the_original_refuses_or_does_otherwise_is_its_own(sane2: SimpleNamespace) -> None:  # noqa: F811
    made = sane2.reconstruction.MSEReconstructionLoss(normalize="batch")
    tensors = _tensors()
    broken = tensors["x_hat"].detach().clone()
    broken[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        losses.reconstruct(made, tensors | {"x_hat": broken}, original=type(made).forward)
    each = sane2.reconstruction.MSEReconstructionLoss(reduction="none", normalize=None)
    assert losses.reconstruct(each, tensors, original=type(made).forward)["loss"].shape == (int(tensors["mask"].sum()),)
    assert losses.reconstruct(made, tensors | {"x": tensors["x"].requires_grad_()}, original=lambda *_: "theirs") == "theirs"
    one = {"x": torch.randn(1, 1), "x_hat": torch.randn(1, 1)}
    assert losses.reconstruct(made, one, original=lambda *_: "theirs") == "theirs"


def test_contrast(sane2: SimpleNamespace) -> None:  # noqa: F811
    made = sane2.contrastive.NTXentLoss(temperature=0.2)
    a, b = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    tensors = {"z_p_i": a, "z_p_j": b}
    expected, found = made.forward(tensors), losses.contrast(made, tensors, original=_never)
    torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=FP32, atol=FP32_ROUNDING)
    gradients = [torch.autograd.grad(out["loss"], a)[0] for out in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=FP32_DEEP, atol=FP32_ROUNDING)
    assert list(found) == list(expected)
    assert losses.contrast(made, {"z_p_i": a[:1], "z_p_j": b[:1]}, original=lambda *_: "theirs") == "theirs"
