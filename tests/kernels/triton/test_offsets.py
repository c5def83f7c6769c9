"""Offsets past 2^31: every kernel run for models (or queries) that lie that far into their buffers, in Triton's interpreter.

A buffer is address space without memory, so that only what is touched is there. The program ids are shifted to the last models; what
they find must equal, to the bit, a plain run of the same two models, and no address may lie outside a buffer. Each probe is run
again with the 64-bit cast taken out of the kernels and has to fail.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import HEADS, SMALL, make
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret or not sys.platform.startswith("linux"):
    pytest.skip("needs TRITON_INTERPRET=1 and Linux's address space", allow_module_level=True)

import triton.language as tl  # noqa: F401 (triton must be there; the interpreter looks for tl beside a kernel)
from triton.runtime import interpreter

from wslfast.kernels.triton import (
    convolution,
    criterion,
    head,
    input_gradients,
    joint_gradient,
    network,
    packing,
    tables,
    tiles,
    weight_gradients,
)
from wslfast.kernels.triton.configurations import configuration, joins
from wslfast.kernels.triton.schedule import schedule

CPU = torch.device("cpu")
N = 3
PRECISION = "ieee"
SCHEDULE = schedule(SMALL.layers, SMALL.shape)
CONV, BELOW, LINEAR = SCHEDULE.stages[1], SCHEDULE.stages[0], SCHEDULE.stages[2]
FUSED = schedule(HEADS["head_relu"].layers, HEADS["head_relu"].shape)
NORESERVE = 0x4000


def _virtual(numbers: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    size = numbers * torch.empty(0, dtype=dtype).element_size()
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError:
        pytest.skip(f"no address space for {size >> 30} GiB")
    return torch.frombuffer(memory, dtype=dtype)


class _Checked:
    """The interpreter's loads and stores, refusing addresses outside the tensors of the launch."""

    def __init__(self, real: Any) -> None:
        self.real, self.ranges = real, []

    def check(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        at = addresses[mask.astype(bool)]
        inside = np.zeros(at.shape, bool)
        for low, high in self.ranges:
            inside |= (at >= low) & (at < high)
        assert inside.all(), "an address outside every buffer"

    def load(self, addresses: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self.check(addresses, mask)
        return self.real.load(addresses, mask, *rest)

    def store(self, addresses: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self.check(addresses, mask)
        return self.real.store(addresses, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@contextmanager
def _shifted(first: int, k: int) -> Iterator[None]:
    """Programs of ``k`` models become those of models ``first`` and on; addresses are checked."""
    builder, real = interpreter.interpreter_builder, interpreter._interpreter
    set_index, set_dim, to_host = builder.set_grid_idx, builder.set_grid_dim, interpreter.GridExecutor._init_args_hst
    patch = pytest.MonkeyPatch()
    checked = _Checked(real)

    def dimensions(x: int, y: int, z: int) -> None:
        checked.per_model = x // k
        set_dim((first + k) * checked.per_model, y, z)

    def arguments(self: Any, args: Any, kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        checked.ranges = [(t.untyped_storage().data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes()) for t in tensors]
        return to_host(self, args, kwargs)

    patch.setattr(builder, "set_grid_dim", dimensions)
    patch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(x + first * checked.per_model, y, z))
    patch.setattr(interpreter, "_interpreter", checked)
    patch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)
    patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # host tensors share their storage
    try:
        yield
    finally:
        patch.undo()


Buffers = dict[str, Tensor]


def _probe(launch: Callable[[Buffers], None], inputs: Buffers, outputs: Buffers, smallest: int) -> None:
    """``launch`` on two models, and on the same two ``first`` models further on; ``smallest``: numbers a model of the tensor
    whose offsets pass 2^31 last. The first axis of every buffer is over models."""
    near = {name: t.clone() for name, t in (inputs | outputs).items()}
    launch(near)
    first = 2**31 // smallest + 3
    far: Buffers = {}
    for name, t in (inputs | outputs).items():
        each = t[0].numel()
        far[name] = _virtual((first + 2) * each, t.dtype).view(first + 2, *t.shape[1:])
        far[name][first:] = t
    with _shifted(first, 2):
        launch(far)
    for name in outputs:
        assert torch.equal(far[name][first:], near[name]), name
        assert not torch.equal(near[name], outputs[name]), f"{name} was not written"


def _activations(stage: Any, k: int = 2) -> Buffers:
    """Output (or its gradient), positions of the maxima and slopes of a stage, as numbers."""
    return {"y": torch.randn(k, N * stage.CODES), "code": torch.randint(0, 4, (k, N * stage.CODES), dtype=torch.int8)}


def _forward() -> None:
    weights = make(SMALL, 2, N)[0]
    place = SCHEDULE.placements[1]
    config = configuration("forward", CONV, PRECISION)
    assert place.bias is not None
    bias = place.bias.offset

    def launch(b: Buffers) -> None:
        convolution.stage_forward(
            b["x"],
            None,
            b["packed"][:, place.forward :],
            b["weights"][:, bias:],
            b["y"],
            b["code"],
            None,
            2,
            N,
            CONV,
            config,
            shared=False,
            gradient=True,
        )

    inputs = {"x": torch.randn(2, N * CONV.INPUTS), "packed": tables.pack(weights, SCHEDULE, PRECISION), "weights": weights}
    outputs = {"y": torch.full((2, N * CONV.OUTPUTS), -7.0), "code": torch.full((2, N * CONV.CODES), -7, dtype=torch.int8)}
    _probe(launch, inputs, outputs, N * CONV.OUTPUTS)


def _forward_indexed() -> None:
    """Rows of a pool that passes 2^31 numbers; the index tensor is small."""
    weights, images, _ = make(SMALL, 1, N)
    place, config = SCHEDULE.placements[0], configuration("forward", BELOW, PRECISION)
    assert place.bias is not None
    packed, bias = tables.pack(weights, SCHEDULE, PRECISION), weights[:, place.bias.offset :]
    stacked = packing.stack(images, SCHEDULE, 3, PRECISION)
    far = 2**31 // BELOW.INPUTS + 5
    pool = _virtual((far + N) * BELOW.INPUTS, torch.float32)
    pool[far * BELOW.INPUTS :] = stacked.flatten()
    found = []
    for x, index in ((stacked, torch.arange(N)), (pool, torch.arange(N) + far)):
        y = torch.full((N * BELOW.OUTPUTS,), float("nan"))
        with _shifted(0, 1):
            convolution.stage_forward(x, index.int()[None], packed, bias, y, None, None, 1, N, BELOW, config, shared=False, gradient=False)
        found.append(y)
    assert torch.equal(*found)


def _dw() -> None:
    config = configuration("dw", CONV, PRECISION)

    def launch(b: Buffers) -> None:
        weight_gradients.stage_dw(b["x"], None, b["y"], b["code"], None, b["part"], 2, N, CONV, config, shared=False)

    parts = {"part": torch.full((2, weight_gradients.splits(CONV, N) * tables.step(CONV)), -7.0)}
    _probe(launch, {"x": torch.randn(2, N * CONV.INPUTS), **_activations(CONV)}, parts, N * CONV.CODES)


def _dx() -> None:
    place, config = SCHEDULE.placements[1], configuration("dx", CONV, PRECISION)

    def launch(b: Buffers) -> None:
        input_gradients.stage_dx(b["y"], b["code"], None, b["packed"][:, place.backward :], b["xg"], None, 2, N, CONV, BELOW, config)

    inputs = {**_activations(CONV), "packed": tables.pack(make(SMALL, 2, N)[0], SCHEDULE, PRECISION)}
    _probe(launch, inputs, {"xg": torch.rand(2, N * CONV.INPUTS)}, N * CONV.CODES)


def _joint() -> None:
    """Both stages' own numbers, the queries' and the partials'."""
    assert joins(SCHEDULE, PRECISION)
    place, config = SCHEDULE.placements[1], configuration("joint", CONV, PRECISION)

    def launch(b: Buffers) -> None:
        packed = b["packed"][:, place.backward :]
        given = b["y"], b["code"], None, packed, b["below"], b["below_code"], None, b["x"], None, b["part"]
        joint_gradient.stage_joint(*given, 2, N, CONV, BELOW, config, shared=False)

    parts = {"part": torch.full((2, weight_gradients.splits(BELOW, N) * tables.step(BELOW)), -7.0)}
    below = {"below": torch.rand(2, N * CONV.INPUTS), "below_code": torch.randint(0, 4, (2, N * BELOW.CODES), dtype=torch.int8)}
    inputs = {"x": torch.randn(2, N * BELOW.INPUTS), **_activations(CONV), **below}
    _probe(launch, {**inputs, "packed": tables.pack(make(SMALL, 2, N)[0], SCHEDULE, PRECISION)}, parts, N * CONV.CODES)


def _criterion() -> None:
    def launch(b: Buffers) -> None:
        criterion.criterion_forward_backward(
            b["outputs"], b["targets"], None, b["losses"], b["gain"], b["g"], 2, N, LINEAR, "softmax_mse", 2.0, PRECISION
        )

    k = LINEAR.NOUT
    outputs = {"losses": torch.full((2, 1), -7.0), "gain": torch.full((2, 1), -7.0), "g": torch.full((2, N * LINEAR.N), -7.0)}
    _probe(launch, {"outputs": torch.randn(2, N * k), "targets": torch.randn(2, N, k)}, outputs, N * k)


def _head() -> None:
    assert head.fits(FUSED, N)
    below, fold = FUSED.stages[-3], tables.fold_tables(FUSED, N, CPU)
    weights = torch.randn(2, FUSED.parameters)
    config = configuration("forward", FUSED.stages[-2], PRECISION)

    def launch(b: Buffers) -> None:
        head.head_loss_and_gradient(
            b["x"],
            None,
            b["packed"],
            b["weights"],
            b["targets"],
            b["losses"],
            b["gain"],
            b["part"],
            fold.bases,
            2,
            N,
            FUSED,
            config,
            "mse",
            2.0,
        )

    inputs = {"packed": tables.pack(weights, FUSED, PRECISION), "weights": weights, "targets": torch.randn(2, N, FUSED.classes)}
    outputs = {
        "x": torch.rand(2, N * below.OUTPUTS),
        "losses": torch.full((2, 1), -7.0),
        "gain": torch.full((2, 1), -7.0),
        "part": torch.full((2, fold.row), -7.0),
    }
    _probe(launch, inputs, outputs, N * FUSED.classes)


def _pack() -> None:
    def launch(b: Buffers) -> None:
        table = tables.pack_table(SCHEDULE, CPU)
        programs = packing.blocks(SCHEDULE.packed, 1024)
        packing.pack_kernel[(2 * programs,)](
            b["weights"], table, b["out"], programs, SCHEDULE.packed, b["weights"].stride(0), 1, B=1024, PREC=PRECISION
        )

    _probe(launch, {"weights": make(SMALL, 2, N)[0]}, {"out": torch.full((2, SCHEDULE.packed), -7.0)}, SCHEDULE.parameters)


def _pack_wide_rows() -> None:
    """A weight's offset in its own row: a column stride of 2^33 / P."""
    weights = make(SMALL, 1, N)[0]
    step = 2**33 // SCHEDULE.parameters
    far = torch.as_strided(
        _virtual(SCHEDULE.parameters * step, torch.float32), (1, SCHEDULE.parameters), (SCHEDULE.parameters * step, step)
    )
    far.copy_(weights)
    with _shifted(0, 1):
        assert torch.equal(packing.pack(far, SCHEDULE, PRECISION), tables.pack(weights, SCHEDULE, PRECISION))


def _stack() -> None:
    """Queries past 2^31 numbers: blocks of the output take the place of models."""
    images = torch.randn(2, *SMALL.shape)
    size = BELOW.INPUTS
    block = 1024
    first = (2**31 // size + 3) * size // block * block // block  # in blocks

    def launch(queries: Tensor, out: Tensor, programs: int) -> None:
        packing.stack_kernel[(programs,)](
            queries, out, out.numel(), queries.shape[1], *queries.stride(), H=BELOW.H, W=BELOW.W, C=BELOW.C, B=block, PREC=PRECISION
        )

    q0 = first * block // size
    queries = _virtual((q0 + 2) * SMALL.shape[0] * SMALL.shape[1] * SMALL.shape[2], torch.float32).view(q0 + 2, *SMALL.shape)
    queries[q0:] = images
    out = _virtual((q0 + 2) * size, torch.float32)
    with _shifted(first, 1):
        launch(queries, out, 1)
    expected = packing.stack(images, SCHEDULE, 3, PRECISION).flatten()
    begin = first * block - q0 * size
    end = min(begin + block, expected.numel())
    assert torch.equal(out[first * block :][: end - begin], expected[begin:end])


def _fold() -> None:
    fold = tables.fold_tables(SCHEDULE, N, CPU)

    def launch(b: Buffers) -> None:
        programs = packing.blocks(SCHEDULE.parameters, 256)
        packing.fold_kernel[(2 * programs,)](
            b["part"],
            fold.places,
            fold.steps,
            fold.counts,
            b["gain"],
            b["out"],
            programs,
            SCHEDULE.parameters,
            max(fold.splits),
            fold.row,
            1.0,
            D=fold.places.shape[1],
            B=256,
        )

    inputs = {"part": torch.randn(2, fold.row), "gain": torch.rand(2, 1) + 1}
    _probe(launch, inputs, {"out": torch.full((2, SCHEDULE.parameters), -7.0)}, SCHEDULE.parameters)


PROBES = {
    "forward": _forward, "forward indexed": _forward_indexed, "dw": _dw, "dx": _dx, "joint": _joint, "criterion": _criterion, "head": _head,
    "pack": _pack, "pack wide rows": _pack_wide_rows, "stack": _stack, "fold": _fold,
}  # fmt: skip


@pytest.mark.parametrize("kernel", PROBES)
def test_offsets_past_two_to_the_31(kernel: str) -> None:
    PROBES[kernel]()


@triton.jit
def _narrow(x):  # type: ignore[no-untyped-def]
    return x


@pytest.mark.slow
@pytest.mark.parametrize("kernel", PROBES)
def test_the_probe_fails_without_the_cast(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (convolution, criterion, head, input_gradients, joint_gradient, network, packing, tiles, weight_gradients):
        if hasattr(module, "wide"):
            monkeypatch.setattr(module, "wide", _narrow)
    with pytest.raises((AssertionError, interpreter.InterpreterError)) as caught:
        PROBES[kernel]()
    assert caught.type is AssertionError or "outside every buffer" in str(caught.value)
