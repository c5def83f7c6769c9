"""Zoos of implicit representations: one network an image, a file each.

Of DWSNets (Navon et al. 2023): ``mnist_png_training_<label>_<i>/checkpoints/model_final.pth``, and ``{train,test}/model_<i>.pth`` with a
``label`` inside and ``splits.json`` beside; layers ``seq.0``, ``seq.1``, ..., frequency 30, 0.5 added to the answer, points (x, y). Of NFN
(Zhou et al. 2023): ``<anything>_<label>s/net<i>.pth``; layers ``net.0.linear``, ..., frequency 30, points (row, column).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...architecture import Architecture
from ...errors import WslfastError, present, require
from ..coordinates import grid_name
from ..manifest import SPLITS
from .checkpoint import Checkpoint, Skips, State, folders, held, unreadable
from .files import Loaded, load, state_files
from .modules import inr

OMEGA = 30.0
_FINAL = re.compile(r"model_final")
_NUMBERED = re.compile(r"(?:model_|net)(\d{1,9})")
_LABELLED = re.compile(r"(?:^|.*_)(\d{1,3})_(\d{1,9})")  # a folder: ..._<label>_<image>
_LABEL_S = re.compile(r"(?:^|.*_)(\d{1,3})s")  # NFN's folders: ..._<label>s
_LAYER = re.compile(r"(seq\.\d{1,3}|net\.\d{1,3}(?:\.linear)?)\.(weight|bias)")


@dataclass(frozen=True)
class Kind:
    """One of the two families: what is added to an answer, the order of coordinates, and the range of an image's values."""

    offset: float
    order: str
    peak: float


KINDS = {"seq": Kind(0.5, "xy", 1.0), "net": Kind(0.0, "ij", 2.0)}


def files_of(source: Path) -> list[Path]:
    """The networks' files, in sorted order: by number where names have one."""
    named = [f for f in state_files(source, Skips()) if f.suffix == ".pth" and (_FINAL.fullmatch(f.stem) or _NUMBERED.fullmatch(f.stem))]
    return sorted(named, key=lambda f: (str(f.parent), int(m[1]) if (m := _NUMBERED.fullmatch(f.stem)) else 0))


def is_there(source: Path) -> bool:
    """Whether the folder holds implicit representations of a known family."""
    first = next(iter(files_of(source)), None) if source.is_dir() else None
    if first is None:
        return False
    try:
        return family_of(load(first).state) is not None
    except WslfastError:
        return False


def family_of(state: Mapping[str, Any]) -> str | None:
    """``"seq"`` or ``"net"``, by the names of the weights; None for others."""
    families = {match[1].partition(".")[0] for name in state if (match := _LAYER.fullmatch(name))}
    return families.pop() if len(families) == 1 and all(_LAYER.fullmatch(name) for name in state) else None


def grid_of(architecture: Architecture, family: Kind) -> str:
    """The grid that a family's networks are asked: 28x28 for one value per point, 32x32 for three."""
    side = 32 if architecture.output_shape == (3,) else 28
    return grid_name((side,) * architecture.input_shape[0], family.order)


def checkpoints(source: Path, omega: float, epochs: Collection[int] | None, skips: Skips, seen: set[int]) -> Iterator[Checkpoint]:
    """Every network, each a model of its own, with ``label`` and ``image`` where they are known."""
    splits = _splits(source, skips)
    for model, file in enumerate(files_of(source)):
        seen.add(model)
        where = str(file.relative_to(source))
        if epochs is not None and 0 not in epochs:
            skips.add(where, "epoch missing", "an implicit representation has one checkpoint, epoch 0")
            continue
        try:
            loaded = load(file)
            family = present(family_of(loaded.state), f"{file.name}: expected layers seq.0, seq.1, ... or net.0.linear, ...")
            architecture = _architecture(loaded.state, family, omega)
        except WslfastError as error:
            skips.add(where, "unreadable checkpoint", unreadable(error))
            continue
        yield Checkpoint(
            where, model, 0, _properties(file, loaded), {}, held(loaded.state), _split(file, splits), architecture=architecture
        )


def _architecture(state: State, family: str, omega: float) -> Architecture:
    names = sorted({match[1] for name in state if (match := _LAYER.fullmatch(name))}, key=lambda name: int(name.split(".")[1]))
    sizes: list[int] = []
    for name in names:
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        fits = weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]
        require(fits, f"{name}: expected a weight [out, in] and a bias [out]")
        assert weight is not None
        require(not sizes or sizes[-1] == weight.shape[1], f"{name}: expected {sizes[-1] if sizes else ''} inputs, got {weight.shape[1]}")
        sizes += [weight.shape[1], weight.shape[0]] if not sizes else [weight.shape[0]]
    # in NFN's class a last layer that is itself under "linear" has its sine, too
    return inr(tuple(names), tuple(sizes), omega, KINDS[family].offset, names[-1].endswith(".linear"))


def _properties(file: Path, loaded: Loaded) -> dict[str, Any]:
    properties: dict[str, Any] = {"name": file.stem if not _FINAL.fullmatch(file.stem) else file.parent.parent.name}
    number = _NUMBERED.fullmatch(file.stem)
    if number:
        properties["image"] = int(number[1])
    for folder in (file.parent.name, file.parent.parent.name):
        if match := _LABELLED.fullmatch(folder):
            properties |= {"label": int(match[1]), "image": int(match[2])}
            break
        if match := _LABEL_S.fullmatch(folder):
            properties["label"] = int(match[1])
            break
    return {**properties, **{name: value for name, value in loaded.beside.items() if name not in ("name", "image", "model", "split")}}


def _splits(source: Path, skips: Skips) -> Mapping[str, str]:
    """Splits by :func:`_key`, from its owner's ``splits.json`` (``mnist_splits.json`` and the like), at ``source`` or in a folder below it;
    its paths are those of another machine."""
    split_of: dict[str, str] = {}
    for folder, names, _ in folders(source, Skips(), lambda names: "checkpoints" in names):
        for name in sorted(name for name in names if name.endswith("splits.json")):
            try:
                table = json.loads((folder / name).read_text("utf-8-sig"))
                pairs = ((split, table[split]) for split in SPLITS if split in table)
                split_of |= {_key(Path(p)): split for split, paths in pairs for p in (paths["path"] if isinstance(paths, dict) else paths)}
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                skips.add(str((folder / name).relative_to(source)), f"unreadable {name}", str(error))
    return split_of


def _key(file: Path) -> str:
    """A network's file by what tells it apart on any machine: its folder and name, and the folder above where all are called alike."""
    return "/".join(file.parts[-3 if _FINAL.fullmatch(file.stem) else -2 :])


def _split(file: Path, splits: Mapping[str, str]) -> str | None:
    if splits:
        return splits.get(_key(file))
    return "test" if any("_testing_" in f"{part}_" for part in file.parts[-3:]) else None
