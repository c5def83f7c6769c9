"""Shards of a zoo as files that are not trusted: size, SHA-256, header, shape and dtype are checked before a row is used."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from itertools import compress
from pathlib import Path

import safetensors.torch
import torch

from ..errors import WslfastError, require, say_once
from .manifest import MANIFEST, Manifest, Shard

OURS = re.compile(r"shard-\d{5,}(?P<generation>(?:\.[0-9a-f]{12})?)\.safetensors")


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Every shard that the manifest lists is a file of the folder and of the right size, and no other one is there."""
    for extra in _extra_shards(folder, manifest):
        raise WslfastError(f"{folder / extra}: extra shard: the manifest does not list it")
    for shard, shape in zip(manifest.shards, manifest.shapes, strict=True):
        _check_size(folder, shard, shape)


def sound_part(folder: Path, manifest: Manifest, verify: bool) -> Manifest:
    """The manifest of the shards that can be read: without the others and their rows, which one warning counts.

    Raises WslfastError if none can be read.
    """
    bad: dict[str, str] = {}
    kept: list[bool] = []
    for shard, shape in zip(manifest.shards, manifest.shapes, strict=True):
        try:
            _check_size(folder, shard, shape)
            read_shard(folder, shard, shape, verify)
        except WslfastError as error:
            bad[shard.file] = str(error)
        kept += [shard.file not in bad] * shard.rows
    reasons = "; ".join([*bad.values()][:3]) + ("; ..." if len(bad) > 3 else "")
    require(any(kept), f"{folder}: none of the zoo's {len(bad)} shards can be read: {reasons}")
    extra = len(_extra_shards(folder, manifest))
    if bad or extra:
        lost = f"{len(bad)} of {len(manifest.shards)} shards with {kept.count(False)} of {manifest.rows} rows left out"
        say_once(f"wslfast: {folder}: {lost}, {extra} extra shards ignored{': ' if bad else ''}{reasons}")
    return replace(
        manifest,
        rows=kept.count(True),
        properties={name: tuple(compress(column, kept)) for name, column in manifest.properties.items()},
        shards=tuple(shard for shard in manifest.shards if shard.file not in bad),
    )


def _extra_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Shards in the folder that are of the zoo's own generation (others belong to a writer at work or one that died) and not listed."""
    names = {shard.file for shard in manifest.shards}
    generations = {m["generation"] for m in map(OURS.fullmatch, names) if m}
    others = ((name, OURS.fullmatch(name)) for name in sorted(set(os.listdir(folder)) - names))
    return [name for name, match in others if match is not None and match["generation"] in generations]


def _check_size(folder: Path, shard: Shard, shape: tuple[int, ...]) -> None:
    size = regular_file(folder, shard.file).stat().st_size
    require(size == shard.bytes, f"{folder / shard.file}: expected {shard.bytes:,} bytes, got {size:,}")
    require(size >= 4 * math.prod(shape), f"{folder / shard.file}: {size:,} bytes cannot hold {list(shape)} float32")


def read_shard(folder: Path, shard: Shard, shape: tuple[int, ...], verify: bool) -> torch.Tensor:
    """The shard's tensor, of the shape that the manifest promises (:attr:`Manifest.shapes`)."""
    where = folder / shard.file
    data = bytes_of(folder, shard.file, shard.bytes)
    if verify:
        digest = hashlib.sha256(data).hexdigest()
        check_digest(digest, shard, where)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # whatever the parser makes of bytes that nobody wrote
        raise WslfastError(f"{where}: not a safetensors file: {error}") from error
    return check_weights(tensors, shape, str(where))


def check_digest(digest: str, shard: Shard, where: Path) -> None:
    """Raise WslfastError unless a shard's SHA-256 is the one that the manifest promises."""
    expected = f"expected sha256 {shard.sha256[:12]}..., got {digest[:12]}..."
    require(digest == shard.sha256, f"{where}: the shard is damaged or not the manifest's: {expected}")


def check_weights(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], where: str) -> torch.Tensor:
    """The one tensor that a shard holds, of the dtype and shape that the manifest promises."""
    require(set(tensors) == {"weights"}, f"{where}: expected one tensor 'weights', got {sorted(tensors)[:5]}")
    weights = tensors["weights"]
    if len(shape) == 1 and weights.ndim == 2:  # rows that happen to be of one length, in a zoo of several architectures
        weights = weights.reshape(-1)
    require(
        weights.dtype == torch.float32 and tuple(weights.shape) == shape,
        f"{where}: expected float32 {list(shape)}, got {str(weights.dtype).removeprefix('torch.')} {list(weights.shape)}",
    )
    return weights


def rows_of(tensor: torch.Tensor, places: torch.Tensor, width: int) -> torch.Tensor:
    """Rows ``[b, width]`` of a shard's tensor at ``places [b]``: numbers of rows, or, where rows differ in length, of first numbers."""
    if tensor.ndim == 2:
        return tensor[places]
    return tensor[places.unsqueeze(1) + torch.arange(width)]


def regular_file(folder: Path, name: str) -> Path:
    """The regular file ``name`` of the folder itself. Raises WslfastError for anything else: a link out, a pipe, nothing."""
    file = folder / name
    try:
        real, home = file.resolve(strict=True), folder.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise WslfastError(f"{file}: no such file; expected a zoo's {'manifest' if name == MANIFEST else 'shard'}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise WslfastError(f"{file}: cannot be read: {error}") from None
    require(real.parent == home, f"{file}: expected a file of the zoo's own folder, got a link to elsewhere")
    require(stat.S_ISREG(mode), f"{file}: expected a regular file")
    return real


def bytes_of(folder: Path, name: str, size: int = -1) -> bytes:
    """What the file holds; at most one byte more than ``size``, so that a file that grows is noticed and not swallowed."""
    try:
        with open(regular_file(folder, name), "rb") as file:
            data = file.read(size + 1 if size >= 0 else -1)
    except OSError as error:
        raise WslfastError(f"{folder / name}: cannot be read: {error.strerror or error}") from error
    require(size < 0 or len(data) == size, f"{folder / name}: expected {size:,} bytes, got {len(data):,}")
    return data
