"""``--suite networks``: loss and gradient of some fifty networks, ours beside what one would use instead, in turns on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wslfast.testing import relative_error

from . import gate, jax_peer, network_zoos
from .network_peers import OURS, PEERS, Loop, Peer
from .networks import NETWORKS, architecture_of_network
from .recording import GIVEN, Row, digits, environment, with_values
from .timing import take_turns

__all__ = ["COMPILED", "SECTIONS", "jax_peer", "run_networks"]

SHAPE = (16, 32)  # models, queries
BOUND = 1e-3  # of the relative error: float32, and a ReLU of thousands that a rounding turns
COMPILED = ("cnn3", "resnet8", "siren-32", "mlp-mnist", "mlp-tiny", "vision-transformer")  # a minute of compiling each
SECTIONS = ("networks", "growth", "zoo", "compiled")
GROWTH = ("siren-32", 64, tuple(2**i for i in range(4, 15)))

Draw = tuple[Tensor, Tensor, Tensor]  # weights [k, P], queries, targets


def draws(name: str, k: int, n: int) -> Iterator[Draw]:
    """Fresh weights, queries and targets without end."""
    architecture, seed = architecture_of_network(name), 1
    first = architecture.initial_weights(["siren"] * min(k, 64), range(min(k, 64)))
    while True:
        generator = torch.Generator().manual_seed(seed)
        rows = first.repeat(-(-k // len(first)), 1)[:k]
        weights = rows * (1 + 0.1 * torch.randn(rows.shape, generator=generator))
        queries = torch.randn(n, *architecture.input_shape, generator=generator)
        yield weights, queries, torch.randn(k, n, *architecture.output_shape, generator=generator)
        seed += 1


def error_of(peer: Peer, draw: Draw) -> float:
    """The larger relative error of the peer's losses and gradients for three of its models, against the module in float64."""
    weights, queries, targets = draw
    found = sorted({0, peer.k // 2, peer.k - 1})
    truth = Loop(copy.deepcopy(peer.module).double(), peer.architecture, len(found))
    truth.load(weights[found])
    for module in truth.modules:
        module.double()
    losses, gradients = truth(queries.double(), targets[found].double())
    peer.load(weights)
    mine, made = peer(queries, targets)
    values = torch.as_tensor(mine if isinstance(mine, Tensor) else torch.from_numpy(mine.__array__().copy()))
    pairs = ((values[found], losses), (peer.rows(made)[found], truth.rows(gradients)))
    return digits(max(relative_error(a, b) for a, b in pairs), 2)


def beside(name: str, k: int, n: int, peers: Sequence[str], rounds: int, budget_s: float) -> list[Row]:
    """Rows of all peers on one network: the gate, then turns. A peer above the bound, or that cannot run it, has a row that says so."""
    architecture, stream = architecture_of_network(name), draws(name, k, n)
    module = NETWORKS[name][0]().eval()
    rows: list[Row] = []
    ready: dict[str, Peer] = {}
    errors: dict[str, float] = {}
    draw = next(stream)
    for peer in peers:
        row = Row(peer, name, k, n, "loss+gradient", "highest", "wall_ms", note=GIVEN, **environment())
        try:
            made = PEERS[peer](copy.deepcopy(module), architecture, k)
            errors[peer] = error_of(made, draw)
            if not errors[peer] <= BOUND:
                raise gate.Red(errors[peer], BOUND)
            ready[peer] = made
        except Exception as error:
            found = error.error if isinstance(error, gate.Red) else ""
            rows.append(replace(row, relative_error=found, note=f"{GIVEN}; {gate.reason(error)}"))

    def fresh() -> tuple[Tensor, Tensor]:
        weights, queries, targets = next(stream)
        for made in ready.values():
            made.load(weights)
            if isinstance(made, jax_peer.Jax):
                made._array(queries), made._array(targets)
        return queries, targets

    times = take_turns(ready, fresh, rounds, budget_s)
    for peer, found in times.items():
        row = Row(peer, name, k, n, "loss+gradient", "highest", "wall_ms", relative_error=errors[peer], **environment())
        rows.append(with_values(row, found, GIVEN))
    return rows


def run_networks(only: Sequence[str], emit: Callable[[list[Row]], None], say: Callable[[str], None]) -> None:
    """The sections, all or some. ``only`` may name networks as well."""
    everyone = [name for name in PEERS if name != "vmap-compiled"]
    named = [name for name in only if name in NETWORKS]
    sections = [s for s in SECTIONS if s in only or (s == "networks" and named)] or SECTIONS
    if "networks" in sections:
        for i, name in enumerate(named or NETWORKS):
            emit(beside(name, *SHAPE, everyone, rounds=5, budget_s=2.0))
            say(f"{name}: {i + 1} of {len(named or NETWORKS)}")
    if "growth" in sections:
        name, n, models = GROWTH
        for k in models:
            emit(beside(name, k, n, (OURS, "vmap-forward"), rounds=3, budget_s=5.0))
        say(f"growth: {name}, {models[0]} to {models[-1]} models")
    if "zoo" in sections:
        for name in network_zoos.ZOOS:
            emit(network_zoos.measure(name))
            say(f"zoo: {name}")
    if "compiled" in sections:
        for name in COMPILED:
            emit(beside(name, *SHAPE, (OURS, "vmap-compiled"), rounds=5, budget_s=2.0))
            say(f"compiled: {name}")
