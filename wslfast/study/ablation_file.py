"""What an ablation is, from its TOML file: a zoo, base settings, what is varied, seeds."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from ..errors import WslfastError, check_positive, require
from ..training import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEYS = ("about", "zoo", "seeds", "split", "models", "seconds", "clock", "generate", "base", "axis", "variants")
_KINDS = {"base": dict, "axis": dict, "variants": dict, "seeds": list, "split": str, "clock": str, "generate": bool}
_ZOO_KEYS = ("dataset", "models", "epochs", "grid", "batch_size", "seed")
_FIXED = ("zoo", "out", "seed")  # of TrainConfig; not a variant's to set


@dataclass(frozen=True)
class Ablation:
    """Settings of training, varied.

    Attributes:
        name: the file's stem.
        zoo: folder of a zoo, or arguments of :func:`wslfast.build_zoo` (dataset, models, epochs, grid, batch_size, seed).
        variants: settings by name: fields of TrainConfig, and ``semantics`` (``"core"``, or what the caller offers; the command offers
            ``"linear"``, ``"metric"``, ``"adaptive"``, ``"published"`` and ``"corrected"``).
        axis: name of what is varied; joined by ``*`` where there are several, and ``variant`` where variants have names.
        seeds: each variant is trained with each.
        split: whose models are measured: ``"test"``, or ``"val"`` to choose by.
        models: how many of them at most, evenly spaced, and without probes, which need all models encoded; None is all of them. For codes
            whose encoding takes seconds per model.
        seconds: budget of a cell; None is ``steps`` alone.
        clock: ``"wall"``, or ``"process"``, the CPU time of this process, for machines that are shared.
        generate: whether new models are sampled from every cell's autoencoder and measured, too (test split).
    """

    name: str
    zoo: Union[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]
    axis: str = "variant"
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"
    seconds: float | None = None
    clock: str = "wall"
    generate: bool = False
    models: int | None = None

    @classmethod
    def from_toml(cls, path: str | Path) -> Ablation:
        """From a file: ``zoo`` (a folder, or a table of what to build), ``[base]`` settings of training, and either ``[axis]`` with a
        list of values for each setting varied (all combinations) or ``[variants.NAME]`` tables; maybe ``seeds``, ``split``, ``models``,
        ``seconds``, ``clock``, ``generate``. Raises WslfastError, one line, for anything else."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_bytes().decode("utf-8"))
            return cls._read(path.stem, values)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError, WslfastError) as error:
            raise WslfastError(f"ablation {path}: {error}") from None

    @classmethod
    def _read(cls, name: str, values: Mapping[str, Any]) -> Ablation:
        unknown = sorted(set(values) - set(_KEYS))
        require(not unknown, f"unknown keys {unknown}; known: {list(_KEYS)}")
        for key, kind in _KINDS.items():
            require(isinstance(values.get(key, kind()), kind), f"{key}: expected a {kind.__name__}, got {values.get(key)!r}")
        zoo, base = values.get("zoo"), values.get("base", {})
        require(isinstance(zoo, (str, dict)) and bool(zoo), f"zoo: expected a folder, or a table of what to build, got {zoo!r}")
        assert isinstance(zoo, (str, dict))
        if isinstance(zoo, dict):
            wrong = sorted(set(zoo) - set(_ZOO_KEYS))
            require(not wrong, f"zoo: unknown keys {wrong}; known: {list(_ZOO_KEYS)}")
            for key, value in zoo.items():
                wanted: type = str if key in ("dataset", "grid") else int
                require(type(value) is wanted, f"zoo: {key}: expected {wanted.__name__}, got {value!r}")
        axis, variants = _variants(values, base)
        seeds, seconds = tuple(values.get("seeds", (0, 1, 2))), values.get("seconds")
        split, clock = values.get("split", "test"), values.get("clock", "wall")
        require(all(type(s) is int and 0 <= s < 1 << 63 for s in seeds), f"seeds: expected integers from 0 to 2^63 - 1, got {list(seeds)}")
        require(len(seeds) > 0 and len(set(seeds)) == len(seeds), f"seeds: expected distinct integers, got {list(seeds)}")
        require(split in ("test", "val"), f"split: expected test or val, got {split!r}")
        require(clock in ("wall", "process"), f"clock: expected wall or process, got {clock!r}")
        models = values.get("models")
        if models is not None:
            check_positive("models", models)
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < float("inf")
        require(seconds is None or number, f"seconds: expected a positive number, got {seconds!r}")
        budget = None if seconds is None else float(seconds)
        made = cls(name, zoo, variants, axis, seeds, split, budget, clock, values.get("generate", False), models)
        for variant in variants:  # every wrong setting is found before anything is trained
            try:
                _, config = settings_of(made, variant, "zoo", seeds[0])
            except WslfastError as error:
                raise WslfastError(f"{variant}: {error}") from None
            paced = seconds is None or config.schedule == "constant"
            require(paced, f"{variant}: schedule: expected constant where seconds is given, got {config.schedule!r}")
        return made

    def value(self, variant: str) -> str:
        """A variant's place on the axis, as text: ``0.1``; its name where variants have names."""
        return variant if self.axis == "variant" else "*".join(part.partition("=")[2] for part in variant.split(" "))


def settings_of(ablation: Ablation, variant: str, zoo: str, seed: int) -> tuple[str, TrainConfig]:
    """Which system trains a variant, and its settings with a seed."""
    settings = dict(ablation.variants[variant])
    system = settings.pop("semantics", "core")
    require(isinstance(system, str), f"semantics: expected a name, got {system!r}")
    return system, TrainConfig.from_dict({**settings, "zoo": zoo, "out": "unused", "seed": seed})


def _variants(values: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    axis, named = values.get("axis", {}), values.get("variants", {})
    require(bool(axis) != bool(named), "expected either [axis] with lists of values or [variants.NAME] tables")
    if axis:
        for key, points in axis.items():
            require(isinstance(points, list) and len(points) > 0, f"axis: {key}: expected a list of values, got {points!r}")
        grid = [dict(zip(axis, point)) for point in itertools.product(*axis.values())]
        variants = {" ".join(f"{k}={_text(v)}" for k, v in point.items()): {**base, **point} for point in grid}
        require(len(variants) == len(grid), "axis: expected distinct values")
    else:
        require(all(isinstance(v, dict) for v in named.values()), f"variants: expected tables, got {named!r}")
        variants = {name: {**base, **settings} for name, settings in named.items()}
    taken = sorted({key for settings in variants.values() for key in settings if key in _FIXED})
    require(not taken, f"{', '.join(taken)}: not a setting to vary; give zoo and seeds at the top, and --out")
    return "*".join(axis) if axis else "variant", variants


def _text(value: Any) -> str:
    """A value in a variant's name: as short as it can be told from others, without the spaces that part settings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).replace(" ", "_")
