"""State dicts to tokens and back, with the published functions' signatures.

One plan is made per set of names and shapes and kept. Only what has no token is copied from the reference.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import describe, require

Checkpoint = Mapping[str, Tensor]


class Rule(NamedTuple):
    """Which names are layers, and which of them are batch norm: what ``ignore_bn`` leaves out of tokens, and of their inverse."""

    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    skipped_by_inverse: tuple[str, ...]

    def chosen(self, names: Iterable[str], skipped: tuple[str, ...]) -> list[str]:
        """The names that are layers and hold none of the parts to skip."""
        return [n for n in names if any(part in n for part in self.layers) and not any(part in n for part in skipped)]


_ALL = ("weight", "running_mean", "running_var")
PUBLISHED = Rule(_ALL, ("bn", "downsample.1", "batchnorm"), ("bn", "downsample.1"))  # the published inverse knows no "batchnorm"
MULTIZOO = Rule(("weight",), *2 * (("bn", "downsample.1", "batchnorm", "normalization"),))


def tokenize_checkpoint(checkpoint: Checkpoint, tokensize: int, return_mask: bool = True, ignore_bn: bool = False) -> tuple[Tensor, ...]:
    """A state dict as tokens, one or more a channel.

    Args:
        checkpoint: name to tensor.
        tokensize: D, or 0 to take the longest row of any layer that has a bias or is a running statistic.
        return_mask: whether the mask is returned.
        ignore_bn: leave batch norm out.

    Returns:
        ``tokens [T, D]``, ``mask [T, D]`` (True on weights), ``positions [T, 3]`` (token, layer, channel), int16 where they fit.

    Raises:
        WslfastError: where there is nothing to tokenise, or a bias is not one number per channel of its weight.
    """
    return tokenize(checkpoint, tokensize, return_mask, ignore_bn, PUBLISHED)


def tokenize(checkpoint: Checkpoint, tokensize: int, return_mask: bool, ignore_bn: bool, rule: Rule) -> tuple[Tensor, ...]:
    """Tokens, mask (if it is wanted) and positions of a state dict by a package's rule."""
    plan = _plan(_signature(checkpoint), int(tokensize), bool(ignore_bn), rule)
    device = next(iter(checkpoint.values())).device
    parts = []
    for name, bias, padding in plan.layers:
        w = checkpoint[name]
        w = w.reshape(w.shape[0], -1)
        if bias is not None:
            w = torch.cat([w, checkpoint[bias].unsqueeze(1)], 1)
        # the published code copies padded layers into float32 zeros, on the CPU; a layer without padding keeps its dtype
        parts.append((F.pad(w.float(), (0, padding)) if padding else w).reshape(-1, plan.token_size))
    tokens = torch.cat(parts)
    mask, positions = plan.mask.to(device), plan.positions.to(device)
    return (tokens, mask.clone(), positions.clone()) if return_mask else (tokens, positions.clone())


def tokens_to_recipe(pos: Tensor, reference_checkpoint: Checkpoint, ignore_bn: bool = False) -> dict[str, Tensor]:
    """Rows of each layer: ``{name: indices}`` into a token sequence whose positions are ``pos [T, 3]``."""
    layer = pos[:, 1]
    return {name: torch.where(layer == index)[0] for index, name in enumerate(_layers(reference_checkpoint, ignore_bn, PUBLISHED))}


def tokens_to_checkpoint(
    tokens: Tensor,
    pos: Tensor | None,
    reference_checkpoint: Checkpoint,
    ignore_bn: bool = False,
    recipe: Mapping[str, Tensor] | None = None,
) -> OrderedDict[str, Tensor]:
    """A token sequence as a state dict; padding is dropped, and the gradient flows back to ``tokens``.

    Args:
        tokens: ``[T, D]``; their dtype and device are kept.
        pos: ``[T, 3]``; may be None with a recipe.
        reference_checkpoint: names and shapes, and the values of whatever has no token.
        ignore_bn: whether batch norm was left out.
        recipe: from :func:`tokens_to_recipe`.

    Raises:
        WslfastError: tokens or positions of another shape, or a layer whose rows are not there.
    """
    return fill(tokens, pos, reference_checkpoint, ignore_bn, recipe, PUBLISHED)


def fill(
    tokens: Tensor, pos: Tensor | None, reference_checkpoint: Checkpoint, ignore_bn: bool, recipe: Mapping[str, Tensor] | None, rule: Rule
) -> OrderedDict[str, Tensor]:
    """A state dict of tokens by a package's rule; see :func:`tokens_to_checkpoint`."""
    require(isinstance(tokens, Tensor) and tokens.ndim == 2, f"tokens: expected those of one model, [T, D], got {describe(tokens)}")
    fits = isinstance(pos, Tensor) and pos.ndim == 2 and pos.shape[1] >= 2
    require(bool(recipe) or fits, f"pos: expected positions [T, 3] where there is no recipe, got {describe(pos)}")
    names = _layers(reference_checkpoint, ignore_bn, rule)
    if not recipe:
        assert pos is not None
        recipe = {name: torch.where(pos[:, 1] == index)[0] for index, name in enumerate(names)}
    out = OrderedDict(reference_checkpoint.items())
    for name in names:
        shape = out[name].shape
        rows, content = recipe[name], math.prod(shape) // shape[0]
        fits = len(rows) % shape[0] == 0 and len(rows) * tokens.shape[1] >= math.prod(shape)
        require(fits, f"tokens: layer {name!r} {list(shape)} cannot be filled from {len(rows)} tokens of {tokens.shape[1]}")
        values = tokens.index_select(0, rows.to(tokens.device)).reshape(shape[0], -1)
        out[name] = values[:, :content].reshape(shape)
        bias = name.replace("weight", "bias")
        if "weight" in name and bias in out:
            require(values.shape[1] > content, f"tokens: layer {name!r} has no column left for its bias")
            out[bias] = values[:, content]
    for name, value in out.items():
        if value is reference_checkpoint[name]:
            out[name] = value.clone()
    return out


def tokens_to_checkpoint_without_batchnorm(
    tokens: Tensor, pos: Tensor, reference_checkpoint: Checkpoint, ignore_bn: bool = False
) -> OrderedDict[str, Tensor]:
    """:func:`tokens_to_checkpoint` as the package ``SANE`` has it: ``ignore_bn`` leaves keys with "batchnorm" out here, too."""
    left_out = {name for name in reference_checkpoint if ignore_bn and "batchnorm" in name}
    rest = OrderedDict((name, value) for name, value in reference_checkpoint.items() if name not in left_out)
    filled = tokens_to_checkpoint(tokens, pos, rest, ignore_bn)
    return OrderedDict((name, value.clone() if name in left_out else filled[name]) for name, value in reference_checkpoint.items())


def test_checkpoint_for_nan(checkpoint: Checkpoint) -> bool:
    """Whether any tensor holds a NaN."""
    return any(bool(torch.isnan(value).any()) for value in checkpoint.values())


def test_checkpoint_with_threshold(checkpoint: Checkpoint, threshold: float) -> bool:
    """Whether any |value| is larger than ``threshold``."""
    return not math.isinf(threshold) and any(bool((value.abs() > threshold).any()) for value in checkpoint.values())


def printProgressBar(
    iteration: int,
    total: int,
    prefix: str = "",
    suffix: str = "",
    decimals: int = 1,
    length: int = 100,
    fill: str = "█",
    printEnd: str = "\r",
) -> None:
    """A line of progress on standard output, ``length`` characters of bar, ended with ``printEnd`` (a new line at the end)."""
    share, done = iteration / total, length * iteration // total
    print(f"\r{prefix} |{fill * done}{'-' * (length - done)}| {100 * share:.{decimals}f}% {suffix}", end=printEnd)
    if iteration == total:
        print()


# pytest takes their names for tests
test_checkpoint_for_nan.__test__ = test_checkpoint_with_threshold.__test__ = False  # type: ignore[attr-defined]


# -- plans -------------------------------------------------------------------------------------------------------------


def _layers(checkpoint: Checkpoint, ignore_bn: bool, rule: Rule) -> list[str]:
    return rule.chosen(checkpoint, rule.skipped_by_inverse if ignore_bn else ())


class _Plan:
    """How one set of names and shapes is cut: ``layers`` of (name, bias or None, padding), mask and positions."""

    def __init__(self, signature: tuple[tuple[str, tuple[int, ...]], ...], token_size: int, ignore_bn: bool, rule: Rule) -> None:
        shapes = dict(signature)
        names = rule.chosen(shapes, rule.skipped if ignore_bn else ())
        for name in names:
            shape, bias = shapes[name], name.replace("weight", "bias")
            require(len(shape) > 0 and 0 not in shape, f"checkpoint: {name!r} {list(shape)} has no channels to tokenise")
            one = "weight" not in name or shapes.get(bias, shape[:1]) == shape[:1]
            expected = f"expected {list(shape[:1])}, a number for each channel of {name!r}"
            require(one, f"checkpoint: {bias!r}: {expected}, got {list(shapes.get(bias, ()))}")
        require(bool(names), f"checkpoint: expected a layer (a key with 'weight' or a running statistic), got {list(shapes)[:5]}")
        if token_size == 0:
            # running statistics map onto themselves, and so count as having a bias
            sizes = [math.prod(shapes[n]) // shapes[n][0] + 1 for n in names if n.replace("weight", "bias") in shapes]
            require(bool(sizes), "tokensize: expected a positive size where no layer has a bias, got 0")
            token_size = max(sizes)
        self.token_size = token_size
        self.layers: list[tuple[str, str | None, int]] = []
        masks, places = [], []
        for index, name in enumerate(names):
            channels = shapes[name][0]
            twin = name.replace("weight", "bias")
            own = twin if "weight" in name and twin in shapes else None
            width = math.prod(shapes[name]) // channels + (own is not None)
            chunks = -(-width // token_size)
            self.layers.append((name, own, chunks * token_size - width))
            masks.append((torch.arange(chunks * token_size) < width).expand(channels, -1).reshape(-1, token_size))
            channel = torch.arange(channels).repeat_interleave(chunks)
            places.append(torch.stack([torch.full_like(channel, index), channel], 1))
        self.mask = torch.cat(masks)
        place = torch.cat(places)
        place = torch.cat([torch.arange(len(place)).unsqueeze(1), place], 1)
        self.positions = place.to(torch.int16 if int(place.max()) <= 32_767 else torch.int32)


_plan = lru_cache(maxsize=64)(_Plan)


def _signature(checkpoint: Checkpoint) -> tuple[tuple[str, tuple[int, ...]], ...]:
    require(isinstance(checkpoint, Mapping) and len(checkpoint) > 0, f"checkpoint: expected a state dict, got {describe(checkpoint)}")
    return tuple((name, tuple(value.shape)) for name, value in checkpoint.items())
