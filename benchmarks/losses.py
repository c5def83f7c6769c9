"""Loss and gradient (and forward passes) of k models on n shared queries, provider beside provider: one cell a shape, direction,
precision and provider; on a CPU in turns, on a GPU one cell after another in worker processes (``workers.py``)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from . import ceilings, gate
from .cases import Case, architecture_of, draws, needed_bytes, needed_flops, numerics
from .recording import GIVEN, RECOMPUTED, Row, digits, environment, with_values
from .timing import host_peak_mb, measure_on_gpu, take_turns

FORWARD = "outputs"  # the variant of forward rows
OF_THE_PROCESS = "of the process"  # peak memory on a CPU


@dataclass(frozen=True)
class Cell:
    """What one provider is asked to do."""

    provider: str
    architecture: str
    k: int
    n: int
    direction: str = "loss+gradient"
    given: bool = True
    precision: str = "highest"

    @property
    def variant(self) -> str:
        """How its rows' notes begin."""
        return FORWARD if self.direction == "forward" else GIVEN if self.given else RECOMPUTED

    @property
    def shape(self) -> tuple[Any, ...]:
        """Cells with the same shape run on the same tensors, one beside the other."""
        return (self.architecture, self.k, self.n, self.direction, self.given, self.precision)

    def row(self, cuda: bool) -> Row:
        """A row without a number."""
        metric = "gpu_ms" if cuda else "wall_ms"
        return Row(
            self.provider,
            self.architecture,
            self.k,
            self.n,
            self.direction,
            self.precision,
            metric,
            note=self.variant,
            **environment(cuda),
        )

    def failed(self, why: str, cuda: bool, error: float | str = "") -> Row:
        """The row that says why there is no number."""
        return replace(self.row(cuda), relative_error=error, note=f"{self.variant}; {why}")


def _refused(cell: Cell, error: Exception, cuda: bool) -> Row:
    return cell.failed(gate.reason(error), cuda, error.error if isinstance(error, gate.Red) else "")


def rate_row(cell: Cell, row: Row, best: Sequence[Row]) -> Row:
    """The achieved FLOP/s and bytes/s that a row of milliseconds amounts to, against the ceilings of the same run."""
    architecture = architecture_of(cell.architecture)
    recomputed = cell.direction != "forward" and not cell.given
    work = cell.k * cell.n * needed_flops(architecture, cell.direction, recomputed)
    moved = needed_bytes(architecture, cell.k, cell.n, cell.direction, recomputed)
    median, fast, slow = (1e-3 * v for v in (row.median, row.p20, row.p80) if isinstance(v, float))
    note = f"{cell.variant}; from {row.metric}; {moved / median:.3g} bytes/s of arguments and results"
    flops, bytes_per_s = ceilings.of(list(best), cell.precision, row.device)
    if flops and bytes_per_s:
        note += f"; {work / median / flops:.1%} of the product's ceiling, {moved / median / bytes_per_s:.2%} of the copy's"
    return replace(row, metric="flops", note=note, median=digits(work / median), p20=digits(work / slow), p80=digits(work / fast))


# -- CPU: in turns ---------------------------------------------------------------------------------------------------------


def beside(cells: Sequence[Cell], rounds: int, budget_s: float, best: Sequence[Row] = ()) -> list[Row]:
    """Rows of cells of one precision on a CPU: the gate, then turns on fresh tensors (cells of one shape share them).

    A provider above the bound is not timed; one that has used ``budget_s`` sits out (after three rounds). ``best``: rows of the ceilings.
    """
    assert len({cell.precision for cell in cells}) == 1
    streams = {cell.shape: draws(architecture_of(cell.architecture), cell.k, cell.n) for cell in cells}
    rows: list[Row] = []
    errors: dict[Cell, float] = {}
    peaks: dict[Cell, float | None] = {}

    def draw() -> dict[tuple[Any, ...], Case]:
        cases = {shape: next(stream) for shape, stream in streams.items()}
        for cell in cells:
            if cell.given and cell.direction != "forward":
                _ = cases[cell.shape].targets  # not on the clock
        return cases

    cases = draw()
    for cell in cells:
        case = cases[cell.shape]
        _ = case.outputs if cell.direction == "forward" else case.truth  # in no provider's peak memory
        try:
            check = partial(gate.check, cell.provider, case, cell.direction, cell.given, cell.precision)
            errors[cell], peaks[cell] = host_peak_mb(check)
        except Exception as error:
            rows.append(_refused(cell, error, cuda=False))
    calls = {cell: partial(_turn, cell) for cell in cells if cell in errors}
    with numerics(cells[0].precision):
        times = take_turns(calls, lambda: (draw(),), rounds, budget_s, warm=False)  # the gate has called each
    for cell, found in errors.items():
        row = with_values(replace(cell.row(cuda=False), relative_error=found), times[cell], cell.variant)
        rows += [row, rate_row(cell, row, best)]
        peak = peaks[cell]
        if peak is not None:
            note = f"{cell.variant}; {OF_THE_PROCESS}, above where it stood"
            rows.append(replace(row, metric="peak_mb", median=digits(peak), p20="", p80="", note=note))
    return rows


def _turn(cell: Cell, cases: Mapping[tuple[Any, ...], Case]) -> None:
    gate.run(cell.provider, cases[cell.shape], cell.direction, cell.given)


# -- GPU: one cell ---------------------------------------------------------------------------------------------------------


def _in_chunks(cell: Cell, case: Case, chunk: int) -> Callable[[], object]:
    """The cell's call on ``chunk`` models at a time; results are joined."""
    if chunk >= cell.k:
        return lambda: gate.run(cell.provider, case, cell.direction, cell.given)
    parts = [case.slice(start, start + chunk) for start in range(0, cell.k, chunk)]

    def call() -> tuple[torch.Tensor, ...]:
        found = [gate.run(cell.provider, part, cell.direction, cell.given) for part in parts]
        return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))

    return call


@lru_cache(maxsize=1)
def _case(net: str, k: int, n: int) -> Case:
    """The tensors of the cells that follow one another on one shape."""
    case = Case(architecture_of(net), k, n, "cuda")
    _ = case.targets
    return case


def on_gpu(cell: Cell, budget_s: float, best: Sequence[Row] = ()) -> list[Row]:
    """Rows of one cell on the GPU. Out of memory: again with half as many models at a time (the note says so), four times at most."""
    chunk, why = cell.k, ""
    try:
        case = _case(cell.architecture, cell.k, cell.n)
    except Exception as error:
        return [_refused(cell, error, cuda=True)]
    for _ in range(5):
        try:
            return _figures(cell, case, chunk, budget_s, best)
        except torch.cuda.OutOfMemoryError:
            why = f"out of memory, also with {chunk} models at a time"
        except Exception as error:
            return [_refused(cell, error, cuda=True)]
        gc.collect()
        torch.cuda.empty_cache()
        if chunk < 2:
            break
        chunk //= 2
    return [cell.failed(why, cuda=True)]


def _figures(cell: Cell, case: Case, chunk: int, budget_s: float, best: Sequence[Row]) -> list[Row]:
    call = _in_chunks(cell, case, chunk)
    with numerics(cell.precision, "cuda"):
        found = call()
        assert isinstance(found, tuple)
        error = gate.judge(found, case, cell.direction, cell.precision)
        figures = measure_on_gpu(call, budget_s)
    where = cell.variant + (f"; {chunk} models at a time, more are out of memory" if chunk < cell.k else "")
    blank = replace(cell.row(cuda=True), relative_error=error)
    rows = [with_values(replace(blank, metric=name), times, where) for name, times in figures.times.items()]
    rows += [replace(blank, metric=name, note=f"{where}; {why}") for name, why in figures.missing.items()]
    rows.append(replace(blank, metric="peak_mb", median=digits(figures.peak_mb), note=where))
    if figures.launches:
        rows.append(replace(blank, metric="launches", median=float(figures.launches), note=where))
    timed = {row.metric: row for row in rows if row.value is not None}
    rows.append(rate_row(cell, timed.get("graph_ms", timed["gpu_ms"]), best))
    return rows
