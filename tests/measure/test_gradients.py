"""The gradient analysis against dense matrices, finite differences and autograd, in float64."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from tolerances import FP64, FP64_GRADIENT
from torch import Tensor

from wslfast import Architecture, WslfastError, batched_behavioral_loss, build_zoo
from wslfast.measure import gradients
from wslfast.measure.first_order import COLUMNS, GradientSettings, analyse, error_directions, sweep
from wslfast.measure.gradients import angle, directions, exact_spectrum, jacobian, model_function, sensitive_directions, spectrum
from wslfast.testing import oracle_loss, oracle_outputs
from wslfast.training import TrainConfig, train

MLP = Architecture.mlp(5, (4, 3), 3, activation="tanh")  # 51 weights
CONV = Architecture.cnn(1, activation="tanh")


def pair(arch: Architecture, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, arch.num_weights, generator=generator, dtype=torch.float64)
    return 0.5 * a, 0.5 * a + scale * b


def queries(arch: Architecture, n: int) -> Tensor:
    return torch.randn(n, *arch.input_shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def differences(arch: Architecture, weights: Tensor, x: Tensor, columns: list[int], step: float = 1e-5) -> Tensor:
    """Central differences of all outputs to some weights, ``[n K, columns]``, by the oracle."""
    moves = torch.zeros(len(columns), arch.num_weights, dtype=torch.float64)
    moves[range(len(columns)), columns] = step
    up, down = (oracle_outputs(weights + s * moves, x, arch) for s in (1, -1))
    return ((up - down) / (2 * step)).flatten(1).T


def test_jacobian_is_what_finite_differences_give() -> None:
    weights, _ = pair(MLP)
    x = queries(MLP, 19)  # more than one block
    expected = differences(MLP, weights, x, list(range(MLP.num_weights)))
    torch.testing.assert_close(jacobian(weights, x, MLP), expected, rtol=1e-6, atol=1e-9)
    weights = CONV.initial_weights(["kaiming_normal"], [0])[0].double()
    x, columns = queries(CONV, 3), [0, 77, 300, 1500, CONV.num_weights - 1]
    torch.testing.assert_close(jacobian(weights, x, CONV)[:, columns], differences(CONV, weights, x, columns), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [3, 40], ids=["fewer outputs than weights", "more outputs than weights"])
def test_exact_spectrum_is_that_of_the_dense_matrix(n: int) -> None:
    original, rebuilt = pair(MLP)
    x = queries(MLP, n)
    f = (
        sum(jacobian(original, x[i : i + 1], MLP).T @ jacobian(rebuilt, x[i : i + 1], MLP) for i in range(n)) / n
    )  # the definition, one query after another
    assert isinstance(f, Tensor)
    found = spectrum(original, rebuilt, x, MLP, method="exact")
    dense = torch.linalg.svdvals(f)
    kept = len(found.singular_values)
    assert kept == min(3 * n, MLP.num_weights)
    torch.testing.assert_close(found.singular_values, dense[:kept], rtol=FP64_GRADIENT, atol=FP64)
    assert float(dense[kept:].sum()) < 1e-9
    symmetric = torch.linalg.eigvalsh((f + f.T) / 2)
    torch.testing.assert_close(
        found.eigenvalues[found.eigenvalues.abs() > 1e-9], symmetric.flip(0)[symmetric.flip(0).abs() > 1e-9], rtol=1e-7, atol=1e-9
    )
    assert found.asymmetry == pytest.approx(float((f - f.T).norm() / (2 * f.norm())), rel=1e-6)
    assert found.trace == pytest.approx(float(f.trace()), rel=FP64_GRADIENT)
    assert found.frobenius == pytest.approx(float(f.norm()), rel=FP64_GRADIENT)
    assert found.negative_share == pytest.approx(float(-symmetric.clamp_max(0).sum() / symmetric.abs().sum()), rel=1e-6)
    assert 1 <= found.effective_rank <= kept


def test_a_perfect_reconstruction_has_a_symmetric_positive_spectrum() -> None:
    original, _ = pair(MLP)
    found = spectrum(original, original, queries(MLP, 6), MLP)
    assert found.exact
    assert found.asymmetry < 1e-6
    assert float(found.eigenvalues.min()) > -1e-12
    assert found.trace == pytest.approx(float(found.singular_values.sum()))


def test_the_sketch_finds_the_leading_singular_values() -> None:
    original, rebuilt = pair(MLP)
    x = queries(MLP, 40)
    whole, part = (spectrum(original, rebuilt, x, MLP, method=m, rank=6, probes=400) for m in ("exact", "sketch"))
    assert not part.exact
    assert math.isnan(part.negative_share)
    torch.testing.assert_close(part.singular_values, whole.singular_values[:6], rtol=1e-4, atol=0)
    assert part.trace == pytest.approx(whole.trace, rel=0.15)
    assert part.frobenius == pytest.approx(whole.frobenius, rel=0.15)
    assert part.asymmetry == pytest.approx(whole.asymmetry, rel=0.2)


def test_directions_are_the_gradients_they_say() -> None:
    original, rebuilt = pair(MLP)
    x = queries(MLP, 7)
    found = directions(original, rebuilt, x, MLP)
    values, gradient = oracle_loss(rebuilt[None], x, oracle_outputs(original[None], x, MLP), MLP, "mse")
    torch.testing.assert_close(found.behavioral, gradient[0], rtol=1e-9, atol=1e-12)
    assert found.loss == pytest.approx(float(values[0]))
    d = rebuilt - original
    f = jacobian(original, x, MLP).T @ jacobian(rebuilt, x, MLP) / 7
    torch.testing.assert_close(found.first_order, f.T @ d, rtol=1e-9, atol=1e-12)
    assert found.quadratic == pytest.approx(float((jacobian(original, x, MLP) @ d).square().sum() / 14))
    assert torch.equal(found.structural, d)
    figures = found.figures()
    assert figures["angle_structural_behavioral"] == pytest.approx(angle(d, gradient[0]))


def test_first_order_is_exact_in_the_limit_and_for_a_linear_network() -> None:
    original, other = pair(MLP)
    x = queries(MLP, 7)
    errors = [directions(original, original + s * (other - original), x, MLP).figures() for s in (1.0, 1e-2, 1e-4)]
    gaps = [e["first_order_gradient_error"] for e in errors]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3
    assert errors[2]["quadratic_over_loss"] == pytest.approx(1, abs=1e-3)
    linear = Architecture.mlp(5, (), 3)
    a, b = pair(linear)
    figures = directions(a, b, queries(linear, 4), linear).figures()
    assert figures["first_order_gradient_error"] < 1e-12
    assert figures["quadratic_over_loss"] == pytest.approx(1)


def test_angles() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert angle(a, b) == pytest.approx(45)
    assert angle(a, -a) == pytest.approx(180)
    assert angle(a, 3 * a) == 0
    assert angle(a, torch.tensor([1.0, 1e-9], dtype=torch.float64)) == pytest.approx(math.degrees(1e-9))
    assert math.isnan(angle(a, torch.zeros(2)))


@pytest.mark.parametrize("n", [3, 40])
def test_error_directions(n: int) -> None:
    original, rebuilt = pair(MLP)
    x = queries(MLP, n)
    found = error_directions(original, x, MLP, torch.Generator().manual_seed(0), rebuilt)
    assert list(found) == ["random", "layer", "top", "bottom", "reconstruction"]
    for direction in found.values():
        assert float(direction.norm()) == pytest.approx(float(original.norm()))
    for s in MLP.parameters:
        part = slice(s.offset, s.stop)
        assert float(found["layer"][part].norm()) == pytest.approx(float(original[part].norm()))
    j = jacobian(original, x, MLP)
    effect = {name: float((j @ d).norm()) for name, d in found.items()}
    assert effect["bottom"] < effect["random"] < effect["top"]
    if n == 3:
        assert effect["bottom"] < 1e-10 * effect["top"]
    assert angle(found["reconstruction"], rebuilt - original) < 1e-5


def test_a_jacobian_is_as_large_as_all_numbers_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several axes was taken for its last, and its Jacobian for that much smaller."""
    arch = Architecture.from_module(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Unflatten(1, (3, 2))), (4,))
    weights, x = arch.initial_weights(["kaiming_uniform"], [0])[0], torch.randn(5, 4)
    for most, whole in ((5 * 6 * arch.num_weights, True), (5 * 6 * arch.num_weights - 1, False), (5 * 2 * arch.num_weights, False)):
        monkeypatch.setattr(gradients, "EXACT", most)
        assert sensitive_directions(weights, x, arch, rank=3)[1] is whole
        monkeypatch.setattr(gradients, "EXACT", 2 * most)
        assert spectrum(weights, weights, x, arch, rank=3).exact is whole


def test_a_model_that_is_not_finite_is_named() -> None:
    """A diverged autoencoder's reconstructions ended in an error of LAPACK's."""
    a, b = pair(MLP)
    b[3] = float("nan")
    x = torch.randn(4, 5, dtype=torch.float64)
    for call in (lambda: spectrum(a, b, x, MLP), lambda: directions(a, b, x, MLP), lambda: sensitive_directions(b, x, MLP)):
        with pytest.raises(WslfastError, match=f"weights: expected finite numbers, got 1 of {MLP.num_weights} that are not"):
            call()


def test_sensitive_directions_exact_and_sketched() -> None:
    original, _ = pair(MLP)
    x = queries(MLP, 40)
    j = jacobian(original, x, MLP)
    dense = torch.linalg.eigvalsh(j.T @ j).flip(0)
    for method in ("exact", "sketch"):
        rows, whole = sensitive_directions(original, x, MLP, rank=5, method=method)
        assert whole == (method == "exact")
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64))
        torch.testing.assert_close((rows[:5] @ j.T).square().sum(1), dense[:5], rtol=1e-3, atol=0)
    assert len(sensitive_directions(original, x, MLP, method="exact")[0]) == MLP.num_weights


def test_a_sweep_measures_what_the_loss_is() -> None:
    original = MLP.initial_weights(["kaiming_normal"], [3])[0]
    x, images = queries(MLP, 6).float(), queries(MLP, 30).float()
    labels = oracle_outputs(original[None], images, MLP)[0].argmax(1)
    direction = torch.randn(MLP.num_weights, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = sweep(original, direction, (1e-4, 0.5), x, images, labels, MLP)
    for i, magnitude in enumerate((1e-4, 0.5)):
        moved = (original.double() + magnitude * direction)[None]
        loss = batched_behavioral_loss(moved, original.double()[None], x.double(), MLP)
        assert found["loss"][i] == pytest.approx(float(loss), rel=1e-6)
        agree = (oracle_outputs(moved, images, MLP)[0].argmax(1) == labels).double().mean()
        assert found["accuracy"][i] == found["agreement"][i] == pytest.approx(float(agree))
    assert found["ratio"][0] == pytest.approx(1, abs=1e-2)
    assert found["quadratic"][1] == pytest.approx(found["quadratic"][0] * 0.5**2 / 1e-8)


@pytest.mark.parametrize("traced", [True, False])
def test_networks_beyond_plain_layers_go_through_their_graph_or_their_module(traced: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).double()
    arch = Architecture.from_module(module, (1, 2, 3))
    assert arch.module is None
    if not traced:
        arch = Architecture("opaque", arch.input_shape, None, copy.deepcopy(module).float(), "hidden by a test")
    row = torch.cat([p.detach().flatten() for p in module.parameters()])
    x = queries(arch, 5)
    torch.testing.assert_close(model_function(arch)(row, x), module(x).detach())
    found = spectrum(row, row + 0.01, x, arch)
    assert len(found.singular_values) == 10
    assert exact_spectrum(jacobian(row, x, arch), jacobian(row + 0.01, x, arch), 5).trace == pytest.approx(found.trace)


def test_wrong_input_is_one_clear_error() -> None:
    original, rebuilt = pair(MLP)
    for call, words in [
        (lambda: spectrum(original[:5], rebuilt, queries(MLP, 2), MLP), "weights: expected"),
        (lambda: spectrum(original, rebuilt, torch.zeros(2, 4), MLP), "queries: expected"),
        (lambda: spectrum(original, rebuilt, queries(MLP, 2), MLP, method="best"), "method: expected"),
        (lambda: GradientSettings(magnitudes=()), "magnitudes"),
        (lambda: GradientSettings(split="train"), "split"),
    ]:
        with pytest.raises(WslfastError, match=words):
            call()


def test_analyse_writes_rows_and_figures(tmp_path: Path) -> None:
    build_zoo("digits", tmp_path / "zoo", models=10, epochs=1, seed=0)
    config = TrainConfig(
        zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), steps=2, batch_size=4, queries=8, d_model=16, heads=2, layers=1
    )
    train(config)
    rows = analyse(tmp_path / "run", tmp_path / "out", GradientSettings(models=2, queries=4, magnitudes=(0.01, 0.1)))
    with (tmp_path / "out" / "gradients.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert len(table) == len(rows)
    facts = json.loads((tmp_path / "out" / "gradients.json").read_text())
    assert len(facts["models"]) == 2
    assert len(facts["models"][0]["singular_values"]) == 40
    swept = [r for r in table if r["direction"] == "random" and r["metric"] == "ratio"]
    assert [float(r["magnitude"]) for r in swept] == [0.01, 0.1]
    assert {r["models"] for r in swept} == {"2"}
    # another run's rows stand beside it; the same run's take its place
    analyse(tmp_path / "run", tmp_path / "out", GradientSettings(models=2, queries=4, magnitudes=(0.01,)), name="again")
    analyse(tmp_path / "run", tmp_path / "out", GradientSettings(models=1, queries=4, magnitudes=(0.01,)), name="again")
    with (tmp_path / "out" / "gradients.csv").open(newline="") as file:
        both = list(csv.DictReader(file))
    assert [r for r in both if r["variant"] == "run"] == table
    assert {r["models"] for r in both if r["variant"] == "again"} == {"1"}
