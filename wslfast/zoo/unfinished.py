"""A zoo that is being built: its state after each epoch, in one file of its folder, so that an interrupted build goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, require
from ..files import remove_leftovers, write_bytes
from ..population import Population
from .reading import load_zoo, read_manifest
from .splits import Split

FILE = "unfinished.safetensors"
_DATA = "data"


class Unfinished:
    """The file with the state of a zoo that is being built.

    Args:
        folder: of the zoo.
        settings: what the build was asked for; one with others does not go on from it.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(folder) / FILE
        self.settings = json.loads(json.dumps(settings))

    def exists(self) -> bool:
        """Whether an interrupted build left this file."""
        return self.path.is_file()

    def load(self) -> dict[str, Any] | None:
        """The state after the last whole epoch; None where there is none.

        Raises WslfastError if the file is damaged, or of a build with other settings.
        """
        if not self.exists():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as opened:
                words = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            require(words.get("sha256") == _digest(tensors, words.get("plain", "")), "its SHA-256 is not the one it was written with")
            plain = json.loads(words["plain"])
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise WslfastError(f"{self.path} is damaged ({error}); overwrite=True (--overwrite) builds anew") from None
        stored = plain.pop("settings")
        other = _others(self.settings, stored)
        require(
            not other,
            f"{self.path}: it was begun with other settings ({', '.join(sorted(other))}); pass the same, or overwrite=True (--overwrite)",
        )
        return {**plain, **tensors}

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state after an epoch over the state before. Raises WslfastError if it cannot be written."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if isinstance(value, Tensor)}
        plain = json.dumps({"settings": self.settings, **{name: value for name, value in state.items() if name not in tensors}})
        words = {"plain": plain, "sha256": _digest(tensors, plain)}
        write_bytes(self.path, safetensors.torch.save(tensors, words))

    def remove(self) -> None:
        """Delete the file, when the zoo is finished or is begun anew."""
        self.path.unlink(missing_ok=True)
        remove_leftovers(self.path)


def finished(folder: str | Path, settings: Mapping[str, Any], architecture: Architecture, split: Split) -> Population:
    """The zoo that a build of these settings has written to a folder.

    Raises WslfastError if the zoo there is another.
    """
    manifest, wanted = read_manifest(folder), json.loads(json.dumps(settings))
    other = _others(wanted, {key: value for key, value in manifest.provenance.items() if key in {*wanted, _DATA}}, "architecture")
    if manifest.split.get("seed") != split.seed or manifest.split.get("fractions") != list(split.fractions):
        other.append("split")
    population = load_zoo(folder)
    if population.architecture.handle != architecture.handle:
        other.append("architecture")
    again = "pass the same, another folder, or overwrite=True (--overwrite)"
    require(not other, f"out: {folder}: there is a zoo already, built with other settings ({', '.join(sorted(other))}); {again}")
    Unfinished(folder, settings).remove()
    return population


def _others(asked: Mapping[str, Any], stored: Mapping[str, Any], *passed_over: str) -> list[str]:
    """Names of settings that differ. A digest of the data is compared where both have one: it is there of data that came as tensors."""
    names = asked.keys() | stored.keys()
    names -= {*passed_over, *([] if _DATA in asked and _DATA in stored else [_DATA])}
    return sorted(name for name in names if asked.get(name) != stored.get(name))


def _digest(tensors: Mapping[str, Tensor], plain: str) -> str:
    digest = hashlib.sha256(plain.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
