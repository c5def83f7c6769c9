"""What was measured, on disk: units, tables that come back as they were, and figures over seeds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from wslfast.errors import WslfastError
from wslfast.measure.results import (
    _COLUMNS,
    HEADER,
    Results,
    Unit,
    figures,
    from_csv,
    kept_unit,
    over_seeds,
    read_results,
    read_unit,
    single,
    to_csv,
    unit_path,
    update_csv,
    write_tables,
    write_unit,
)


def test_figures_leave_out_what_is_undefined() -> None:
    values = [0.1, 0.4, 0.9, float("nan"), float("inf")]
    assert figures(torch.tensor(values)) == pytest.approx((0.4, statistics.fmean(values[:3]), statistics.stdev(values[:3])))
    assert figures(torch.tensor([float("nan")])) == (None, None, None)
    assert figures(torch.tensor([2.0])) == (2.0, 2.0, None)
    assert single(float("nan")) == (None, None, None)


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        {"zoo": "1", "variant": "2.5", "seed": 3, "metric": "x", "a": 0.1, "b": None},
        {"zoo": "1", "variant": 'a,"b"', "seed": 4, "c": "n/a"},
    ]
    (tmp_path / "t.csv").write_text(to_csv(rows, ("zoo", "variant", "seed")))
    back = from_csv(tmp_path / "t.csv")
    assert back[0] == {"zoo": "1", "variant": "2.5", "seed": 3, "metric": "x", "a": 0.1, "b": None, "c": None}
    assert back[1] == {"zoo": "1", "variant": 'a,"b"', "seed": 4, "metric": None, "a": None, "b": None, "c": "n/a"}
    assert to_csv([{"zoo": "z", "v": float("nan")}], ("zoo",)) == "zoo,v\nz,\n"
    with pytest.raises(WslfastError, match=r"t\.csv: columns \['median'\] are missing; expected zoo,median"):
        from_csv(tmp_path / "t.csv", ("zoo", "median"))
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(WslfastError, match="not a CSV table"):
        from_csv(tmp_path / "t.csv")


def test_rows_of_others_stay_in_a_table_to_the_letter(tmp_path: Path) -> None:
    columns, path = ("zoo", "name", "value"), tmp_path / "t.csv"
    update_csv(
        path, columns, [{"zoo": "a", "name": "007", "value": "1.2345678e-04"}, {"zoo": "b", "name": "x", "value": 0.1}], ("zoo", "name")
    )
    before = path.read_text().splitlines()
    assert before == ["zoo,name,value", "a,007,1.2345678e-04", "b,x,0.1"]
    update_csv(path, columns, [{"zoo": "b", "name": "x", "value": 0.25}, {"zoo": "b", "name": "y", "value": None}], ("zoo", "name"))
    assert path.read_text().splitlines() == [*before[:2], "b,x,0.25", "b,y,"]
    path.write_text("zoo,name\na,b\n")
    with pytest.raises(WslfastError, match=r"columns \['value'\] are missing"):
        update_csv(path, columns, [], ("zoo",))


def test_units_are_whole_or_not_there(tmp_path: Path) -> None:
    unit = Unit("a/b", "x y", 1, "run", "f", {"k": [1, None]}, {"m": (1.0, float("nan"), None)}, {"models": [{"v": 1}]})
    path = unit_path(tmp_path, *unit.key)
    write_unit(path, unit)
    back = read_unit(path)
    assert back is not None
    assert back.metrics == {"m": [1.0, None, None]}
    assert (back.key, back.facts) == (unit.key, unit.facts)
    assert back.rows() == [{"zoo": "a/b", "variant": "x y", "seed": 1, "metric": "m", "median": 1.0, "mean": None, "spread": None}]
    assert kept_unit(path, "g", "f") == back
    assert kept_unit(path, "g") is None
    assert unit_path(tmp_path, "a_b", "x y", 1) != path  # names that look alike are kept apart
    damaged = ('{"figures": {"m": 1}}', '{"figures": []}', json.dumps({"schema": 1, "zoo": "z"}), json.dumps({"schema": 1, "what": 2}))
    for text in ("", "{", "[]", "3", "null", '{"schema": 99}', *damaged):
        path.write_text(text)
        assert read_unit(path) is None, text


def test_a_cell_of_an_ablation_as_it_was_written_before_cells_were_units(tmp_path: Path) -> None:
    path = tmp_path / "cells" / "22299a32ba923310" / "figures-test.json"
    path.parent.mkdir(parents=True)
    old = {"agreement": {"median": 0.25, "mean": 0.5, "std": 0.1}, "steps": {"median": 3.0, "mean": 3.0, "std": None}}
    path.write_text(json.dumps({"config": {"steps": 3}, "figures": old}, indent=1))
    unit = kept_unit(path, "22299a32ba923310")
    assert unit is not None
    assert unit.metrics == {"agreement": (0.25, 0.5, 0.1), "steps": (3.0, 3.0, None)}
    assert kept_unit(path, "another") is None


def test_figures_over_seeds() -> None:
    rows: list[dict[str, Any]] = [
        {"variant": v, "metric": "m", "mean": x, "median": 4.0} for v, x in (("a", 1.0), ("a", 3.0), ("b", 5.0), ("b", None))
    ]
    assert over_seeds(rows) == {"a": {"m": (2.0, statistics.stdev([1, 3]), 2)}, "b": {"m": (5.0, None, 1)}}
    assert over_seeds(rows, "median")["b"]["m"] == (4.0, 0.0, 2)
    # of the change in accuracy the median over models counts
    change = [{"variant": "a", "metric": "accuracy_change", "mean": 0.3, "median": 0.0}]
    assert over_seeds(change)["a"]["accuracy_change"] == (0.0, None, 1)


def test_results_answer_by_zoo_and_variant(tmp_path: Path) -> None:
    units = [
        Unit("z", "zoo", 0, "zoo", "f", {"dataset": "d"}, {"accuracy": (0.9, 0.9, 0.1)}),
        Unit("z", "S+B", 1, "run", "f", {"losses": "S+B"}, {"agreement": (0.6, 0.6, 0.2), "agreement_margin": (0.2, 0.2, 0.1)}, {"models": [{"model": 1}]}),
        Unit("z", "S+B", 0, "run", "f", {"losses": "S+B"}, {"agreement": (0.8, 0.8, 0.2), "agreement_margin": (0.2, 0.2, 0.1)}, {"models": [{"model": 0}]}),
        Unit("z", "S", 0, "run", "f", {"losses": "S"}, {"agreement": (0.9, 0.9, 0.3), "agreement_margin": (0.0, 0.0, 0.0)}),
        Unit("z", "S-zero-layer", 0, "run", "f", {"losses": "S", "baseline": "twin"}, {"agreement": (0.5, 0.5, None)}),
    ]  # fmt: skip
    write_tables(tmp_path, units, {})
    results = read_results(tmp_path)
    assert results.zoos == ["z"]
    assert results.trained("z") == ["S", "S+B"]
    assert results.over_seeds("z", "S+B", "agreement") == pytest.approx((0.7, statistics.stdev([0.6, 0.8])))
    assert results.over_seeds("z", "S", "agreement") == (0.9, 0.3)  # one seed: the spread over models
    assert results.over_seeds("z", "S", "nothing") == (None, None)
    assert "collapse" in results.collapsed("z", "S")
    assert results.best("z", ["S", "S+B"], "agreement") == "S+B"  # one that has collapsed only where there is no other
    assert results.best("z", ["S"], "agreement") == "S"
    assert results.best("z", ["zoo"], "agreement") is None
    assert [r["model"] for r in results.table("models", "z", "S+B", first_seed=True)] == [0]


def test_extra_tables_are_found_beside_the_rows_or_in_their_analysis_folder(tmp_path: Path) -> None:
    write_tables(tmp_path, [], {})
    (tmp_path / "analysis").mkdir()
    for path, zoo in (("analysis/ablations.csv", "far"), ("analysis/gradients.csv", "far"), ("gradients.csv", "near")):
        (tmp_path / path).write_text(to_csv([{"zoo": zoo, "metric": "m"}], (*HEADER, "direction", "magnitude")))
    tables = read_results(tmp_path).tables
    assert tables["ablations"][0]["zoo"] == "far"
    assert tables["gradients"][0]["zoo"] == "near"


def test_a_folder_without_results_or_with_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(WslfastError, match="no results here"):
        read_results(tmp_path)
    write_tables(tmp_path, [Unit("z", "v", 0, "run", "f", {}, {"agreement": (0.5, 0.5, 0.1)})], {})
    assert len(read_results(tmp_path).rows) == 1
    (tmp_path / "rows.csv").write_text("zoo,variant\na,b\n")
    with pytest.raises(WslfastError, match=r"columns .* are missing"):
        read_results(tmp_path)
    write_tables(tmp_path, [Unit("z", "v", 0, "run", "f", {}, {"agreement": (0.5, 0.5, 0.1)})], {})
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(WslfastError, match="not JSON"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("table", "column"), [("models", "seed"), ("samples", "epoch"), ("samplings", "novelty"), ("latents", "x"), ("ablations", "metric"), ("gradients", "direction")]
)  # fmt: skip
def test_a_table_that_lacks_a_column_is_named(tmp_path: Path, table: str, column: str) -> None:
    write_tables(tmp_path, [Unit("z", "S", 0, "run", "", {}, {"agreement": (0.5, 0.5, None)})], {})
    names = [name for name in _COLUMNS[table] if name != column]
    (tmp_path / f"{table}.csv").write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    with pytest.raises(WslfastError, match=rf"{table}.csv: columns \['{column}'\] are missing"):
        read_results(tmp_path)


@pytest.mark.parametrize("variants", ['["a"]', '[{"zoo": "z", "variant": "S"}]'], ids=["text", "no kind"])
def test_variants_that_are_none_are_named(tmp_path: Path, variants: str) -> None:
    write_tables(tmp_path, [Unit("z", "S", 0, "run", "", {}, {"agreement": (0.5, 0.5, None)})], {})
    (tmp_path / "report.json").write_text(f'{{"variants": {variants}}}')
    with pytest.raises(WslfastError, match="variants: expected objects with zoo, variant and kind"):
        read_results(tmp_path)


def test_the_rows_of_the_lowest_seed() -> None:
    rows = [{"zoo": "z", "variant": "v", "seed": seed, "x": seed} for seed in (2, None, 1, 1, 2)]
    found = Results([], {"latents": rows}, {"variants": []})
    assert [r["x"] for r in found.table("latents", "z", "v", first_seed=True)] == [1, 1]
    assert len(found.table("latents", "z", "v")) == 5
    many = Results([], {"latents": rows * 20_000}, {"variants": []})  # a row at a time against all others took an hour
    assert len(many.table("latents", "z", "v", first_seed=True)) == 40_000
