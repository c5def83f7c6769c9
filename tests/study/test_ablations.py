"""Ablations: cells that are computed once and go on where they stopped, paired seeds, systems."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ablation_cases import BASE, counted, read_rows, write
from tolerances import FP32
from torch import Tensor

from wslfast import TrainConfig, WslfastError, load_zoo
from wslfast.measure.results import read_unit
from wslfast.page import report
from wslfast.sane.ablation import systems
from wslfast.study import ablations, closed_form
from wslfast.study.ablation_file import Ablation, settings_of
from wslfast.study.ablations import COLUMNS, Cell, Stop, Trained, run_ablation
from wslfast.study.loaded_zoo import Protocol
from wslfast.training import load_run
from wslfast.training.query_sets import query_images

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "ablations").glob("*.toml"))


def test_cells_are_computed_once_and_rows_are_theirs(tmp_path: Path, zoo: Path) -> None:
    file = write(tmp_path / "beta.toml", zoo, "[axis]\nbeta = [0.1, 1.0]")
    log: list[tuple[str, int]] = []
    known = {"core": counted(log)}
    said: list[str] = []
    rows = run_ablation(Ablation.from_toml(file), tmp_path / "out", systems=known, on_cell=said.append)
    assert len(log) == 4
    assert said[0] == "1 of 4: beta=0.1, seed 0"
    with (tmp_path / "out" / "ablations.csv").open(newline="") as table:
        assert tuple(next(csv.reader(table))) == COLUMNS
    stored = read_rows(tmp_path / "out" / "ablations.csv")
    assert len(stored) == len(rows)
    agreement = [r for r in stored if r["metric"] == "agreement"]
    assert [(r["zoo"], r["variant"], r["seed"], r["axis"], r["value"]) for r in agreement] == [
        ("digits", "beta=0.1", 0, "beta", "0.1"),
        ("digits", "beta=1", 0, "beta", "1"),
        ("digits", "beta=0.1", 1, "beta", "0.1"),
        ("digits", "beta=1", 1, "beta", "1"),
    ]
    assert all(0 <= r["mean"] <= 1 and r["spread"] is not None for r in agreement)
    assert {"accuracy_change", "l2_masked", "probe_r2", "steps", "seconds", "latent_numbers"} <= {r["metric"] for r in stored}
    again = run_ablation(Ablation.from_toml(file), tmp_path / "out", systems=known, on_cell=said.append)
    assert len(log) == 4
    assert again == rows
    assert said[-1] == "4 of 4: beta=1, seed 1 (done before)"

    # a cell of another file with the same settings is the same cell; rows of the first file stay
    other = write(tmp_path / "more.toml", zoo, "[variants.both]\nbeta = 0.1\n[variants.queries]\nqueries = 5", seeds="[1]")
    run_ablation(Ablation.from_toml(other), tmp_path / "out", systems=known)
    assert len(log) == 5
    stored = read_rows(tmp_path / "out" / "ablations.csv")
    assert {r["ablation"] for r in stored} == {"beta", "more"}
    pair = [r["mean"] for r in stored if r["metric"] == "agreement" and r["seed"] == 1 and r["variant"] in ("beta=0.1", "both")]
    assert pair[0] == pair[1]


def test_figures_are_those_of_the_run(tmp_path: Path, zoo: Path) -> None:
    from wslfast.measure import evaluate

    file = write(tmp_path / "a.toml", zoo, "[axis]\nbeta = [0.5]", seeds="[3]", top='split = "test"')
    rows = run_ablation(Ablation.from_toml(file), tmp_path / "out")
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    assert load_run(cell).config.seed == 3
    figures = evaluate(cell, zoo, baselines=False)["run"]
    found = {r["metric"]: r for r in rows}
    assert found["agreement"]["mean"] == pytest.approx(figures["agreement"])
    assert found["accuracy_change"]["median"] == pytest.approx(figures["accuracy_change"])
    assert found["steps"]["mean"] == 3


def test_a_killed_cell_goes_on_to_the_bit(tmp_path: Path, zoo: Path) -> None:
    file = write(tmp_path / "a.toml", zoo, "[axis]\nbeta = [0.1]", seeds="[0]")
    ablation = Ablation.from_toml(file)

    def killed(cell: Cell) -> Trained:
        whole = cell.stop

        def stop(step: int) -> bool:
            whole(step)
            if step == 3:
                raise KeyboardInterrupt
            return False

        return ablations.core(cell._replace(stop=stop))  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        run_ablation(ablation, tmp_path / "broken", systems={"core": killed})
    (cell,) = (tmp_path / "broken" / "cells").iterdir()
    assert load_run(cell).step == 2
    seconds = json.loads((cell / "clock.json").read_text())["2"]
    broken, whole = run_ablation(ablation, tmp_path / "broken"), run_ablation(ablation, tmp_path / "whole")
    values = [{r["metric"]: r["mean"] for r in rows} for rows in (broken, whole)]
    assert values[0].pop("seconds") > seconds
    values[1].pop("seconds")
    for figures in values:
        figures.pop("coding_seconds")
    assert values[0] == values[1]


def test_half_written_figures_are_measured_again_without_training(tmp_path: Path, zoo: Path) -> None:
    ablation = Ablation.from_toml(write(tmp_path / "a.toml", zoo, "[axis]\nbeta = [1.0]", seeds="[0]"))
    rows = run_ablation(ablation, tmp_path)
    (cell,) = (tmp_path / "cells").iterdir()
    (cell / "figures-test.json").write_text('{"figures": {"agree')
    before = (cell / "checkpoint" / "state.pt").read_bytes()
    again = run_ablation(ablation, tmp_path)
    assert (cell / "checkpoint" / "state.pt").read_bytes() == before
    pick = lambda rows: {r["metric"]: r["mean"] for r in rows if r["metric"] not in ("seconds", "coding_seconds")}  # noqa: E731
    assert pick(again) == pick(rows)


def test_cells_as_they_were_written_before_cells_were_units_are_not_computed_again(tmp_path: Path, zoo: Path) -> None:
    ablation = Ablation.from_toml(write(tmp_path / "a.toml", zoo, "[axis]\nbeta = [1.0]", seeds="[0]"))
    rows = run_ablation(ablation, tmp_path / "new")
    (cell,) = (tmp_path / "new" / "cells").iterdir()
    unit = read_unit(cell / "figures-test.json")
    assert unit is not None
    old = {name: {"median": median, "mean": mean, "std": std} for name, (median, mean, std) in unit.metrics.items()}
    place = tmp_path / "old" / "cells" / cell.name
    place.mkdir(parents=True)
    (place / "figures-test.json").write_text(json.dumps({"config": {}, "figures": old}, indent=1))
    said: list[str] = []
    assert run_ablation(ablation, tmp_path / "old", on_cell=said.append) == rows
    assert said == ["1 of 1: beta=1, seed 0 (done before)"]
    tables = [(tmp_path / folder / "ablations.csv").read_text() for folder in ("old", "new")]
    assert tables[0] == tables[1]


def test_the_key_of_a_cell_stays_what_it_was(tmp_path: Path) -> None:
    """Of default settings. Where a new setting of TrainConfig changes it, every cell that there is would be computed again: leave the new
    setting out of the hash where it has its default."""
    ablation = Ablation.from_toml(write(tmp_path / "k.toml", "z", "[variants.a]", base=""))
    system, config = ablations.settings_of(ablation, "a", "z", 0)
    assert ablations._key("digest", system, config, ablation) == "ebf7b2948869ba05"


def test_whatever_changes_a_result_changes_the_cell(tmp_path: Path, zoo: Path) -> None:
    def key(rest: str = "[variants.a]\nbeta = 0.1", top: str = "", digest: str = "z", seed: int = 0) -> str:
        ablation = Ablation.from_toml(write(tmp_path / "k.toml", zoo, rest, top=top))
        system, config = ablations.settings_of(ablation, "a", str(zoo), seed)
        return ablations._key(digest, system, config, ablation)

    first = key()
    assert (
        first
        == key()
        == key(top='split = "val"')
        == key("[variants.a]\nbeta = 0.1\nlog_every = 7\ncheckpoint_every = 1")
        == key("[variants.b]\n[variants.a]\nbeta = 0.1")
    )
    images = tmp_path / "q.npz"
    images.write_bytes(b"one")
    others = [
        key("[variants.a]\nbeta = 0.2"),
        key(top="seconds = 2"),
        key(top='seconds = 2\nclock = "process"'),
        key(digest="y"),
        key(seed=1),
        key('[variants.a]\nbeta = 0.1\nsemantics = "published"'),
        key(f'[variants.a]\nbeta = 0.1\nquery_set = "{images}"'),
    ]
    images.write_bytes(b"two")  # the same name, another content
    others.append(key(f'[variants.a]\nbeta = 0.1\nquery_set = "{images}"'))
    assert len({first, *others}) == 1 + len(others)
    moved = tmp_path / "elsewhere.npz"
    moved.write_bytes(b"two")
    assert key(f'[variants.a]\nbeta = 0.1\nquery_set = "{moved}"') == others[-1]


def test_seeds_are_paired(tmp_path: Path, zoo: Path) -> None:
    """The same batches and queries in every variant that does not change them."""
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def system(cell: Cell) -> Trained:
        from wslfast.training.trainer import Trainer

        trainer = Trainer(cell.config, cell.zoo, query_images(cell.config.query_set, zoo, cell.zoo))
        drawn = [trainer.next_rows(), trainer.pool.draw(cell.config.queries, trainer.draws), trainer.pool.images]
        seen[f"{cell.config.beta} {cell.config.criterion}", cell.config.seed] = drawn
        return Trained(lambda w: w, lambda w: w[:, :2], 1, 1)

    file = write(tmp_path / "a.toml", zoo, '[axis]\nbeta = [0.1, 1.0]\ncriterion = ["mse", "softmax_mse"]')
    rows = run_ablation(Ablation.from_toml(file), tmp_path, systems={"core": system})
    assert len(seen) == 8
    for seed in (0, 1):
        drawn = [d for (_, s), d in seen.items() if s == seed]
        assert all(torch.equal(a, b) for other in drawn for a, b in zip(drawn[0], other, strict=True))
    assert not torch.equal(seen["0.1 mse", 0][1], seen["0.1 mse", 1][1])
    assert {r["value"] for r in rows} == {"0.1*mse", "0.1*softmax_mse", "1*mse", "1*softmax_mse"}
    assert all(r["mean"] == 1.0 for r in rows if r["metric"] == "agreement")  # that system copies


def test_one_training_serves_validation_and_test_models(tmp_path: Path, zoo: Path) -> None:
    log: list[tuple[str, int]] = []
    ablation = Ablation.from_toml(write(tmp_path / "a.toml", zoo, "[axis]\nbeta = [0.1]", seeds="[0]"))
    chosen = run_ablation(replace(ablation, split="val"), tmp_path, systems={"core": counted(log)})
    (cell,) = (tmp_path / "cells").iterdir()
    before = (cell / "checkpoint" / "state.pt").stat().st_mtime_ns
    rows = run_ablation(ablation, tmp_path)
    assert (cell / "checkpoint" / "state.pt").stat().st_mtime_ns == before
    figures = [{r["metric"]: r["mean"] for r in t} for t in (chosen, rows)]
    assert figures[0]["seconds"] == figures[1]["seconds"] > 0
    assert figures[0]["accuracy_original"] != figures[1]["accuracy_original"]
    assert read_rows(tmp_path / "ablations-val.csv") != read_rows(tmp_path / "ablations.csv")


# -- equal time ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_seconds_stops_a_run(tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = iter(range(1000))
    monkeypatch.setitem(ablations._CLOCKS, "wall", lambda: float(next(time)))  # a second a look
    base = BASE.replace("steps = 3", "steps = 1000")
    file = write(tmp_path / "a.toml", zoo, "[axis]\nbeta = [0.1, 1.0]", seeds="[0]", base=base, top="seconds = 5")
    rows = run_ablation(Ablation.from_toml(file), tmp_path)
    assert [r["mean"] for r in rows if r["metric"] == "steps"] == [5, 5]
    assert [r["mean"] for r in rows if r["metric"] == "seconds"] == [5, 5]
    cells = list((tmp_path / "cells").iterdir())
    assert all(load_run(c).step == 5 for c in cells)
    (cells[0] / "figures-test.json").unlink()  # killed between training and measuring: nothing is left to spend
    run_ablation(Ablation.from_toml(file), tmp_path)
    assert load_run(cells[0]).step == 5


def test_the_clock_goes_on_where_a_killed_cell_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setitem(ablations._CLOCKS, "wall", lambda: now[0])
    first = Stop(tmp_path, "wall", 10.0, 2, 99)
    for step in (1, 2, 3):
        now[0] += 2
        assert not first(step)
    now[0] += 1000  # nobody works
    second = Stop(tmp_path, "wall", 10.0, 2, 99)
    assert second.resume(2)
    assert second.seconds == 4  # step 3 was not in a checkpoint
    answers = []
    for step in (3, 4, 5):
        now[0] += 2
        answers.append(second(step))
    assert answers == [False, False, True]
    assert not Stop(tmp_path, "wall", 10.0, 2, 99).resume(5)


# -- the files of examples/ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_good_files(path: Path) -> None:
    ablation = Ablation.from_toml(path)
    one = path.stem in (
        "paper",
        "schedule",
        "collapse",
        "closed_form",
        "objectives",
        "past_closed_form",
        "metric_choices",
        "metric_start",
        "another_kind",
    )  # the paper has one; others are not about seeds
    assert len(ablation.seeds) == (1 if one else 3)
    assert len(ablation.variants) >= 2


# -- published semantics ---------------------------------------------------------------------------------------------------


def published(tmp_path: Path, zoo: Path, out: str, **changes: Any) -> tuple[Cell, dict[str, Any]]:
    values = {
        "zoo": str(zoo),
        "out": str(tmp_path / out),
        "steps": 4,
        "batch_size": 4,
        "queries": 6,
        "d_model": 16,
        "heads": 2,
        "layers": 1,
        "latent": 4,
        "start": "random",
        "checkpoint_every": 2,
        "lr": 1e-3,
    }
    config = TrainConfig(**(values | changes))
    return Cell(config, load_zoo(zoo, "train"), Stop(Path(config.out), "wall", None, 2, config.steps)), systems()


@pytest.mark.parametrize("semantics", ["published", "corrected"])
def test_published_batch_attention_makes_models_depend_on_each_other(tmp_path: Path, zoo: Path, semantics: str) -> None:
    cell, known = published(tmp_path, zoo, semantics)
    trained = known[semantics](cell)
    weights = load_zoo(zoo, "test").weights[:2]
    together, alone = trained.reconstruct(weights), torch.cat([trained.reconstruct(w[None]) for w in weights])
    assert together.shape == weights.shape
    assert torch.allclose(together, alone, atol=FP32) == (semantics == "corrected")
    assert trained.embed(weights).shape == (2, 4)
    assert (trained.latent_numbers, trained.steps) == (48 * 4, 4)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_killed_published_cell_goes_on_to_the_bit(tmp_path: Path, zoo: Path, beta: float) -> None:
    whole, known = published(tmp_path, zoo, "whole", beta=beta)
    state = torch.get_rng_state()
    expected = known["published"](whole)
    assert torch.equal(state, torch.get_rng_state())
    broken, _ = published(tmp_path, zoo, "broken", beta=beta)
    clock = broken.stop

    class Killed(Exception):
        pass

    def kill(step: int) -> bool:
        if step == 3:
            raise Killed
        return clock(step)

    with pytest.raises(Killed):
        known["published"](broken._replace(stop=kill))  # type: ignore[arg-type]
    again, _ = published(tmp_path, zoo, "broken", beta=beta)
    weights = load_zoo(zoo, "test").weights
    assert torch.equal(known["published"](again).reconstruct(weights), expected.reconstruct(weights))


def test_published_cells_through_a_file(tmp_path: Path, zoo: Path) -> None:
    file = write(
        tmp_path / "s.toml", zoo, '[axis]\nsemantics = ["core", "published", "corrected"]', seeds="[0]", base=BASE + 'start = "random"'
    )
    rows = run_ablation(Ablation.from_toml(file), tmp_path, systems=systems())
    latents = {r["variant"]: r["mean"] for r in rows if r["metric"] == "latent_numbers"}
    assert latents == dict.fromkeys(("semantics=core", "semantics=published", "semantics=corrected"), 192)
    agreement = [r["mean"] for r in rows if r["metric"] == "agreement"]
    assert len(set(agreement)) > 1
    linear = write(tmp_path / "l.toml", zoo, '[axis]\nsemantics = ["published"]', seeds="[0]")
    with pytest.raises(WslfastError, match="start: expected random"):
        run_ablation(Ablation.from_toml(linear), tmp_path, systems=systems())


# -- new models, and the paper -----------------------------------------------------------------------------------------


def test_new_models_are_measured_where_the_file_asks(tmp_path: Path, zoo: Path) -> None:
    """Of systems that can be sampled from, on the test split; another protocol measures again and trains nothing."""
    file = write(tmp_path / "a.toml", zoo, '[axis]\nsemantics = ["core", "metric"]', seeds="[0]", top="generate = true")
    few = Protocol(samples=3, models=4, train_models=8, images=20, bandwidths=(0.1,), finetune_epochs=1, finetune_images=32)
    log: list[tuple[str, int]] = []
    known = {**closed_form.systems(), "core": counted(log)}
    rows = run_ablation(Ablation.from_toml(file), tmp_path / "out", systems=known, protocol=few)
    found = {name: {r["metric"]: r for r in rows if r["variant"] == f"semantics={name}"} for name in ("core", "metric")}
    new = {"generated_accuracy", "diversity", "novelty", "finetuned_accuracy", "best_generated"}
    assert new <= set(found["core"])
    assert not new & set(found["metric"])
    assert found["core"]["diversity"]["mean"] > 0
    assert run_ablation(Ablation.from_toml(file), tmp_path / "out", systems=known, protocol=few) == rows
    assert len(log) == 1
    run_ablation(Ablation.from_toml(file), tmp_path / "out", systems=known, protocol=replace(few, samples=2))
    val = run_ablation(replace(Ablation.from_toml(file), split="val"), tmp_path / "out", systems=known, protocol=few)
    assert not new & {r["metric"] for r in val}
    assert load_run(log[0][0]).step == 3
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2  # the same cells, measured anew


@pytest.mark.slow
def test_the_paper_in_three_steps(tmp_path: Path, zoo: Path) -> None:
    """Every variant of the file that reruns the paper, with a smaller network and three steps, on two zoos into one table."""
    whole = Ablation.from_toml(next(path for path in EXAMPLES if path.stem == "paper"))
    small = {"steps": 3, "batch_size": 4, "queries": 4, "query_pool": 16, "d_model": 16, "heads": 2, "layers": 1, "latent": 4}
    tried = replace(whole, variants={name: {**settings, **small} for name, settings in whole.variants.items()})
    few = Protocol(samples=3, models=4, train_models=8, images=20, bandwidths=(0.1,), finetune_epochs=1, finetune_images=32)
    rows = run_ablation(tried, tmp_path, zoo=zoo, systems=systems(), protocol=few)
    assert {r["variant"] for r in rows} == set(whole.variants)
    for variant in whole.variants:
        measured = {r["metric"] for r in rows if r["variant"] == variant}
        assert {"agreement", "identified", "l2_masked", "probe_r2"} <= measured
        assert ("generated_accuracy" in measured) is not variant.startswith("published")
    assert {name: settings_of(whole, name, "z", 0)[1].lr for name in ("C+S", "C+S+B")} == {"C+S": 1e-4, "C+S+B": 1e-5}
    assert {settings_of(whole, name, "z", 0)[1].steps for name in whole.variants} == {30_000}
    assert "<html" in report(tmp_path).read_text()


@pytest.mark.parametrize("content", ["[1]", '{"2": "long"}', '{"2": null}', "null", "{"])
def test_a_clock_that_is_damaged_counts_from_here(tmp_path: Path, content: str) -> None:
    (tmp_path / "clock.json").write_text(content)
    stop = Stop(tmp_path, "wall", 60.0, 1, 4)
    assert stop.resume(2)
    assert stop.seconds == 0
    assert not stop(3)
    assert set(json.loads((tmp_path / "clock.json").read_text())) == {"3"}
