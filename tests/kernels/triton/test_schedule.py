"""The schedule of a network and the packing tables, in plain torch: no Triton needed."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import CASES, MLP, Net, cnn3, cnn28, count, lenet5, make_weights

from wslfast.kernels.layers import ACTIVATIONS, Activation, Conv2d, Flatten, Linear, Pool2d, Unplannable
from wslfast.kernels.triton import schedule as module
from wslfast.kernels.triton import tables
from wslfast.kernels.triton.configurations import CHOICES, configuration, joins, splits, tuned
from wslfast.kernels.triton.schedule import executed_multiply_adds, needed_multiply_adds, schedule

NETWORKS = {"cnn3": cnn3(), "cnn28": cnn28(), "lenet5": lenet5(), "mlp": MLP, **CASES}
CPU = torch.device("cpu")


def _conv(name: str = "conv", i: int = 3, o: int = 4, k: int = 3, **options: object) -> Conv2d:
    return Conv2d(name, i, o, (k, k), **options)  # type: ignore[arg-type]


HEAD = (Flatten("flatten"), Linear("head", 4 * 6 * 6, 2))
REFUSED = {
    "groups": (_conv("bad", 3, 3, groups=3), *HEAD),
    "dilation": (_conv("bad", dilation=(2, 2)), *HEAD),
    "stride_3": (_conv("bad", stride=(3, 3)), *HEAD),
    "stride_rectangular": (_conv("bad", stride=(1, 2)), *HEAD),
    "kernel_8": (_conv("bad", k=8, padding=(7, 7)), *HEAD),
    "padding_wide": (_conv("bad", k=1, padding=(1, 1)), *HEAD),
    "channels_65": (_conv("bad", 3, 65), *HEAD),
    "pool_3": (_conv(), Pool2d("bad", "max", (3, 3), (3, 3)), *HEAD),
    "pool_overlapping": (_conv(), Pool2d("bad", "max", (2, 2), (1, 1)), *HEAD),
    "pool_twice": (_conv(), Pool2d("ok"), Pool2d("bad"), *HEAD),
    "pool_first": (Pool2d("bad"), _conv(), *HEAD),
    "activation_first": (Activation("bad"), _conv(), *HEAD),
    "activation_twice": (_conv(), Activation("ok"), Activation("bad", "tanh"), *HEAD),
    "activation_on_both_sides": (_conv(), Activation("ok"), Pool2d("ok2"), Activation("bad"), *HEAD),
    "elu_negative": (_conv(), Activation("bad", "elu", -1.0), *HEAD),
    "ends_in_a_map": (_conv("bad"), Flatten("flatten")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name: str) -> None:
    layers = REFUSED[name]
    size = 8
    fitted = []
    shape: tuple[int, ...] = (3, size, size)
    for layer in layers:  # the head takes whatever arrives
        if isinstance(layer, Linear):
            layer = Linear(layer.name, shape[0], layer.out_features)
        fitted.append(layer)
        shape = module.shapes(tuple(fitted), (3, size, size))[-1]
    with pytest.raises(Unplannable, match="'bad'"):
        schedule(tuple(fitted), (3, size, size))


def test_refuses_nothing_to_run() -> None:
    with pytest.raises(Unplannable, match="nothing to run"):
        schedule((Flatten("flatten"),), (3, 4, 4))


def test_activations_without_an_entry_here_are_refused_by_name() -> None:
    assert set(module.ACTIVATIONS) <= set(ACTIVATIONS)
    for other in {*ACTIVATIONS, "softsign"} - set(module.ACTIVATIONS):
        layers = (Linear("l", 3, 2), Activation("a", other), Linear("m", 2, 1))
        with pytest.raises(Unplannable, match=rf"'a' .*'{other}'"):
            schedule(layers, (3,))


def test_a_schedule_is_cached_and_shared() -> None:
    assert schedule(cnn3().layers, (3, 32, 32)) is schedule(cnn3().layers, (3, 32, 32))
    # Stages carry no names and no offsets, so equal stages of different networks share a compiled kernel.
    other = (*cnn3().layers[:-1], Linear("renamed", 20, 10))
    assert schedule(other, (3, 32, 32)).stages == schedule(cnn3().layers, (3, 32, 32)).stages


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_packed_and_folded(name: str) -> None:
    case = NETWORKS[name]
    scheduled = schedule(case.layers, case.shape)
    assert scheduled.parameters == count(case.layers)
    table = tables.pack_table(scheduled, CPU)
    weights = {i for place in scheduled.placements for i in range(place.weight.offset, place.weight.stop)}
    assert set(table[table >= 0].tolist()) == weights
    folded = tables.fold_tables(scheduled, 3, CPU)
    assert (folded.places[:, 0] >= 0).all(), "a parameter that no partial reaches"
    assert len(set(folded.places[folded.places >= 0].tolist())) == int((folded.places >= 0).sum()), "a partial counted twice"


@pytest.mark.parametrize("name", NETWORKS)
def test_fold_is_the_transpose_of_pack(name: str) -> None:
    """<pack(w), v> = <w, fold(v)>, with the gradient's own tiles."""
    case = NETWORKS[name]
    scheduled = schedule(case.layers, case.shape)
    for stage, place in zip(scheduled.stages, scheduled.placements, strict=True):
        weights = make_weights(case.layers, 1)[0].double()
        table = tables.gradient_table(stage, place)
        packed = torch.where(table >= 0, weights[table.clamp(min=0)], 0.0)
        v = torch.randn(packed.numel(), dtype=torch.float64)
        gradient = torch.zeros_like(weights).index_add_(0, table.clamp(min=0), torch.where(table >= 0, v, 0.0))
        assert torch.allclose(packed @ v, weights @ gradient)
        # The same sum through the tables of the real kernel, one split.
        parts = torch.zeros(1, tables.fold_tables(scheduled, 1, CPU).row, dtype=torch.float64)
        base = tables.fold_tables(scheduled, 1, CPU).bases[scheduled.stages.index(stage)]
        if scheduled.stages.count(stage) == 1:
            parts[0, base : base + packed.numel()] = v
            assert torch.allclose(tables.fold(parts, scheduled, 1)[0], gradient)


def _patch_convolution(case: Net, stage_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One stage's convolution, pooled positions as rows, by its packed weights and by torch."""
    scheduled = schedule(case.layers, case.shape)
    stage, place = scheduled.stages[stage_index], scheduled.placements[stage_index]
    weights = make_weights(case.layers, 1).double()
    slot = place.weight
    kernel = weights[0, slot.offset : slot.stop].view(slot.shape)
    if kernel.ndim == 2:
        kernel = kernel[:, :, None, None]
    x = torch.randn(2, slot.shape[1], stage.H, stage.W, dtype=torch.float64)
    expected = F.conv2d(x, kernel, None, stage.S, (stage.PY, stage.PX))[:, :, : stage.HO * stage.P, : stage.WO * stage.P]
    stored = torch.zeros(2, stage.C, stage.H, stage.W, dtype=torch.float64)
    stored[:, : x.shape[1]] = x
    stored = F.pad(stored, (stage.PX, stage.PX + stage.RX, stage.PY, stage.PY + stage.R)).permute(0, 2, 3, 1)
    table = tables.forward_table(stage, place, stage.KD, stage.NCH)
    packed = torch.where(table >= 0, weights[0][table.clamp(min=0)], 0.0)
    packed = packed.view(stage.NB, stage.KR, stage.NCH * stage.KD, -1, stage.P, stage.BN)  # nb, i, run, dy, dx, n
    out = torch.zeros(2, stage.N, stage.HO * stage.P, stage.WO * stage.P, dtype=torch.float64)
    for oy in range(stage.HO):
        for ox in range(stage.WO):
            top, left = oy * stage.PS, ox * stage.PS
            patch = stored[:, top : top + stage.R, left : left + stage.RX].reshape(2, stage.R, -1)
            for dy in range(stage.P):
                if stage.PATCH:
                    run = F.pad(patch, (0, stage.RUN - patch.shape[2])).flatten(1)
                    value = torch.einsum("qr,brxn->qbxn", F.pad(run, (0, stage.KD - run.shape[1])), packed[:, 0, :, dy])
                else:
                    run = F.pad(patch, (0, stage.KD * stage.NCH - patch.shape[2]))
                    run = run[:, dy * stage.S : dy * stage.S + stage.KH]
                    value = torch.einsum("qir,birxn->qbxn", run, packed[:, :, :, 0])
                value = value.permute(0, 2, 1, 3).flatten(2)  # q, dx, channel
                for dx in range(stage.P):
                    out[:, :, oy * stage.P + dy, ox * stage.P + dx] = value[:, dx]
    return out[:, : stage.NOUT], expected


@pytest.mark.parametrize(
    ("name", "index"),
    [("cnn3", 0), ("cnn3", 1), ("cnn28", 0), ("cnn28", 1), ("cnn28", 2), ("stride_2_and_pool", 0), ("rectangular", 1),
     ("kernel_7_same", 1), ("channels_33_64_63", 1)],
)  # fmt: skip
def test_packed_weights_are_a_convolution(name: str, index: int) -> None:
    found, expected = _patch_convolution(NETWORKS[name], index)
    assert torch.allclose(found, expected)


def test_pack_rounds_to_nearest() -> None:
    scheduled = schedule(MLP.layers, MLP.shape)
    weights = torch.randn(3, scheduled.parameters) * 1e3
    weights[0, 0], weights[1, 0], weights[2, 0] = float("inf"), float("nan"), 1e30
    exact = tables.pack(weights, scheduled, "ieee")
    for precision, eps in (("tf32", 2.0**-11), ("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        packed = tables.pack(weights, scheduled, precision).float()
        finite = exact.isfinite() & (exact.abs() < 6e4)
        assert ((packed - exact).abs()[finite] <= eps * exact.abs()[finite]).all()
        assert packed.isnan().sum() == exact.isnan().sum() > 0, "NaN must stay NaN"
    assert tables.pack(weights, scheduled, "fp16").float().nan_to_num(nan=0.0).abs().max() == 65504


def test_splits_know_nothing_of_k_and_cover_every_row() -> None:
    for stage in schedule(cnn3().layers, (3, 32, 32)).stages:
        for n in (1, 5, 256, 4096):
            assert 1 <= splits(stage, n) <= 16


@pytest.mark.parametrize(("name", "most"), [("cnn3", 1.8), ("lenet5", 2.35), ("cnn28", 2.5)])
def test_executed_multiply_adds(name: str, most: float) -> None:
    case = NETWORKS[name]
    scheduled = schedule(case.layers, case.shape)
    roles = ("forward", "dx", "dw")
    needed = sum(needed_multiply_adds(s, p, r) for s, p in zip(scheduled.stages, scheduled.placements, strict=True) for r in roles)
    executed = sum(executed_multiply_adds(s, r) for s in scheduled.stages for r in roles)
    assert executed <= most * needed
    if name == "cnn3":
        assert needed == 2_979_816 - 2 * 432 * (900 - 784)  # of conv 1's outputs 28 x 28 are read, of 30 x 30


def test_schedule_tables_and_reference_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import wslfast.kernels.layers, wslfast.kernels.triton.schedule, wslfast.kernels.triton.tables, wslfast.kernels.reference"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_what_the_new_cases_are_for() -> None:
    """Tiles over kernel rows, products by single columns, maps cropped to what is read."""
    stages = {name: schedule(CASES[name].layers, CASES[name].shape).stages for name in CASES}
    assert stages["flat_gradient"][0].FLAT > 0
    assert stages["flat_gradient_stride_2"][0].FLAT > 0
    assert stages["dx_by_columns"][1].JX == 1
    first, second = stages["cropped"][:2]
    assert (first.HO, first.WO) == (second.H, second.W) == (6, 8)  # of 7 x 8: a pooling of 5 rows reads 4
    for found in stages.values():
        for below, stage in pairwise(found):
            assert stage.KH * stage.KW == 1 or (stage.H, stage.W) == (below.HO, below.WO)


def test_loads_that_a_machine_may_move_change_no_sum() -> None:
    """They move rows and loads; what is summed over, and in what order, is the default's: so they change no bit."""
    for name in ("default", "pipelined"):
        with tuned(CHOICES[name]):
            for stage in schedule(cnn3().layers, (3, 32, 32)).stages:
                assert configuration("dw", stage, "tf32") == configuration_of_the_default("dw", stage, "tf32")
                for role in ("forward", "dx"):
                    mine, default = configuration(role, stage, "tf32"), configuration_of_the_default(role, stage, "tf32")
                    assert (mine.BM, mine.WARPS, mine.PREC) == (default.BM, default.WARPS, default.PREC)
                assert splits(stage, 100_000) == min(16, -(-100_000 * stage.POSITIONS // 4096))


def test_which_networks_join_two_gradients() -> None:
    """A first patch that is one tile, maxima, no channels split: CNN3 and CNN do, LeNet-5 (5 x 5 x 3 patches) does not."""
    joined = {"cnn3": cnn3(), "cnn28": cnn28(), "lenet5": lenet5(), **CASES}
    planned = {name: schedule(case.layers, case.shape) for name, case in joined.items()}
    names = {name for name in planned if joins(planned[name], "fp16")}
    assert {"cnn3", "cnn28", "cropped", "silu_after_max", "elu_celu"} <= names
    for precision, unit in (("tf32", "warpgroup"), ("tf32x3", "warpgroup"), ("fp16", "warp")):  # registers: docs/notes/tuning.md
        assert not any(joins(p, precision, unit) for p in planned.values())
    assert not names & {"lenet5", "average_then_act", "same_padding", "linear_wide", "channels_17_in"}


def configuration_of_the_default(role: str, stage: Any, precision: str) -> Any:
    with tuned(CHOICES["default"]):
        return configuration(role, stage, precision)
