"""Rules of images among the channels, each against its form through torch's own graph, in float64 and alone in a network."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_oracle import close, looped, queries_like, rows_near
from tolerances import FP32
from torch import Tensor, nn

from wslfast import Architecture, Population, batched_behavioral_loss, batched_forward
from wslfast.kernels import stacked
from wslfast.kernels.stacked import image_rules
from wslfast.kernels.stacked.compiler import compile_program
from wslfast.kernels.stacked.passes import tapes_of
from wslfast.kernels.stacked.tape import Island
from wslfast.testing import relative_error


class Between(nn.Module):
    """A call between a convolution and a mean, with what it needs of parts."""

    def __init__(self, run: Callable[..., Tensor], out: int, *parts: nn.Module) -> None:
        super().__init__()
        self.first, self.parts, self.run = nn.Conv2d(2, 4, 3, 1, 1), nn.ModuleList(parts), run
        self.last = nn.Conv2d(out, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.first(x), x, *self.parts)).mean((2, 3))


CASES = {
    "group norm": lambda: Between(lambda h, x, norm: norm(h), 4, nn.GroupNorm(2, 4)),
    "group norm, no affine": lambda: Between(lambda h, x, norm: norm(h), 4, nn.GroupNorm(2, 4, affine=False)),
    "instance norm": lambda: Between(lambda h, x, norm: norm(h) * h.sigmoid(), 4, nn.InstanceNorm2d(4, affine=True)),
    "instance norm, no affine": lambda: Between(lambda h, x, norm: norm(h) * h.sigmoid(), 4, nn.InstanceNorm2d(4)),
    "prelu": lambda: Between(lambda h, x, act: act(h), 4, nn.PReLU(4)),
    "prelu, one slope": lambda: Between(lambda h, x, act: act(h), 4, nn.PReLU()),
    "prelu of features": lambda: Between(lambda h, x, act: act(h.mean((2, 3)))[:, :, None, None], 4, nn.PReLU(4)),
    "nearest neighbors": lambda: Between(lambda h, x: F.interpolate(h, scale_factor=2.0), 4),
    "nearest neighbors, uneven": lambda: Between(lambda h, x: F.interpolate(h, size=(7, 9)), 4),
    "tiles": lambda: Between(lambda h, x, up: up(h), 5, nn.ConvTranspose2d(4, 5, 2, 2)),
    "few tiles, no bias": lambda: Between(lambda h, x, up: up(h), 1, nn.ConvTranspose2d(4, 1, (2, 3), (2, 3), bias=False)),
    "transposed with overlap": lambda: Between(lambda h, x, up: up(h), 3, nn.ConvTranspose2d(4, 3, 4, 2, 1)),
    "transposed, output padding": lambda: Between(lambda h, x, up: up(h), 3, nn.ConvTranspose2d(4, 3, 3, 2, 1, 1)),
    "transposed, uneven": lambda: Between(lambda h, x, up: up(h), 2, nn.ConvTranspose2d(4, 2, (5, 3), (3, 2), (1, 2), (2, 0), bias=False)),
    "transposed, much padding": lambda: Between(lambda h, x, up: up(h), 2, nn.ConvTranspose2d(4, 2, 4, (2, 3), 3)),
    "transposed, gaps": lambda: Between(lambda h, x, up: up(h), 2, nn.ConvTranspose2d(4, 2, 2, 3, 0, 1)),
    "transposed, groups": lambda: Between(lambda h, x, up: up(h), 6, nn.ConvTranspose2d(4, 6, 2, 2, groups=2)),
    "transposed, dilation": lambda: Between(lambda h, x, up: up(h), 2, nn.ConvTranspose2d(4, 2, 3, 1, 0, dilation=2)),
    "transposed queries": lambda: Between(lambda h, x, up: torch.cat((up(x), up(x).relu()), 1), 4, nn.ConvTranspose2d(2, 2, 2, 2)),
    "joined": lambda: Between(lambda h, x, more: torch.cat((h, more(h), h), 1), 11, nn.Conv2d(4, 3, 1)),
    "joined with queries": lambda: Between(lambda h, x: torch.cat((x, h), 1), 6),
    "joined along pixels": lambda: Between(lambda h, x: torch.cat((h, h.flip(3)), 3), 4),
    "padded": lambda: Between(lambda h, x: F.pad(h, (1, 0, 2, 1), value=0.3), 4),
    "cut": lambda: Between(lambda h, x: h[:, :, 1:-1, ::2], 4),
    "one row": lambda: Between(lambda h, x: h[:, :, 2].unsqueeze(2) + h, 4),
    "averaged beside itself": lambda: Between(lambda h, x: F.adaptive_avg_pool2d(h, 1) * h, 4),
}
ISLANDS = ()


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype, own: bool) -> None:
    torch.manual_seed(0)
    module = CASES[name]().eval()
    arch = Architecture.from_module(module, (2, 6, 5))
    assert arch.graph is not None, arch.reason
    k, n, tolerance = 3, 18, 2e-5 if dtype == torch.float32 else 1e-10
    weights, queries = rows_near(module, arch, k), queries_like(module, arch, *((k,) if own else ()), n)
    _, targets, values, slope = looped(module, arch, weights, queries)
    losses, gradient = stacked.loss_and_gradient(weights.to(dtype), queries.to(dtype), targets.to(dtype), arch.graph, "mse")
    close(losses, values, tolerance, "losses")
    for slot in arch.graph.slots:
        close(gradient[:, slot.offset : slot.stop], slope[:, slot.offset : slot.stop], tolerance, f"gradient of {slot.name}")


@pytest.mark.parametrize("name", [name for name in CASES if name not in ISLANDS])
def test_no_call_is_left_to_torchs_graph(name: str) -> None:
    arch = Architecture.from_module(CASES[name]().eval(), (2, 6, 5))
    assert arch.graph is not None
    _, tape = tapes_of(compile_program(arch.graph, False, True, True))
    assert not [call for call in tape.calls if isinstance(call, Island)]


@pytest.mark.parametrize("channels", [1, 5, 16, 24])
@pytest.mark.parametrize("n", [1, 16, 33])
def test_a_models_sum_over_queries_does_not_depend_on_its_company(n: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8 * channels, generator=generator)
    every = image_rules._over_queries(x, 8)
    torch.testing.assert_close(every.double(), x.double().view(n, 8, channels).sum(0), rtol=FP32, atol=FP32)
    for models in (1, 2, 3, 4, 6):
        assert torch.equal(image_rules._over_queries(x[:, : models * channels].contiguous(), models), every[:models])
        assert torch.equal(image_rules._over_queries(x[:, -models * channels :].contiguous(), models), every[-models:])


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(
    ("norm", "size"),
    [(lambda: nn.GroupNorm(3, 6), 8), (lambda: nn.InstanceNorm2d(6, affine=True), 8), (lambda: nn.GroupNorm(1, 6), 3)],
    ids=["group", "instance", "one pixel"],
)
def test_a_mean_thirty_times_the_spread_costs_no_digits(norm: Callable[[], nn.Module], size: int, traced: bool) -> None:
    """Of channels-last images, and of one pixel, torch's group norm takes the mean of squares less the square of the mean."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        parts: list[nn.Module] = [nn.Conv2d(3, 6, 3), norm(), nn.Flatten(), nn.Linear(6 * (size - 2) ** 2, 4)]
        models.append(nn.Sequential(*parts, *([] if traced else [Mirrored()])))
        nn.init.constant_(parts[0].bias, 17.0)  # type: ignore[arg-type]
    population, x, targets = Population.from_modules(models, (3, size, size)), torch.randn(9, 3, size, size), torch.randn(3, 9, 4)
    assert (population.architecture.graph is not None) == traced
    weights = population.weights.clone().requires_grad_()
    outputs = batched_forward(weights, x, population.architecture)
    losses = batched_behavioral_loss(weights, None, x, population.architecture, targets=targets, reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), weights)
    for model, made, given, slope in zip(models, outputs, targets, slopes, strict=True):
        wanted = model.double()(x.double())
        assert relative_error(made, wanted) < FP32
        gradients = torch.autograd.grad((wanted - given).square().sum() / 18, list(model.parameters()))
        assert relative_error(slope, torch.cat([g.flatten() for g in gradients])) < FP32


class Mirrored(nn.Module):
    """What cannot be traced, as it asks for the value of a number; it changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().square().sum()) >= 0 else -x


# channels of a model, of a group, pixels: each of torch's own ways forward and back, and passes over pixels
NORMED = [
    (16, 4, (32, 32)),
    (16, 8, (6, 5)),
    (32, 16, (9, 9)),
    (16, 4, (6, 5)),
    (12, 12, (32, 32)),
    (6, 2, (40,)),
    (6, 2, (5,)),
    (4, 1, (4, 3, 3)),
]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("channels", "each", "pixels"), NORMED, ids=str)
def test_group_norm_by_either_way(channels: int, each: int, pixels: tuple[int, ...], affine: bool) -> None:
    """Means fifty times the spread; a model's bits are the same wherever it lies among others."""
    generator, models, n = torch.Generator().manual_seed(0), 5, 7
    layout = torch.channels_last if len(pixels) == 2 else torch.contiguous_format
    x = torch.randn(n, models * channels, *pixels, generator=generator) + 50 * torch.randn(models * channels, *(1,) * len(pixels))
    g = torch.randn(x.shape, generator=generator)
    weight, bias = (torch.randn(models, channels, generator=generator) if affine else None for _ in range(2))
    rule = image_rules.GroupNorm({"eps": 1e-5}, frozenset({"input", *(["weight", "bias"] if affine else [])}), channels // each)

    def run(rows: list[int]) -> dict[str, Tensor]:
        def mine(t: Tensor) -> Tensor:
            return t.unflatten(1, (models, channels))[:, rows].flatten(1, 2).contiguous(memory_format=layout)

        own = {name: t[rows] for name, t in (("weight", weight), ("bias", bias)) if t is not None}
        made, saved = rule.forward({"input": mine(x), **own}, len(rows))
        slopes = rule.backward(mine(g), saved, len(rows))
        return {"made": made.unflatten(1, (len(rows), channels)), **slopes, "input": slopes["input"].unflatten(1, (len(rows), channels))}

    whole = run(list(range(models)))
    ways = image_rules._torchs_own(x.contiguous(memory_format=layout), channels, each)
    assert ways == {(4, 1024): (True, False), (4, 30): (False, False), (2, 5): (False, False)}.get((each, math.prod(pixels)), ways)
    precise = x.double().requires_grad_()
    parts = [t.double().flatten().requires_grad_() for t in (weight, bias) if t is not None]
    wanted = F.group_norm(precise, models * channels // each, *parts)
    right = torch.autograd.grad(wanted, [precise, *parts], g.double())
    names = ["input", *(["weight", "bias"] if affine else [])]
    assert relative_error(whole["made"].flatten(1, 2), wanted) < 3e-5  # fifty roundings of a number of the spread's size
    for name, slope in zip(names, right, strict=True):
        assert relative_error(whole[name].reshape(slope.shape), slope) < 3e-5, name
    for rows in ([0], [4], [3, 1], [2, 4, 0]):
        some = run(rows)
        for name, value in whole.items():
            place = 1 if name in ("made", "input") else 0
            assert torch.equal(some[name], value.index_select(place, torch.tensor(rows))), (name, rows)
