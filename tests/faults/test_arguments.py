"""Arguments that make no sense, at every public name: one WslfastError that names them, and nothing has been run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import reached
from torch import nn
from training_runs import ARCH, config

import wslfast
from wslfast import (
    AdaptiveCodec,
    Architecture,
    Autoencoder,
    JointCodec,
    LinearCodec,
    Population,
    QueryPool,
    TargetCache,
    TokenLayout,
    TrainConfig,
    WslfastError,
    batched_behavioral_loss,
    batched_forward,
    build_zoo,
    doctor,
    evaluate,
    generate,
    load_zoo,
    save_zoo,
    train,
)
from wslfast.engine import paths
from wslfast.engine.module_path import Module
from wslfast.engine.triton_path import Triton
from wslfast.kernels import reference
from wslfast.kernels.cpu import engine as cpu

K, N, P = 3, 4, ARCH.num_weights
W, X, Y = torch.zeros(K, P), torch.zeros(N, 1, 8, 8), torch.zeros(K, N, 3)
ROWS = Population(ARCH, W)
LAYOUT = TokenLayout(ARCH)
POOL = QueryPool(X)
NAN = float("nan")


def loss(*arguments: Any, **options: Any) -> Any:
    return batched_behavioral_loss(*arguments, **options)


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)])


CASES: dict[str, Callable[[], Any]] = {
    # batched_forward
    "forward: no weights": lambda: batched_forward(None, X, ARCH),
    "forward: a list": lambda: batched_forward([1.0], X, ARCH),
    "forward: integers": lambda: batched_forward(W.long(), X, ARCH),
    "forward: complex": lambda: batched_forward(W.to(torch.complex64), X, ARCH),
    "forward: one row": lambda: batched_forward(W[0], X, ARCH),
    "forward: a weight too few": lambda: batched_forward(W[:, 1:], X, ARCH),
    "forward: no models": lambda: batched_forward(W[:0], X, ARCH),
    "forward: tokens of no layout": lambda: batched_forward(torch.zeros(K, 5, 7), X, ARCH),
    "forward: tokens of size 0": lambda: batched_forward(torch.zeros(K, 5, 0), X, ARCH),
    "forward: four axes": lambda: batched_forward(torch.zeros(1, 1, 1, 1), X, ARCH),
    "forward: no names": lambda: batched_forward({}, X, ARCH),
    "forward: other names": lambda: batched_forward({"weight": W}, X, ARCH),
    "forward: unequal numbers of models": lambda: batched_forward(
        {s.name: torch.zeros(2 + (i == 0), *s.shape) for i, s in enumerate(ARCH.parameters)}, X, ARCH
    ),
    "forward: another architecture's population": lambda: batched_forward(Population(Architecture.cnn(), torch.zeros(1, 2464)), X, ARCH),
    "forward: no queries": lambda: batched_forward(W, None, ARCH),
    "forward: zero queries": lambda: batched_forward(W, X[:0], ARCH),
    "forward: integer queries": lambda: batched_forward(W, X.byte(), ARCH),
    "forward: three channels": lambda: batched_forward(W, torch.zeros(N, 3, 8, 8), ARCH),
    "forward: one image": lambda: batched_forward(W, X[0], ARCH),
    "forward: flat images": lambda: batched_forward(W, X.flatten(1), ARCH),
    "forward: nested weights": lambda: batched_forward(_nested(), X, ARCH),
    "forward: nested queries": lambda: batched_forward(W, _nested(), ARCH),
    "loss: nested targets": lambda: batched_behavioral_loss(W, None, X, ARCH, targets=_nested()),
    "population: nested weights": lambda: Population(ARCH, _nested()),
    "forward: queries on another device": lambda: batched_forward(W, X.to("meta"), ARCH),
    "forward: no architecture": lambda: batched_forward(W, X, "cnn"),
    "forward: unknown backend": lambda: batched_forward(W, X, ARCH, backend="cuda"),
    "forward: triton on a CPU": lambda: batched_forward(W, X, ARCH, backend="triton"),
    # batched_behavioral_loss
    "loss: nothing to compare with": lambda: loss(W, None, X, ARCH),
    "loss: both originals and targets": lambda: loss(W, W, X, ARCH, targets=Y),
    "loss: fewer originals": lambda: loss(W, W[:2], X, ARCH),
    "loss: originals of another size": lambda: loss(W, W[:, 1:], X, ARCH),
    "loss: targets transposed": lambda: loss(W, None, X, ARCH, targets=Y.transpose(0, 1)),
    "loss: targets of other classes": lambda: loss(W, None, X, ARCH, targets=torch.zeros(K, N, 10)),
    "loss: integer targets": lambda: loss(W, None, X, ARCH, targets=Y.long()),
    "loss: targets no tensor": lambda: loss(W, None, X, ARCH, targets=[[0.0]]),
    "loss: targets on another device": lambda: loss(W, None, X, ARCH, targets=Y.to("meta")),
    "loss: unknown criterion": lambda: loss(W, W, X, ARCH, criterion="l1"),
    "loss: criterion no string": lambda: loss(W, W, X, ARCH, criterion=None),
    "loss: unknown reduction": lambda: loss(W, W, X, ARCH, reduction="batchmean"),
    "loss: unknown policy": lambda: loss(W, W, X, ARCH, nan_policy="ignore"),
    "loss: temperature 0": lambda: loss(W, W, X, ARCH, criterion="distillation", temperature=0),
    "loss: temperature NaN": lambda: loss(W, W, X, ARCH, criterion="distillation", temperature=NAN),
    "loss: temperature a bool": lambda: loss(W, W, X, ARCH, temperature=True),
    "loss: temperature a string": lambda: loss(W, W, X, ARCH, temperature="2"),
    "loss: unknown backend": lambda: loss(W, W, X, ARCH, backend=None),
    # Architecture
    "architecture: unknown activation": lambda: Architecture.cnn(activation="swish2"),
    "architecture: no channels": lambda: Architecture.cnn3(0),
    "architecture: channels a float": lambda: Architecture.cnn3(3.0),
    "architecture: dropout 1": lambda: Architecture.lenet5(dropout=1.0),
    "architecture: no layers": lambda: Architecture.from_layers([], (1, 8, 8)),
    "architecture: layers of torch": lambda: Architecture.from_layers([nn.Linear(2, 2)], (2,)),
    "architecture: a negative image": lambda: Architecture.from_layers(ARCH.layers, (1, -8, 8)),
    "architecture: an image too small": lambda: Architecture.from_layers(ARCH.layers, (1, 2, 2)),
    "architecture: two axes": lambda: Architecture.from_layers(ARCH.layers, (8, 8)),
    "architecture: no module": lambda: Architecture.from_module(None, (1, 8, 8)),
    "architecture: a module without weights": lambda: Architecture.from_module(nn.ReLU(), (3,)),
    "architecture: a module that fails": lambda: Architecture.from_module(nn.Sequential(nn.LayerNorm(3)), (4,)),
    "architecture: no record": lambda: Architecture.from_dict([]),
    "architecture: an empty record": lambda: Architecture.from_dict({}),
    # Population
    "population: no architecture": lambda: Population(None, W),
    "population: other weights": lambda: Population(ARCH, W[:, 1:]),
    "population: weights a list": lambda: Population(ARCH, [[0.0] * P]),
    "population: a short column": lambda: Population(ARCH, W, {"acc": [1.0]}),
    "population: no state dicts": lambda: Population.from_state_dicts(ARCH, [{}]),
    "population: a state dict of numbers": lambda: Population.from_state_dicts(ARCH, [{s.name: 0 for s in ARCH.parameters}]),
    "population: a row beyond the last": lambda: ROWS.state_dict(7),
    "population: no such column": lambda: ROWS.column("acc"),
    # TokenLayout
    "tokens: no architecture": lambda: TokenLayout("cnn"),
    "tokens: negative size": lambda: TokenLayout(ARCH, -1),
    "tokens: size a float": lambda: TokenLayout(ARCH, 2.5),
    "tokens: other weights": lambda: LAYOUT.tokenize(W[:, 1:]),
    "tokens: other tokens": lambda: LAYOUT.detokenize(torch.zeros(1, 2, 3)),
    # QueryPool, TargetCache
    "pool: no images": lambda: QueryPool(X[:0]),
    "pool: bytes": lambda: QueryPool(X.byte()),
    "pool: too many drawn": lambda: POOL.draw(N + 1),
    "pool: none drawn": lambda: POOL.draw(0),
    "cache: weights": lambda: TargetCache(W, POOL),
    "cache: images": lambda: TargetCache(ROWS, X),
    # LinearCodec, Autoencoder
    "codec: weights": lambda: LinearCodec(W, latent=0.5),
    "codec: a share of 0": lambda: LinearCodec(ROWS, latent=0.0),
    "codec: a share of NaN": lambda: LinearCodec(ROWS, latent=NAN),
    "codec: unknown metric": lambda: LinearCodec(ROWS, latent=0.5, metric="l2"),
    "adaptive codec: weights": lambda: AdaptiveCodec(W, queries=X),
    "adaptive codec: damping 0": lambda: AdaptiveCodec(ROWS, queries=X, damping=0.0),
    "adaptive codec: images of another shape": lambda: AdaptiveCodec(ROWS, queries=X[..., :-1]),
    "joint codec: weights": lambda: JointCodec(W, queries=X),
    "joint codec: a share of 1": lambda: JointCodec(ROWS, queries=X, joint=1.0),
    "joint codec: no steps": lambda: JointCodec(ROWS, queries=X, steps=-1),
    "joint codec: importance": lambda: JointCodec(ROWS, queries=X, importance=3),
    "autoencoder: heads that do not divide": lambda: Autoencoder(LAYOUT, d_model=16, heads=3),
    "autoencoder: negative layers": lambda: Autoencoder(LAYOUT, layers=-1),
    "autoencoder: dropout 2": lambda: Autoencoder(LAYOUT, dropout=2.0),
    "autoencoder: unknown start": lambda: Autoencoder(LAYOUT, start="pca"),
    "autoencoder: linear without a code": lambda: Autoencoder(LAYOUT, start="linear"),
    "autoencoder: other tokens": lambda: Autoencoder(LAYOUT, d_model=4, heads=1, layers=0, latent=2).encode(torch.zeros(1, 2, 3)),
    # TrainConfig, train
    "config: steps 0": lambda: TrainConfig(zoo="z", out="o", steps=0),
    "config: lr NaN": lambda: TrainConfig(zoo="z", out="o", lr=NAN),
    "config: cuda_graph on a CPU": lambda: TrainConfig(zoo="z", out="o", cuda_graph=True),
    "config: beta 2": lambda: TrainConfig(zoo="z", out="o", beta=2.0),
    "config: a zoo of None": lambda: TrainConfig(zoo=None, out="o"),
    "config: unknown keys": lambda: TrainConfig.from_dict({"zoo": "z", "out": "o", "stepz": 1}),
    "config: no mapping": lambda: TrainConfig.from_dict([("zoo", "z")]),
    "config: no file": lambda: TrainConfig.from_toml("nowhere.toml"),
    "train: no zoo there": lambda: train(TrainConfig(zoo="nowhere", out="out")),
    "train: unknown device": lambda: train(config(Path("out"), device="tpu"), population=ROWS, images=X),
    "train: a GPU that is not there": lambda: train(config(Path("out"), device="cuda:99"), population=ROWS, images=X),
    "train: more queries than images": lambda: train(config(Path("out"), queries=99), population=ROWS, images=X),
    "train: images of another shape": lambda: train(config(Path("out"), queries=2), population=ROWS, images=torch.zeros(9, 3, 8, 8)),
    # zoos
    "zoo: unknown data set": lambda: build_zoo("mnist"),
    "zoo: no models": lambda: build_zoo("digits", models=0),
    "zoo: no epochs": lambda: build_zoo("digits", epochs=0),
    "zoo: an epoch beyond the last": lambda: build_zoo("digits", epochs=2, keep=[3]),
    "zoo: unknown grid": lambda: build_zoo("digits", grid="large"),
    "zoo: shares that make no split": lambda: build_zoo("digits", split=(0.5, 0.1, 0.1)),
    "load: nowhere": lambda: load_zoo("nowhere"),
    "load: unknown split": lambda: load_zoo("nowhere", "dev"),
    "load: a name with a null": lambda: load_zoo("a\0b"),
    "save: weights": lambda: save_zoo(W, "zoo", provenance={}),
    "save: rows without a split": lambda: save_zoo(ROWS, "zoo", splits=["train"], provenance={}),
    # doctor, evaluate, generate
    "doctor: a name": lambda: doctor("cnn3"),
    "doctor: no models": lambda: doctor(ARCH, k=0),
    "doctor: no time": lambda: doctor(ARCH, limit_s=float("inf")),
    "doctor: no device": lambda: doctor(ARCH, device="banana"),
    "doctor: unknown precision": lambda: doctor(ARCH, precision="fp8"),
    "evaluate: no run": lambda: evaluate("nowhere"),
    "evaluate: unknown split": lambda: evaluate("nowhere", split="dev"),
    "evaluate: unknown device": lambda: evaluate("nowhere", device="tpu"),
    "generate: no run": lambda: generate("nowhere"),
    "generate: no samples": lambda: generate("nowhere", samples=0),
    "generate: a bandwidth of NaN": lambda: generate("nowhere", bandwidth=NAN),
}


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Everything that runs a model is a fault here; returns what was called."""
    called: list[str] = []

    def forbid(module: Any, name: str) -> None:
        def launched(*_: Any, **__: Any) -> None:
            called.append(f"{module.__name__}.{name}")
            raise AssertionError(f"{name} was run")

        monkeypatch.setattr(module, name, launched)

    for module in (cpu, reference):
        for name in ("forward", "loss_and_gradient"):
            forbid(module, name)
    for path in (paths.Loop, paths.Stacked, paths.Cpu, Triton, Module):
        monkeypatch.setattr(path, "forward", lambda *_: called.append("path"))
        monkeypatch.setattr(path, "loss_and_gradient", lambda *_: called.append("path"))
    monkeypatch.chdir(tmp_path)
    return called


@pytest.mark.parametrize("case", CASES)
def test_a_bad_argument_is_one_error_and_runs_nothing(no_kernel: list[str], tmp_path: Path, case: str) -> None:
    with pytest.raises(WslfastError) as caught:
        CASES[case]()
    assert len(str(caught.value)) > 10
    assert no_kernel == []
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    if case == list(CASES)[-1]:
        reached("arguments", "bad arguments: a WslfastError, no kernel launched", len(CASES), 80)


def test_every_public_name_is_among_them() -> None:
    names = {name for name in wslfast.__all__ if name not in ("WslfastError", "profiling")}
    used = {variable for function in CASES.values() for variable in function.__code__.co_names} | {"batched_behavioral_loss"}
    assert names <= used
