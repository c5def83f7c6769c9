"""Weight matching, permuted views and aligned checkpoints of ``sane`` 2.x: the same draws, the same permutations, networks of their own."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sane2_package import CNN3, sane2  # noqa: F401 - a fixture
from tolerances import FP32, FP32_DEEP
from torch import nn

from wslfast.errors import WslfastError
from wslfast.sane import mlp_permutation_spec, rebasin
from wslfast.sane.v2 import augmentation
from wslfast.sane.v2.modules import copied, tensors_of

pytest.importorskip("scipy")


def _mlp(seed: int, width: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    sizes = [5, width, width, width, 3]
    return {
        f"layer{i}.{part}": torch.randn(*shape)
        for i, (a, b) in enumerate(pairwise(sizes))
        for part, shape in (("weight", (b, a)), ("bias", (b,)))
    }


def _cnn(p: SimpleNamespace, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return p.zoo_dataset_models.get_model(CNN3)


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_matching_is_the_published_descent_to_the_bit(sane2: SimpleNamespace, network: str) -> None:  # noqa: F811
    basin = sane2.git_re_basin
    if network == "mlp":
        spec, states = mlp_permutation_spec(3), [_mlp(seed) for seed in range(5)]
    else:
        spec, states = basin.zoo_cnn_large_permutation_spec(), [_cnn(sane2, seed).state_dict() for seed in range(3)]
    for j, state in enumerate(states[1:]):
        results = []
        for run in (basin.weight_matching, rebasin.weight_matching):
            torch.manual_seed(j)
            found = run(spec, states[0], state)
            results.append((found, torch.get_rng_state()))
        (a, drawn_a), (b, drawn_b) = results
        _same(a, b)
        assert torch.equal(drawn_a, drawn_b)
        worst = {p: torch.arange(len(v)) for p, v in b.items()}
        assert rebasin.objective(spec, states[0], state, b) >= rebasin.objective(spec, states[0], state, worst)


def test_a_reference_that_changed_is_not_taken_for_the_old_one() -> None:
    spec, a, b = mlp_permutation_spec(3), _mlp(0), _mlp(1)
    torch.manual_seed(0)
    first = rebasin.weight_matching(spec, a, b)
    a["layer1.weight"].data.copy_(torch.randn(12, 12))  # no version counter sees this
    torch.manual_seed(0)
    second = rebasin.weight_matching(spec, a, b)
    rebasin._last.clear()
    torch.manual_seed(0)
    _same(second, rebasin.weight_matching(spec, a, b))
    assert any(not torch.equal(first[p], second[p]) for p in first)


def test_another_threads_reference_is_not_taken_for_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, a, b, other = mlp_permutation_spec(3), _mlp(0), _mlp(1), _mlp(2)
    torch.manual_seed(0)
    expected = rebasin.weight_matching(spec, a, b)
    real = rebasin._Reference.is_of
    theirs = rebasin._Reference(rebasin._last[0].plan, other)

    def meanwhile(self: rebasin._Reference, *arguments: Any) -> bool:
        found = real(self, *arguments)
        rebasin._last[:] = [theirs]
        return found

    monkeypatch.setattr(rebasin._Reference, "is_of", meanwhile)
    torch.manual_seed(0)
    _same(rebasin.weight_matching(spec, a, b), expected)


def test_a_permuted_model_is_found_again_and_a_first_guess_is_used() -> None:
    spec, a = mlp_permutation_spec(3), _mlp(0)
    from wslfast.sane import apply_permutation

    perm = {f"P_{i}": torch.randperm(12) for i in range(3)}
    moved = apply_permutation(spec, perm, a)
    found = rebasin.weight_matching(spec, a, moved)
    assert all(torch.equal(apply_permutation(spec, found, moved)[name], a[name]) for name in a)
    start = {p: value.float() for p, value in found.items()}
    assert rebasin.weight_matching(spec, a, moved, init_perm=start) is start
    assert all(torch.equal(start[p].long(), found[p].long()) for p in found)


def test_what_it_cannot_match_is_the_originals_or_an_error() -> None:
    spec, a = mlp_permutation_spec(3), _mlp(0)
    half = {name: value.half() for name, value in a.items()}
    assert rebasin.weight_matching(spec, a, half, original=lambda *_: "theirs") == "theirs"
    with pytest.raises(WslfastError, match="float32 tensors of one shape"):
        rebasin.weight_matching(spec, a, half)
    for a_too in (half, {name: value.bfloat16() for name, value in a.items()}, {name: value.to("meta") for name, value in a.items()}):
        assert rebasin.weight_matching(spec, a_too, a_too, original=lambda *_: "theirs") == "theirs"
        with pytest.raises(WslfastError, match=r"layer0\.weight': expected float32 tensors of one shape on the CPU"):
            rebasin.weight_matching(spec, a_too, a)
    whole = {f"P_{i}": torch.arange(12.0) for i in range(3)}
    for change in ({"P_0": torch.arange(5.0)}, {"P_1": torch.zeros(12)}, {"P_9": torch.arange(12.0)}):
        with pytest.raises(WslfastError, match=f"init_perm: expected a permutation .* not so for {list(change)}".replace("[", r"\[")):
            rebasin.weight_matching(spec, a, a, init_perm={**whole, **change})
    with pytest.raises(WslfastError, match=r"not so for \['P_2'\]"):
        rebasin.weight_matching(spec, a, a, init_perm={p: v for p, v in whole.items() if p != "P_2"})
    with pytest.raises(WslfastError, match="layer3"):
        rebasin.weight_matching(spec, a, {name: value for name, value in a.items() if "layer3" not in name})


@pytest.mark.parametrize("kind", ["views", "align"])
def test_augmented_checkpoints_are_the_published_ones(sane2: SimpleNamespace, kind: str) -> None:  # noqa: F811
    checkpoint = sane2.checkpoint.Checkpoint(_cnn(sane2, 1), {"eval_results": {"test_acc": [0.5]}}, "zoo")
    spec = sane2.git_re_basin.zoo_cnn_large_permutation_spec()
    module = sane2.checkpoint_augmentation
    if kind == "views":
        made, ours = module.PermutationAugmentation(spec, 3), augmentation.permute
    else:
        made, ours = module.CheckpointAligner(spec, sane2.checkpoint.Checkpoint(_cnn(sane2, 2))), augmentation.align
    torch.manual_seed(0)
    expected, drawn = made(checkpoint), torch.get_rng_state()
    torch.manual_seed(0)
    found = ours(made, checkpoint, original=lambda *_: pytest.fail("the original was asked"))
    assert torch.equal(drawn, torch.get_rng_state())
    assert len(found) == len(expected)
    x = torch.randn(4, 3, 32, 32)
    for a, b in zip(expected, found):
        _same(a.model.state_dict(), b.model.state_dict())
        assert (a.metadata, a.zoo_root_dir) == (b.metadata, b.zoo_root_dir)
        torch.testing.assert_close(b.model.eval()(x), checkpoint.model.eval()(x), rtol=FP32_DEEP, atol=FP32)  # a view is the same function
    last = found[-1]
    assert last.metadata is not checkpoint.metadata
    assert last.metadata["eval_results"]["test_acc"] is not checkpoint.metadata["eval_results"]["test_acc"]
    before = copy.deepcopy(checkpoint.model.state_dict())
    with torch.no_grad():
        for parameter in last.model.parameters():
            assert parameter.requires_grad
            assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()  # a file of it holds nothing else
            parameter.zero_()
    _same(before, checkpoint.model.state_dict())


def test_networks_with_a_will_of_their_own_are_left_to_the_original(sane2: SimpleNamespace) -> None:  # noqa: F811
    made = sane2.checkpoint_augmentation.PermutationAugmentation(sane2.git_re_basin.zoo_cnn_large_permutation_spec(), 2)

    def asked(model: nn.Module) -> bool:
        return augmentation.permute(made, sane2.checkpoint.Checkpoint(model), original=lambda *_: "theirs") == "theirs"

    assert not asked(_cnn(sane2, 0))
    unknown = _cnn(sane2, 0)
    unknown.extra = nn.Linear(2, 2)
    assert asked(unknown)  # the spec does not know the names
    graded = _cnn(sane2, 0)
    graded.module_list[0].weight.grad = torch.ones_like(graded.module_list[0].weight)
    assert asked(graded)  # a deep copy keeps gradients
    assert asked(_cnn(sane2, 0).double())


class _Odd(nn.Module):
    """What copying has to keep: tied weights, buffers that are no state, plain attributes, hooks, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.rnn = nn.GRU(3, 3, batch_first=True)
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.sizes, self.name, self.table = [1, 2], "odd", {"k": [3]}
        self.norm = nn.BatchNorm1d(3)
        self.register_forward_hook(_hook)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.rnn(self.b(self.a(x)).unsqueeze(1))[0][:, 0])


def _hook(module: Any, arguments: Any, out: torch.Tensor) -> torch.Tensor:
    return out + 1


def test_a_copy_is_a_deep_copy_with_other_numbers() -> None:
    model = _Odd().eval()
    tensors = tensors_of(model)
    assert tensors is not None
    new = {id(value): torch.rand_like(value) if value.is_floating_point() else value.clone() for value in tensors.values()}
    made = copied(model, new)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in expected.state_dict(keep_vars=True).items():
            value.copy_(new[id(tensors[name])])
    x = torch.randn(4, 3)
    torch.testing.assert_close(made(x), expected(x))
    assert made.a.weight is made.b.weight
    assert made.a.weight is not model.a.weight
    assert made.seen is not model.seen
    assert made.table == model.table
    assert made.table is not model.table
    assert made.sizes is not model.sizes
    assert [id(p) for p in made.parameters()] != [id(p) for p in model.parameters()]
    assert repr(made) == repr(model)
    made.rnn.flatten_parameters()
    assert len(list(made.parameters())) == len(list(model.parameters()))
