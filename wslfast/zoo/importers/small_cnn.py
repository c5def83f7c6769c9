"""The Small CNN Zoo (Unterthiner et al. 2020, google-research/dnn_predict_accuracy): all checkpoints in one matrix, ``weights.npy``.

``layout.csv`` says which columns are which variable (``varname, start_idx, end_idx, shape``), ``metrics.csv.gz`` what each row is
(``config.*``, ``modeldir``, ``step``, accuracies and losses). The matrix is mapped, not read: the published ones have 5 GB. Kernels are
TensorFlow's, height, width, in, out; dense ones in, out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import WslfastError, present, require
from .checkpoint import Checkpoint, Skips
from .modules import small_cnn
from .tables import read_table

PADDINGS = ("valid", "same")
_METRICS = ("metrics.csv.gz", "metrics.csv")
_SHAPE = re.compile(r"\s*[(\[]?\s*(\d{1,6}(?:\s*,\s*\d{1,6})*)\s*,?\s*[)\]]?\s*")
_COLUMNS = {
    "train_accuracy": "train_acc", "test_accuracy": "test_acc", "train_loss": "train_loss", "test_loss": "test_loss",
    "config.learning_rate": "lr", "config.l2reg": "wd", "config.w_init": "init_type", "config.random_seed": "seed",
}  # fmt: skip


def is_there(source: Path) -> bool:
    """Whether the folder is a Small CNN Zoo's."""
    return (source / "weights.npy").is_file() and (source / "layout.csv").is_file()


@dataclass(frozen=True)
class _Variable:
    """One variable's columns; its shape is TensorFlow's."""

    owner: str
    kind: str  # kernel or bias
    start: int
    stop: int
    shape: tuple[int, ...]


def checkpoints(
    source: Path, padding: str, side: int | None, epochs: Collection[int] | None, skips: Skips, seen: set[int]
) -> Iterator[Checkpoint]:
    """Every row of the matrix, models numbered by ``modeldir`` in order of appearance.

    Args:
        padding: of the convolutions, ``"valid"`` (Keras' default, which the published training script leaves alone) or ``"same"``.
        side: of the images; default 32 where the table says CIFAR-10 or SVHN, else 28.
    """
    require(padding in PADDINGS, f"padding: expected one of {PADDINGS}, got {padding!r}")
    matrix = _matrix(source / "weights.npy")
    layers = _layers(read_table(source / "layout.csv"), matrix.shape[1], source / "layout.csv")
    candidates = (source / name for name in _METRICS if (source / name).is_file())
    file = present(next(candidates, None), f"{source}: expected {_METRICS[0]} beside weights.npy")
    table = read_table(file)
    require(len(table) == len(matrix), f"{file}: expected {len(matrix)} rows, as many as weights.npy has, got {len(table)}")
    models: dict[Any, int] = {}
    for row, line in enumerate(table):
        folder = line.get("modeldir")
        model = models.setdefault(row if folder is None else folder, len(models))
        seen.add(model)
        epoch = line.get("step", 0)
        where = f"{file.name} row {row}"
        if type(epoch) is not int or epoch < 0:
            skips.add(where, "epoch unknown", f"step is {epoch!r}")
            continue
        if epochs is not None and epoch not in epochs:
            continue
        activation = str(line.get("config.activation") or "relu")
        size = side or (32 if re.search("cifar|svhn", str(line.get("config.dataset"))) else 28)
        try:
            architecture = small_cnn(layers.widths, layers.classes, activation, padding, size)
        except WslfastError as error:
            skips.add(where, "another architecture", str(error))
            continue
        properties = {"name": str(folder or row), **_properties(line)}
        yield Checkpoint(where, model, epoch, properties, {}, partial(layers.state, matrix, row), architecture=architecture)


def _properties(line: Mapping[str, Any]) -> dict[str, Any]:
    properties = {
        _COLUMNS.get(name, name.removeprefix("config.")): value for name, value in line.items() if name not in ("modeldir", "step")
    }
    train, test = properties.get("train_acc"), properties.get("test_acc")
    if isinstance(train, (int, float)) and isinstance(test, (int, float)):
        properties["ggap"] = train - test
    return properties


def _matrix(path: Path) -> np.ndarray:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise WslfastError(f"{path}: cannot be read as .npy without pickle: {error}") from None
    fits = isinstance(matrix, np.ndarray) and matrix.ndim == 2 and matrix.dtype.kind == "f" and len(matrix) > 0
    require(fits, f"{path}: expected floating [rows, parameters], got {getattr(matrix, 'dtype', '?')} {list(getattr(matrix, 'shape', ()))}")
    return matrix


@dataclass(frozen=True)
class _Layers:
    """Convolutions in order, then the dense layer: (kernel, bias) each."""

    pairs: tuple[tuple[_Variable, _Variable], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        kernels = [kernel.shape for kernel, _ in self.pairs[:-1]]
        return (kernels[0][2], *(shape[3] for shape in kernels))

    @property
    def classes(self) -> int:
        return self.pairs[-1][0].shape[1]

    def state(self, matrix: np.ndarray, row: int) -> dict[str, Tensor]:
        """One row as a state dict of :class:`~.modules.SmallCNN`."""
        numbers = torch.from_numpy(np.array(matrix[row], dtype=np.float32))
        state: dict[str, Tensor] = {}
        for i, (kernel, bias) in enumerate(self.pairs):
            values = numbers[kernel.start : kernel.stop].reshape(kernel.shape)
            name = f"conv.{i}" if len(kernel.shape) == 4 else "dense"
            state[f"{name}.weight"] = values.permute(3, 2, 0, 1) if values.ndim == 4 else values.T
            state[f"{name}.bias"] = numbers[bias.start : bias.stop]
        return state


def _layers(table: list[dict[str, Any]], columns: int, where: Path) -> _Layers:
    owners: dict[str, dict[str, _Variable]] = {}
    taken = 0
    for line in table:
        variable = _variable(line, columns, where)
        parts = owners.setdefault(variable.owner, {})
        require(variable.kind not in parts, f"{where}: {variable.owner} has two variables of kind {variable.kind}")
        parts[variable.kind] = variable
        taken += variable.stop - variable.start
    require(taken == columns, f"{where}: expected variables of {columns} columns in all, as weights.npy has, got {taken}")
    wrong = [owner for owner, parts in owners.items() if set(parts) != {"kernel", "bias"}]
    require(not wrong, f"{where}: expected a kernel and a bias of every layer, not so of {wrong[:3]}")
    pairs = sorted(((parts["kernel"], parts["bias"]) for parts in owners.values()), key=lambda pair: pair[0].start)
    kernels = [kernel.shape for kernel, _ in pairs]
    chained = len(kernels) >= 2 and all(len(s) == 4 and s[:2] == (3, 3) for s in kernels[:-1]) and len(kernels[-1]) == 2
    chained = chained and all(a[-1] == b[-2] for a, b in itertools.pairwise(kernels))
    chained = chained and all(bias.shape == (kernel.shape[-1],) for kernel, bias in pairs)
    require(chained, f"{where}: expected 3x3 convolutions and one dense layer, each reading the one before, got {kernels}")
    return _Layers(tuple(pairs))


def _variable(line: Mapping[str, Any], columns: int, where: Path) -> _Variable:
    name, start, stop = line.get("varname"), line.get("start_idx"), line.get("end_idx")
    shape = _SHAPE.fullmatch(str(line.get("shape")))  # a text as "(3, 3, 1, 16)", never evaluated
    whole = isinstance(name, str) and type(start) is int and type(stop) is int and shape is not None
    require(whole, f"{where}: expected varname, start_idx, end_idx and shape in every line, got {dict(line)!r:.120}")
    assert isinstance(name, str)
    assert isinstance(start, int)
    assert isinstance(stop, int)
    assert shape is not None
    sizes = tuple(int(size) for size in shape[1].split(","))
    fits = 0 <= start < stop <= columns and int(np.prod(sizes)) == stop - start
    require(fits, f"{where}: {name}: columns {start} to {stop} do not hold {list(sizes)}")
    owner, _, leaf = name.rpartition("/")
    kind = leaf.partition(":")[0]
    require(kind in ("kernel", "bias"), f"{where}: {name}: expected a variable called kernel or bias")
    return _Variable(owner, kind, start, stop, sizes)
