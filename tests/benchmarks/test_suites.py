"""The benchmark suite's own promises: a wrong provider gets no number, rows have the header everyone reads, pages are made of rows."""

from __future__ import annotations

import csv
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import FP32_AMPLIFIED, FP32_DEEP

from benchmarks import cases, derived, gate, losses, providers, readme, recording, suites, tables, timing, workers, zoo_building
from benchmarks.__main__ import main
from benchmarks.losses import Cell
from benchmarks.network_peers import PEERS
from benchmarks.recording import GIVEN, RECOMPUTED, Row
from wslfast.kernels import reference

ROOT = Path(__file__).resolve().parents[2]

HEADER = (
    "provider,architecture,k,n,direction,precision,metric,median,p20,p80,relative_error,device,driver,torch,triton,python,commit,date,note"
)
NAMES = {
    "published", "vmap", "vmap-compiled", "grouped", "unfold-bmm", "loop", "loop-channels-last", "loop-cudagraph",
    "wslfast-torch", "wslfast-triton-layerwise", "wslfast-triton-network",
}  # fmt: skip
NEED_A_GPU = {"loop-cudagraph", "wslfast-triton-layerwise", "wslfast-triton-network"}


def row(provider: str = "loop", k: int = 8, median: float | str = 1.0, note: str = GIVEN, **changes: object) -> Row:
    values = {"n": 16, "direction": "loss+gradient", "precision": "highest", "metric": "wall_ms", "device": "a machine", "torch": "2"}
    return Row(provider, "cnn3", k=k, median=median, p20=median, p80=median, note=note, date="2026-01-01", **{**values, **changes})  # type: ignore[arg-type]


# -- providers and the gate ------------------------------------------------------------------------------------------------


def test_providers_are_registered() -> None:
    assert set(providers.PROVIDERS) == set(providers.FORWARDS) == NAMES


def _agrees(name: str, net: str) -> None:
    case = cases.Case(cases.architecture_of(net), 3, 9)
    for direction, given in (("forward", False), ("loss+gradient", True), ("loss+gradient", False)):
        if (name in NEED_A_GPU and not torch.cuda.is_available()) or (name, direction, given) == ("published", "loss+gradient", True):
            with pytest.raises(providers.Unavailable, match=r"need.? a GPU|no place for given targets"):
                gate.check(name, case, direction, given, "highest")
        else:
            assert gate.check(name, case, direction, given, "highest") < 1e-4


@pytest.mark.parametrize("net", cases.ARCHITECTURES)
@pytest.mark.parametrize("name", sorted(NAMES - {"vmap-compiled"}))
def test_every_provider_agrees_with_float64_or_says_why_not(name: str, net: str) -> None:
    _agrees(name, net)


@pytest.mark.slow
def test_the_compiled_provider_agrees_with_float64() -> None:
    _agrees("vmap-compiled", "cnn")


@pytest.mark.parametrize("name", ["loop", "grouped", "vmap", "wslfast-torch"])
def test_bf16_stays_below_its_bound_and_is_not_float32(name: str) -> None:
    case = cases.Case(cases.architecture_of("cnn3"), 3, 48)
    error = gate.check(name, case, "loss+gradient", True, "bf16")
    assert 1e-4 < error < gate.BOUNDS["bf16"]


def test_the_published_layout_is_one_token_a_channel() -> None:
    architecture = cases.architecture_of("cnn3")
    weights = cases.models(architecture, 2, 0)
    tokens = providers.to_tokens(weights, architecture)
    assert tokens.shape == (2, 93, 289)
    assert torch.equal(torch.stack([providers.from_tokens(t, architecture) for t in tokens]), weights)


WRONG = {
    "another scale": lambda losses, gradient: (losses, 1.01 * gradient),
    "one model wrong": lambda losses, gradient: (losses, torch.cat([gradient[:-1], gradient[:1]])),
    "wrong losses": lambda losses, gradient: (losses + 0.01, gradient),
    "a NaN in a model that is not compared": lambda losses, gradient: (losses, gradient.index_fill(0, torch.tensor([1]), float("nan"))),
    "models missing": lambda losses, gradient: (losses[:-1], gradient[:-1]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_provider_gets_no_number(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = providers.PROVIDERS["loop"]
    monkeypatch.setitem(providers.PROVIDERS, "wrong", lambda *arguments: WRONG[wrong](*right(*arguments)))
    rows = losses.beside([Cell("wrong", "cnn", 5, 4), Cell("loop", "cnn", 5, 4)], rounds=2, budget_s=1.0)
    (bad,) = [r for r in rows if r.provider == "wrong"]
    assert bad.value is None
    assert "gate" in bad.note
    assert bad.note.startswith(GIVEN)
    assert isinstance(bad.relative_error, float)
    assert bad.relative_error > gate.BOUNDS["highest"]
    assert any(r.provider == "loop" and r.value for r in rows)


def test_a_failing_provider_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> providers.Result:
        raise torch.cuda.OutOfMemoryError("tried to allocate; 9 GB")

    monkeypatch.setitem(providers.PROVIDERS, "hungry", fails)
    (only,) = losses.beside([Cell("hungry", "cnn", 2, 4)], rounds=2, budget_s=1.0)
    assert (only.value, only.variant, only.details) == (None, GIVEN, "out of memory")


def test_a_worker_that_is_late_or_fails_costs_its_cell() -> None:
    found: list[Row] = []
    todo = [Cell("loop", "cnn", 2, 4), Cell("no such provider", "cnn", 2, 4), Cell("loop", "cnn", 2048, 512), Cell("grouped", "cnn", 2, 4)]
    workers.run(
        todo,
        found.extend,
        device="cpu",
        deadline=time.monotonic() + 120,
        cell_s=10,
        provider_s=lambda name: 40.0 if name == "loop" else 99.0,
    )
    notes = {(r.provider, r.k): r.note for r in found if r.metric == "wall_ms"}
    assert "repeats" in notes["loop", 2]
    assert "failed" in notes["no such provider", 2]
    assert "stopped after" in notes["loop", 2048]
    assert "repeats" in notes["grouped", 2]
    late: list[Row] = []
    workers.run(todo[:1], late.extend, device="cpu", deadline=time.monotonic() - 1, cell_s=1, provider_s=lambda _: 1.0)
    assert late[0].details == "not run: out of time"


def test_out_of_memory_halves_the_models_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right, most = providers.PROVIDERS["loop"], 2

    def hungry(weights: torch.Tensor, *rest: object) -> providers.Result:
        if len(weights) > most:
            raise torch.cuda.OutOfMemoryError
        return right(weights, *rest)  # type: ignore[arg-type]

    def figures(call: Callable[[], tuple[torch.Tensor, ...]], budget_s: float) -> timing.Figures:
        assert [len(value) for value in call()] == [9, 9]
        return timing.Figures({"wall_ms": [2.0, 3.0], "gpu_ms": [1.0, 2.0]}, 7.0, 11, {"graph_ms": "cannot be captured"})

    monkeypatch.setitem(providers.PROVIDERS, "hungry", hungry)
    monkeypatch.setattr(losses, "_case", lambda net, k, n: cases.Case(cases.architecture_of(net), k, n))
    monkeypatch.setattr(losses, "environment", lambda cuda: recording.environment(False))
    monkeypatch.setattr(losses, "measure_on_gpu", figures)
    rows = {r.metric: r for r in losses.on_gpu(Cell("hungry", "cnn", 9, 4), 1.0)}
    assert set(rows) == {"wall_ms", "gpu_ms", "graph_ms", "peak_mb", "launches", "flops"}
    assert rows["gpu_ms"].details.startswith("2 models at a time")
    assert (rows["graph_ms"].value, rows["launches"].value, rows["peak_mb"].value) == (None, 11.0, 7.0)
    assert "cannot be captured" in rows["graph_ms"].note
    most = 0
    (only,) = losses.on_gpu(Cell("hungry", "cnn", 9, 4), 1.0)
    assert only.value is None
    assert "out of memory" in only.details


def test_both_ways_of_building_a_zoo_train_the_same_models() -> None:
    architecture = cases.architecture_of("cnn")
    weights = cases.models(architecture, 3, 0)
    images, labels = torch.randn(40, 1, 28, 28), torch.randint(10, (40,))
    order = torch.randint(40, (3, 2, 8))
    one = zoo_building.one_after_another(architecture, weights, images, labels, order)
    torch.testing.assert_close(
        zoo_building.tuned_loop(architecture, weights, images, labels, order), one, rtol=FP32_AMPLIFIED, atol=FP32_DEEP
    )
    torch.testing.assert_close(
        zoo_building.together(architecture, weights, images, labels, order), one, rtol=FP32_AMPLIFIED, atol=FP32_DEEP
    )


# -- counts ----------------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_pixels_that_matter() -> None:
    # CNN3: 28x28 of 16x27, 12x12 of 32x144, 4x4 of 15x288, 60x20, 20x10; no input gradient of the first
    by_layer = [28 * 28 * 16 * 27, 12 * 12 * 32 * 144, 4 * 4 * 15 * 288, 60 * 20, 20 * 10]
    architecture = cases.architecture_of("cnn3")
    assert cases.needed_flops(architecture, "forward") == 2 * sum(by_layer)
    assert cases.needed_flops(architecture, "loss+gradient") == 2 * (3 * sum(by_layer) - by_layer[0])
    assert cases.needed_flops(architecture, "loss+gradient", True) == 2 * (4 * sum(by_layer) - by_layer[0])


def test_wide_networks_are_cnn3_at_width_one() -> None:
    one, cnn3 = cases.architecture_of("cnn3x1"), cases.architecture_of("cnn3")
    weights, queries = cases.models(cnn3, 2, 0), torch.randn(3, 3, 32, 32)
    assert torch.equal(reference.forward(weights, queries, one.layers), reference.forward(weights, queries, cnn3.layers))
    assert cases.architecture_of("cnn3x4").num_weights > 12 * cnn3.num_weights


# -- rows ------------------------------------------------------------------------------------------------------------------


def test_rows(tmp_path: Path) -> None:
    rows = losses.beside([Cell("loop", "cnn", 2, 4), Cell("wslfast-torch", "cnn", 2, 4, "forward")], rounds=2, budget_s=1.0)
    path = tmp_path / "rows.csv"
    recording.merge(path, rows)
    lines = path.read_text().splitlines()
    assert lines[0] == HEADER
    assert len(lines) == len(rows) + 1
    assert recording.read_rows(path) == rows
    timed = [r for r in rows if r.metric == "wall_ms"]
    assert [(r.provider, r.direction, r.variant) for r in timed] == [
        ("loop", "loss+gradient", GIVEN),
        ("wslfast-torch", "forward", losses.FORWARD),
    ]
    for r in timed:
        assert 0 < r.p20 <= r.median <= r.p80
        assert 0 <= r.relative_error < 1e-4
    assert {r.metric for r in rows} >= {"wall_ms", "flops"}
    again = [replace(rows[0], median=123.0), row("published")]
    recording.merge(path, again)
    assert recording.read_rows(path) == [again[0], *rows[1:], again[1]]
    assert len(recording.plain_table(rows).splitlines()) == len(rows) + 1


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "data").glob("*.csv")), ids=lambda p: p.name)
def test_tracked_rows(path: Path) -> None:
    with path.open(newline="") as file:
        assert ",".join(next(csv.reader(file))) == HEADER
    rows = recording.read_rows(path)
    assert len({(r.key, r.device) for r in rows}) == len(rows)
    for r in rows:
        assert r.direction in ("forward", "loss+gradient", "step", "zoo")
        assert r.metric in ("gpu_ms", "graph_ms", "wall_ms", "peak_mb", "launches", "flops")
        assert r.precision in cases.PRECISIONS
        assert r.value is not None or r.details, f"no number and no reason: {r.key}"
        assert r.provider in NAMES | set(PEERS) | {"ceiling", "wslfast", "one-after-another", zoo_building.TUNED, "jax-vmap"}
        timed = r.provider in NAMES and r.value is not None
        assert not timed or (isinstance(r.relative_error, float) and r.relative_error <= gate.BOUNDS[r.precision])


def test_modules_and_copies_of_images_are_not_on_the_clock_of_zoo_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("on the clock")

    def turns(calls: dict[str, Callable[..., object]], arguments: Callable[[], tuple[object, ...]], rounds: int) -> dict[str, list[float]]:
        given = arguments()
        with monkeypatch.context() as inside:
            for name in ("plain_module", "Loop"):
                inside.setattr(zoo_building, name, never)
            inside.setattr(torch.optim, "Adam", never)
            for call in calls.values():
                call(*given)
        return {name: [48.0] for name in calls}

    monkeypatch.setattr(zoo_building, "take_turns", turns)
    rows = {r.provider: r for r in zoo_building.measure("cnn", 4, baseline_models=2, steps=2)}
    assert {name: r.value for name, r in rows.items()} == {"one-after-another": 3.0, zoo_building.TUNED: 3.0, zoo_building.OURS: 6.0}
    assert all(0 < float(r.relative_error) < zoo_building.BOUNDS["highest"] for r in rows.values())


def test_suites_hold_what_was_asked() -> None:
    gpu = [cell for make in suites.GPU_CELLS.values() for cell in make()]
    assert {cell.provider for cell in suites.core_cells()} == NAMES
    assert {cell.precision for cell in suites.core_cells()} == set(cases.PRECISIONS)
    assert {cell.k for cell in gpu} >= {16, 64, 128, 1024, 4096, 16384}
    assert {cell.n for cell in gpu} >= {64, 256, 1024}
    cpu = [cell for section in suites.SECTIONS for group in suites.cpu_cells(section, quick=False) for cell in group[0]]
    assert {cell.provider for cell in cpu} == NAMES
    assert {(cell.direction, cell.given) for cell in cpu} >= {("forward", True), ("loss+gradient", True), ("loss+gradient", False)}


def test_only_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--suite", "cpu", "--only", "tokenz", "--out", str(tmp_path)]) == 2
    assert "growth-k" in capsys.readouterr().err
    assert main(["--suite", "quick", "--only", "growth-k", "--out", str(tmp_path)]) == 2  # it would measure nothing
    assert "some of ceilings, loss, zoo, tokens for --suite quick" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- compare ---------------------------------------------------------------------------------------------------------------


def _compare(tmp_path: Path, before: list[Row], after: list[Row], *flags: str) -> int:
    for name, rows in (("a.csv", before), ("b.csv", after)):
        recording.write_rows(rows, tmp_path / name)
    return main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), *flags])


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(), row("vmap", median=2.0), row("vmap", note=RECOMPUTED, median=3.0), row("loop", metric="flops", median=1e9)]
    assert _compare(tmp_path, rows, rows) == 0
    assert _compare(tmp_path, rows, [replace(rows[0], median=1.05), *rows[1:]]) == 0
    assert _compare(tmp_path, rows, [replace(rows[0], median=1.05), *rows[1:]], "--threshold", "0.01") == 1
    capsys.readouterr()
    assert _compare(tmp_path, rows, [*rows[:2], replace(rows[2], median=6.0), rows[3]]) == 1
    assert f"vmap cnn3 k=8 n=16 loss+gradient ({RECOMPUTED})" in capsys.readouterr().out
    assert _compare(tmp_path, rows, [*rows[:3], replace(rows[3], median=5e8)]) == 1  # a rate that halved
    assert _compare(tmp_path, rows, [*rows[:3], replace(rows[3], median=5e9)]) == 0
    assert _compare(tmp_path, rows, [replace(rows[0], median="", note=f"{GIVEN}; gate: red"), *rows[1:]]) == 1
    assert _compare(tmp_path, [replace(rows[2], median=0.0)], [rows[2]]) == 1  # from nothing to something
    assert _compare(tmp_path, [replace(rows[2], median=0.0)], [replace(rows[2], median=0.0)]) == 0
    assert _compare(tmp_path, [rows[3]], [replace(rows[3], median=0.0)]) == 1  # a rate of nothing
    assert _compare(tmp_path, rows, [row(k=9)]) == 2
    assert main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "gone.csv")]) == 2
    assert "gone.csv" in capsys.readouterr().err


# -- what is made of rows --------------------------------------------------------------------------------------------------


def test_the_readme_is_what_the_tracked_rows_say() -> None:
    assert readme.main(["--check"]) == 0, "python -m benchmarks readme"


def test_bars_come_from_rows() -> None:
    cpu = [row("published", k, 100.0, RECOMPUTED, n=n) for k, n in ((64, 256), (32, 128))]
    cpu += [row("wslfast-torch", k, ms, note, n=n) for k, n in ((64, 256), (32, 128)) for note, ms in ((RECOMPUTED, 12.5), (GIVEN, 20.0))]
    cpu += [row("wslfast-torch", 2**i, 0.5 * 2**i * (1.04 if i == 9 else 1), n=64) for i in range(6, 12)]
    found = derived.cpu_bars(derived.Rows(cpu))
    assert [(b.obtained, b.verdict) for b in found[:4]] == [(8.0, "met"), (5.0, "missed"), (8.0, "met, moonshot too"), (5.0, "missed")]
    assert found[-1].obtained == pytest.approx(4.0)
    assert "k=512" in found[-1].detail
    assert found[-1].verdict == "met, moonshot too"
    assert {b.verdict for b in found[4:-1]} == {"not measured"}


def test_where_a_peer_wins_is_said() -> None:
    rows = [row("wslfast-torch", 1, 3.0), row("loop", 1, 2.0), row("vmap", 1, 9.0), row("wslfast-torch", 8, 1.0), row("loop", 8, 2.0)]
    table = tables.peers(derived.Rows(rows))
    assert table.rows == [("cnn3 k=1 n=16", f"{GIVEN}, highest", "loop", "1.50")]
    assert "1.50" in readme.text(rows)
    assert "At no shape" in readme.text(rows[-2:])


def test_growth_is_told_of_one_suite_at_a_time() -> None:
    """The networks' suite times a CNN3, too, on another loss, and in another run."""
    one = [row("loop", 16, 2.0 * n, n=n) for n in (64, 128, 256, 512)]
    other = [row("loop", 16, 320.0, n=32)]
    (found,) = readme.by_device(one, other).values()
    expected = ("loop", "cnn3 highest, k=16", "n = 64: 1.00, 128: 1.00, 256: 1.00, 512: 1.00")
    assert tables.growth(found).rows == [expected]
    assert "| n = 64: 1.00, 128: 1.00" in readme.text(one, other)


def test_no_two_suites_time_the_same_thing() -> None:
    """What stands beside ours is looked up by what was measured, over all suites: one of them would hide the other."""
    keys = [(row.device, *row.key) for suite in readme.tracked() for row in suite]
    assert len(set(keys)) == len(keys)


def test_all_versions_that_rows_were_measured_with_are_named() -> None:
    rows = [row(), replace(row("vmap"), torch="3", commit="c0ffee"), replace(row("grouped"), python="3.12", date="2026-01-02")]
    assert tables.machine(derived.Rows(rows)) == "a machine; torch 2, 3; Python 3.12; commit c0ffee; 2026-01-01 to 2026-01-02"


@pytest.mark.parametrize("clock", ["wall_ms", "gpu_ms"])
def test_a_loop_that_builds_a_zoo_faster_is_a_peer_that_wins(clock: str) -> None:
    where = {"direction": "zoo", "note": f"{zoo_building.VARIANT}; Adam, batch 32"}
    rows = [row(name, 64, ms, **where) for name, ms in (("wslfast", 3.0), ("one-after-another", 6.0), (zoo_building.TUNED, 2.0))]
    rows.append(row("loop", 1, 2.0, metric=clock))  # on a GPU zoo rows have the host's clock, too
    rows += [
        row(name, 64, ms, "tokens of weights; n is the number of tokens", direction="forward", metric=clock)
        for name, ms in (("wslfast", 5.0), ("loop", 4.0))
    ]
    table = tables.peers(derived.Rows(rows))
    assert table.rows == [
        ("cnn3 k=64 n=16", f"{zoo_building.VARIANT}, highest", zoo_building.TUNED, "1.50"),
        ("cnn3 k=64 n=16", "tokens of weights, highest", "loop", "1.25"),
    ]


def test_the_page_is_one_file_with_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.page import write_page

    rows = [row(name, k, float(k), note) for name in ("loop", "wslfast-torch") for k in (8, 16, 32) for note in (GIVEN, RECOMPUTED)]
    rows += [replace(r, metric="flops", median=1e9 + r.k) for r in rows]
    product = row("ceiling", 2048, 1e11, "large matrix product", metric="flops", direction="forward")
    copied = row("ceiling", 1, 10.0, "large copy; 1 bytes/s", n=1 << 20, direction="forward")
    rows += [replace(product, architecture="matmul"), replace(copied, architecture="copy")]
    text = write_page(rows, tmp_path / "page.html").read_text()
    assert text.count("<svg") == 3
    assert "src=" not in text
    assert 'href="http' not in text
    assert "a machine" in text


def test_the_summary_of_the_gpu_gate_fits_a_screen() -> None:
    from benchmarks.gpu_gate import summary

    rows = []
    for cell in suites.core_cells():
        blank = replace(cell.row(cuda=False), metric="gpu_ms", device="a GPU", relative_error=1e-3, note=f"{cell.variant}; 9 repeats")
        rows += [replace(blank, metric=m, median=12.0) for m in ("gpu_ms", "wall_ms", "graph_ms", "peak_mb", "launches", "flops")]
    text = summary(rows)
    assert len(text) < 11_000
    assert "k=1024, n=256, fp16" in text
    assert "not measured" in text


BLOCKED = """
    import importlib.abc, sys
    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"tyro", "rich", "matplotlib", "nvtx", "sklearn", "pytest", "torchvision"}:
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Absent())
    import benchmarks.gpu_gate, benchmarks.__main__, benchmarks.workers, benchmarks.training_step
    from benchmarks.recording import show
    show([])
"""


def test_the_gpu_gate_needs_little() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BLOCKED)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the GPU gate")
def test_the_gpu_gate_without_a_gpu_says_so(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "OUT": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_gate.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())
