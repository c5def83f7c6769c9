"""The examples for neighbouring fields: each against its neighbour's own computation, with the neighbour's package where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP, FP32_ROUNDING, FP32_SMALL
from torch import nn
from torch.func import functional_call

import wslfast
from wslfast.population import unstack
from wslfast.zoo import Dataset

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "neighbours"
EXAMPLES = ("probe_images", "siren_images", "neuroevolution", "ensemble", "hypernetwork")


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_it_is_run(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    assert f"Run: python examples/neighbours/{name}.py" in text
    assert "turns(" in text  # a time beside the neighbour's


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"neighbours/{n}" for n in EXAMPLES), "own_zoo", "query_files", "zoo_to_reconstruction"])
def test_an_example_shows_its_help_and_names_what_is_wrong(name: str, tmp_path: Path) -> None:
    """Before anything is computed: what it is, an argument that it does not take, a package that is not there."""
    file = FOLDER.parent / f"{name}.py"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "COLUMNS": "200"}

    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(file), *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )

    if name == "query_files":
        pytest.importorskip("skimage")
    shown, wrong = ran("--help"), ran("--no-such-flag")
    assert shown.returncode == 0
    assert "usage: " in shown.stdout
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert not list(tmp_path.iterdir())
    missing = [n for n in re.findall(r"pip install ([\w-]+)", file.read_text()) if not importlib.util.find_spec(n.replace("-", "_"))]
    if missing:
        assert f"which is not installed: pip install {missing[0]}" in ran().stderr


def test_probe_images_get_the_gradient_that_a_loop_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = example("probe_images", monkeypatch)
    networks = [ours.network() for _ in range(5)]
    weights = wslfast.Population.from_state_dicts(ours.ARCH, [n.state_dict() for n in networks]).weights
    probes = torch.randn(3, 1, 8, 8, requires_grad=True)
    direction = torch.randn(5, 3, 10)
    a = ours.answers(weights, probes)
    b = ours.answers_one_by_one([n.state_dict() for n in networks], probes)
    torch.testing.assert_close(a, b, rtol=FP32_DEEP, atol=FP32)
    gradients = [torch.autograd.grad((y * direction).sum(), probes)[0] for y in (a, b)]
    torch.testing.assert_close(*gradients, rtol=FP32_DEEP, atol=FP32)
    images, reader = ours.learn(weights, torch.rand(5), probes=2, steps=2)
    assert images.shape == (2, 1, 8, 8)
    assert sum(p.numel() for p in reader.parameters()) == 3


def test_a_sirens_image_loss_is_that_of_its_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("siren_pytorch")
    ours = example("siren_images", monkeypatch)
    nets, where = [ours.network() for _ in range(6)], ours.grid(7)
    arch = wslfast.Architecture.from_module(nets[0], input_shape=(2,))
    weights = wslfast.Population.from_state_dicts(arch, [n.state_dict() for n in nets]).weights
    drawn = torch.stack([n(where) for n in nets]).detach()
    torch.testing.assert_close(wslfast.batched_forward(weights, where, arch), drawn, rtol=FP32_DEEP, atol=FP32)
    rebuilt = (weights + 0.01 * torch.randn_like(weights)).requires_grad_()
    a = ours.image_loss(rebuilt, drawn, where, arch)
    b = ours.image_loss_one_by_one(unstack(rebuilt, arch), drawn, where, nets[0])
    torch.testing.assert_close(a, b, rtol=FP32_DEEP, atol=FP32_SMALL)
    gradients = [torch.autograd.grad(loss, rebuilt)[0] for loss in (a, b)]
    torch.testing.assert_close(*gradients, rtol=FP32_AMPLIFIED, atol=FP32_ROUNDING)


def test_fitness_is_that_of_each_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = example("neuroevolution", monkeypatch)
    images, labels = torch.rand(20, 64), torch.randint(0, 10, (20,))
    population = 0.1 * torch.randn(6, ours.ARCH.num_weights)
    found = ours.losses(population, images, labels)
    network = ours.network()
    for member, loss in zip(population, found, strict=True):
        nn.utils.vector_to_parameters(member, network.parameters())  # the flat order of every neuroevolution package on torch
        torch.testing.assert_close(nn.functional.cross_entropy(network(images), labels), loss, rtol=FP32_DEEP, atol=FP32)
    centre = ours.evolve(images, labels, popsize=16, generations=8)
    start = ours.losses(torch.zeros_like(centre)[None], images, labels)
    assert ours.losses(centre[None], images, labels) < start


def test_fitness_is_evotorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        importlib.import_module("evotorch")
    except ImportError as error:
        pytest.skip(f"evotorch: {error}")
    ours = example("neuroevolution", monkeypatch)
    images, labels = torch.rand(20, 64), torch.randint(0, 10, (20,))
    problem = ours.evotorch_problem(images, labels)
    batch = problem.generate_batch(5)
    batch.set_values(0.1 * torch.randn(5, ours.ARCH.num_weights))
    problem.evaluate(batch)
    torch.testing.assert_close(ours.losses(batch.values, images, labels), batch.evals[:, 0], rtol=FP32_DEEP, atol=FP32)


def test_an_ensemble_votes_as_its_members_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = example("ensemble", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    part = lambda n: (torch.randn(n, 1, 28, 28, generator=generator), torch.randint(0, 10, (n,), generator=generator))  # noqa: E731
    data = Dataset("noise", *part(40), *part(10), *part(12), 10, {})
    population = ours.members(data, 4, 1)
    assert len(population) == 4
    states = population.state_dicts()
    expected = torch.stack([functional_call(ours.network(), s, (data.test_images,)).softmax(-1) for s in states]).mean(0)
    torch.testing.assert_close(ours.vote(population, data.test_images), expected, rtol=FP32_DEEP, atol=FP32)
    ours.train_one(data, 1)
    try:
        importlib.import_module("torchensemble")
    except ImportError:
        return
    with torch.no_grad():
        torch.testing.assert_close(ours.torchensemble_of(population)(data.test_images), expected, rtol=FP32_DEEP, atol=FP32)


def test_a_hypernetwork_gets_the_gradient_that_its_own_target_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hypnettorch")
    ours = example("hypernetwork", monkeypatch)
    target, hyper = ours.pair(5)
    x, y = torch.randn(9, 1), torch.randn(5, 9, 1)
    written = hyper.forward(cond_id=list(range(5)))
    a, b = ours.task_losses(written, x, y), ours.task_losses_one_by_one(written, x, y, target)
    torch.testing.assert_close(a, b, rtol=FP32_DEEP, atol=FP32_ROUNDING)
    into = list(hyper.parameters())
    for mine, theirs in zip(torch.autograd.grad(a.sum(), into, retain_graph=True), torch.autograd.grad(b.sum(), into), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=FP32_AMPLIFIED, atol=FP32_ROUNDING)


def test_a_hypernetwork_of_ones_own_gets_the_gradient_that_a_loop_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without anybody's package."""
    ours = example("hypernetwork", monkeypatch)
    shapes = [slot.shape for slot in ours.ARCH.parameters]
    hyper = nn.Linear(3, ours.ARCH.num_weights)
    rows = hyper(torch.randn(4, 3)) * 0.3
    written = [list(map(lambda w, s: w.reshape(s), row.split([s.numel() for s in map(torch.Size, shapes)]), shapes)) for row in rows]
    x, y = torch.randn(7, 1), torch.randn(4, 7, 1)
    a = ours.task_losses(written, x, y)
    b = []
    for t, (w1, b1, w2, b2, w3, b3) in enumerate(written):
        hidden = nn.functional.linear(nn.functional.linear(x, w1, b1).relu(), w2, b2).relu()
        b.append((nn.functional.linear(hidden, w3, b3) - y[t]).square().mean())
    torch.testing.assert_close(a, torch.stack(b), rtol=FP32_DEEP, atol=FP32_ROUNDING)
    mine, theirs = (torch.autograd.grad(loss, hyper.weight, retain_graph=True)[0] for loss in (a.sum(), sum(b)))
    torch.testing.assert_close(mine, theirs, rtol=FP32_AMPLIFIED, atol=FP32_ROUNDING)


def test_turns_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side = example("side_by_side", monkeypatch)
    order: list[str] = []
    text = side_by_side.turns(lambda: order.append("ours"), lambda: order.append("theirs"), rounds=2)
    assert order == ["ours", "theirs"] * 3
    assert "one network after another" in text
