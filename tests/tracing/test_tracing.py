"""What a forward may be written like: it is followed and right, runs as it is with the reason named, or is refused with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from graph_oracle import check, check_record, close, queries_like, rows_near
from torch import Tensor, nn

import wslfast
from wslfast import engine
from wslfast.architecture import Architecture

Forward = Callable[["Written", Tensor], Any]


class Written(nn.Module):
    """Two linear layers, a few buffers, and a forward as it is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.fc, self.out, self.call = nn.Linear(6, 6), nn.Linear(6, 3), forward
        self.register_buffer("order", torch.tensor([3, 1, 5, 0, 2, 4]))
        self.register_buffer("picked", torch.tensor([True, False, True, True, False, True]))
        self.register_buffer("scale", torch.randn(6))
        self.register_buffer("shift", torch.randn(6), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


# -- followed ----------------------------------------------------------------------------------------------------------

FOLLOWED: dict[str, Forward] = {}


def followed(run: Forward) -> Forward:
    FOLLOWED[run.__name__] = run
    return run


@followed
def a_column_is_written(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    h[:, 0] = 1.0
    h[:, 1] = h[:, 2] * 2
    return m.out(h)


@followed
def some_columns_are_added_to(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    h[..., :2] += 3 * x[..., :2]
    h[..., 4:].mul_(0.5)
    return m.out(h)


@followed
def a_view_is_written_to(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    view = h.view(-1, 2, 3)
    view[:, 0].mul_(2)
    return m.out(F.relu_(h))


@followed
def a_mask_is_written(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    h[h < 0] = 0.25
    h[:, m.picked] = h[:, m.picked] * 2
    return m.out(h.masked_fill_(h > 1, 1.0))


@followed
def rows_are_masked(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    h[x[:, 0] > 0] = -0.5
    return m.out(h)


@followed
def the_queries_are_written_to(m: Written, x: Tensor) -> Tensor:
    x[:, 0] = 0
    x -= 0.5
    return m.out(m.fc(x))


@followed
def filled_one_after_another(m: Written, x: Tensor) -> Tensor:
    made, more = torch.zeros(x.shape[0], 6), torch.empty_like(x)
    for i in range(6):
        made[:, i] = m.fc(x)[:, 5 - i]
        more[:, i] = x[:, i] ** 2
    return m.out(made + more)


@followed
def filled_by_index(m: Written, x: Tensor) -> Tensor:
    h = x.clone()
    h.index_fill_(1, torch.tensor([0, 2]), 0.3)
    return m.out(m.fc(h).scatter_(1, torch.tensor([[1, 3]]).expand(len(x), 2), 0.5))


@followed
def in_training_only(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    if m.training:
        h = h + torch.randn_like(h)
    return m.out(F.dropout(h, 0.5, m.training))


@followed
def dropped_in_place(m: Written, x: Tensor) -> Tensor:
    h = F.dropout(m.fc(x), 0.3, m.training, inplace=True)
    return m.out(F.alpha_dropout(h, 0.3, False, inplace=True))


@followed
def types_change(m: Written, x: Tensor) -> Tensor:
    whole = (3 * x).long()
    h = m.fc(x + whole.to(x.dtype)).to(m.out.weight.dtype)
    return m.out(h * (x > 0) + whole.bool().float() + torch.zeros_like(whole, dtype=torch.float32))


@followed
def the_number_of_queries_is_used(m: Written, x: Tensor) -> Tensor:
    n = x.shape[0]
    h = m.fc(x).reshape(n * 2, 3).softmax(-1).reshape(n, -1)
    return m.out(h + torch.ones(n, 1) * x.new_full((len(x), 6), 0.5))


@followed
def buffers_are_used(m: Written, x: Tensor) -> Tensor:
    return m.out(m.fc(x)[:, m.order.flip(0)] * m.scale + m.shift + m.order[:1])


@followed
def a_constant_mask_picks(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    return m.out(torch.cat((h[:, m.picked], h[:, ~m.picked]), 1))


@followed
def constants_are_made(m: Written, x: Tensor) -> Tensor:
    angles = torch.arange(6).to(x) * (2 * torch.pi / 6)
    return m.out(m.fc(x) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + angles.sin() + torch.eye(6)[2])


@followed
def a_gradient_is_stopped(m: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.fc(x)
    h = h + x
    return m.out(h + (h.round() - h).detach())


@followed
def both_signs_side_by_side(m: Written, x: Tensor) -> Tensor:
    h = m.fc(torch.cat((x, -x)))
    return m.out(h[: len(x)].relu() - h[len(x) :].relu())


@followed
def a_factor_that_is_the_number_of_queries(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    return m.out(torch.add(h, h.tanh(), alpha=len(x)) - h.tanh() * x.new_ones(len(x)).sum())


@followed
def checked_by_shape(m: Written, x: Tensor) -> Tensor:
    assert x.shape[1] == 6
    if x.dim() == 3:
        raise ValueError("one query at a time")
    return m.out(m.fc(x)).squeeze()


@pytest.mark.parametrize("name", FOLLOWED)
def test_is_followed(name: str) -> None:
    module = Written(FOLLOWED[name]).eval()
    arch = Architecture.from_module(module, (6,))
    assert arch.graph is not None, arch.reason
    check(module, arch, rows_near(module, arch, 3), queries_like(module, arch, 5), (1e-7, 1e-5))
    check(module, arch, rows_near(module, arch, 3), queries_like(module, arch, 3, 5), (None, 1e-5))


@pytest.mark.parametrize("name", ["a_view_is_written_to", "buffers_are_used", "a_constant_mask_picks"])
def test_two_traces_are_equal(name: str) -> None:
    module = Written(FOLLOWED[name])
    check_record(module, Architecture.from_module(module, (6,)))
    assert module.training


# -- runs as it is, and why ----------------------------------------------------------------------------------------------

UNFOLLOWED: dict[str, tuple[Forward, str]] = {}


def unfollowed(why: str) -> Callable[[Forward], Forward]:
    def keep(run: Forward) -> Forward:
        UNFOLLOWED[run.__name__] = run, why
        return run

    return keep


@unfollowed(r"control flow that looks at numbers \(test_tracing.py:\d+: if h.sum\(\) > 0:\); torch.where")
def a_branch(m: Written, x: Tensor) -> Tensor:
    h = m.fc(x)
    if h.sum() > 0:
        h = h * 1
    return m.out(h)


@unfollowed(r"control flow that looks at numbers \(test_tracing.py:\d+: .*float\(")
def a_number_is_read(m: Written, x: Tensor) -> Tensor:
    return m.out(m.fc(x) * float(m.out.weight.sum()))


@unfollowed(r"control flow that looks at numbers .*assert")
def an_assertion(m: Written, x: Tensor) -> Tensor:
    assert (x.abs() < 1e9).all()
    return m.out(m.fc(x))


@unfollowed("a query's place would count")
def a_table_by_place(m: Written, x: Tensor) -> Tensor:
    return m.out(m.fc(x)) + 1e-6 * torch.eye(900)[: len(x), :3]


@unfollowed("another number of queries takes another way")
def query_by_query(m: Written, x: Tensor) -> Tensor:
    return torch.stack([m.out(m.fc(row)) for row in x])


@unfollowed("other gradients than it has")
def a_backward_of_its_own(m: Written, x: Tensor) -> Tensor:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return g[0]

    return m.out(Straight.apply(m.fc(x)))


@unfollowed(r"operation aten.special_i0 is not in the table \(test_tracing.py:\d+")
def another_operation(m: Written, x: Tensor) -> Tensor:
    return m.out(torch.special.i0(m.fc(x)))


@unfollowed("transform of torch.func inside")
def a_transform(m: Written, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: m.out(m.fc(row)))(x)


@unfollowed(r"draws random numbers \(aten.rand\)")
def random_numbers_that_do_not_count(m: Written, x: Tensor) -> Tensor:
    return m.out(m.fc(x) + 0 * torch.rand(6))


@unfollowed("a conversion to torch.bfloat16")
def a_narrower_type(m: Written, x: Tensor) -> Tensor:
    return m.out(m.fc(x).to(torch.bfloat16).to(x.dtype))


@unfollowed("another way than as a multiple")
def a_number_by_the_number_of_queries(m: Written, x: Tensor) -> Tensor:
    return m.out(m.fc(x) * (1 / len(x))) * len(x) - m.out.bias * (len(x) - 1)


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_is_run_as_it_is(name: str) -> None:
    run, why = UNFOLLOWED[name]
    module = Written(run).eval()
    arch = Architecture.from_module(module, (6,))
    assert arch.graph is None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(arch.reason)
    weights = rows_near(module, arch, 3)
    for lead in ((5,), (3, 5)):
        queries = queries_like(module, arch, *lead)
        loose = 2e-2 if name == "a_narrower_type" else 1e-5
        own = len(lead) == 2
        wanted = torch.stack([_one(module, arch, row, queries[j] if own else queries) for j, row in enumerate(weights.float())])
        close(engine.forward(weights.float(), queries.float(), arch), wanted.double(), loose, name)


def _one(module: nn.Module, arch: Architecture, row: Tensor, x: Tensor) -> Tensor:
    state = {s.name: row[s.offset : s.stop].view(s.shape) for s in arch.parameters}
    with torch.no_grad():
        return torch.func.functional_call(copy.deepcopy(module), state, (x.float(),))


# -- refused -------------------------------------------------------------------------------------------------------------


def _counts(m: Written, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.out(m.fc(x)) * m.calls


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class _First(nn.Module):
    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout always on": (lambda: Written(lambda m, x: m.out(F.dropout(m.fc(x)))), r"random in evaluation mode \(dropout\): .*self.training"),
    "noise always on": (lambda: Written(lambda m, x: m.out(m.fc(x) + torch.randn_like(x))), r"random in evaluation mode \(randn_like\)"),
    "noise in a part": (lambda: nn.Sequential(nn.Linear(6, 4), _Noise()), r"random in evaluation mode \(randn_like in '1'\)"),
    "a sample": (lambda: Written(lambda m, x: m.out(torch.bernoulli(m.fc(x).sigmoid()))), r"\(bernoulli\)"),
    "a draw of classes": (lambda: Written(lambda m, x: m.out(x.gather(1, torch.multinomial(m.fc(x).softmax(1), 6)))), r"\(multinomial\)"),
    "it counts": (lambda: Written(_counts), "keeps something between calls"),
    "a mean over queries": (lambda: Written(lambda m, x: m.out(m.fc(x) - x.mean(0))), "depends on the other queries"),
    "a largest of all queries": (lambda: Written(lambda m, x: m.out(m.fc(x) / m.fc(x).abs().max())), "depends on the other queries"),
    "sums of earlier queries": (lambda: Written(lambda m, x: m.out(m.fc(x).cumsum(0))), "depends on the other queries"),
    "less the first query": (lambda: Written(lambda m, x: m.out(m.fc(x) - m.fc(x)[:1])), "depends on the other queries"),
    "a query's place": (lambda: Written(lambda m, x: m.out(m.fc(x) + torch.arange(len(x))[:, None])), "depends on the other queries"),
    "queries as time": (lambda: nn.Sequential(nn.GRU(6, 4), _First()), "without batch_first"),
    "another way for many": (lambda: Written(lambda m, x: m.out(m.fc(x)) * (2 if len(x) > 100 else 1)), "another one among 600 than among 4"),
    "sorted queries": (lambda: Written(lambda m, x: m.out(m.fc(x)).sort(0).values), "depends on the other queries"),
    "batch norm without statistics": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)), "'1' is a batch norm without running statistics"),
    "two answers": (lambda: Written(lambda m, x: (m.out(x), x)), "got a tuple; name a part of it with output="),
    "answers by name": (lambda: Written(lambda m, x: {"logits": m.out(x)}), "got a dict; name a part of it with output="),
    "no answer": (lambda: Written(lambda m, x: None), "got a NoneType"),
    "classes, not logits": (lambda: Written(lambda m, x: m.out(x).argmax(-1)), "expected floating outputs"),
    "one answer for all": (lambda: Written(lambda m, x: m.out(x).mean()), "expected floating outputs"),
    "another input": (lambda: nn.Linear(7, 3), r"cannot run on \[n, 6\]"),
    "two inputs": (lambda: nn.Bilinear(6, 6, 3), r"cannot run on \[n, 6\]: .*missing 1 required positional argument"),
    "lazy": (lambda: nn.LazyLinear(3), "parameters without a shape .* run it once"),
    "scripted": (lambda: torch.jit.script(nn.Linear(6, 3)), "TorchScript module, whose code cannot be read"),
    "nothing to learn": (lambda: nn.ReLU(), "it has no parameters"),
    "no module": (lambda: torch.relu, "expected a torch.nn.Module"),  # type: ignore[dict-item,return-value]
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(wslfast.WslfastError, match=sentence):
        Architecture.from_module(make(), (6,))


class _Pair(NamedTuple):
    first: Tensor
    second: Tensor


@pytest.mark.parametrize(
    ("answer", "part", "sentence"),
    [
        (lambda y: {"logits": y}, "aux", r"output: expected a part of the answer, one of \['logits'\], got 'aux'"),
        (lambda y: {"logits": y}, -1, r"one of \['logits'\], got -1"),
        (lambda y: (y, 2 * y), 2, r"one of \[0, 1\], got 2"),
        (lambda y: (y, 2 * y), "aux", r"one of \[0, 1\], got 'aux'"),
        (lambda y: y, 0, r"as the answer is one tensor, got 0"),
    ],
)  # fmt: skip
def test_a_part_that_the_answer_has_not_is_named(answer: Callable[[Tensor], Any], part: str | int, sentence: str) -> None:
    with pytest.raises(wslfast.WslfastError, match=sentence):
        Architecture.from_module(Written(lambda m, x: answer(m.out(m.fc(x)))), (6,), output=part)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (lambda y: {"a": y, "b": 2 * y}, "b"),
        (lambda y: (y, 2 * y), -1),
        (lambda y: _Pair(y, 2 * y), "second"),
        (lambda y: (2 * y).unsqueeze(-1).max(-1), "values"),
    ],
)  # fmt: skip
def test_a_part_of_the_answer(answer: Callable[[Tensor], Any], part: str | int) -> None:
    module = Written(lambda m, x: answer(m.out(m.fc(x))))
    arch, x = Architecture.from_module(module, (6,), output=part), torch.randn(5, 6)
    row = wslfast.Population.from_state_dicts(arch, [module.state_dict()]).weights
    close(engine.forward(row, x, arch)[0], 2 * module.eval().out(module.fc(x)).detach().double(), 1e-5, "outputs")


# -- modules in any state ------------------------------------------------------------------------------------------------


def test_a_weight_that_a_step_of_training_left() -> None:
    """The older weight and spectral norm keep a computed weight, which torch does not copy."""
    module = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(6, 3)))
    module(torch.randn(4, 6)).sum().backward()
    arch = Architecture.from_module(module, (6,))
    assert arch.graph is not None
    row = wslfast.Population.from_state_dicts(arch, [module.state_dict()]).weights
    x = torch.randn(5, 6)
    close(engine.forward(row, x, arch)[0], module.eval()(x).detach().double(), 1e-5, "outputs")


def test_the_fused_encoder_is_not_taken_for_random() -> None:
    """Its answer differs from its parts' in the last bits."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    module = nn.Sequential(nn.Unflatten(1, (3, 6)), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten())
    assert Architecture.from_module(module, (18,)).graph is not None


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_dropout_in_place(kind: Any) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), kind(0.2, inplace=True), nn.Flatten(), nn.Linear(48, 2))
    assert Architecture.from_module(module, (2, 6, 6)).graph is not None


@pytest.mark.parametrize("state", ["train", "half", "double", "no gradients", "wrapped"])
def test_any_state_gives_the_same_network(state: str) -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    plain = Architecture.from_module(copy.deepcopy(module).eval(), (6,), "net")
    changed = {
        "train": lambda: module.train(), "half": lambda: module.bfloat16(), "double": lambda: module.double(), "no gradients": lambda: module.requires_grad_(False),
        "wrapped": lambda: nn.DataParallel(module),
    }[state]()  # fmt: skip
    assert Architecture.from_module(changed, (6,), "net") == plain
    assert changed.training
