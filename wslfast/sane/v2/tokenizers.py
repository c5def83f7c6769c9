"""``tokenize`` and ``detokenize`` of the tokenizers of ``sane`` 2.x, and both for many state dicts at once.

The published methods walk over layers and channels, and copy a whole reference for every model. Here masks and positions are made once a
network; tokens are one concatenation and one gather, and so is the way back. What the published code would do another way (an unusual
tensor, a subclass with steps of its own) is left to it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import WslfastError, describe, present, require
from ...tokens import Tokens
from .layout import Layout, layout_of, signature_of

State = Mapping[str, Tensor]
_STEPS = ("flatten", "slice_by_layers", "slice", "pad", "unslice", "rebuild_state_dict")
_BLOCK = 64  # models whose numbers are in the processor's cache between two copies
_NAMES = {"DenseTokenizer": "dense", "SparseTokenizer": "sparse"}


# -- what takes the place of the published methods ---------------------------------------------------------------------


def tokenize(self: Any, statedict: State, *, original: Callable[..., Any]) -> Any:
    """A state dict's ``(tokens, mask, position)``, or a list of one such tuple a layer, to the bit as published."""
    kind = kind_of(self)
    layout = None if kind is None else _layout(kind, self.tokensize, statedict)
    if layout is None or not _plain(statedict, layout):
        return original(self, statedict)
    device, first = torch.device(self.device), statedict[layout.names[0]]
    _, _, mask, positions = layout.on(device)
    if self.padding == "zero":
        parts = [statedict[name].reshape(-1) for name in layout.names]
        numbers = torch.cat([*parts, first.new_zeros(1)])
        tokens = numbers.index_select(0, layout.on(first.device)[0]).view(-1, layout.token_size).to(device)
    else:
        if not _pads(self) or first.device.type != device.type:  # it pads where the tokens are to be
            return original(self, statedict)
        tokens = torch.cat([self.pad(rows, fill).reshape(-1, layout.token_size) for rows, fill in _rows(statedict, layout)])
    if kind == "dense":
        tokens = tokens.to(torch.float32)
    if self.mode != "layer_wise":
        return tokens, mask.clone(), positions.clone()
    # in memory of their own: a file of one layer is not to hold the others
    slices = [slice(layer.first, layer.stop) for layer in layout.layers]
    return [(tokens[s].clone(), mask[s].clone(), positions[s].clone()) for s in slices]


def detokenize(
    self: Any,
    tokens_input: Any,
    mask: Tensor | None = None,
    position: Tensor | None = None,
    reference_statedict: State | None = None,
    *,
    original: Callable[..., Any],
) -> Any:
    """The state dict of one model's tokens, in the order and with the further entries of the reference."""
    reference = self.reference_statedict if reference_statedict is None else reference_statedict
    kind = kind_of(self)
    layout = None if kind is None or reference is None else _layout(kind, self.tokensize, reference)
    tokens = None
    if layout is not None:
        if isinstance(tokens_input, list):
            tokens = _joined(tokens_input, layout)
        elif isinstance(mask, Tensor) and isinstance(position, Tensor):
            tokens = _whole(tokens_input, mask, position, layout)
    if tokens is None or layout is None:
        return original(self, tokens_input, mask, position, reference_statedict)
    assert reference is not None
    return rebuilt(reference, layout.fill(tokens))


# -- many at once ------------------------------------------------------------------------------------------------------


def tokenize_all(tokenizer: Any, state_dicts: Sequence[State]) -> Tokens:
    """``tokens [k, T, D], mask [T, D], positions [T, 3]`` of state dicts of one network, as the tokenizer makes them one by one.

    Args:
        tokenizer: a ``DenseTokenizer`` or ``SparseTokenizer`` of ``sane`` 2.x with zero padding.
        state_dicts: k of them, of equal names, shapes and order.

    Raises:
        WslfastError: another tokenizer or padding, or state dicts that differ.
    """
    require(len(state_dicts) > 0, "state_dicts: expected at least one model, got none")
    layout = layout_like(tokenizer, state_dicts[0])
    require(tokenizer.padding == "zero", f"tokenizer: expected padding 'zero', got {tokenizer.padding!r}")
    signature = signature_of(state_dicts[0])
    other = next((j for j, state in enumerate(state_dicts) if signature_of(state) != signature), None)
    require(other is None, f"state_dicts[{other}]: its names, shapes or order differ from those of the first")
    blocks = [state_dicts[start : start + _BLOCK] for start in range(0, len(state_dicts), _BLOCK)]
    parts = [layout.tokenize(layout.rows_of(block).to(tokenizer.device)) for block in blocks]
    return Tokens(torch.cat([part.tokens for part in parts]), parts[0].mask, parts[0].positions)


def detokenize_all(tokenizer: Any, tokens: Tensor, reference_statedict: State | None = None) -> list[dict[str, Tensor]]:
    """The state dicts of k models' tokens ``[k, T, D]``; each as ``tokenizer.detokenize`` gives it.

    Raises:
        WslfastError: no reference, or tokens that are not all of its network's.
    """
    given = tokenizer.reference_statedict if reference_statedict is None else reference_statedict
    reference: State = present(given, "reference_statedict: expected a state dict for names and shapes, got None")
    layout = layout_like(tokenizer, reference)
    expected = (layout.num_tokens, layout.token_size)
    fits = isinstance(tokens, Tensor) and tokens.ndim == 3 and tuple(tokens.shape[1:]) == expected
    require(fits, f"tokens: expected [k, {expected[0]}, {expected[1]}], got {describe(tokens)}")
    return [rebuilt(reference, layout.fill(model)) for model in tokens]


def layout_like(tokenizer: Any, state: State) -> Layout:
    """The layout of a published tokenizer on a state dict. Raises WslfastError for a tokenizer that is none."""
    kind = present(kind_of(tokenizer), f"tokenizer: expected a DenseTokenizer or SparseTokenizer, got {describe(tokenizer)}")
    return layout_of(kind, tokenizer.tokensize, signature_of(state))


def kind_of(tokenizer: Any) -> str | None:
    """``"dense"``, ``"sparse"``, or None for a tokenizer with steps of its own."""
    home = next((c for c in type(tokenizer).__mro__ if c.__name__ in _NAMES and c.__module__.startswith("sane.")), None)
    if home is None or any(getattr(type(tokenizer), step, None) is not getattr(home, step, None) for step in _STEPS):
        return None
    if any(step in vars(tokenizer) for step in _STEPS):
        return None
    return _NAMES[home.__name__]


def rebuilt(reference: State, filled: Mapping[str, Tensor]) -> Any:
    """A copy of the reference with the filled tensors in their places; what is replaced is not copied first."""
    rest = [name for name in reference if name not in filled]
    kept = copy.deepcopy({name: reference[name] for name in rest}) if rest else {}
    pairs = ((name, filled[name] if name in filled else kept[name]) for name in reference)
    if type(reference) is OrderedDict:
        out = OrderedDict(pairs)
        metadata = vars(reference).get("_metadata")  # a module's state dict says what version each part is of
        if metadata is not None:
            out._metadata = copy.copy(metadata)  # type: ignore[attr-defined]
        return out
    return dict(pairs)


# -- checks ------------------------------------------------------------------------------------------------------------


def _layout(kind: str, token_size: Any, state: Any) -> Layout | None:
    if type(state) not in (dict, OrderedDict) or type(token_size) is not int:
        return None
    try:
        return layout_of(kind, token_size, signature_of(state))
    except (WslfastError, AttributeError):  # something in it is no tensor, or its layers are unusual
        return None


def _plain(state: State, layout: Layout) -> bool:
    """Whether all tokenised tensors lie on one device, in one floating dtype."""
    first = state[layout.names[0]]
    kind, place = first.dtype, first.device
    return kind.is_floating_point and all(state[name].dtype == kind and state[name].device == place for name in layout.names)


def _pads(tokenizer: Any) -> bool:
    return tokenizer.padding in ("mean", "gaussian", "reflect", "replicate", "circular")


def _rows(state: State, layout: Layout) -> list[tuple[Tensor, int]]:
    """Each layer as the published code pads it, and by how much: flat (dense), or a row per channel."""
    out = []
    for layer in layout.layers:
        rows = state[layer.name].reshape(layer.channels, -1)
        if layer.bias is not None:
            rows = torch.cat([rows, state[layer.bias].unsqueeze(1)], 1)
        if layout.kind == "dense":
            rows = rows.reshape(-1)
        out.append((rows, -rows.shape[-1] % layout.token_size))
    return out


def _whole(tokens: Any, mask: Tensor, position: Tensor, layout: Layout) -> Tensor | None:
    """The tokens ``[T, D]`` without padded ones after the end, if mask and positions are the layout's; else None."""
    t = layout.num_tokens
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[1] != layout.token_size or len(tokens) < t:
        return None
    if mask.shape != tokens.shape or mask.dtype != torch.bool or tuple(position.shape) != (len(tokens), 3):
        return None
    if mask.device != tokens.device or position.device != tokens.device:
        return None
    if len(tokens) > t:
        if bool(mask[t:].any()):
            return None
        tokens, mask, position = tokens[:t], mask[:t], position[:t]
    _, _, expected, places = layout.on(tokens.device)
    if not torch.equal(mask, expected):
        return None
    if position.dtype != places.dtype:
        position = position.to(places.dtype)
    if not torch.equal(position, places):
        columns = slice(1, 2) if layout.kind == "dense" else slice(1, 3)  # what the published code reads of them
        if not torch.equal(position[:, columns], places[:, columns]):
            return None
    return tokens


def _joined(parts: list[Any], layout: Layout) -> Tensor | None:
    """The same for a list of one ``(tokens, mask, position)`` a layer."""
    if len(parts) != len(layout.layers) or not all(isinstance(part, tuple) and len(part) == 3 for part in parts):
        return None
    for (tokens, mask, position), layer in zip(parts, layout.layers):
        if not all(isinstance(x, Tensor) for x in (tokens, mask, position)):
            return None
        same = tokens.shape == mask.shape == (layer.stop - layer.first, layout.token_size) and mask.dtype == torch.bool
        if not same or tuple(position.shape) != (len(tokens), 3) or tokens.dtype != parts[0][0].dtype:
            return None
    tokens, mask, position = (torch.cat(column) for column in zip(*parts))
    _, _, expected, places = layout.on(tokens.device)
    if not torch.equal(mask, expected):
        return None
    if layout.kind == "sparse" and not torch.equal(position[:, 2].to(places.dtype), places[:, 2]):
        return None
    return tokens
