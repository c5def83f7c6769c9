"""Checkpoints of a zoo from disk, for ``sane`` 2.x: files of equal structure are read without unpickling.

``torch.load`` runs a pickle program in Python for every file. The programs of a zoo's checkpoints are equal byte for byte: the first is run
by torch, and what it made of which stored block is remembered. A file with another program goes to torch again.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import WslfastError
from ...safe.inert import InertFile, StoredTensor
from .modules import copied

_REMEMBERED = 64
_SAVED_EVERY = 5.0  # seconds


class _Block(NamedTuple):
    """A stored tensor: record, numbers in the storage, dtype, offset, shape, stride."""

    record: str
    numel: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Program:
    """What one pickle program makes: a nest of dicts, lists and tuples whose leaves are plain tensors."""

    def __init__(self, example: Any, blocks: list[_Block]) -> None:
        self.example, self.blocks = example, blocks

    def run(self, reader: Any) -> Any:
        storages: dict[str, Any] = {}
        tensors = []
        for record, numel, dtype, offset, shape, stride in self.blocks:
            if record not in storages:
                raw = reader.get_storage_from_record(record, numel * dtype.itemsize, torch.UntypedStorage)
                storages[record] = raw.untyped_storage()
            tensors.append(torch.empty(0, dtype=dtype).set_(storages[record], offset, shape, stride))
        return _filled(self.example, iter(tensors))


_programs: dict[bytes, _Program | None] = {}


def load(path: str | Path) -> Any:
    """``torch.load(path, map_location="cpu")``, to the bit; torch's own errors for what it cannot read."""
    open_file = getattr(torch._C, "PyTorchFileReader", None)
    if open_file is None:
        return torch.load(path, map_location="cpu")
    try:
        reader = open_file(str(path))
        program = bytes(reader.get_record("data.pkl"))
    except (RuntimeError, ValueError):
        return torch.load(path, map_location="cpu")
    known = _programs.get(program)
    if known is not None:
        try:
            return known.run(reader)
        except (RuntimeError, ValueError):  # a block is damaged: the words about it are torch's
            return torch.load(path, map_location="cpu")
    made = torch.load(path, map_location="cpu")
    if program not in _programs:
        while len(_programs) >= _REMEMBERED:
            del _programs[next(iter(_programs))]
        _programs[program] = _learn(path, made, reader)
    return made


def _learn(path: str | Path, made: Any, reader: Any) -> _Program | None:
    """The program of a file, if it makes nothing but plain tensors, and making them again gives the same; else None."""
    leaves: list[Any] = []
    if not _leaves(made, leaves) or any(type(t) is not Tensor or t.requires_grad or vars(t) for t in leaves):
        return None
    try:
        if reader.has_record("byteorder") and bytes(reader.get_record("byteorder")).strip() != b"little":
            return None
        with InertFile(path) as file:
            stored: list[Any] = []
            if not _leaves(file.root, stored) or len(stored) != len(leaves) or not all(isinstance(s, StoredTensor) for s in stored):
                return None
            blocks = [_block(s, t) for s, t in zip(stored, leaves)]
        example = _filled(made, iter(torch.empty(0) for _ in leaves))
        learnt = _Program(example, blocks)
        again: list[Any] = []
        _leaves(learnt.run(reader), again)
        same = all(a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and _bits(a, b) for a, b in zip(leaves, again))
        return learnt if same else None
    except (WslfastError, RuntimeError, AttributeError, ValueError, TypeError):
        return None


def _block(stored: StoredTensor, tensor: Tensor) -> _Block:
    return _Block(
        f"data/{stored.storage.key}", stored.storage.numel, tensor.dtype, int(stored.offset), tuple(stored.shape), tuple(stored.stride)
    )


def _bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)) if a.numel() else True


def _leaves(value: Any, into: list[Any]) -> bool:
    """Collects the leaves of nested dicts, lists and tuples in order; False if something is neither these nor a tensor."""
    if isinstance(value, (Tensor, StoredTensor)):
        into.append(value)
        return True
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(_leaves(v, into) for v in value.values())
    return type(value) in (list, tuple) and all(_leaves(v, into) for v in value)


def _filled(value: Any, tensors: Any) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        out = type(value)((key, _filled(v, tensors)) for key, v in value.items())
        metadata = vars(value).get("_metadata") if isinstance(value, OrderedDict) else None
        if metadata is not None:
            out._metadata = OrderedDict((key, dict(v)) for key, v in metadata.items())  # type: ignore[attr-defined]
        return out
    return type(value)([_filled(v, tensors) for v in value])


# -- what takes the place of the published methods ---------------------------------------------------------------------


def from_cache(self: Any, cache_path: Path, *, original: Callable[..., Any]) -> Any:
    """``DiskCache._load_from_disk``: a window that was stored. What is missing or damaged is treated as published."""
    if not cache_path.exists():
        return original(self, cache_path)
    try:
        return load(cache_path)
    except Exception:
        return original(self, cache_path)


def preload(self: Any, checkpoint_indices: Any = None, *, original: Callable[..., Any]) -> Any:
    """``CachedWindowedDataset.preload_cache``, which writes its whole list of checkpoints once every few seconds and at the end, not once a
    checkpoint."""
    if "_save_cache_metadata" in vars(self):
        return original(self, checkpoint_indices)
    done, last = len(self._cached_checkpoints), [time.monotonic()]

    def now_and_then() -> None:
        if time.monotonic() - last[0] > _SAVED_EVERY:
            type(self)._save_cache_metadata(self)
            last[0] = time.monotonic()

    self._save_cache_metadata = now_and_then
    try:
        return original(self, checkpoint_indices)
    finally:
        del self._save_cache_metadata
        if self._cache_mode == "per_window" and len(self._cached_checkpoints) != done:
            self._save_cache_metadata()


def within_magnitude(self: Any, checkpoint_info: Any, *, original: Callable[..., Any]) -> bool:
    """``WeightMagnitudeCheckpointFilter.__call__``: one look at all numbers together."""
    try:
        state = load(checkpoint_info.state_dict_path)
        values = list(state.values())
        floats = [t.reshape(-1) for t in values if t.is_floating_point() and t.numel()]
        others = [t for t in values if not t.is_floating_point()]
        if len({t.dtype for t in floats}) != 1 or any(t.is_complex() for t in others):
            return bool(original(self, checkpoint_info))
        flat = torch.cat(floats)
        if bool(flat.isnan().any()):  # alone or beside large numbers: which tensor comes first decides
            return bool(original(self, checkpoint_info))
        if self.max_absolute_weight is None:
            return True
        # compared as tensors: a limit is rounded as the weights are, so that weights clipped at it are within
        return not any(bool(t.abs().max() > self.max_absolute_weight) for t in (flat, *others) if t.numel())
    except Exception:
        return bool(original(self, checkpoint_info))


def item(self: Any, index: int, *, original: Callable[..., Any]) -> Any:
    """``ZooDataset.__getitem__``: a checkpoint with its settings and results. Nothing is drawn that the published code does not draw."""
    world = original.__globals__
    try:
        info = self._ZooDataset__ckpt_info_list[index]
        config = json.loads(Path(info.model_config_path).read_bytes())
        results = _line(info.eval_results_path, info.epoch_idx)
        state = world["_unwrap_state_dict"](load(info.state_dict_path))
        config = world["_reconcile_model_output_dim"](config, state)
    except Exception:
        return original(self, index)
    model = network(config, state, world["get_model"])
    if model is None:
        model = world["get_model"](config)
        model.load_state_dict(state)
    checkpoint = world["Checkpoint"](model, metadata={"model_config": config, "eval_results": results})
    return self.augmentations(checkpoint) if self.augmentations is not None else checkpoint


def _line(path: str, index: int) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.loads(list(file)[index])


class _Template:
    """A network of one configuration as the published code builds it, and how many numbers building it draws."""

    def __init__(self, model: Any, draws: int) -> None:
        self.tensors = dict(model.state_dict(keep_vars=True))
        self.model, self.draws = model, draws


_templates: dict[str, _Template | None] = {}


def network(config: dict[str, Any], state: dict[str, Tensor], build: Callable[..., Any]) -> Any:
    """The network of a configuration with these weights, torch's generator advanced as building it would; None if that cannot be told.

    Building initialises every layer twice, and loading overwrites it. Only what follows depends on it: later draws do.
    """
    # learning rates and seeds, which each model of a zoo has its own of, are no part of a network
    model_settings = {name: value for name, value in config.items() if str(name).startswith("model::")}
    key = json.dumps(model_settings or config, sort_keys=True, default=str)
    if key not in _templates:
        if len(_templates) >= _REMEMBERED:
            _templates.clear()
        _templates[key] = _template(config, build)
    template = _templates[key]
    if template is None or list(state) != list(template.tensors):
        return None
    fits = all(
        type(t) is Tensor and t.shape == old.shape and t.dtype == old.dtype for t, old in zip(state.values(), template.tensors.values())
    )
    if not fits:
        return None
    _advance(template.draws)
    return copied(template.model, {id(old): t.clone() for t, old in zip(state.values(), template.tensors.values())})


def _template(config: dict[str, Any], build: Callable[..., Any]) -> _Template | None:
    before, settings = torch.get_rng_state(), json.dumps(config)
    try:
        model = build(config)
        after = torch.get_rng_state()
        tensors = list(model.state_dict(keep_vars=True).values())
        held = {id(t) for t in (*model.parameters(), *model.buffers())}
        # every layer draws weights and biases, then weights again; a network that draws another way is built every time
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
        biases = sum(m.bias.numel() for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and m.bias is not None)
        torch.set_rng_state(before)
        for draws in (2 * weights + biases, weights + biases):
            torch.set_rng_state(before)
            _advance(draws)
            same = torch.equal(torch.get_rng_state(), after)
            if same and json.dumps(config) == settings and {id(t) for t in tensors} <= held and type(model.state_dict()) is OrderedDict:
                return _Template(model, draws)
        return None
    except Exception:
        return None
    finally:
        torch.set_rng_state(before)


def _advance(draws: int) -> None:
    """Takes as many numbers from torch's generator as that many uniform ones do."""
    torch.empty(draws, dtype=torch.int32).random_()
