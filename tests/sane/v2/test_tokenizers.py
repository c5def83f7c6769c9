"""Tokens of ``sane`` 2.x, both tokenizers, one by one and for many networks, against loops over channels."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sane2_package import CNN3, sane2  # noqa: F401 - a fixture

from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.sane import v2
from wslfast.sane.v2 import tokenizers
from wslfast.sane.v2.layout import layout_for, layout_of, signature_of

CONFIGS = [CNN3, {"model::type": "Small", "model::o_dim": 3}]
KINDS = ["Dense", "Sparse"]


def _tokenizer(p: SimpleNamespace, kind: str, **settings: Any) -> Any:
    return getattr(p.tokenizers, f"{kind}Tokenizer")(**{"tokensize": 37, "mode": "full_model", **settings})


def _state(p: SimpleNamespace, config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = p.zoo_dataset_models.get_model(config).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.add_(torch.randn_like(value))  # batch norm begins with ones and zeros
    return state


def _equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _equal(a[key], b[key])
    else:
        assert len(a) == len(b)
        for one, two in zip(a, b):
            _equal(one, two)


@pytest.mark.parametrize("config", CONFIGS, ids=["CNN3", "batch norm"])
@pytest.mark.parametrize("mode", ["full_model", "layer_wise"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_are_the_loops_to_the_bit(sane2: SimpleNamespace, kind: str, mode: str, config: dict[str, Any]) -> None:  # noqa: F811
    state, reference = _state(sane2, config), _state(sane2, config, 1)
    theirs = type(_tokenizer(sane2, kind)).__mro__[1]
    for padding in ("zero", "mean", "gaussian"):
        made = _tokenizer(sane2, kind, mode=mode, padding=padding, reference_statedict=reference)
        torch.manual_seed(5)
        expected = theirs.tokenize(made, state)
        drawn = torch.get_rng_state()
        torch.manual_seed(5)
        found = tokenizers.tokenize(made, state, original=_never)
        assert torch.equal(drawn, torch.get_rng_state())
        _equal(found, expected)
        arguments = (found,) if mode == "layer_wise" else found
        back = tokenizers.detokenize(made, *arguments, original=_never)
        _equal(back, theirs.detokenize(made, *arguments))
        left = [name for name in state if "running" in name]
        assert all(torch.equal(back[name], reference[name]) and back[name] is not reference[name] for name in left)
        assert getattr(back, "_metadata", None) == getattr(reference, "_metadata", None)


def _never(*_: Any) -> None:
    pytest.fail("the original was asked")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_unusual_is_left_to_the_original(sane2: SimpleNamespace, kind: str) -> None:  # noqa: F811
    state = _state(sane2, CNN3)
    made = _tokenizer(sane2, kind, reference_statedict=state)
    tokens, mask, position = made.tokenize(state)
    asked: list[Any] = []

    def original(*arguments: Any) -> str:
        asked.append(arguments)
        return "theirs"

    half = {name: value.half() if name.endswith("16.bias") else value for name, value in state.items()}
    assert tokenizers.tokenize(made, half, original=original) == "theirs"
    assert tokenizers.tokenize(made, {"weight": 3}, original=original) == "theirs"
    assert tokenizers.detokenize(made, tokens[:-1], mask[:-1], position[:-1], original=original) == "theirs"
    other = mask.clone()
    other[0, 0] = False
    assert tokenizers.detokenize(made, tokens, other, position, original=original) == "theirs"
    shuffled = position.flip(0)
    assert tokenizers.detokenize(made, tokens, mask, shuffled, original=original) == "theirs"
    assert tokenizers.detokenize(made, tokens, None, None, original=original) == "theirs"

    class Mine(type(made)):  # type: ignore[misc]
        def flatten(self, statedict: Any) -> Any:
            return super().flatten(statedict)

    mine = Mine(tokensize=37, mode="full_model", reference_statedict=state)
    assert tokenizers.tokenize(mine, state, original=original) == "theirs"
    assert len(asked) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_padded_windows_and_their_gradient_come_back(sane2: SimpleNamespace, kind: str) -> None:  # noqa: F811
    state = _state(sane2, CNN3)
    made = _tokenizer(sane2, kind, reference_statedict=state)
    tokens, mask, position = made.tokenize(state)
    more = torch.arange(1, 6).unsqueeze(1)
    tokens = torch.cat([tokens, torch.randn(5, 37)])
    mask = torch.cat([mask, torch.zeros(5, 37, dtype=torch.bool)])
    position = torch.cat([position, position[-1:] + more.int() * torch.tensor([1, 0, 1], dtype=torch.int32)])
    gradients = []
    for run in (lambda x: tokenizers.detokenize(made, x, mask, position, original=_never), lambda x: made.detokenize(x, mask, position)):
        leaf = tokens.clone().requires_grad_()
        out = run(leaf)
        sum((value * torch.arange(value.numel()).view(value.shape)).sum() for value in out.values()).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert not gradients[0][~mask].any()
    out = tokenizers.detokenize(made, tokens, mask, position, original=_never)
    kept = tokens.clone()
    out["module_list.0.weight"].fill_(9.0)
    assert torch.equal(tokens, kept)  # no view of what came in


def test_layers_are_files_of_their_own_size(sane2: SimpleNamespace) -> None:  # noqa: F811
    made = _tokenizer(sane2, "Sparse", mode="layer_wise")
    first = tokenizers.tokenize(made, _state(sane2, CNN3), original=_never)[0]
    file = io.BytesIO()
    torch.save(first, file)
    assert file.tell() < 10_000


@pytest.mark.parametrize("config", CONFIGS, ids=["CNN3", "batch norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_and_rows_of_weights(sane2: SimpleNamespace, kind: str, config: dict[str, Any]) -> None:  # noqa: F811
    states = [_state(sane2, config, seed) for seed in range(3)]
    made = _tokenizer(sane2, kind, reference_statedict=states[0])
    expected = [made.tokenize(state) for state in states]
    found = v2.tokenize_all(made, states)
    assert torch.equal(found.tokens, torch.stack([tokens for tokens, _, _ in expected]))
    assert torch.equal(found.mask, expected[0][1])
    assert torch.equal(found.positions, expected[0][2])
    for back, (tokens, mask, position) in zip(v2.detokenize_all(made, found.tokens), expected):
        _equal(back, made.detokenize(tokens, mask, position))
    # rows of an architecture: what has no token comes from the reference
    shape = (1, 12, 12) if config["model::type"] == "Small" else (3, 32, 32)
    arch = Architecture.from_module(sane2.zoo_dataset_models.get_model(config), shape)
    rows = torch.stack([torch.cat([s[slot.name].reshape(-1) for slot in arch.parameters]) for s in states])
    layout = layout_for(kind.lower(), 37, arch)
    assert torch.equal(layout.tokenize(rows).tokens, found.tokens)
    assert torch.equal(layout.detokenize(found.tokens, rows), rows)
    if not layout.complete:
        with pytest.raises(WslfastError, match="running statistics"):
            layout.detokenize(found.tokens)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradients_pass_and_pass_again(kind: str) -> None:
    layout = layout_of(kind, 3, (("a.weight", (2, 2)), ("a.bias", (2,)), ("b.weight", (3, 4))))
    rows = torch.randn(2, layout.num_weights, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, layout.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layout.tokenize(x).tokens ** 2, rows)
    assert torch.autograd.gradgradcheck(lambda x: layout.detokenize(x) ** 2, tokens)


def test_wrong_input_is_named(sane2: SimpleNamespace) -> None:  # noqa: F811
    state = _state(sane2, CNN3)
    made = _tokenizer(sane2, "Sparse", reference_statedict=state)
    other = copy.deepcopy(state)
    other["extra.weight"] = torch.zeros(1, 1)
    with pytest.raises(WslfastError, match=r"state_dicts\[1\]"):
        v2.tokenize_all(made, [state, other])
    with pytest.raises(WslfastError, match="at least one"):
        v2.tokenize_all(made, [])
    with pytest.raises(WslfastError, match="padding 'zero', got 'mean'"):
        v2.tokenize_all(_tokenizer(sane2, "Sparse", padding="mean"), [state])
    with pytest.raises(WslfastError, match=r"expected \[k, \d+, 37\]"):
        v2.detokenize_all(made, torch.zeros(2, 3, 37))
    with pytest.raises(WslfastError, match="DenseTokenizer"):
        v2.tokenize_all(torch.nn.Linear(1, 1), [state])
    with pytest.raises(WslfastError, match="no channels"):
        layout_of("dense", 4, (("weight", ()),))
    with pytest.raises(WslfastError, match="a number per channel"):
        layout_of("dense", 4, (("weight", (2, 2)), ("bias", (3,))))
    with pytest.raises(WslfastError, match="nothing to tokenise"):
        layout_of("dense", 4, signature_of({"bias": torch.zeros(2)}))
    with pytest.raises(WslfastError, match="positive integer"):
        layout_of("dense", 0, (("weight", (2, 2)),))
