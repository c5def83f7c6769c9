"""Somebody reads while a zoo or a checkpoint is replaced: the old one or the new one, never a mix; and files of other versions."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import digest, many, reached
from training_runs import ARCH, config

from wslfast import Population, WslfastError, load_zoo, train
from wslfast.training import load_run
from wslfast.training.checkpoint import load_checkpoint, save_checkpoint
from wslfast.zoo import MappedZoo, read_manifest, save_zoo


def _zoo(which: int) -> Population:
    return Population(ARCH, torch.full((12 + 9 * which, ARCH.num_weights), float(which + 1)), {"lr": [float(which)] * (12 + 9 * which)})


def _write_zoos(folder: str, rounds: int) -> None:
    for i in range(rounds):
        zoo = _zoo((i + 1) % 2)
        save_zoo(zoo, folder, splits=["train"] * len(zoo), provenance={"round": i}, shard_rows=4, overwrite=True)


def _write_checkpoints(folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    state = {key: value for key, value in load_checkpoint(folder).items() if key != "schema"}
    for i in range(1, rounds + 1):
        state["step"] = i
        state["model"] = {name: torch.full_like(value, i) for name, value in state["model"].items()}
        save_checkpoint(folder, state)


def _while(write: Callable[[str, int], None], folder: Path, rounds: int, read: Callable[[], Any]) -> list[Any]:
    """What was read while another process wrote so many times."""
    writer = multiprocessing.get_context("fork").Process(target=write, args=(str(folder), rounds))
    writer.start()
    seen = []
    try:
        while writer.is_alive():
            seen.append(read())
    finally:
        writer.join(120)
    assert writer.exitcode == 0
    return [*seen, read()]


def test_a_zoo_that_is_replaced_is_the_old_or_the_new(tmp_path: Path) -> None:
    rounds = many(12, 100)
    save_zoo(_zoo(0), tmp_path / "zoo", splits=["train"] * 12, provenance={}, shard_rows=4)

    def read() -> int:
        while True:
            try:
                loaded = load_zoo(tmp_path / "zoo")
                break
            except WslfastError as error:  # on a busy machine the writer may be ahead of every attempt, and then this is what is said
                if "was replaced" not in str(error):
                    raise
        which = int(loaded.properties["lr"][0])
        assert torch.equal(loaded.weights, _zoo(which).weights)
        assert loaded.properties["lr"] == _zoo(which).properties["lr"]
        return which

    seen = _while(_write_zoos, tmp_path / "zoo", rounds, read)
    assert len(seen) > 1
    reached("readers", "rounds of replacing a zoo under a reader in another process, no mix", rounds, 100)
    reached("readers", "readings of it", len(seen), "-")


def test_a_mapped_zoo_outlives_its_replacement_or_says_so(tmp_path: Path) -> None:
    """Its shards are removed with the zoo they belong to: rows are the old ones, or there is one error that names the shard."""
    save_zoo(_zoo(0), tmp_path / "zoo", splits=["train"] * 12, provenance={}, shard_rows=4)
    zoo = MappedZoo(tmp_path / "zoo")
    assert torch.equal(zoo.rows(torch.arange(4)), _zoo(0).weights[:4])
    save_zoo(_zoo(1), tmp_path / "zoo", splits=["train"] * 21, provenance={}, shard_rows=4, overwrite=True)
    assert torch.equal(zoo.rows(torch.arange(4)), _zoo(0).weights[:4])  # mapped: the system keeps what is in use
    with pytest.raises(WslfastError, match=r"shard-00001\.safetensors: no such file"):
        zoo.rows(torch.tensor([5]))


def test_a_checkpoint_that_is_replaced_is_the_old_or_the_new(tmp_path: Path) -> None:
    rounds = many(20, 100)
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    train(config(tmp_path, steps=1, d_model=4, heads=1), population=population, images=torch.randn(48, 1, 8, 8))
    first = digest(load_checkpoint(tmp_path)["model"])

    def read() -> int:
        state = load_checkpoint(tmp_path)
        values = [value.double().unique().tolist() for value in state["model"].values() if value.numel() and value.dtype != torch.bool]
        assert digest(state["model"]) == first or all(v == [float(state["step"])] for v in values)
        return state["step"]

    seen = _while(_write_checkpoints, tmp_path, rounds, read)
    assert seen == sorted(seen)
    assert seen[-1] == rounds
    reached("readers", "rounds of replacing a checkpoint under a reader in another process, no mix", rounds, 100)


def test_unknown_fields_are_ignored_and_newer_schemas_refused(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    save_zoo(_zoo(0), zoo, splits=["train"] * 12, provenance={}, shard_rows=4)
    record = json.loads((zoo / "manifest.json").read_text())
    record["future"], record["shards"][0]["codec"] = {"x": [1]}, "none"
    (zoo / "manifest.json").write_text(json.dumps(record))
    assert torch.equal(load_zoo(zoo).weights, _zoo(0).weights)
    (zoo / "manifest.json").write_text(json.dumps({**record, "schema": 3}))
    with pytest.raises(WslfastError, match="schema 3 is newer"):
        read_manifest(zoo)
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    train(config(tmp_path / "run", steps=1), population=population, images=torch.randn(48, 1, 8, 8))
    state = {key: value for key, value in load_checkpoint(tmp_path / "run").items() if key != "schema"}
    from wslfast.training import checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", 2)
        save_checkpoint(tmp_path / "run", state)
    for read in (load_checkpoint, load_run):
        with pytest.raises(WslfastError, match=r"state\.pt is from a newer version \(schema 2"):
            read(tmp_path / "run")
