"""The networks suite: every peer computes the same, who cannot says why, and rows and page hold it all."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tolerances import FP32

from benchmarks import __main__ as command
from benchmarks import network_peers, network_suite, network_zoos
from benchmarks.network_peers import OURS, PEERS
from benchmarks.network_suite import beside, draws, error_of
from benchmarks.networks import NETWORKS, architecture_of_network
from benchmarks.page import html
from benchmarks.providers import Unavailable
from benchmarks.recording import read_rows
from wslfast.testing import relative_error

PLAIN = [name for name in PEERS if name != "vmap-compiled"]


@pytest.mark.parametrize("name", ["cnn3", "mobilenet", "siren-32", "mlp-batch-norm", "resnet8"])
@pytest.mark.parametrize("peer", PLAIN)
def test_every_peer_computes_what_float64_does(name: str, peer: str) -> None:
    torch.manual_seed(0)
    module, architecture = NETWORKS[name][0]().eval(), architecture_of_network(name)
    images = len(architecture.input_shape) == 3
    if (peer == "loop-channels-last" and not images) or (peer == "jax-vmap" and importlib.util.find_spec("jax") is None):
        with pytest.raises(Unavailable, match=r"no images|not installed"):
            PEERS[peer](module, architecture, 3)
        return
    assert error_of(PEERS[peer](module, architecture, 3), next(draws(name, 3, 5))) < network_suite.BOUND


def test_ours_is_the_librarys_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[torch.Size] = []
    real = network_peers.batched_behavioral_loss

    def spy(reconstructed: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        called.append(reconstructed.shape)
        return real(reconstructed, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(network_peers, "batched_behavioral_loss", spy)
    architecture = architecture_of_network("mlp-tiny")
    made = PEERS[OURS](NETWORKS["mlp-tiny"][0]().eval(), architecture, 3)
    assert error_of(made, next(draws("mlp-tiny", 3, 5))) < FP32
    assert called == [(3, architecture.num_weights)]


def test_a_wrong_peer_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(PEERS[OURS], name="wrong"):  # type: ignore[misc]
        def __call__(self, queries: torch.Tensor, targets: torch.Tensor) -> object:
            losses, found = super().__call__(queries, targets)
            return losses, {"rows": found["rows"] * 1.01}

    rows = beside("mlp-tiny", 3, 4, ("wrong", "fused", OURS), 1, 1.0)
    del PEERS["wrong"]
    by_name = {row.provider: row for row in rows}
    assert by_name["wrong"].value is None
    assert "gate: relative error 0.0" in by_name["wrong"].details
    assert by_name["fused"].value is not None
    assert by_name[OURS].relative_error < FP32  # type: ignore[operator]


@pytest.mark.parametrize("name", ["siren-32", "mlp-mnist"])
def test_zoos_train_to_what_one_after_another_does(name: str) -> None:
    assert network_zoos.gradient_error(network_zoos.Problem(name, 3)) < 1e-2  # type: ignore[operator]


@pytest.mark.parametrize("name", ["cnn3", "siren-32"])
def test_a_tuned_loop_trains_the_same_zoo_and_a_red_gate_gives_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = network_zoos.Problem(name, 2)
    weights, order = problem.arguments(2)
    plain, tuned = (problem.one_after_another(weights, order, tuned) for tuned in (False, True))
    assert relative_error(tuned, plain) < 1e-4
    if name == "siren-32":
        monkeypatch.setattr(network_zoos, "gradient_error", lambda problem: 0.5)
        rows = {row.provider: row for row in network_zoos.measure(name, 3, rounds=1, baseline_models=1, steps=1)}
        assert rows["wslfast"].value is None
        assert "gate: not timed" in rows["wslfast"].note
        assert rows["one-after-another"].value is not None
        assert rows[network_zoos.TUNED].value is not None


@pytest.mark.parametrize("name", ["mlp-batch-norm", "siren-32"])
def test_modules_are_not_on_the_clock_of_zoos(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("on the clock")

    def turns(calls: dict[str, Callable[..., object]], arguments: Callable[[], tuple[object, ...]], rounds: int) -> dict[str, list[float]]:
        given = arguments()
        with monkeypatch.context() as inside:
            inside.setitem(NETWORKS, name, (never, NETWORKS[name][1]))
            inside.setattr(torch.optim, "Adam", never)
            for call in calls.values():
                call(*given)
        return {provider: [48.0] for provider in calls}

    monkeypatch.setattr(network_zoos, "take_turns", turns)
    rows = {row.provider: row.value for row in network_zoos.measure(name, 4, baseline_models=2, steps=2)}
    assert rows == {"one-after-another": 3.0, network_zoos.TUNED: 3.0, network_zoos.OURS: 6.0}


def test_the_command_writes_rows_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_suite, "SHAPE", (3, 4))
    assert command.main(["--suite", "networks", "--only", "mlp-tiny", "mlp-residual", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "networks.csv")
    assert {row.provider for row in rows} == set(PLAIN)
    missing = [row for row in rows if row.value is None]
    assert all(row.details for row in missing)
    assert "mlp-residual" in html(rows)
    assert command.main(["--suite", "networks", "--only", "nothing", "--out", str(tmp_path)]) == 2


def test_a_network_that_is_named_beside_a_section_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    monkeypatch.setattr(network_suite, "beside", lambda name, *_, **__: [run.append(name)])
    monkeypatch.setattr(network_suite, "GROWTH", ("siren-32", 4, (2,)))
    network_suite.run_networks(["growth", "mlp-tiny"], lambda rows: None, lambda line: None)
    assert run == ["mlp-tiny", "siren-32"]


def test_growth_reaches_as_many_models_as_it_says() -> None:
    name, n, models = network_suite.GROWTH
    assert models[-1] == 16_384
    weights, queries, targets = next(draws(name, models[-1], n))
    assert weights.shape == (16_384, architecture_of_network(name).num_weights)
    assert (queries.shape, targets.shape) == ((n, 2), (16_384, n, 1))


@pytest.mark.slow
def test_every_network_is_traced_and_can_be_trained() -> None:
    assert len(NETWORKS) >= 40
    for name in NETWORKS:
        graph = architecture_of_network(name).graph
        assert graph is not None, name
        assert not graph.training.refused, name


@pytest.mark.slow
def test_compiled_vmap_computes_the_same() -> None:
    module = NETWORKS["mlp-tiny"][0]().eval()
    peer = PEERS["vmap-compiled"](copy.deepcopy(module), architecture_of_network("mlp-tiny"), 3)
    assert error_of(peer, next(draws("mlp-tiny", 3, 4))) < network_suite.BOUND
