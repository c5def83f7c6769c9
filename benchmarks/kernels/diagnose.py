"""Every kernel of a network alone against its twin: which one is wrong, and by how much.

    PYTHONPATH=. python3 -m benchmarks.kernels.diagnose NETWORK PRECISION            the steps, one a line
    PYTHONPATH=. python3 -m benchmarks.kernels.diagnose NETWORK PRECISION STEP       one step: a JSON line with its relative error

A step gets what it reads from torch, not from the kernel before it, so that one wrong kernel is one wrong line. ``make gpu`` runs each in a
process of its own: a fault poisons nobody else. On a machine without a GPU it runs in Triton's interpreter (``TRITON_INTERPRET=1``).
Networks: those of inspect.py, whose pooling keeps maxima and whose activations are read off their outputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.inspect import ARCHITECTURES
from wslfast.kernels import reference
from wslfast.kernels.layers import Layers, Unplannable
from wslfast.kernels.triton import launch, launcher, packing, tables
from wslfast.kernels.triton.configurations import joins
from wslfast.kernels.triton.convolution import launch_configuration, stage_forward
from wslfast.kernels.triton.devices import matrix_unit
from wslfast.kernels.triton.input_gradients import stage_dx
from wslfast.kernels.triton.joint_gradient import stage_joint
from wslfast.kernels.triton.network_layout import network
from wslfast.kernels.triton.packing import storage
from wslfast.kernels.triton.schedule import schedule
from wslfast.kernels.triton.stages import Stage
from wslfast.kernels.triton.tables import fold_tables
from wslfast.kernels.triton.weight_gradients import stage_dw

K, N = 3, 5
# what a kernel alone may be off by: a maximum that is nearly tied goes another way now and then
BOUNDS = {"tf32x3": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "relu": lambda y: (y > 0).to(y.dtype),
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
}


class Network:
    """A network's weights, queries and every activation, computed by torch in float64."""

    def __init__(self, name: str, precision: str, device: str) -> None:
        layers, shape = ARCHITECTURES[name]
        self.name, self.layers, self.shape, self.precision, self.device = name, layers, shape, precision, device
        self.schedule = schedule(layers, shape)
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.zeros(K, self.schedule.parameters)
        for place in self.schedule.placements:
            w, b = place.weight, place.bias
            self.weights[:, w.offset : w.stop] = torch.randn(K, w.size, generator=generator) * 1.3 * (w.shape[0] / w.size) ** 0.5
            if b is not None:
                self.weights[:, b.offset : b.stop] = torch.randn(K, b.size, generator=generator) * 0.2
        self.queries = torch.randn(N, *shape, generator=generator)
        self.targets = torch.randn(K, N, self.schedule.classes, generator=generator)
        self.generator = generator
        self.parts = list(_by_stage(layers, [p.layer for p in self.schedule.placements]))

    def here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def operand(self, tensor: Tensor) -> Tensor:
        """As a kernel stores it, on the device."""
        return self.here(tensor).to(storage(self.precision))

    def inputs(self, i: int) -> Tensor:
        """What stage i reads, as stored: ``[n, ...]`` for the images, else ``[k, n, ...]``."""
        if i == 0:
            first = self.schedule.stages[0]
            if self.schedule.flat_input:
                return F.pad(self.queries.flatten(1), (0, first.C - self.queries[0].numel()))
            image = self.queries[:, :, : first.H, : first.W].permute(0, 2, 3, 1)
            return F.pad(image, (0, first.C - image.shape[-1])).flatten(1)
        below: tuple[object, ...] = tuple(layer for part in self.parts[:i] for layer in part)
        values = reference.forward(self.weights.double(), self.queries.double(), below)  # type: ignore[arg-type]
        return self.stored(self.schedule.stages[i - 1], values)

    @staticmethod
    def stored(stage: Stage, values: Tensor) -> Tensor:
        """``[k, n, C, H, W]`` or ``[k, n, features]`` -> ``[k, n, H * W * N]``: channels last, padded, without rows that nobody reads."""
        if values.ndim == 3:
            return F.pad(values, (0, stage.N - values.shape[-1]))
        values = values[..., : stage.HO, : stage.WO].permute(0, 1, 3, 4, 2)
        return F.pad(values, (0, stage.N - values.shape[-1])).flatten(2)

    def packed(self) -> Tensor:
        return self.here(tables.pack(self.weights, self.schedule, self.precision))

    def product(self, i: int, stored: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One model's pooled products ``[n, HO, WO, NOUT]`` of stage i in float64, from its stored input and unpacked weights."""
        s, place = self.schedule.stages[i], self.schedule.placements[i]
        if place.features[0]:
            c, h, w = place.features
            if i and self.schedule.stages[i - 1].HO * self.schedule.stages[i - 1].WO > 1:
                stored = stored.view(N, h, w, -1)[..., :c].permute(0, 3, 1, 2).flatten(1)
            return F.linear(stored[:, : weight.shape[1]], weight, bias)[:, None, None]
        x = stored.view(N, s.H, s.W, s.C)[..., : weight.shape[1]].permute(0, 3, 1, 2)
        z = F.conv2d(x, weight, bias, s.S, (s.PY, s.PX))
        z = F.max_pool2d(z, 2) if s.POOL == "max" else F.avg_pool2d(z, 2) if s.POOL == "avg" else z
        return z[..., : s.HO, : s.WO].permute(0, 2, 3, 1)

    def gradients(self, i: int, stored: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(weights' ``[k, P]``, zero but for stage i's; the input's ``[k, n, ...]`` as stored) of the sum of g and the pooled products."""
        place = self.schedule.placements[i]
        stored = stored.double().expand(K, *stored.shape[-2:]).clone().requires_grad_()
        wide = self.weights.double().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for j in range(K):
            weight = wide[j, place.weight.offset : place.weight.stop].view(place.weight.shape)
            bias = None if place.bias is None else wide[j, place.bias.offset : place.bias.stop]
            z = self.product(i, stored[j], weight, bias)
            total = total + (z * g[j].double()[..., : z.shape[-1]].view(z.shape)).sum()
        slopes = torch.autograd.grad(total, (wide, stored))
        return slopes[0], slopes[1]


def _by_stage(layers: Layers, names: list[str]) -> Iterator[Layers]:
    """Layers cut where a stage begins."""
    starts = [next(at for at, layer in enumerate(layers) if layer.name == name) for name in names]
    starts[0] = 0
    flat = [at - 1 if at and layers[at - 1].kind == "flatten" else at for at in starts]
    yield from (layers[a:b] for a, b in zip(flat, [*flat[1:], len(layers)], strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _forward(net: Network, i: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output, positions of the maxima, stored input) of stage i's kernel on torch's activations."""
    s, place = net.schedule.stages[i], net.schedule.placements[i]
    x = net.operand(net.inputs(i)).contiguous()
    kind = torch.float32 if s.LAST else storage(net.precision)
    y = torch.full((K, N * s.OUTPUTS), float("nan"), device=net.device, dtype=kind)
    code = torch.zeros(K, N * s.CODES, dtype=torch.int8, device=net.device) if s.POOL == "max" else None
    weights = net.here(net.weights)
    stage_forward(
        x,
        None,
        net.packed()[:, place.forward :],
        weights if place.bias is None else weights[:, place.bias.offset :],
        y,
        code,
        None,
        K,
        N,
        s,
        launch_configuration("forward", s, net.precision, weights.device),
        shared=i == 0,
        gradient=True,
    )
    return y, code, x


def step_pack(net: Network) -> float:
    packed = packing.pack(net.here(net.weights), net.schedule, net.precision)
    return _error(packed, tables.pack(net.weights, net.schedule, net.precision))


def step_stack(net: Network) -> float:
    stacked = packing.stack(net.here(net.queries), net.schedule, len(net.shape), net.precision)
    return _error(stacked, net.inputs(0))


def step_forward(net: Network, i: int) -> float:
    s = net.schedule.stages[i]
    y, _, _ = _forward(net, i)
    through: tuple[object, ...] = tuple(layer for part in net.parts[: i + 1] for layer in part)
    truth = reference.forward(net.weights.double(), net.queries.double(), through)  # type: ignore[arg-type]
    if s.LAST:
        return _error(y.view(K, N, s.NOUT), truth)
    found = y.view(K, N, s.POSITIONS, s.N)[..., : s.NOUT]
    return _error(found, net.stored(s, truth).view(K, N, s.POSITIONS, s.N)[..., : s.NOUT])


def _gradient_case(net: Network, i: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(gradient of the output, positions of the maxima, stored input) of stage i."""
    s = net.schedule.stages[i]
    g = torch.randn(K, N * s.POSITIONS, s.N, generator=net.generator)
    g[..., s.NOUT :] = 0
    _, code, x = _forward(net, i)
    return net.operand(g).contiguous(), code, x


def step_dw(net: Network, i: int) -> float:
    s, place = net.schedule.stages[i], net.schedule.placements[i]
    g, code, x = _gradient_case(net, i)
    made = fold_tables(net.schedule, N, torch.device(net.device))
    partials = torch.zeros(K, made.row, device=net.device)
    config = launch_configuration("dw", s, net.precision, partials.device)
    stage_dw(x, None, g, code, None, partials[:, made.bases[i] :], K, N, s, config, shared=i == 0)
    found = fold_twin(partials, made)
    expected, _ = net.gradients(i, x.cpu(), g.cpu())
    slots = [place.weight] + ([place.bias] if place.bias is not None else [])
    return max(_error(found[:, slot.offset : slot.stop], expected[:, slot.offset : slot.stop]) for slot in slots)


def step_dx(net: Network, i: int) -> float:
    s, below, place = net.schedule.stages[i], net.schedule.stages[i - 1], net.schedule.placements[i]
    g, code, x = _gradient_case(net, i)
    _, expected = net.gradients(i, x.cpu(), g.cpu())
    expected = expected * SLOPES[below.ACT](x.cpu().double())
    config = launch_configuration("dx", s, net.precision, x.device)
    stage_dx(g, code, None, net.packed()[:, place.backward :], x, None, K, N, s, below, config)
    shape = K, N, below.POSITIONS, below.N
    return _error(x.view(shape)[..., : below.NOUT], expected.view(shape)[..., : below.NOUT])


def step_joint(net: Network, i: int) -> float:
    """The first stage's weight gradient, made where the second's input gradient is."""
    s, below, place = net.schedule.stages[i], net.schedule.stages[i - 1], net.schedule.placements[i]
    g, code, y = _gradient_case(net, i)
    _, below_code, x = _forward(net, i - 1)
    made = fold_tables(net.schedule, N, torch.device(net.device))
    partials = torch.zeros(K, made.row, device=net.device)
    config = launch_configuration("joint", s, net.precision, partials.device)
    packed = net.packed()[:, place.backward :]
    stage_joint(g, code, None, packed, y, below_code, None, x, None, partials[:, made.bases[0] :], K, N, s, below, config, shared=True)
    found = fold_twin(partials, made)
    _, between = net.gradients(i, y.cpu(), g.cpu())
    between = between * SLOPES[below.ACT](y.cpu().double())
    expected, _ = net.gradients(i - 1, x.cpu(), between.view(K, N * below.POSITIONS, below.N))
    first = net.schedule.placements[i - 1]
    slots = [slot for slot in (first.weight, first.bias) if slot is not None]
    return max(_error(found[:, slot.offset : slot.stop], expected[:, slot.offset : slot.stop]) for slot in slots)


def fold_twin(partials: Tensor, made: tables.FoldTables) -> Tensor:
    """``[k, P]`` sums of a row of partials, in plain torch."""
    total = torch.zeros(len(partials), len(made.places), dtype=torch.float64, device=partials.device)
    wide = partials.double()
    for split in range(max(made.splits)):
        for d in range(made.places.shape[1]):
            at = made.places[:, d].long()
            use = (at >= 0) & (split < made.counts)
            total += torch.where(use, wide[:, (at + split * made.steps.long()).clamp(0, wide.shape[1] - 1)], 0.0)
    return total


def step_fold(net: Network) -> float:
    made = fold_tables(net.schedule, N, torch.device(net.device))
    partials = net.here(torch.randn(K, made.row, generator=net.generator))
    out = torch.full((K, net.schedule.parameters), float("nan"), device=net.device)
    packing.fold(partials, torch.ones(K, device=net.device), out, net.schedule, made, 0.5)
    return _error(out, 0.5 * fold_twin(partials, made))


def step_call(net: Network, mode: str, gradient: bool) -> float:
    """A whole call. Layer by layer, what is judged is the loss and the last two layers: the head and the criterion."""
    weights, queries = net.here(net.weights), net.here(net.queries)
    if not gradient:
        truth = reference.forward(net.weights.double(), net.queries.double(), net.layers)
        return _error(launch.forward(weights, queries, net.layers, net.precision, mode=mode), truth)
    losses, found = launch.loss_and_gradient(weights, queries, net.here(net.targets), net.layers, "mse", 2.0, net.precision, mode=mode)
    arguments = net.weights.double(), net.queries.double(), net.targets.double()
    expected, slopes = reference.loss_and_gradient(*arguments, net.layers, "mse")
    judged = net.schedule.placements[-2:] if mode == "layers" else net.schedule.placements
    errors = [_error(losses, expected)]
    for slot in (slot for place in judged for slot in (place.weight, place.bias) if slot is not None):
        errors.append(_error(found[:, slot.offset : slot.stop], slopes[:, slot.offset : slot.stop]))
    return max(errors)


def steps(name: str, precision: str) -> list[str]:
    """The steps of a network, in the order in which a wrong one explains those after it."""
    planned = schedule(*ARCHITECTURES[name])
    count = len(planned.stages)
    found = ["pack", "stack", *(f"forward {i}" for i in range(count)), "head"]
    found += [f"{role} {i}" for i in range(count - 1, -1, -1) for role in ("dw", "dx") if i or role == "dw"]
    unit = matrix_unit(launcher.capability_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    found += ["joint 1", "fold"] if joins(planned, precision, unit) else ["fold"]
    for gradient, step in ((False, "network forward"), (True, "network loss")):
        try:
            network(planned, precision, gradient)
        except Unplannable:
            continue
        found.append(step)
    return found


def run(name: str, precision: str, step: str, device: str) -> float:
    """Relative error of one step."""
    net = Network(name, precision, device)
    kind, _, number = step.partition(" ")
    if kind in ("forward", "dw", "dx", "joint"):
        return {"forward": step_forward, "dw": step_dw, "dx": step_dx, "joint": step_joint}[kind](net, int(number))
    simple: dict[str, Callable[[], float]] = {
        "pack": lambda: step_pack(net),
        "stack": lambda: step_stack(net),
        "fold": lambda: step_fold(net),
        "head": lambda: step_call(net, "layers", True),
        "network forward": lambda: step_call(net, "network", False),
        "network loss": lambda: step_call(net, "network", True),
    }
    return simple[step]()


def bound(precision: str, step: str) -> float:
    """What a step may be off by; the first convolution's gradient through a whole network sees every near-tie above it."""
    return BOUNDS[precision] * (4 if step == "network loss" else 1)


def main() -> int:
    """Command line."""
    name, precision, *step = sys.argv[1:]
    if not step:
        print("\n".join(steps(name, precision)))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    error = run(name, precision, " ".join(step), device)
    if device == "cuda":
        torch.cuda.synchronize()
    good = error < bound(precision, " ".join(step))
    print(json.dumps({"network": name, "precision": precision, "step": " ".join(step), "error": error, "right": good}), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
