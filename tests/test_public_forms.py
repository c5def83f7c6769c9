"""Forms of the two public calls: each model's own queries, outputs of any shape, parts of an answer, numbers of classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP64, FP64_GRADIENT, FP64_ROUNDING
from torch import Tensor, nn

from wslfast import Architecture, Population, WslfastError, batched_behavioral_loss, batched_forward, engine
from wslfast.kernels.criteria import CRITERIA
from wslfast.testing import as_module, relative_error


class Dense(nn.Module):
    """One class distribution a pixel, ``[n, K, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.a(x)))


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).square().sum(-1)


class Heads(nn.Module):
    """A policy with a value: two answers."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.body, self.policy, self.value, self.named = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 1), named

    def forward(self, x: Tensor) -> object:
        h = self.body(x).tanh()
        return {"policy": self.policy(h), "value": self.value(h)} if self.named else (self.policy(h), self.value(h))


def _models(make: object, k: int = 3) -> list[nn.Module]:
    made = []
    for j in range(k):
        torch.manual_seed(j)
        made.append(make().double())  # type: ignore[operator]
    return made


def _rows(arch: Architecture, models: list[nn.Module]) -> Tensor:
    return torch.stack([torch.cat([m.state_dict()[s.name].flatten() for s in arch.parameters]) for m in models]).double()


@pytest.mark.parametrize("net", ["cnn", "mlp", "graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_queries_of_each_model_its_own(net: str, dtype: torch.dtype) -> None:
    arch = {"cnn": Architecture.cnn(), "mlp": Architecture.mlp(), "graph": Architecture.siren(3, (6,), 2)}[net]
    k, n, bound = 4, 5, 1e-4 if dtype == torch.float32 else 1e-10
    rows, other = (arch.initial_weights(["default"] * k, range(s, s + k)).to(dtype) for s in (0, 9))
    queries = torch.randn(k, n, *arch.input_shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    each = torch.cat([batched_forward(rows[j : j + 1], queries[j], arch) for j in range(k)])
    assert relative_error(batched_forward(rows, queries, arch), each) < bound
    for policy in ("propagate", "omit"):
        leaf, x = rows.clone().requires_grad_(), queries.clone().requires_grad_()
        values = batched_behavioral_loss(leaf, other, x, arch, reduction="none", nan_policy=policy)
        values.sum().backward()
        plain = rows.clone().requires_grad_()
        batched_behavioral_loss(plain, other, queries, arch, reduction="sum", nan_policy=policy).backward()
        assert relative_error(plain.grad, leaf.grad) < bound  # type: ignore[arg-type]
        for j in range(k):
            one, own = rows[j : j + 1].clone().requires_grad_(), queries[j].clone().requires_grad_()
            value = batched_behavioral_loss(one, other[j : j + 1], own, arch)
            value.backward()
            assert relative_error(values[j], value) < bound
            assert relative_error(leaf.grad[j], one.grad[0]) < bound  # type: ignore[index]
            assert relative_error(x.grad[j], own.grad) < bound  # type: ignore[index, arg-type]
    with pytest.raises(WslfastError, match=rf"or \[{k}, n, .*got \[3, "):
        batched_forward(rows, queries[:3], arch)


def test_own_queries_of_a_broken_model_stay_its_own() -> None:
    arch = Architecture.cnn()
    rows = arch.initial_weights(["default"] * 3, range(3))
    rows[1] = float("nan")
    queries = torch.randn(3, 4, 1, 28, 28).requires_grad_()
    batched_behavioral_loss(rows, rows.flip(0).nan_to_num(), queries, arch, nan_policy="omit").backward()
    assert queries.grad is not None
    assert queries.grad.isfinite().all()
    assert not queries.grad[1].any()


def test_classes_moved_last_leave_training_mode_as_it_was() -> None:
    """Dropout, buffers that nobody trains and what cannot be trained are known of the moved network, too, whichever of equals came first."""

    class Doubled(nn.Module):
        def __init__(self, doubled: bool) -> None:
            super().__init__()
            self.only, self.doubled = nn.Conv2d(2, 3, 1), doubled
            self.register_buffer("factor", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.only(x) * self.factor
            return x * 2 if self.doubled and self.training else x

    plain, doubled = (Architecture.from_module(Doubled(d), (2, 4, 4)) for d in (False, True))
    assert plain == doubled
    for arch in (plain, doubled):
        moved = arch.with_classes_last(0)
        assert arch.graph is not None
        assert moved.graph is not None
        assert moved.graph.training.fixed == arch.graph.training.fixed == ("factor",)
        assert engine.random_in_training(moved) == engine.random_in_training(arch) == (arch is doubled)
        weights, queries = torch.randn(2, arch.num_weights), torch.randn(3, 2, 4, 4)
        targets = torch.randn(2, 3, 3, 4, 4)
        losses = [engine.training_step(weights, queries, t, a, "mse")[0] for a, t in ((arch, targets), (moved, targets.movedim(2, -1)))]
        assert relative_error(losses[1], losses[0]) < FP32


@pytest.mark.parametrize("criterion", CRITERIA)
def test_classes_on_any_axis(criterion: str) -> None:
    models, others = _models(Dense), _models(Dense, 6)[3:]
    arch = Architecture.from_module(models[0], (2, 6, 5))
    assert arch.output_shape == (4, 6, 5)
    rows, original = _rows(arch, models), _rows(arch, others)
    queries = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    leaf = rows.clone().requires_grad_()
    values = batched_behavioral_loss(leaf, original, queries, arch, criterion=criterion, reduction="none", class_axis=0)
    values.sum().backward()
    outputs = batched_forward(original, queries, arch)
    given = batched_behavioral_loss(rows, None, queries, arch, targets=outputs, criterion=criterion, class_axis=-3)
    assert relative_error(given, values.mean()) < FP64
    n = len(queries)
    for j, (model, other) in enumerate(zip(models, others, strict=True)):
        model.zero_grad()
        y, t = model(queries), other(queries).detach()
        if criterion == "mse":
            value = (y - t).square().sum() / (2 * n)
        elif criterion == "huber":
            value = F.huber_loss(y, t, reduction="sum") / n
        elif criterion == "softmax_mse":
            value = (y.softmax(1) - t.softmax(1)).square().mean()
        elif criterion == "cross_entropy":
            value = F.cross_entropy(y, t.softmax(1), reduction="sum") / n
        else:
            value = 4 * F.kl_div((y / 2).log_softmax(1), (t / 2).softmax(1), reduction="sum") / n
        value.backward()
        assert relative_error(values[j], value) < FP64
        assert relative_error(leaf.grad[j], torch.cat([p.grad.flatten() for p in model.parameters()])) < FP64_GRADIENT  # type: ignore[index, union-attr]


def test_one_number_a_query() -> None:
    models = _models(Scalar)
    arch = Architecture.from_module(models[0], (5,))
    assert arch.output_shape == ()
    rows, queries = _rows(arch, models), torch.randn(4, 5, dtype=torch.float64)
    outputs = batched_forward(rows, queries, arch)
    assert outputs.shape == (3, 4)
    assert relative_error(outputs, torch.stack([m(queries) for m in models])) < FP64_ROUNDING
    value = batched_behavioral_loss(rows, rows.flip(0), queries, arch)
    assert relative_error(value, (outputs - outputs.flip(0)).square().sum(1).mean() / 8) < FP64_ROUNDING
    with pytest.raises(WslfastError, match=r"class_axis: expected an axis of one answer \[\]"):
        batched_behavioral_loss(rows, rows.flip(0), queries, arch, criterion="softmax_mse")
    with pytest.raises(WslfastError, match=r"class_axis: expected an axis"):
        batched_behavioral_loss(rows, rows, queries, arch, criterion="softmax_mse", class_axis=3)


@pytest.mark.parametrize(("named", "part", "out"), [(False, 0, 3), (False, 1, 1), (True, "policy", 3), (True, "value", 1)])
def test_a_part_of_an_answer(named: bool, part: str | int, out: int) -> None:
    models = _models(lambda: Heads(named))
    with pytest.raises(WslfastError, match="name a part of it with output="):
        Architecture.from_module(models[0], (5,))
    arch = Architecture.from_module(models[0], (5,), output=part)
    assert (arch.name, arch.output_shape) == ("Heads", (out,))
    population = Population.from_state_dicts(arch, [m.state_dict() for m in models])
    queries = torch.randn(4, 5)
    expected = torch.stack([m(queries.double())[part] for m in models])  # type: ignore[index]
    assert relative_error(batched_forward(population, queries, arch), expected) < FP32
    models[0].load_state_dict(population.state_dict(2))


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_numbers_of_classes(classes: int) -> None:
    for make in (Architecture.cnn, Architecture.cnn2, Architecture.cnn3, Architecture.lenet5, Architecture.resnet18):
        arch = make(num_classes=classes, **({"width": 4} if make == Architecture.resnet18 else {}))  # type: ignore[operator]
        assert arch.num_classes == classes
        rows = arch.initial_weights(["default"], [0])
        assert batched_forward(rows, torch.randn(2, *arch.input_shape), arch).shape == (1, 2, classes)


def test_siren_is_its_formula() -> None:
    arch = Architecture.siren(2, (8, 7), 3, omega=20.0, offset=0.5)
    rows = arch.initial_weights(["default"] * 2, [0, 1]).double()
    assert [p.name for p in arch.parameters] == [f"seq.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    grid = torch.rand(6, 2, dtype=torch.float64)
    outputs = batched_forward(rows, grid, arch)
    for j in range(2):
        x = grid
        state = Population(arch, rows).state_dict(j)
        for i in range(3):
            x = F.linear(x, state[f"seq.{i}.weight"].double(), state[f"seq.{i}.bias"].double())
            x = torch.sin(20 * x) if i < 2 else x + 0.5
        assert relative_error(outputs[j], x) < FP32
    assert relative_error(as_module(arch)(grid.float()), torch.full((6, 3), 0.5)) < FP32 / 10  # of zeros
