"""A run's checkpoint: one file with everything, written atomically, loadable without running any code of the file."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._files import write_atomically
from ..architecture import Architecture
from ..autoencoder import Autoencoder
from ..errors import WslfastError, check_device, require
from ..tokens import TokenLayout
from .config import TrainConfig

SCHEMA = 1
_KEYS = ("schema", "step", "config", "architecture", "autoencoder", "model", "optimizer", "schedule", "normalizers", "rng", "sampler")


def checkpoint_path(out: str | Path) -> Path:
    """Where a run keeps its latest checkpoint."""
    return Path(out) / "checkpoint" / "state.pt"


def save_checkpoint(out: str | Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint by ``state`` (tensors and plain values under the keys of this module)."""
    assert set(state) == set(_KEYS) - {"schema"}, set(state) ^ set(_KEYS)
    write_atomically(checkpoint_path(out), lambda temporary: torch.save({"schema": SCHEMA, **state}, temporary))


def load_checkpoint(out: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The run's latest checkpoint. Raises WslfastError naming the file if it is missing, damaged or from a newer version."""
    path, device = checkpoint_path(out), check_device(device)
    require(path.is_file(), f"no checkpoint in {out} (expected {path})")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError, pickle.UnpicklingError) as error:
        raise WslfastError(f"checkpoint {path} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    require(isinstance(state, dict) and isinstance(state.get("schema"), int), f"checkpoint {path} is not one of wslfast's")
    require(state["schema"] <= SCHEMA, f"checkpoint {path} is from a newer version (schema {state['schema']}, this one reads {SCHEMA})")
    missing = [key for key in _KEYS if key not in state]
    require(not missing, f"checkpoint {path} lacks {missing}")
    return state


@dataclass(frozen=True)
class Run:
    """A trained autoencoder and what it was trained with."""

    out: Path
    step: int
    config: TrainConfig
    autoencoder: Autoencoder

    @property
    def finished(self) -> bool:
        """Whether all its steps were taken."""
        return self.step >= self.config.steps


def load_run(out: str | Path, *, architecture: Architecture | None = None, device: torch.device | str = "cpu") -> Run:
    """The autoencoder of a run's latest checkpoint, in evaluation mode (``architecture`` for zoos of opaque networks)."""
    state = load_checkpoint(out, device)
    config = TrainConfig.from_dict(state["config"])
    arch = architecture if architecture is not None else Architecture.from_dict(state["architecture"])
    model = Autoencoder.from_config(TokenLayout(arch, config.token_size), state["autoencoder"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise WslfastError(f"checkpoint {checkpoint_path(out)} does not fit its own config: {error}") from None
    return Run(Path(out), int(state["step"]), config, model.to(device).eval())
