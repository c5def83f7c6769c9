"""What a training run is: one frozen dataclass, from Python, TOML or flags."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import WslfastError, require
from ..kernels.criteria import CRITERIA
from .query_sets import set_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    CriterionName = str
else:
    CriterionName = Literal[CRITERIA]  # the names of the table, so that the shell lists them

PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {
        "steps": 30_000, "batch_size": 64, "lr": 1e-5, "clip": None, "precision": "auto", "start": "random", "d_model": 256, "heads": 8,
        "layers": 8, "latent": 64,
    },
}  # fmt: skip
"""What settings are where nobody gives them: the fields' defaults, a CPU's; the published ones (:meth:`TrainConfig.paper`)."""
RETIRED = {"restart": False}  # settings that are no more, and what older runs hold without having used them


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the small CPU preset; ``TrainConfig.paper(...)`` is the published one."""

    zoo: str
    """Folder of the zoo, as made by wslfast zoo build."""
    out: str
    """Folder of the run: config.toml, log.jsonl, checkpoint/."""
    steps: int = 1000
    """Optimiser steps."""
    seed: int = 0
    """Seed of initialisation, batches, views and queries."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """What runs the zoo's networks. A checkpoint keeps it: a run goes on with the backend that it began with."""

    cuda_graph: bool = False
    """On a GPU, where kernels run the networks: record the call of the behavioral loss once and replay it at every step, to the same bits.
    Saves the host the launches of a small batch's kernels; holds the memory of their activations throughout. Its gain was not measured."""

    batch_size: int = 32
    """Models a step; each gives two views where gamma > 0, one otherwise."""
    lr: float = 5e-4
    """Learning rate of AdamW (the peak, under a one-cycle schedule)."""
    maps_lr: float = 1.0
    """Rate of the linear maps that each layer has beside the transformer (starts linear and paths), as a multiple of lr."""
    weight_decay: float = 3e-9
    """AdamW's decay on parameters with two or more dimensions."""
    schedule: Literal["constant", "onecycle"] = "constant"
    """Learning-rate schedule."""
    clip: float | None = 1.0
    """Largest gradient norm; none switches clipping off."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Autocast of the autoencoder; the behavioral loss runs outside it. bf16 is faster on GPUs and on CPUs with avx512_bf16 or AMX,
    and many times slower on other CPUs; auto: bf16 where the device computes in it, else fp32 (the run's config.toml says which)."""
    behavior_precision: Literal["highest", "high", "medium", "bf16"] = "high"
    """Of the behavioral loss: torch's float32 matmul precision on a GPU (high: TF32; a CPU computes in float32 whatever it says), or bf16,
    autocast on either; losses and gradients are float32."""

    gamma: float = 0.05
    """Weight of the contrastive loss."""
    beta: float = 0.1
    """Share of the structural loss in the rest; 1 - beta is behavior's."""
    behavior_from: float = 0.0
    """Share of the steps, from the first, that are without behavior: structure has its weight. From a random start an objective with
    behavior in it from the first step finds one good network and answers every model with it; after structure it keeps models apart."""
    behavior_ramp: float = 0.0
    """Share of the steps, after those, over which behavior's weight rises evenly to 1 - beta."""
    behavior_of: Literal["outputs", "deviations"] = "outputs"
    """What of a network's outputs behavior compares (criterion mse alone): outputs, or deviations from the mean outputs of the step's
    batch, originals and reconstructions each from their own. An error that all models of the batch share then costs nothing."""
    structure_metric: Literal["plain", "activation"] = "plain"
    """What structure measures of an error in the weights: plain, its square. activation: what it does to the responses of its layer, on the
    mean second moment of the layer's inputs over training models and query images. Layers that are neither linear nor ungrouped
    convolutions (norms, their statistics) count as they are."""
    structure_unit: Literal["zoo", "layer", "outputs"] = "zoo"
    """What structure's squared errors are divided by: the variance over the zoo, or that of the layer's each. With layer, a number of a
    layer of small weights counts as much as one of a layer of large weights. outputs (structure_metric activation alone): a layer's error
    counts as much as it moves the networks' outputs, measured."""
    criterion: CriterionName = "mse"
    """Behavioral criterion."""
    distillation_temperature: float = 2.0
    """Temperature of criterion distillation."""
    contrast_temperature: float = 0.1
    """Temperature of NT-Xent."""
    queries: int = 256
    """Query images a step, shared by all models."""
    query_pool: int = 2048
    """Images that stay on the device with the originals' outputs on them, drawn once from the query set."""
    query_set: str = "data"
    """Where they come from: data, val or test (images of the zoo's data set), uniform, noise, smooth, strokes, blend or optimised (made
    without any; docs/analysis.md), a file of wslfast queries, or several joined by +."""
    views: bool = True
    """Draw a permutation of every model at every step; without, models are seen as stored."""
    permutations: Literal["equivalent", "random"] = "equivalent"
    """equivalent: views that preserve behavior. random: a control that scrambles models, the next layer's inputs permuted by another
    permutation than the outputs they read; each scrambled model is then its own original."""

    start: Literal["linear", "random", "paths"] = "linear"
    """linear: begin as a closed-form linear code of the zoo, the transformer as a zero-started correction. random: as published. paths:
    random, too, with linear maps of each layer's own beside the transformer, and latent widths by layer (from the zoo's spectra)."""
    metric: Literal["plain", "activation"] = "plain"
    """The metric on weights of the linear code that a start is, or takes its latent widths from."""
    coordinates: Literal["plain", "activation"] = "plain"
    """What the autoencoder sees and makes: weights, or the principal coordinates of each layer's rows in the activation metric, all of unit
    variance (a fixed linear map, made from the zoo; nothing that is trained begins from it)."""
    start_views: bool = True
    """Fit the linear start on every permuted view of the zoo, in closed form; without, on the models as stored."""
    share: float = 0.55
    """Latent size of a start that is not random, as a share of the parameters."""
    d_model: int = 96
    """Transformer width."""
    heads: int = 4
    """Attention heads."""
    layers: int = 2
    """Transformer blocks in the encoder, and again in the decoder."""
    latent: int = 64
    """Latent numbers a token, for a random start; the others have the widths of a linear code."""
    projection: int = 30
    """Width of the contrastive projection head."""
    dropout: float = 0.0
    """Dropout of the autoencoder."""
    token_size: int = 0
    """Token size; 0 finds it from the architecture."""
    window: int = 0
    """Tokens that attend to each other. 0: all of a network, and of one with more than 2,048, as ResNets have, windows of 512 (the
    published way; the number of tokens itself is all of them at once)."""

    gather_negatives: bool = True
    """Under torchrun, contrast every model with those of all processes; without, with those of its own process alone."""
    memory_gb: float = 4.0
    """Weights of the zoo, and its models' outputs on the query pool, stay in memory while each takes at most half of this (in 10^9
    bytes); beyond, weights are read from mapped shards and outputs computed at every step (as they are where the run looks up few
    of them). Changes results by rounding at most."""

    skip_bad: bool = False
    """Leave out shards of the zoo that are missing or damaged, with a count, instead of stopping."""

    log_every: int = 10
    """Steps between records of log.jsonl."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end."""

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)  # the command adds fields of its own, which its parser has checked
        for name, hint in hints.items():
            value = _coerce(name, getattr(self, name), hint)
            object.__setattr__(self, name, value)
        require(self.steps >= 1, f"steps: expected at least 1, got {self.steps}")
        for name in ("batch_size", "queries", "query_pool", "d_model", "heads", "latent", "projection", "log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("gamma", "beta", "share", "behavior_from", "behavior_ramp"):
            require(0 <= getattr(self, name) <= 1, f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        require(self.share > 0, "share: expected a number in (0, 1], got 0")
        begun = self.behavior_from + self.behavior_ramp
        require(begun < 1, f"behavior_from, behavior_ramp: expected shares of less than 1 in all, got {begun:g}")
        require(0 <= self.dropout < 1, f"dropout: expected a number in [0, 1), got {self.dropout}")
        for name in ("seed", "layers", "token_size", "window"):
            require(getattr(self, name) >= 0, f"{name}: expected a non-negative integer, got {getattr(self, name)}")
        for name in ("lr", "maps_lr", "distillation_temperature", "contrast_temperature"):
            require(0 < getattr(self, name) < float("inf"), f"{name}: expected a positive number, got {getattr(self, name)}")
        require(0 <= self.weight_decay < float("inf"), f"weight_decay: expected a non-negative number, got {self.weight_decay}")
        require(0 <= self.memory_gb < float("inf"), f"memory_gb: expected a non-negative number, got {self.memory_gb}")
        require(self.clip is None or self.clip > 0, f"clip: expected a positive number or none, got {self.clip}")
        require(self.d_model % (2 * self.heads) == 0, f"d_model: expected a multiple of 2 * heads = {2 * self.heads}, got {self.d_model}")
        deviations = self.behavior_of == "deviations"
        require(not deviations or self.criterion == "mse", f"behavior_of: deviations are those of criterion mse, got {self.criterion!r}")
        on_gpu = self.device.partition(":")[0] == "cuda"
        require(not self.cuda_graph or on_gpu, f"cuda_graph: expected device cuda, got {self.device!r}, which has no CUDA graphs")
        outputs = self.structure_unit == "outputs"
        require(not outputs or self.structure_metric == "activation", "structure_unit: outputs is one of structure_metric activation")
        set_names(self.query_set)

    @property
    def uses_behavior(self) -> bool:
        """Whether the behavioral term ever has weight."""
        return self.gamma < 1 and self.beta < 1

    @property
    def uses_structure(self) -> bool:
        """Whether the structural term ever has weight."""
        return self.gamma < 1 and (self.beta > 0 or self.scheduled)

    @property
    def scheduled(self) -> bool:
        """Whether behavior's weight depends on the step."""
        return self.behavior_from > 0 or self.behavior_ramp > 0

    @property
    def behavior_start(self) -> int:
        """Steps without behavior."""
        return round(self.behavior_from * self.steps)

    def beta_at(self, step: int) -> float:
        """Structure's share in the step that follows ``step`` others: 1 until behavior sets in, ``beta`` once its weight has risen."""
        after, rise = step - self.behavior_start, round(self.behavior_ramp * self.steps)
        if after < 0:
            return 1.0
        return 1 - (1 - self.beta) * min(1.0, (after + 1) / (rise + 1))

    @classmethod
    def paper(cls, zoo: str, out: str, **changes: Any) -> TrainConfig:
        """The published setting (arXiv 2503.17138): d 256, 8 + 8 blocks, 64 models, n = 256, lr 1e-5, 30,000 steps, no clipping."""
        return cls.from_dict({"preset": "paper", "zoo": zoo, "out": out, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From a mapping; ``preset`` ("small", the defaults, or "paper") says what the settings are that it does not hold.

        Raises WslfastError for unknown keys and wrong types.
        """
        named = isinstance(values, Mapping) and all(isinstance(name, str) for name in values)
        require(named, f"config: expected settings by name, got {type(values).__name__}")
        values = {name: value for name, value in values.items() if name not in RETIRED or value != RETIRED[name]}
        preset = values.pop("preset", "small")
        require(preset in PRESETS, f"preset: expected one of {tuple(PRESETS)}, got {preset!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        require(not unknown, f"config: unknown keys {unknown}; known: {known}")
        missing = [name for name in ("zoo", "out") if name not in values]
        require(not missing, f"config: {' and '.join(missing)} missing")
        return cls(**{**PRESETS[preset], **values})

    @classmethod
    def from_toml(cls, path: str | Path, **changes: Any) -> TrainConfig:
        """From a TOML file of ``key = value`` lines (``clip = "none"`` for None; maybe ``preset``); ``changes`` win.

        Raises WslfastError for a file that cannot be read and for settings that do not fit, naming the file.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8")
            values = tomllib.loads(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise WslfastError(f"config {path}: {error}") from None
        try:
            return cls.from_dict({**values, **changes})
        except WslfastError as error:
            raise WslfastError(f"config {path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The TOML that :meth:`from_toml` reads back."""
        lines = []
        for name, value in self.to_dict().items():
            if value is None:
                text = '"none"'
            elif isinstance(value, bool):
                text = str(value).lower()
            elif isinstance(value, str):
                text = '"' + "".join(_ESCAPES.get(c, c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in value) + '"'
            else:
                text = repr(value)
            lines.append(f"{name} = {text}")
        return "\n".join(lines) + "\n"


_ESCAPES = {"\\": "\\\\", '"': '\\"'}


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the field's type: integers pass for floats, ``"none"`` for None; anything else is an error."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        require(isinstance(value, str) and value in choices, f"{name}: expected one of {choices}, got {value!r}")
        return value
    if get_origin(hint) in (Union, UnionType):
        if value is None or value == "none":
            return None
        hint = next(a for a in get_args(hint) if a is not NoneType)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    require(fits and value == value, f"{name}: expected {hint.__name__}, got {value!r}")
    return value
