"""``backend=`` reaches every run of a network: in training, zoo building, evaluation, generation, and from the shell."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wslfast
from wslfast import TrainConfig, WslfastError, engine
from wslfast.cli import main
from wslfast.training import load_run
from wslfast.training.checkpoint import load_checkpoint
from wslfast.zoo import read_manifest

FOLDER = Path(__file__).parents[1] / "data" / "before_the_move"  # a tiny zoo, its images and a run on it


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("zoo", "run"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    shutil.copy(FOLDER / "images.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of every call of the engine."""
    calls: list[str] = []
    choose = engine.choose

    def watched(architecture: Any, device: str, dtype: torch.dtype, backend: str = "auto", *rest: Any) -> Any:
        calls.append(backend)
        return choose(architecture, device, dtype, backend, *rest)

    monkeypatch.setattr(engine, "choose", watched)
    return calls


def _config(**changes: Any) -> TrainConfig:
    sizes = {"d_model": 4, "heads": 1, "layers": 1, "projection": 2, "batch_size": 2, "queries": 4, "query_pool": 8}
    return TrainConfig(**{"zoo": "zoo", "out": "new", "steps": 1, "start": "linear", "metric": "activation", **sizes, **changes})


WORK: dict[str, Callable[..., Any]] = {
    "train": lambda **backend: wslfast.train(_config(**backend)),
    "build_zoo": lambda **backend: wslfast.build_zoo(
        "images.npz", "built", architecture=wslfast.load_zoo("zoo").architecture, models=6, epochs=1, **backend
    ),
    "evaluate": lambda **backend: wslfast.evaluate("run", **backend),
    "generate": lambda **backend: wslfast.generate("run", samples=2, finetune=1, select="subsampled", candidates=4, **backend),
}


@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_every_call_beneath_takes_it(here: Path, asked: list[str], what: str, backend: str) -> None:
    WORK[what](backend=backend)
    assert len(asked) > 1
    assert set(asked) == {backend}


@pytest.mark.parametrize("what", WORK)
def test_one_that_cannot_be_had_or_does_not_exist_is_an_error(here: Path, what: str) -> None:
    with pytest.raises(WslfastError, match="backend='triton' cannot run this: tensors are on cpu"):
        WORK[what](backend="triton")
    with pytest.raises(WslfastError, match="backend: expected one of"):
        WORK[what](backend="cuda")
    assert not any((here / made).exists() for made in ("built/manifest.json", "new/checkpoint"))


def test_a_run_keeps_it(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In its settings, its checkpoint and the log; it does not go on with another."""
    with caplog.at_level(logging.INFO, "wslfast"):
        wslfast.train(_config(backend="torch"))
    assert any(message.startswith("backend torch: path loop") for message in caplog.messages)
    assert 'backend = "torch"' in Path("new/config.toml").read_text()
    assert load_checkpoint("new")["config"]["backend"] == "torch" == load_run("new").config.backend
    with pytest.raises(WslfastError, match=r"cannot resume with another config: backend = 'auto' \(was 'torch'\)"):
        wslfast.train(_config(steps=2), resume=True)
    assert wslfast.train(_config(steps=2, backend="torch"), resume=True).step == 2


def test_a_checkpoint_from_before_there_was_one_is_auto(here: Path) -> None:
    assert load_run("run").config.backend == "auto"


def test_the_shell_and_what_it_writes(here: Path, asked: list[str]) -> None:
    main(["train", "--zoo", "zoo", "--out", "new", "--steps", "1", "--d-model", "4", "--heads", "1", "--layers", "1", "--batch-size", "2",
          "--queries", "4", "--query-pool", "8", "--backend", "torch"])  # fmt: skip
    main(["evaluate", "--run", "new", "--backend", "torch", "--out", "figures.json"])
    main(["generate", "--run", "new", "--samples", "2", "--backend", "torch", "--out", "generated"])
    assert set(asked) == {"torch"}
    assert json.loads(Path("figures.json").read_text())["backend"] == "torch"
    assert read_manifest("generated").provenance["backend"] == "torch"
    wslfast.build_zoo("images.npz", "built", architecture=wslfast.load_zoo("zoo").architecture, models=6, epochs=1, backend="torch")
    assert read_manifest("built").provenance["backend"] == "torch"


def test_blocks_nest_and_end(asked: list[str]) -> None:
    arch = wslfast.Architecture.mlp(4, (3,), 2)
    weights, queries = torch.randn(2, arch.num_weights), torch.randn(3, 4)

    def call(**backend: str) -> None:
        wslfast.batched_forward(weights, queries, arch, **backend)

    with engine.using("torch"):
        call()
        with engine.using("auto"):  # nobody asks here
            call()
        call(backend="torch")
        with pytest.raises(WslfastError, match="tensors are on cpu"):
            call(backend="triton")  # one's own word wins
    call()
    with pytest.raises(ZeroDivisionError), engine.using("torch"):
        1 / 0  # noqa: B018
    call()
    assert asked == ["torch", "torch", "torch", "triton", "auto", "auto"]
