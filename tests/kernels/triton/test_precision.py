"""What rounding costs: emulated TF32, fp16 and bf16 operands against float64, with and without the maxima pinned.

In the interpreter fp16 storage is real, TF32 operands are rounded where the kernels round them and, in the fixture ``tensor_core``, cut
off where a tensor core cuts them; bf16 operands are rounded and widened. Sums are fp32. Tolerances are those of docs/kernels.md.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import CASES, Net, cnn3, cnn28, count, error, gradient_errors, lenet5, make, oracle
from tolerances import BARS, allowed
from torch import Tensor

from wslfast.kernels import criteria, reference
from wslfast.kernels.layers import Conv2d, Flatten, Linear, Pool2d, layer_slots

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from triton.runtime import interpreter

from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton import launcher
from wslfast.kernels.triton.configurations import configuration
from wslfast.kernels.triton.devices import matrix_unit
from wslfast.kernels.triton.schedule import schedule

pytestmark = pytest.mark.slow


def _data(case: Net, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, queries, targets = make(case, k, n)
    assert weights.shape[1] == count(case.layers)
    return weights, queries, targets


@pytest.fixture
def tensor_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in TF32 read what a tensor core reads of an fp32 number: sign, exponent and ten bits."""
    builder = interpreter.InterpreterBuilder
    real = builder.create_dot

    def cut(handle: Any) -> Any:
        bits = handle.data.view(np.int32) & -0x2000
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        if "TF32" in str(input_precision).upper():
            a, b = cut(a), cut(b)
        return real(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(builder, "create_dot", dot)


PRECISIONS = ("ieee", "tf32", "tf32x3", "fp16", "bf16")
IN_TIME = {*product(["cnn28"], PRECISIONS), ("cnn3", "fp16")}  # the others take a quarter of a minute to most of one


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(*case, marks=() if case in IN_TIME else pytest.mark.thorough, id="-".join(case))
        for case in product(["cnn3", "cnn28", "lenet5"], PRECISIONS)
    ],
)
def test_precision(name: str, precision: str, tensor_core: None) -> None:
    case = {"cnn3": cnn3("tanh"), "cnn28": cnn28(), "lenet5": lenet5()}[name]
    weights, queries, targets = _data(case, 1, 16)
    outputs = kernels.forward(weights, queries, case.layers, precision)
    assert error(outputs, reference.forward(weights.double(), queries.double(), case.layers)) < BARS[precision].outputs
    _, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision)
    _, expected = oracle(weights, queries, targets, case.layers, "mse")
    of = allowed(case.layers, precision)
    for parameter, found in gradient_errors(gradient, expected, case.layers).items():
        assert found < of[parameter.rpartition(".")[0]], parameter


def _pinned(weights: Tensor, queries: Tensor, case: Net, picks: list[Tensor]) -> Tensor:
    """float64 outputs of one model whose pools take the given positions instead of their own maxima."""
    x, picked = queries.double(), iter(picks)
    for layer, slots in zip(case.layers, layer_slots(case.layers), strict=True):
        if slots.weight is not None and slots.bias is not None:
            weight = weights[slots.weight.offset : slots.weight.stop].view(slots.weight.shape)
            bias = weights[slots.bias.offset : slots.bias.stop]
        if isinstance(layer, Conv2d):
            x = F.conv2d(x, weight, bias)
        elif isinstance(layer, Linear):
            x = F.linear(x, weight, bias)
        elif isinstance(layer, Pool2d):
            n, c, h, w = x.shape
            choice = next(picked)  # of the outputs that a later layer reads; what the others pick reaches nothing
            choice = F.pad(choice, (0, w // 2 - choice.shape[3], 0, h // 2 - choice.shape[2]))
            windows = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).transpose(3, 4).flatten(-2)
            x = windows.gather(-1, choice.unsqueeze(-1))[..., 0]
        elif isinstance(layer, Flatten):
            x = x.flatten(1)
        else:
            x = reference.activation(x, layer) if hasattr(layer, "function") else x
    return x


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precision_with_the_maxima_pinned(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the convolutions' error when near-ties cannot flip is that of the products."""
    case = cnn3("tanh")
    weights, queries, targets = _data(case, 1, 8)
    held: list[kernels.Activations] = []
    make_buffers = kernels.Activations.__init__

    def keep(self: kernels.Activations, *arguments: object) -> None:
        make_buffers(self, *arguments)  # type: ignore[arg-type]
        held.append(self)

    monkeypatch.setattr(kernels.Activations, "__init__", keep)
    _, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision)
    scheduled = schedule(case.layers, case.shape)
    picks = [
        code.view(8, stage.HO, stage.WO, stage.N)[..., : stage.NOUT].permute(0, 3, 1, 2).long()
        for stage, code in zip(scheduled.stages, held[0].codes, strict=True)
        if code is not None
    ]
    row = weights[0].double().requires_grad_()
    outputs = _pinned(row, queries, case, picks)
    criteria.criterion_values(outputs[None], targets.double(), "mse").sum().backward()
    assert row.grad is not None
    errors = gradient_errors(gradient, row.grad[None], case.layers)
    assert max(errors.values()) < 2e-3, errors


def test_rounding_where_it_is_stored_beats_truncation() -> None:
    """TF32 operands rounded to nearest: three times closer or better than the tensor core's own truncation."""
    case = lenet5()
    weights, queries, _ = _data(case, 1, 16)
    expected = reference.forward(weights.double(), queries.double(), case.layers)
    rounded = error(kernels.forward(weights, queries, case.layers, "tf32"), expected)

    def truncated(x: Tensor) -> Tensor:
        return (x.contiguous().view(torch.int32) & -0x2000).view(torch.float32)

    x = truncated(queries)
    for layer, slots in zip(case.layers, layer_slots(case.layers), strict=True):
        if slots.weight is not None and slots.bias is not None:
            weight = truncated(weights[0, slots.weight.offset : slots.weight.stop]).view(slots.weight.shape)
            bias = weights[0, slots.bias.offset : slots.bias.stop]
        if isinstance(layer, Conv2d):
            x = F.conv2d(x, weight, bias)
        elif isinstance(layer, Linear):
            x = F.linear(x, weight, bias)
        elif isinstance(layer, Pool2d):
            x = truncated(F.max_pool2d(x, 2))
        elif isinstance(layer, Flatten):
            x = x.flatten(1)
        else:
            x = truncated(reference.activation(x, layer)) if hasattr(layer, "function") else x
    assert error(x[None], expected) > 3 * rounded


def test_what_a_tensor_core_cuts_off_of_tf32_is_nothing(request: pytest.FixtureRequest) -> None:
    """Every operand was rounded before, so that the products are those of exact multiplication, to the bit."""
    case = cnn28()
    weights, queries, targets = _data(case, 1, 8)
    exact = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, "tf32")
    request.getfixturevalue("tensor_core")
    cut = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, "tf32")
    assert all(torch.equal(a, b) for a, b in zip(exact, cut, strict=True))


@pytest.mark.parametrize(
    ("name", "mode", "capability"),
    [
        ("cnn28", "layers", (9, 0)),
        ("channels_17_in", "layers", (8, 0)),
        ("cnn28", "network", (9, 0)),
        ("channels_17_in", "network", (12, 0)),
    ],
)
def test_three_products_of_tf32_are_as_near_as_fp32(
    name: str, mode: str, capability: tuple[int, int], tensor_core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tf32x3 on tensor cores that cut their operands off, beside fp32's own products: at most three times as far from float64. With the
    tiles of both kinds of matrix units, whose sums are taken in parts or shared between programs."""
    case = {"cnn28": cnn28(), **CASES}[name]
    monkeypatch.setattr(launcher, "capability_of", lambda device: capability)
    unit = matrix_unit(capability)
    stages = schedule(case.layers, case.shape).stages
    parts = [configuration("forward", s, "tf32x3", unit).CUT for s in stages]
    turns = [configuration("dw", s, "tf32x3", unit).TURNS for s in stages]
    assert max(parts if unit == "warpgroup" else turns) > 1
    weights, queries, targets = _data(case, 1, 8)
    _, expected = oracle(weights, queries, targets, case.layers, "mse")
    errors = {}
    for precision in ("ieee", "tf32x3"):
        _, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision, mode=mode)
        errors[precision] = gradient_errors(gradient, expected, case.layers)
    assert max(errors["tf32x3"].values()) < 3 * max(errors["ieee"].values()), errors
