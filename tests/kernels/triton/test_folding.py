"""Norms and averages folded into a chain that the kernels know, against the graph they came from; and the kernels on such chains."""

from __future__ import annotations

import pytest
import torch
from tolerances import FP32_AMPLIFIED, FP32_DEEP, FP64, FP64_ROUNDING
from torch import Tensor, nn

from wslfast import Architecture, engine
from wslfast.engine.triton_path import Triton
from wslfast.kernels import reference
from wslfast.kernels.layers import Unplannable
from wslfast.kernels.triton.folding import chain
from wslfast.testing import relative_error

SHAPE = (2, 9, 8)


def _flat(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


NETS: dict[str, nn.Module] = {
    "norm behind": _flat(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)),
    "norm behind the activation": _flat(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(120, 3)
    ),
    "norm without a bias before": _flat(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(126, 3)
    ),
    "global average": _flat(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3),
    ),
    "an average of windows that overlap": _flat(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.Flatten(), nn.Linear(60, 3)),
    "an average behind a maximum": _flat(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d((4, 1)), nn.Flatten(), nn.Dropout(0.1), nn.Linear(9, 3)
    ),
}  # fmt: skip


def _architecture(name: str) -> Architecture:
    return Architecture.from_module(NETS[name], SHAPE, name)


def _weights(architecture: Architecture, k: int) -> Tensor:
    weights = torch.randn(k, architecture.num_weights) * 0.5
    for p in architecture.parameters:
        if p.name.endswith("running_var"):
            weights[:, p.offset : p.stop] = weights[:, p.offset : p.stop].abs() + 0.5
    return weights


def test_averages_are_copied_to_a_device_once_and_belong_to_autograd() -> None:
    """A CUDA graph may record no copy from the host; what inference mode made could not be saved for a gradient."""
    arch = Architecture.from_module(_flat(nn.Conv2d(2, 3, 3), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(12, 4)), SHAPE, "copied")
    found = chain(arch.graph)
    assert found.rows is not None
    weights = _weights(arch, 2)
    with torch.inference_mode():
        found.rows(weights)
    leaf = weights.requires_grad_()
    found.rows(leaf).sum().backward()  # raises where the first call's copy is an inference tensor
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", lambda *given, **more: pytest.fail("copied again"))
        found.rows(leaf)


@pytest.mark.parametrize("name", NETS)
def test_the_chain_is_the_network(name: str) -> None:
    arch = _architecture(name)
    found = chain(arch.graph)
    assert found.rows is not None
    weights, queries = _weights(arch, 3).double().requires_grad_(), torch.randn(4, *SHAPE, dtype=torch.float64)
    truth = engine.choose(arch, "cpu", torch.float64, "torch").forward(weights, queries, True)
    outputs = reference.forward(found.rows(weights), queries, found.layers)
    assert relative_error(outputs, truth) < FP64_ROUNDING
    slope = torch.randn_like(truth)
    (expected,), (gradient,) = (torch.autograd.grad(made, weights, slope) for made in (truth, outputs))
    assert relative_error(gradient, expected) < FP64
    silent = [p.name for p in arch.parameters if not gradient[:, p.offset : p.stop].any()]
    assert not silent, "every parameter of the network, running statistics included, has a gradient"


def test_a_model_does_not_depend_on_its_company() -> None:
    for name in NETS:
        arch = _architecture(name)
        rows, weights = chain(arch.graph).rows, _weights(arch, 5)
        assert rows is not None
        assert torch.equal(rows(weights)[2:3], rows(weights[2:3])), name


def test_published_networks_are_as_they_were() -> None:
    arch = Architecture.cnn3()
    found = chain(arch.graph)
    assert found.rows is None
    assert found.layers == arch.layers


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(126, 3), nn.LogSoftmax(-1)), "not a chain"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(18, 3)), "window"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "window|ends in a map"),
    ],
    ids=["a graph", "a maximum over 3 x 3", "no linear layer"],
)
def test_what_the_kernels_do_not_know_is_named(module: nn.Module, words: str) -> None:
    arch = Architecture.from_module(module, SHAPE)
    with pytest.raises(Unplannable, match=words):
        chain(arch.graph)
    with pytest.raises(engine.choice.WslfastError, match="backend='triton' cannot run this"):
        engine.choose(arch, "cuda", torch.float32, "triton")


@pytest.mark.parametrize("name", ["norm behind", pytest.param("global average", marks=pytest.mark.slow)])
def test_the_kernels_on_it(name: str) -> None:
    """Outputs, losses and gradients to the network's own weights, through the path that a GPU takes; in the interpreter."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    arch = _architecture(name)
    weights, queries, targets = _weights(arch, 3), torch.randn(4, *SHAPE), torch.randn(3, 4, 3)
    path = Triton(arch, "a test")
    exact = engine.choose(arch, "cpu", torch.float64, "torch")
    assert relative_error(path.forward(weights, queries, False), exact.forward(weights.double(), queries.double(), False)) < FP32_DEEP
    losses, gradient = path.loss_and_gradient(weights, queries, targets, "mse", 2.0, None)
    expected, slopes = exact.loss_and_gradient(weights.double(), queries.double(), targets.double(), "mse", 2.0, None)
    assert relative_error(losses, expected) < FP32_DEEP
    assert relative_error(gradient, slopes) < FP32_AMPLIFIED
    rows = weights.clone().requires_grad_()
    path.forward(rows, queries, True).sum().backward()
    wide = weights.double().requires_grad_()
    exact.forward(wide, queries.double(), True).sum().backward()
    assert relative_error(rows.grad, wide.grad) < FP32_AMPLIFIED
