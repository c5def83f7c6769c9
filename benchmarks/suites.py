"""Which cells a suite holds, section by section. Each section hands over its rows as soon as it has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import ceilings, token_coding, training_step, workers, zoo_building
from .cases import ARCHITECTURES, PRECISIONS, WIDTHS
from .losses import Cell, beside
from .providers import OURS, PROVIDERS
from .recording import Row

Emit = Callable[[list[Row]], None]
EVERYONE = tuple(PROVIDERS)
UNCOMPILED = tuple(name for name in EVERYONE if name != "vmap-compiled")
LOOPS = ("loop", "loop-channels-last", "wslfast-torch")
KERNELS = tuple(name for name in OURS if "triton" in name)
JOB, ZOO_MODELS = ("cnn3", 256), 1200
SECTIONS = ("ceilings", "loss", "forward", "precision", "few", "growth-k", "growth-n", "growth-width", "step", "zoo", "tokens")
QUICK = ("ceilings", "loss", "zoo", "tokens")
GPU_SECTIONS = ("ceilings", "core", "nets", "growth", "sizes", "step", "zoo", "tokens")


def _both(names: Iterable[str], net: str, k: int, n: int, precision: str = "highest") -> list[list[Cell]]:
    """Cells with targets recomputed, and with targets given (for which the published algorithm has no place)."""
    names = list(names)
    given = [name for name in names if name != "published"]
    return [
        [Cell(name, net, k, n, given=False, precision=precision) for name in names],
        [Cell(name, net, k, n, given=True, precision=precision) for name in given],
    ]


# -- CPU -------------------------------------------------------------------------------------------------------------------


def cpu_cells(section: str, quick: bool) -> list[tuple[list[Cell], int, float]]:
    """(cells that take turns, rounds, seconds a provider may use) of a section of loss and gradient or forward passes."""
    if quick:
        nets = ("cnn3", "cnn") if section == "loss" else ()
        groups = [group for net in nets for group in _both(UNCOMPILED, net, 8, 16)]
        return [(group, 9, 2.0) for group in groups]
    if section == "loss":
        small = [group for net in ARCHITECTURES for group in _both(UNCOMPILED, net, 8, 16)]
        middle = [*_both(EVERYONE, "cnn3", 32, 128)]
        middle += [group for net in ("cnn", "lenet5") for group in _both(UNCOMPILED, net, 32, 128)]
        large = [group for net in ARCHITECTURES for group in _both(("published", *LOOPS[1:]), net, 64, 256)]
        return [(g, 9, 3.0) for g in small] + [(g, 5, 5.0) for g in middle] + [(g, 4, 6.0) for g in large]
    if section == "forward":
        return [([Cell(name, net, 32, 128, "forward") for name in UNCOMPILED], 5, 2.0) for net in ARCHITECTURES]
    if section == "precision":
        names = ("grouped", *LOOPS)
        return [([Cell(name, net, 32, 128, precision="bf16") for name in names], 5, 3.0) for net in ARCHITECTURES]
    if section == "few":  # where a group of models is filled up
        return [([Cell(name, net, k, 256) for name in LOOPS], 9, 3.0) for net in ARCHITECTURES for k in (1, 2, 3, 4)]
    if section == "growth-k":
        return [([Cell("wslfast-torch", "cnn3", 2**i, 64) for i in range(4, 12)], 3, 20.0)]
    if section == "growth-n":
        return [([Cell(name, "cnn3", 16, n) for name in LOOPS[1:] for n in (64, 128, 256, 512, 1024)], 3, 3.0)]
    if section == "growth-width":
        return [([Cell(name, net, 16, 64) for name in LOOPS[1:] for net in WIDTHS], 5, 3.0)]
    return []


def run_cpu(suite: str, only: Sequence[str], known: Sequence[Row], emit: Emit, say: Callable[[str], None]) -> None:
    """The sections of ``quick`` or ``cpu``, all or some. ``known``: rows from before, for the ceilings of a section run alone."""
    quick, best = suite == "quick", list(known)
    for section in only or (QUICK if quick else SECTIONS):
        began = time.perf_counter()
        if section == "ceilings":
            best = ceilings.measure("cpu")
            emit(best)
        for cells, rounds, budget_s in cpu_cells(section, quick):
            emit(beside(cells, rounds, budget_s, best))
        if section == "step":
            emit(training_step.measure("cnn3", "cpu", published=False))
        if section == "zoo":
            for net in ("cnn",) if quick else tuple(ARCHITECTURES):
                emit(zoo_building.measure(net, 32 if quick else 64, rounds=3 if quick else 5))
        if section == "tokens":
            for net in ("cnn3",) if quick else tuple(ARCHITECTURES):
                emit(token_coding.measure(net, 64, "cpu"))
        say(f"{section}: {time.perf_counter() - began:.0f} s")


# -- GPU -------------------------------------------------------------------------------------------------------------------


def core_cells() -> list[Cell]:
    """CNN3 at n=256 in every precision; the most telling shapes first. Everyone with targets given; the published algorithm, vmap
    and ours with targets recomputed; forward passes at k=1024."""
    given = [name for name in EVERYONE if name not in (*KERNELS, "published", "vmap-compiled")]
    given = [*KERNELS, *given, "vmap-compiled"]  # compiling last
    recomputed = (*KERNELS, "published", "vmap", "wslfast-torch")
    net, n = JOB
    cells: list[Cell] = []
    for k, precisions in ((1024, ("tf32", "fp16")), (128, ("tf32", "fp16")), (4096, ("tf32", "fp16")), (1024, ("bf16", "highest"))):
        for precision in precisions:
            cells += [Cell(name, net, k, n, precision=precision) for name in given]
            cells += [Cell(name, net, k, n, given=False, precision=precision) for name in recomputed]
    forward = [Cell(name, net, 1024, n, "forward", precision=p) for p in ("tf32", "fp16") for name in (*recomputed, "grouped")]
    return cells + forward + [Cell(name, net, k, n, precision=p) for k in (128, 4096) for p in ("bf16", "highest") for name in given]


def net_cells() -> list[Cell]:
    """CNN and LeNet-5 at k=1024."""
    peers = ("published", "vmap", "grouped", "wslfast-torch", *KERNELS)
    return [
        cell
        for precision in ("tf32", "fp16")
        for net in ("cnn", "lenet5")
        for group in _both(peers, net, 1024, 256, precision)
        for cell in group
    ]


def growth_cells() -> list[Cell]:
    """Ours in k from 64 to 16,384, in n from 64 to 1,024, and in width."""
    in_k = [Cell(name, *JOB[:1], k=2**i, n=JOB[1], precision="tf32") for name in KERNELS for i in (6, 7, 8, 9, 10, 12, 14)]
    in_n = [Cell(name, "cnn3", 256, n, precision="tf32") for name in KERNELS for n in (64, 128, 256, 512, 1024)]
    return in_k + in_n + [Cell(name, net, 256, 256, precision="tf32") for name in (*KERNELS, "wslfast-torch") for net in WIDTHS]


def size_cells() -> list[Cell]:
    """Every provider over the whole range of k and n, for a machine that has the time."""
    shapes = [(16, 64), (16, 1024), (128, 64), (128, 1024), (1024, 64), (1024, 1024), (4096, 256), (16384, 256)]
    return [
        cell
        for net in ARCHITECTURES
        for k, n in shapes
        for precision in PRECISIONS
        for group in _both(EVERYONE, net, k, n, precision)
        for cell in group
    ]


GPU_CELLS: dict[str, Callable[[], list[Cell]]] = {"core": core_cells, "nets": net_cells, "growth": growth_cells, "sizes": size_cells}


def run_gpu(only: Sequence[str], known: Sequence[Row], emit: Emit, say: Callable[[str], None], folder: Path) -> None:
    """The sections of ``gpu``, all or some, without the short budgets of ``make gpu``: cells may take two minutes each."""
    best = list(known)
    for section in only or GPU_SECTIONS:
        began = time.perf_counter()
        if section == "ceilings":
            best = ceilings.measure("cuda")
            emit(best)
        elif section in GPU_CELLS:
            deadline = time.monotonic() + 3600 * 6
            workers.run(
                GPU_CELLS[section](), emit, device="cuda", deadline=deadline, cell_s=120, provider_s=lambda _: 3600, figure_s=2.0, best=best
            )
        elif section == "step":
            emit(training_step.measure("cnn3", "cuda", published=True, folder=folder / "step"))
        elif section == "zoo":
            emit(zoo_building.measure("cnn3", ZOO_MODELS, device="cuda"))
        elif section == "tokens":
            emit(token_coding.measure("cnn3", 1024, "cuda"))
        say(f"{section}: {time.perf_counter() - began:.0f} s")
