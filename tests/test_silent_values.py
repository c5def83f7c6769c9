"""No silent wrong value: each test is a kind of call that once gave a wrong number without a word."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP32_DEEP, FP64_ROUNDING
from torch import Tensor, nn
from torch.autograd import forward_ad

from wslfast import Architecture, Population, TokenLayout, WslfastError, batched_behavioral_loss, batched_forward
from wslfast.kernels import criteria
from wslfast.kernels.cpu import engine as cpu
from wslfast.testing import oracle_loss, relative_error


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + torch.tanh(self.second(x)))


def _net(name: str) -> Architecture:
    if name == "chain":
        return Architecture.cnn()
    if name == "mlp":
        return Architecture.mlp()
    torch.manual_seed(0)
    return Architecture.from_module(Residual(), (5,))


def _case(name: str, k: int = 3, n: int = 4) -> tuple[Architecture, Tensor, Tensor, Tensor, Tensor]:
    """Architecture, weights, originals, queries, a direction in weights; float64."""
    arch = _net(name)
    generator = torch.Generator().manual_seed(1)
    weights, other, direction = (0.3 * torch.randn(k, arch.num_weights, generator=generator, dtype=torch.float64) for _ in range(3))
    queries = torch.randn(n, *arch.input_shape, generator=generator, dtype=torch.float64)
    return arch, weights, weights + 0.1 * other, queries, direction


def _slope(function: object, at: Tensor, along: Tensor, step: float = 1e-6) -> Tensor:
    return (function(at + step * along) - function(at - step * along)) / (2 * step)  # type: ignore[operator]


NETS = ["chain", "mlp", "opaque"]


# -- transforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("net", NETS)
def test_forward_mode_has_the_true_tangent(net: str, dtype: torch.dtype) -> None:
    """In float32 the tuned CPU path serves the same call without a transform."""
    arch, weights, original, queries, along = _case(net)
    bound = 1e-3 if dtype == torch.float32 else 1e-6
    w, o, x, v = (t.to(dtype) for t in (weights, original, queries, along))
    expected = _slope(lambda w: batched_forward(w, queries, arch), weights, along)
    outputs, tangent = torch.func.jvp(lambda w: batched_forward(w, x, arch), (w,), (v,))
    assert relative_error(outputs, batched_forward(weights, queries, arch)) < FP32
    assert relative_error(tangent, expected) < bound
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, v)
        assert relative_error(forward_ad.unpack_dual(batched_forward(dual, x, arch)).tangent, expected) < bound
        loss = batched_behavioral_loss(dual, o, x, arch, criterion="softmax_mse")
        expected = _slope(lambda w: batched_behavioral_loss(w, original, queries, arch, criterion="softmax_mse"), weights, along)
        assert relative_error(forward_ad.unpack_dual(loss).tangent, expected) < bound


@pytest.mark.parametrize("net", NETS)
def test_forward_mode_through_queries_and_originals(net: str) -> None:
    arch, weights, original, queries, _ = _case(net)
    along = torch.randn(queries.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return batched_behavioral_loss(weights, original, x, arch)

    assert relative_error(torch.func.jvp(loss, (queries,), (along,))[1], _slope(loss, queries, along)) < FP32 / 10


@pytest.mark.parametrize("net", NETS)
def test_vmap_grad_and_their_compositions(net: str) -> None:
    arch, weights, original, queries, along = _case(net)
    many = torch.stack([weights, weights + along, weights - along]).float()
    o, x = original.float(), queries.float()

    def loss(w: Tensor) -> Tensor:
        return batched_behavioral_loss(w, o, x, arch)

    each = torch.stack([batched_forward(w, x, arch) for w in many])
    assert relative_error(torch.vmap(lambda w: batched_forward(w, x, arch))(many), each) < FP32
    assert relative_error(torch.vmap(loss)(many), torch.stack([loss(w) for w in many])) < FP32
    expected = []
    for w in many:
        row = w.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(row), row)[0])
    assert relative_error(torch.vmap(torch.func.grad(loss))(many), torch.stack(expected)) < FP32_DEEP
    line = torch.func.hessian(lambda s: batched_behavioral_loss(weights + s * along, original, queries, arch, criterion="distillation"))
    here = torch.zeros((), dtype=torch.float64)
    slope = torch.func.grad(lambda s: batched_behavioral_loss(weights + s * along, original, queries, arch, criterion="distillation"))
    step = torch.tensor(1e-5, dtype=torch.float64)
    assert relative_error(line(here), (slope(here + step) - slope(here - step)) / (2 * step)) < FP32_DEEP


def test_tokens_are_looked_through_as_well() -> None:
    arch, weights, original, queries, along = _case("chain")
    layout = TokenLayout(arch)
    tokens, direction = layout.tokenize(weights).tokens, layout.tokenize(along).tokens
    tangent = torch.func.jvp(lambda t: batched_behavioral_loss(t, original, queries, arch), (tokens,), (direction,))[1]
    expected = _slope(lambda w: batched_behavioral_loss(w, original, queries, arch), weights, along)
    assert relative_error(tangent, expected) < FP32 / 10
    mapped = torch.vmap(lambda t: layout.tokenize(layout.detokenize(t)).tokens)(torch.stack([tokens, 2 * tokens]))
    assert torch.equal(mapped[1], layout.tokenize(2 * weights).tokens)


def test_what_cannot_be_looked_through_says_what_to_do() -> None:
    arch, weights, original, queries, along = _case("chain")
    for options, words in (({"nan_policy": "omit"}, "use nan_policy='propagate'"), ({"backend": "triton"}, "use backend='torch'")):
        with pytest.raises(WslfastError, match=words):
            torch.func.jvp(lambda w, o=options: batched_behavioral_loss(w, original, queries, arch, **o), (weights,), (along,))


def test_a_flop_counter_counts() -> None:
    """A dispatch mode sees every operator: the count is that of the layers, not zero."""
    from torch.utils.flop_counter import FlopCounterMode

    arch = Architecture.mlp()
    with FlopCounterMode(display=False) as counter:
        batched_forward(torch.zeros(2, arch.num_weights), torch.zeros(3, 14), arch)
    assert counter.get_total_flops() == 2 * 2 * 3 * (14 * 30 + 30 * 15 + 15 * 10)


# -- networks that are not functions of weights and one query ----------------------------------------------------------


class Shifts(nn.Module):
    """Changes its input in place."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return self.last(x)


@pytest.mark.parametrize(
    "last", [nn.Linear(5, 3), nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 2), nn.Flatten())], ids=["vmap", "loop"]
)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_module_that_writes_to_its_input_is_run_right(last: nn.Module, k: int) -> None:
    models = [Shifts(copy.deepcopy(last)) for _ in range(k)]
    for j, model in enumerate(models):
        torch.manual_seed(j)
        for p in model.parameters():
            nn.init.normal_(p)
    arch = Architecture.from_module(models[0], (5,))
    weights = Population.from_state_dicts(arch, [m.state_dict() for m in models]).weights
    queries = torch.randn(4, 5)
    before = queries.clone()
    expected = torch.stack([m(queries.clone()) for m in models]).detach()
    assert relative_error(batched_forward(weights, queries, arch), expected) < FP32 / 10
    assert torch.equal(queries, before)
    row = weights.clone().requires_grad_()
    batched_behavioral_loss(row, None, queries, arch, targets=torch.zeros_like(expected), reduction="none").sum().backward()
    assert torch.equal(queries, before)
    for j, model in enumerate(models):
        model.zero_grad()
        (model(queries.clone()).square().sum() / (2 * len(queries))).backward()
        assert relative_error(row.grad[j], torch.cat([p.grad.flatten() for p in model.parameters()])) < FP32  # type: ignore[index, union-attr]


class Noisy(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner, self.last = kind, nn.Identity(), nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "dropout":
            return self.last(F.dropout(x, 0.5))
        if self.kind == "noise":
            return self.last(x + torch.randn_like(x))
        if self.kind == "python":
            return self.last(x * random.random())
        if self.kind == "counts":
            return self.last(x * self.calls)
        return self.last(x - x.mean(0))


REFUSED = {
    "dropout": "random in evaluation mode.*dropout",
    "noise": "random in evaluation mode.*randn_like",
    "python": "another way the second time",
    "counts": "another way the second time",
    "batch": "depends on the other queries of the batch",
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_is_no_function_of_weights_and_query_is_refused(kind: str, training: bool) -> None:
    with pytest.raises(WslfastError, match=REFUSED[kind]):
        Architecture.from_module(Noisy(kind).train(training), (5,), "mine")


def test_dropout_that_is_always_on_is_named_with_its_place() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5)

    with pytest.raises(WslfastError, match=r"architecture 'mine' is random in evaluation mode .dropout in '1'."):
        Architecture.from_module(nn.Sequential(nn.Linear(5, 4), Always(), nn.LayerNorm(4)), (5,), "mine")


# -- gradients to the queries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("net", NETS)
def test_the_gradient_to_the_queries_has_the_originals_part(net: str, criterion: str) -> None:
    arch, weights, original, queries, _ = _case(net)
    along = torch.randn(queries.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = batched_forward(original, queries, arch)
    for other in ({"original": original}, {"original": None, "targets": targets}):
        for policy in ("propagate", "omit", "raise"):
            x = queries.clone().requires_grad_()

            def loss(x: Tensor, other: dict[str, Tensor] = other, policy: str = policy) -> Tensor:
                return batched_behavioral_loss(weights, queries=x, architecture=arch, criterion=criterion, nan_policy=policy, **other)  # type: ignore[arg-type]

            loss(x).backward()
            assert relative_error((x.grad * along).sum(), _slope(loss, queries, along)) < FP32


def test_a_bad_model_leaves_no_trace_in_the_queries_gradient() -> None:
    arch, weights, original, queries, _ = _case("chain")
    broken = weights.clone()
    broken[1] = float("nan")
    x, y = queries.clone().requires_grad_(), queries.clone().requires_grad_()
    batched_behavioral_loss(broken, original, x, arch, nan_policy="omit").backward()
    batched_behavioral_loss(weights[[0, 2]], original[[0, 2]], y, arch).backward()
    assert relative_error(x.grad, y.grad) < FP64_ROUNDING


# -- criteria ----------------------------------------------------------------------------------------------------------


def test_an_unknown_criterion_raises_everywhere() -> None:
    arch = Architecture.mlp()
    weights, queries, targets = torch.zeros(2, arch.num_weights), torch.zeros(3, 14), torch.zeros(2, 3, 10)
    with pytest.raises(ValueError, match="unknown criterion 'hinge'"):
        cpu.loss_and_gradient(weights, queries, targets, arch.layers, "hinge")
    with pytest.raises(ValueError, match="unknown criterion 'hinge'"):
        criteria.criterion_values(targets, targets, "hinge")
    with pytest.raises(ValueError, match="unknown criterion 'hinge'"):
        criteria.share_of_loss(targets, targets, 3, "hinge", 1.0)
    with pytest.raises(ValueError, match="unknown criterion 'hinge'"):
        oracle_loss(weights, queries, targets, arch, "hinge")
    with pytest.raises(WslfastError, match="criterion: expected one of"):
        batched_behavioral_loss(weights, None, queries, arch, targets=targets, criterion="hinge")


# -- what was refused, or failed in words of torch ---------------------------------------------------------------------


class Ordered(nn.Module):
    """An integer buffer is part of it."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, self.order])


def test_integer_buffers_belong_to_the_architecture() -> None:
    models = [Ordered(torch.arange(6).flip(0)) for _ in range(3)]
    arch = Architecture.from_module(models[0], (6,))
    population = Population.from_state_dicts(arch, [m.state_dict() for m in models])
    queries = torch.randn(4, 6)
    expected = torch.stack([m(queries) for m in models]).detach()
    assert relative_error(batched_forward(population, queries, arch), expected) < FP32 / 10
    models[1].load_state_dict(population.state_dict(2))
    assert torch.equal(models[1](queries), expected[2])
    other = Ordered(torch.arange(6)).state_dict()
    with pytest.raises(WslfastError, match=r"state_dicts\[0\]\['order'\]: expected the architecture's own values"):
        Population.from_state_dicts(arch, [other])


def test_instance_norm_with_running_statistics_has_a_gradient() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    with torch.no_grad():
        module[1].running_mean.normal_()  # type: ignore[union-attr, operator]
        module[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    module.eval()
    arch = Architecture.from_module(module, (1, 6, 6))
    row = Population.from_state_dicts(arch, [module.state_dict()]).weights.requires_grad_()
    queries = torch.randn(5, 1, 6, 6)
    outputs = batched_forward(row, queries, arch)
    assert relative_error(outputs, module(queries)[None]) < FP32 / 10
    batched_behavioral_loss(row, None, queries, arch, targets=torch.zeros(1, 5, 3)).backward()
    (module(queries).square().sum() / 10).backward()
    for name, p in module.named_parameters():
        slot = arch.slots[name]
        assert relative_error(row.grad[0, slot.offset : slot.stop], p.grad.flatten()) < FP32  # type: ignore[index, union-attr]


WRAPPERS = {
    "data-parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda m: torch.compile(nn.DataParallel(m)),
    "inside": lambda m: nn.Sequential(torch.compile(m[0]), *m[1:]),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_modules_are_the_modules_in_them(wrap: str) -> None:
    plain = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    wrapped = WRAPPERS[wrap](copy.deepcopy(plain))
    arch = Architecture.from_module(plain, (5,))
    found = Architecture.from_module(wrapped, (5,))
    assert [p.name for p in found.parameters] == list(plain.state_dict())
    for architecture, state in ((found, wrapped.state_dict()), (arch, wrapped.state_dict()), (found, plain.state_dict())):
        population = Population.from_state_dicts(architecture, [state])
        assert torch.equal(population.weights, Population.from_state_dicts(arch, [plain.state_dict()]).weights)
    stacked = {key: value[None] for key, value in wrapped.state_dict().items()}
    queries = torch.randn(2, 5)
    assert relative_error(batched_forward(stacked, queries, found), plain(queries)[None]) < FP32 / 10


def test_a_key_that_begins_with_module_is_left_alone() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) * 2

    arch = Architecture.from_module(Holder(), (5,))
    assert [p.name for p in arch.parameters] == ["module.weight", "module.bias"]
    Population.from_state_dicts(arch, [Holder().state_dict()])
    Population.from_state_dicts(arch, [nn.DataParallel(Holder()).state_dict()])


class FixedBatch(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.fc = n, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(self.n, 5))


class Large(nn.Module):
    """Cannot run on more than eight queries, which is found at a call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(5, 3), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x)) + torch.zeros(8)[: len(x)].unsqueeze(1)


def test_errors_of_torch_become_errors_that_say_what_to_do() -> None:
    with pytest.raises(WslfastError, match=r"'mine': cannot run on \[n, 5\]"):
        Architecture.from_module(FixedBatch(32), (5,), "mine")
    with pytest.raises(WslfastError, match=r"TorchScript.*pass the module that it was made from"):
        Architecture.from_module(torch.jit.trace(nn.Linear(5, 3), torch.zeros(1, 5)), (5,))
    with pytest.raises(WslfastError, match=r"without a shape.*run it once"):
        Architecture.from_module(nn.Sequential(nn.LazyLinear(3)), (5,))
    arch = Architecture.from_module(Large(), (5,), "mine")
    weights = torch.zeros(2, arch.num_weights)
    for call in (
        lambda: batched_forward(weights, torch.zeros(9, 5), arch),
        lambda: batched_behavioral_loss(weights, weights, torch.zeros(9, 5), arch),
    ):
        with pytest.raises(WslfastError, match=r"'mine': its forward failed on queries \[9, 5\]"):
            call()


# -- random numbers of the caller's ------------------------------------------------------------------------------------


def _traced_with_dropout() -> None:
    Architecture.from_module(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)), (5,))


def _viewed() -> None:
    from wslfast.permutation import random_views

    arch = Architecture.from_module(Residual(), (5,))
    random_views(torch.randn(2, arch.num_weights, generator=torch.Generator().manual_seed(3)), arch, torch.Generator().manual_seed(4))


def _importance() -> None:
    from wslfast.codes.trained_joint import OutputImportance

    OutputImportance(3)


def _trained() -> None:
    from wslfast.training.trainer import seed_generators

    seed_generators(5, torch.device("cpu"))


@pytest.mark.parametrize("call", [_traced_with_dropout, _viewed, _importance, _trained])
def test_generators_of_gpus_are_not_seeded(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` seeds those of all GPUs, and no ``fork_rng`` of ours puts them back: dropout in the caller's training would
    begin anew."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with torch.random.fork_rng(devices=[]):
        call()
    assert not seeded


def test_the_callers_generator_stays_where_it_is() -> None:
    state = torch.get_rng_state()
    _importance()
    assert torch.equal(state, torch.get_rng_state())
