"""The published downstream probe: what a representation knows about its models, from data sets or loaders of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import describe, require
from ..measure.probe import PENALTIES, RidgeProbe

TASKS = ("test_acc", "training_iteration", "ggap")
_CATEGORIES = ("POISONED", "NUMBER_TRIGGERED_CLASSES", "poisoned")


class DownstreamTaskLearner:
    """Fits one linear probe a property on embeddings of the training split and reads R2 (accuracy for classes) on every split."""

    def eval_dstasks(
        self,
        model: Any,
        trainset: Any,
        testset: Any,
        valset: Any = None,
        task_keys: Sequence[str] = TASKS,
        batch_size: int = 100,
        polar_coordinates: bool = False,
    ) -> dict[str, float]:
        """Probe ``model.forward_embeddings(tokens, positions)``.

        Args:
            model: anything with ``forward_embeddings(x [k, T, D], p [k, T, 3]) -> [k, d]``.
            trainset, testset, valset: data sets with ``__get_weights__() -> (tokens [M, T, D], masks)``, ``positions [T, 3]``
                (or ``pos``, one per model) and ``properties {name: values}`` (nested lists, a model and epoch, are flattened).
            task_keys: properties; numbers (booleans too, as published) are regressed, strings classified.
            batch_size: models embedded at a time.
            polar_coordinates: embeddings as their norm and the angle to each axis.

        Returns:
            ``{task}_train``, ``{task}_test`` and, with a ``valset``, ``{task}_val``.
        """
        sets = {"train": trainset, "test": testset} | ({} if valset is None else {"val": valset})
        features = {split: self._embed(model, data, batch_size, polar_coordinates) for split, data in sets.items()}
        out: dict[str, float] = {}
        for key in task_keys:
            values = {split: _flat(data.properties[key]) for split, data in sets.items()}
            category = key in _CATEGORIES or isinstance(values["train"][0], str)
            solve: Any = self.classify_single if category else self.compute_closed_form_solution
            pairs = [argument for split in ("train", "test") for argument in (features[split], values[split])]
            scores = solve(*pairs, features.get("val"), values.get("val"))
            out |= {f"{key}_{split}": score for split, score in zip(("train", "test", "val"), scores) if split in sets}
        return out

    def _embed(self, model: Any, data: Any, batch_size: int, polar: bool) -> Tensor:
        weights = data.__get_weights__()[0]
        each = getattr(data, "pos", None)
        positions = torch.stack(list(each)) if each is not None else data.positions.expand(len(weights), -1, -1)
        return self.map_embeddings(weights, positions, model, batch_size, polar)

    @torch.no_grad()
    def map_embeddings(self, weights: Tensor, pos: Tensor, model: Any, batch_size: int = 100, polar_coordinates: bool = False) -> Tensor:
        """Embeddings ``[M, d]`` on the CPU, of tokens ``[M, T, D]`` in their order."""
        device = getattr(model, "device", None) or next((p.device for p in getattr(model, "parameters", list)()), torch.device("cpu"))
        pairs = zip(weights.split(batch_size), pos.split(batch_size))
        z = torch.cat([model.forward_embeddings(w.to(device), p.to(device, torch.int)).cpu() for w, p in pairs])
        return _polar(z) if polar_coordinates else z

    def compute_closed_form_solution(
        self,
        z_train: Tensor,
        prop_train: Sequence[float],
        z_test: Tensor,
        prop_test: Sequence[float],
        z_val: Tensor | None = None,
        prop_val: Sequence[float] | None = None,
        verbosity: int = 0,
        return_reg: bool = False,
    ) -> tuple[Any, ...]:
        """R2 of a ridge probe on train, test and validation (None without one); its penalty is chosen on validation, else on
        train. With ``return_reg`` the penalty comes first."""
        return ridge(z_train, prop_train, z_test, prop_test, z_val, prop_val, return_reg)

    def classify_single(
        self,
        z_train: Tensor,
        prop_train: Sequence[Any],
        z_test: Tensor,
        prop_test: Sequence[Any],
        z_val: Tensor | None = None,
        prop_val: Sequence[Any] | None = None,
    ) -> tuple[float, float, float | None]:
        """Accuracy of a linear softmax classifier (Adam 1e-4, decay 1e-6, 50 epochs of batches of 10) on the three splits."""
        classes = sorted(set(prop_train))
        for split, labels in (("test", prop_test), ("val", prop_val or ())):
            unknown = sorted(set(labels) - set(classes))
            require(not unknown, f"{split}: expected classes of the training split {classes}, got {unknown[:5]}")
        y_train, y_test = (torch.tensor([classes.index(v) for v in values]) for values in (prop_train, prop_test))
        generator = torch.Generator().manual_seed(42)
        linear = nn.Linear(z_train.shape[1], len(classes))
        with torch.no_grad():
            linear.weight.normal_(0, math.sqrt(2 / z_train.shape[1]), generator=generator)  # kaiming, for a ReLU's gain
            linear.bias.fill_(0.01)
        optimiser = torch.optim.Adam(linear.parameters(), 1e-4, weight_decay=1e-6)
        x = z_train.float()
        for _ in range(50):
            for batch in torch.randperm(len(x), generator=generator).split(10):
                optimiser.zero_grad()
                F.cross_entropy(linear(x[batch]), y_train[batch]).backward()
                optimiser.step()

        def accuracy(z: Tensor, y: Tensor) -> float:
            with torch.no_grad():
                return float((linear(z.float()).argmax(1) == y).float().mean())

        val = None if z_val is None or prop_val is None else accuracy(z_val, torch.tensor([classes.index(v) for v in prop_val]))
        return accuracy(x, y_train), accuracy(z_test, y_test), val


def ridge(
    z_train: Tensor, prop_train: Any, z_test: Tensor, prop_test: Any, z_val: Tensor | None, prop_val: Any, return_reg: bool = False
) -> tuple[Any, ...]:
    """One decomposition for all 17 penalties, in float64, as :class:`wslfast.measure.RidgeProbe` does it."""
    val = None if z_val is None or prop_val is None else (z_val, _numbers(prop_val))
    probe = RidgeProbe.fit(z_train, _numbers(prop_train), validation=val, penalties=PENALTIES)
    scores = (probe.r2(z_train, _numbers(prop_train)), probe.r2(z_test, _numbers(prop_test)), None if val is None else probe.r2(*val))
    return (probe.penalty, *scores) if return_reg else scores


def _numbers(values: Any) -> Tensor:
    # the published code goes through float32
    return torch.as_tensor(values, dtype=torch.float32).flatten()


def _flat(values: Any) -> list[Any]:
    require(isinstance(values, Iterable) and not isinstance(values, (str, Mapping)), f"properties: expected a list, got {describe(values)}")
    if isinstance(values, Tensor):
        return list(values.flatten().tolist())
    flat: list[Any] = []
    for value in values:
        nested = isinstance(value, (list, tuple, Tensor))
        flat += _flat(value) if nested else [value]
    return flat


def _polar(z: Tensor) -> Tensor:
    """``[M, d]`` to ``[M, d + 1]``: the norm, and the angle to each axis."""
    radius = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return torch.cat([radius, (z / radius).acos()], 1)
