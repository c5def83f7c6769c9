"""A run's checkpoint: one file with everything, written atomically, loadable without running any code of the file.

The file is what ``torch.save`` writes, an archive, with the SHA-256 of all its other bytes as the archive's comment: ``torch.load`` reads
it too, but tells no damaged weights from sound ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..architecture import Architecture
from ..codes.autoencoder import Autoencoder
from ..errors import WslfastError, check_device, require
from ..files import write_tensors
from ..population import html_table
from ..safe.state import load_plain
from ..tokens import TokenLayout, num_tokens
from ..zoo.importers.checkpoint import unreadable
from ..zoo.manifest import MANIFEST
from .config import TrainConfig

SCHEMA = 1
_TABLES = ("config", "architecture", "autoencoder", "model", "optimizer", "normalizers", "rng", "sampler")
_SEAL, _DIGITS = b"sha256 ", 64
_BLOCK = 1 << 20
_LATER = ("kernels",)  # keys that older files lack
_KEYS = ("schema", "step", "config", "architecture", "autoencoder", "model", "optimizer", "schedule", "normalizers", "rng", "sampler")


def checkpoint_path(out: str | Path) -> Path:
    """Where a run keeps its latest checkpoint."""
    return Path(out) / "checkpoint" / "state.pt"


def save_checkpoint(out: str | Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint by ``state`` (tensors and plain values under the keys of this module)."""
    assert set(state) - set(_LATER) == set(_KEYS) - {"schema"}, set(state) ^ set(_KEYS)
    write_tensors(checkpoint_path(out), {"schema": SCHEMA, **state}, _seal)


def load_checkpoint(out: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The run's latest checkpoint. Raises WslfastError naming the file if it is missing, damaged or from a newer version."""
    path, device = checkpoint_path(out), check_device(device)
    require(path.is_file(), f"no checkpoint in {out} (expected {path})")
    try:
        state = load_plain(path, device, _check_seal)
    except WslfastError as error:
        raise WslfastError(f"checkpoint {path} is damaged: {unreadable(error)}") from error
    require(isinstance(state, dict) and isinstance(state.get("schema"), int), f"checkpoint {path} is not one of wslfast's")
    require(state["schema"] <= SCHEMA, f"checkpoint {path} is from a newer version (schema {state['schema']}, this one reads {SCHEMA})")
    missing = [key for key in _KEYS if key not in state]
    require(not missing, f"checkpoint {path} lacks {missing}")
    wrong = [key for key in _TABLES if not isinstance(state[key], dict)] + ["step"] * (type(state["step"]) is not int)
    kept = state.get("kernels", [])
    wrong += ["kernels"] * (not isinstance(kept, list) or not all(isinstance(k, list) and len(k) == 4 for k in kept))
    require(not wrong, f"checkpoint {path} holds something else under {wrong}")
    return state


def _seal(path: Path) -> None:
    """Make the digest of the archive its comment."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # the comment's length ends the archive
        file.write((len(_SEAL) + _DIGITS).to_bytes(2, "little") + _SEAL)
        end = file.tell()
        digest = _digest(file, end)
        file.seek(end)
        file.write(digest)


def _check_seal(file: BinaryIO) -> None:
    end = max(0, file.seek(0, os.SEEK_END) - _DIGITS)
    digest = _digest(file, end)
    file.seek(max(0, end - len(_SEAL)))
    require(file.read() == _SEAL + digest, "its SHA-256 is not the one it was written with")


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first ``size`` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


@dataclass(frozen=True, repr=False)
class Run:
    """A trained autoencoder and what it was trained with; of several architectures, the autoencoder as each of them sees it (``parts``, by
    label; ``autoencoder`` is then the first one's)."""

    out: Path
    step: int
    config: TrainConfig
    autoencoder: Autoencoder
    parts: Mapping[str, Autoencoder] = field(default_factory=dict)

    def __repr__(self) -> str:
        model = self.autoencoder
        sizes = f"{model.latent_numbers:,} latent numbers for {model.layout.architecture.num_weights:,} weights"
        more = f", {len(self.parts)} architectures" if self.parts else ""
        return f"Run({str(self.out)!r}, step {self.step:,} of {self.config.steps:,}, zoo {self.config.zoo!r}, {sizes}{more})"

    @property
    def finished(self) -> bool:
        """Whether all its steps were taken."""
        return self.step >= self.config.steps

    @property
    def zoo(self) -> str:
        """Folder of the zoo that it was trained on. One that was given from another working folder is looked for above the run's."""
        given = Path(self.config.zoo)
        places = [given, *(parent / given for parent in self.out.resolve().parents)] if self.config.zoo else []
        return str(next((place for place in places if (place / MANIFEST).is_file()), given))

    def _repr_html_(self) -> str:
        """In a notebook: where it is, how far it got, and what it was trained with."""
        c, model = self.config, self.autoencoder
        facts = {
            "folder": str(self.out), "steps": f"{self.step:,} of {c.steps:,}", "zoo": c.zoo, "start": c.start,
            "latent numbers a model": f"{model.latent_numbers:,} for {model.layout.architecture.num_weights:,} weights",
            "gamma, beta": f"{c.gamma:g}, {c.beta:g}", "criterion": c.criterion, "learning rate": c.lr, "seed": c.seed,
        }  # fmt: skip
        return html_table(["run", ""], list(facts.items()))

    def of(self, architecture: Architecture) -> Autoencoder:
        """The autoencoder as models of an architecture see it. Raises WslfastError where it was not trained on any."""
        if not self.parts:
            known = self.autoencoder.layout.architecture
            fits = known.same_network(architecture) or None in (known.graph, architecture.graph)
            what = f"trained on models of architecture {known.name!r}, and these are of {architecture.name!r}, another network"
            require(fits, f"run {self.out}: {what}")
            return self.autoencoder
        own = [part for part in self.parts.values() if part.layout.architecture.same_network(architecture)]
        require(bool(own), f"run {self.out}: not trained on models of architecture {architecture.name!r}, but of {list(self.parts)}")
        return own[0]

    def only(self, architecture: Architecture) -> Run:
        """The run as one over a single architecture."""
        return replace(self, autoencoder=self.of(architecture), parts={})


def load_run(out: str | Path, *, architecture: Architecture | None = None, device: torch.device | str = "cpu") -> Run:
    """The autoencoder of a run's latest checkpoint, in evaluation mode (``architecture`` for zoos of opaque networks)."""
    state = load_checkpoint(out, device)
    try:
        config = TrainConfig.from_dict(state["config"])
        recorded = state["architecture"].get("architectures")
        if isinstance(recorded, dict) and recorded:
            return _mixed(Path(out), state, config, recorded, device)
        arch = architecture if architecture is not None else Architecture.from_dict(state["architecture"])
        model = _rebuilt(arch, state)
    except Exception as error:  # whatever the library makes of a state that nobody trained
        raise WslfastError(f"checkpoint {checkpoint_path(out)} cannot be rebuilt: {error}") from error
    return Run(Path(out), state["step"], config, model.to(device).eval())


def _mixed(out: Path, state: dict[str, Any], config: TrainConfig, recorded: dict[str, Any], device: torch.device | str) -> Run:
    """A run over several architectures: its weights are under the number of each."""
    parts = {}
    for i, (name, record) in enumerate(recorded.items()):
        model = {key.removeprefix(f"{i}."): value for key, value in state["model"].items() if key.startswith(f"{i}.")}
        own = {"autoencoder": state["autoencoder"][name], "model": model}
        parts[name] = _rebuilt(Architecture.from_dict(record), own).to(device).eval()
    return Run(out, state["step"], config, next(iter(parts.values())), parts)


def _rebuilt(architecture: Architecture, state: dict[str, Any]) -> Autoencoder:
    """The autoencoder of a state. Its sizes are compared with the tensors that are there before any memory of that size is taken."""
    sizes, held = state["autoencoder"], {name: tuple(value.shape) for name, value in state["model"].items()}
    require(len(held.get("mask", ())) == 2, "it has no mask of tokens")
    size = held["mask"][1]
    require(size > 0 and held["mask"][0] == num_tokens(architecture, size), f"its tokens are not of {architecture.name!r}")
    layout = TokenLayout(architecture, size)
    require(type(sizes.get("layers")) is int and sizes["layers"] <= len(held), "it lacks layers")
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Autoencoder.from_config(layout, sizes).state_dict().items()}
    differ = [name for name in {**wanted, **held} if wanted.get(name) != held.get(name)]
    require(not differ, f"{differ[:3]} have other shapes")
    model = Autoencoder.from_config(layout, sizes).to(torch.float32)
    model.load_state_dict(state["model"])
    return model
