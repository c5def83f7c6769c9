"""Activations of the CPU wing in whole vectors, which torch's fused functions serve: exact, and equal bits in any company.

That the others round every element alike is tested with the engine (``test_engine.py``).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wslfast.kernels.cpu import activations, jobs
from wslfast.kernels.cpu.activations import TABLE, _whole, dense, function_of, in_order_of, tanh
from wslfast.kernels.layers import ACTIVATIONS, Activation

RECORDS = [Activation("a", name) for name in ACTIVATIONS if name != "identity"]
RECORDS += [
    Activation("a", "gelu", approximate="tanh"),
    Activation("a", "elu", 0.3),
    Activation("a", "elu", -0.5),
    Activation("a", "celu", 2.0),
    Activation("a", "softplus", 3.0),
]


def _alone(run) -> None:
    """In a job: one thread, as the engine runs them."""
    jobs.run([run])


def _both(record: Activation, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    entry = function_of(record)
    assert entry is not None
    y, saved = entry.forward(x.clone(), record, False)
    return y, entry.backward(g.clone(), saved, record)


def _plain(record: Activation, x: Tensor) -> Tensor:
    module = {
        "relu": lambda: torch.relu(x),
        "leakyrelu": lambda: torch.nn.functional.leaky_relu(x, record.parameter),
        "tanh": lambda: torch.tanh(x),
        "sigmoid": lambda: torch.sigmoid(x),
        "silu": lambda: torch.nn.functional.silu(x),
        "gelu": lambda: torch.nn.functional.gelu(x, approximate=record.approximate),
        "elu": lambda: torch.nn.functional.elu(x, record.parameter),
        "celu": lambda: torch.nn.functional.celu(x, record.parameter),
        "softplus": lambda: torch.nn.functional.softplus(x, record.parameter),
    }
    return module[record.function]()


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r.function} {r.parameter} {r.approximate}")
def test_whole_vectors(record: Activation) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(64 * 50, generator=generator) * scale for scale in (4, 1))
    images = x.view(10, 4, 16, 5).permute(0, 3, 1, 2)  # channels-last

    def run() -> None:
        assert _whole(x) or jobs.threads_inside() > 1
        y, slope = _both(record, x, g)
        for start, stop in ((0, 64), (64, 1280), (3136, 3200), (128, 2944)):
            part, its = _both(record, x[start:stop], g[start:stop])
            assert torch.equal(part, y[start:stop])
            assert torch.equal(its, slope[start:stop])
        laid, its = _both(record, images, g.view(10, 4, 16, 5).permute(0, 3, 1, 2))
        assert torch.equal(laid.permute(0, 2, 3, 1).flatten(), y)
        assert torch.equal(its.permute(0, 2, 3, 1).flatten(), slope)
        precise = x.double().requires_grad_()
        wanted = _plain(record, precise)
        (right,) = torch.autograd.grad(wanted, precise, g.double())
        torch.testing.assert_close(y.double(), wanted.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(slope.double(), right, rtol=2e-5, atol=3e-6)

    _alone(run)


def test_every_activation_is_tested() -> None:
    assert {"gelu_tanh" if r.approximate == "tanh" else r.function for r in RECORDS} == set(TABLE)


@pytest.fixture(params=[True, False], ids=["torch's", "ours"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two ways to a tanh, whichever is this processor's."""
    monkeypatch.setattr(activations, "intel", lambda: request.param)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 1.0, 30.0])
def test_tanh_is_exact_to_three_units(scale: float) -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(1)) * scale
    wanted = x.double().tanh()
    assert ((tanh(x).double() - wanted).abs() <= 3 * 2**-24 * wanted.abs() * 2).all()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_rounds_alike_at_every_place(dtype: torch.dtype) -> None:
    """Any number of numbers from anywhere on: what a model's bits rest on."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3)).to(dtype) * 2
    whole = tanh(x)
    for start in range(0, 70, 3):
        for count in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 1000):
            here = slice(start, start + count)
            assert torch.equal(tanh(x[here]), whole[here])
            assert torch.equal(tanh(x[here].clone(), owned=True), whole[here])
    columns = x.view(64, 64)[:, 3:20]
    assert torch.equal(tanh(columns), whole.view(64, 64)[:, 3:20])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_in_few_digits(dtype: torch.dtype) -> None:
    """Each is a rounding or two away from that of the same numbers in float64."""
    x = (torch.randn(64 * 20, generator=torch.Generator().manual_seed(2)) * 8).to(dtype)
    for record in RECORDS:
        entry = function_of(record)
        assert entry is not None
        y, _ = entry.forward(x.clone(), record, False)
        wanted = _plain(record, x.double())
        assert ((y.double() - wanted).norm() / wanted.norm()) < 4 * torch.finfo(dtype).eps, record


@pytest.mark.usefixtures("either")
def test_tanh_at_the_ends() -> None:
    ends = tanh(torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, float("nan")]))
    assert ends[:4].tolist() == [1, -1, 0, 0]
    assert ends[4].isnan()
    assert torch.signbit(ends[3])


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.randn(3, 64)[:, 16:32], True),
        (torch.randn(400, 256)[:, 64:128], True),
        (torch.randn(400, 64)[16:32], False),
        (torch.randn(400, 64).t(), False),  # in another order
        (torch.randn(4, 1, 6, 3).transpose(0, 2), False),
        (torch.randn(6, 32, 9, 9).to(memory_format=torch.channels_last), False),
        (torch.randn(6, 32, 9, 9).to(memory_format=torch.channels_last)[:, 8:16], True),
        (torch.randn(64, 64, 4)[..., 0], True),
        (torch.randn(1, 3000, 8)[..., :4], True),
        (torch.randn(64, 1, 64).expand(64, 32, 64), True),
    ],
    ids=["quarter", "long runs", "rows", "turned", "turned, with one", "channels-last", "channels", "every fourth", "one", "broadcast"],
)
def test_numbers_lie_side_by_side(x: Tensor, copied: bool) -> None:
    made = dense(x)
    assert torch.equal(made, x)
    assert (made is not x) == copied
    span = 1 + sum((size - 1) * stride for size, stride in zip(made.shape, made.stride(), strict=True))
    assert span == made.numel()


def test_gradients_take_the_order_of_what_they_meet() -> None:
    x = torch.randn(16, 8, 9, 9).to(memory_format=torch.channels_last)
    g = torch.randn(16, 8, 9, 9)
    assert torch.equal(in_order_of(g, x), g)
    assert in_order_of(g, x).stride() == x.stride()
    assert in_order_of(g, g.clone()) is g
    assert in_order_of(g[:1, :1], x[:1, :1]).shape == (1, 1, 9, 9)
    assert in_order_of(g[0], x) is not x, "of another shape: left to torch, which broadcasts"
