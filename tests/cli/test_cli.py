"""The shell: every command as a user types it, and what a mistake looks like."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import wslfast
from wslfast import load_zoo
from wslfast.cli import _once, evaluation, main
from wslfast.measure.results import read_results

Shell = Callable[..., str]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """Run a command, return what it prints; ``code`` is the exit status it must have."""

    def run(*arguments: object, code: int = 0) -> str:
        status = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = capsys.readouterr()
        assert status == code, captured.out + captured.err
        return captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy 28x28 stripes."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 150)
    patterns = np.stack([np.sin(np.outer(np.ones(28), np.arange(28)) * (c + 1) / 2) for c in range(3)])
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(path, images=(patterns[labels] + 0.3 * generator.normal(size=(150, 28, 28))).astype(np.float32), labels=labels)
    return path


TRAIN = ("--queries", 16, "--batch-size", 4, "--d-model", 16, "--heads", 2, "--layers", 1, "--log-every", 2)


def test_zoo_train_resume_evaluate(tmp_path: Path, images: Path, shell: Shell) -> None:
    zoo, run = tmp_path / "zoo", tmp_path / "run"
    assert "30 rows" in shell("zoo", "build", "--dataset", images, "--models", 10, "--epochs", 3, "--seed", 1, "--out", zoo)
    shown = json.loads(shell("zoo", "show", zoo, "--json"))
    assert (shown["models"], shown["rows"], shown["architecture"]) == (10, 30, "cnn")
    assert "test_acc" in shell("zoo", "show", zoo)

    first = shell("train", "--zoo", zoo, "--out", run, "--steps", 4, "--seed", 0, "--checkpoint-every", 2, *TRAIN)
    assert "step 4" in first
    assert "forward passes of originals" in first
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 4]
    second = shell("train", "--zoo", zoo, "--out", run, "--steps", 6, "--seed", 0, "--checkpoint-every", 2, "--resume", "--profile", *TRAIN)
    assert "resumed at step 4\n" in second
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 4, 6]
    assert "finished" in shell("train", "--zoo", zoo, "--out", run, "--steps", 6, "--checkpoint-every", 2, "--resume", *TRAIN)

    table = shell("evaluate", "--run", run)
    assert all(word in table for word in ("agree", "others", "linear-metric"))
    figures = json.loads(shell("evaluate", "--run", run, "--split", "val", "--json"))["variants"]
    assert set(figures) == {"run", "linear", "linear-views", "linear-metric", "adaptive"}
    assert 0 <= figures["run"]["agreement"] <= 1
    made = tmp_path / "made"
    assert "novelty" in shell("generate", "--run", run, "--samples", 5, "--out", made)
    tuned = shell("generate", "--run", run, "--samples", 3, "--sampler", "token", "--select", "subsampled", "--finetune", 1)
    assert "test_acc after 1 epoch:" in tuned
    assert json.loads(shell("zoo", "show", made, "--json"))["rows"] == 5
    assert figures["run"]["latent_numbers"] == pytest.approx(figures["linear"]["latent_numbers"], rel=0.02)


def test_queries_ablate_gradients(tmp_path: Path, images: Path, shell: Shell) -> None:
    zoo, made = tmp_path / "zoo", tmp_path / "made.npz"
    shell("zoo", "build", "--dataset", images, "--models", 10, "--epochs", 1, "--out", zoo)
    assert "9 query images [1, 28, 28]" in shell("queries", "--zoo", zoo, "--kind", "optimised", "--n", 9, "--out", made)
    assert "n: expected a positive integer, got 0" in shell("queries", "--zoo", zoo, "--kind", "noise", "--n", 0, "--out", made, code=2)
    base = "steps = 2\nqueries = 4\nbatch_size = 4\nd_model = 16\nheads = 2\nlayers = 1\n"
    text = f"seeds = [0, 1]\nzoo = '{zoo}'\n[base]\n{base}[axis]\nquery_set = ['data', '{made}']\n"
    (tmp_path / "sets.toml").write_text(text)
    table = shell("ablate", tmp_path / "sets.toml", "--out", tmp_path / "out")
    assert "4 of 4" in table
    assert "±" in table
    assert "ablations.csv" in table
    assert "done before" in shell("ablate", tmp_path / "sets.toml", "--out", tmp_path / "out")
    run = next(p.parents[1] for p in (tmp_path / "out" / "cells").rglob("state.pt"))
    table = shell("gradients", "--run", run, "--zoo", zoo, "--models", 2, "--queries", 3, "--out", tmp_path / "g")
    assert "angle structural behavioral" in table
    assert (tmp_path / "g" / "gradients.csv").exists()


def test_a_run_from_toml_with_flags_over_it(tmp_path: Path, images: Path, shell: Shell) -> None:
    zoo, run = tmp_path / "zoo", tmp_path / "run"
    shell("zoo", "build", "--dataset", images, "--models", 6, "--epochs", 1, "--out", zoo)
    (tmp_path / "c.toml").write_text("queries = 16\nbatch_size = 4\nd_model = 16\nheads = 2\nlayers = 1\nsteps = 9\nclip = 'none'\n")
    shell("train", "--config", tmp_path / "c.toml", "--zoo", zoo, "--out", run, "--steps", 2)
    text = (run / "config.toml").read_text()
    assert "steps = 2\n" in text
    assert "queries = 16\n" in text
    assert 'clip = "none"\n' in text
    assert "lr = 0.0005\n" in text
    shell("train", "--zoo", zoo, "--out", tmp_path / "other", "--steps", 1, "--layers", 0, "--clip", "none", "--queries", 4)
    assert 'clip = "none"\n' in (tmp_path / "other" / "config.toml").read_text()


def test_the_published_settings_from_one_flag(tmp_path: Path, images: Path, shell: Shell) -> None:
    """Three steps of the published run, with the smaller network of a file under it and a flag over both."""
    zoo = tmp_path / "zoo"
    shell("zoo", "build", "--dataset", images, "--models", 6, "--epochs", 1, "--out", zoo)
    (tmp_path / "c.toml").write_text("d_model = 16\nheads = 2\nlayers = 1\nqueries = 8\n")
    flags = ("--preset", "paper", "--config", tmp_path / "c.toml", "--zoo", zoo, "--steps", 3)
    shell("train", *flags, "--out", tmp_path / "a", "--lr", 1e-4)
    text = (tmp_path / "a" / "config.toml").read_text()
    for line in (
        "steps = 3",
        "lr = 0.0001",
        "batch_size = 64",
        "latent = 64",
        "d_model = 16",
        'start = "random"',
        'clip = "none"',
        "gamma = 0.05",
    ):
        assert f"{line}\n" in text
    shell("train", "--preset=paper", "--zoo", zoo, "--out", tmp_path / "b", "--steps", 1, "--layers", 0, "--queries", 4)
    assert "d_model = 256\n" in (tmp_path / "b" / "config.toml").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("zoo",),
        ("zoo", "build"),
        ("zoo", "show"),
        ("train",),
        ("evaluate",),
        ("report",),
        ("generate",),
        ("queries",),
        ("ablate",),
        ("gradients",),
        ("demo",),
        ("info",),
    ],
    ids=lambda a: " ".join(a) or "wslfast",
)
def test_help_teaches(shell: Shell, arguments: tuple[str, ...]) -> None:
    text = shell(*arguments, "--help")
    assert "usage: wslfast" in text
    if arguments not in ((), ("zoo",), ("info",)):
        assert "Example: wslfast " + " ".join(arguments) in text


def test_a_zoo_of_a_network_with_several_answers_and_of_one_that_takes_any_image(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--output`` says which answer counts, ``--input-shape`` which of the sizes that the data set has (28, else as they are, 8)."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body, self.head, self.aux = nn.Conv2d(1, 3, 3), nn.Linear(3, 10), nn.Linear(3, 2)\n"
        "    def forward(self, x):\n"
        "        x = self.body(x).relu().mean((2, 3))\n"
        "        return {'logits': self.head(x), 'aux': self.aux(x)}\n"
    )
    build = ("zoo", "build", "--network", "net.py:Net", "--models", 4, "--epochs", 1, "--out", "zoo")
    assert "name a part of it with output= (--output)" in " ".join(shell(*build, code=2).split())
    shell(*build, "--output", "logits", "--input-shape", 1, 8, 8)
    architecture = load_zoo("zoo").architecture
    assert (architecture.input_shape, architecture.output_shape) == ((1, 8, 8), (10,))


def test_a_network_of_ones_own_is_built_and_trained_on(tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))\n"
    )
    generator = np.random.default_rng(0)
    np.savez("images.npz", images=generator.integers(0, 255, (60, 2, 9, 9), dtype=np.uint8), labels=np.arange(60) % 4)
    build = ("zoo", "build", "--dataset", "images.npz", "--models", 8, "--epochs", 2, "--out", "zoo")
    said = " ".join(shell(*build, code=2).split())
    assert "there is no default for images [2, 9, 9]; pass architecture=, in a shell --network FILE.py:NAME" in said
    assert "16 rows" in shell(*build, "--network", "net.py:net")
    population = load_zoo("zoo")
    assert population.architecture.name == "net"
    assert not torch.equal(population.weights[0], population.weights[2])  # initial weights are each model's own
    shell("train", "--zoo", "zoo", "--out", "run", "--steps", 2, "--batch-size", 4)


def test_info(shell: Shell) -> None:
    facts = json.loads(shell("info", "--json"))
    assert facts["optional packages"]["sklearn"] in (True, False)
    assert "torch" in shell("info")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "--zoo", "z", "--out", "o", "--stepps", 3), "--steps"),
        (("train",), "--zoo"),
        (("frobnicate",), "frobnicate"),
        (("zoo", "build", "--out", "x", "--models", "many"), "many"),
        (("zoo", "show", "nowhere"), "nowhere"),
        (("train", "--zoo", "nowhere", "--out", "out"), "nowhere"),
        (("train", "--zoo", "z", "--out", "out", "--steps", 0), "steps: expected at least 1"),
        (("train", "--config", "nowhere.toml", "--zoo", "z", "--out", "o"), "nowhere.toml"),
        (("train", "--preset", "large", "--zoo", "z", "--out", "o"), "preset: expected one of ('small', 'paper'), got 'large'"),
        (("train", "--preset", "paper", "--zoo", "z"), "out"),
        (("evaluate", "--run", "nowhere"), "nowhere"),
        (("evaluate", "--run", "a", "b"), "--out"),
        (("evaluate", "--run", "a", "b", "--out", "figures.json"), "--out"),
        (("evaluate", "--run", "a", "--out", "results", "--split", "val"), "--split"),
        (("evaluate", "--zoo", "z", "--run", "nowhere", "--out", "results"), "nowhere"),
        (("evaluate", "--run", "a", "--quick"), "--quick is for the page"),
        (("evaluate", "--run", "a", "--name", "digits"), "--name is for the page"),
        (("report", "--out", "nowhere"), "nowhere"),
        (("report", "nowhere"), "nowhere"),
        (("report",), "wslfast report FOLDER"),
        (("generate", "--run", "nowhere", "--samples", 0), "samples"),
        (("zoo", "build", "--dataset", "mnist", "--out", "x"), "mnist"),
        (("zoo", "build", "--dataset", "nowhere.npz", "--out", "x"), "nowhere.npz"),
        (("train", "--zoo", "z", "--out", "o", "--device", "tpu"), "tpu"),
        (("evaluate", "--run", "nowhere", "--device", "tpu"), "tpu"),
        (("zoo", "build", "--models", 0, "--out", "x"), "models"),
        (("zoo", "build", "--network", "nowhere.py:Net", "--out", "x"), "nowhere.py"),
        (("zoo", "build", "--network", "net.py:Net", "--architecture", "cnn", "--out", "x"), "are two networks"),
        (("zoo", "build", "--output", "logits", "--out", "x"), "--output: it is for --network"),
        (("zoo", "build", "--input-shape", 1, 8, 8, "--out", "x"), "--input-shape: it is for --network"),
        (("zoo", "build", "--architecture", "cnn3", "--width", 32, "--out", "x"), "--width: it is for --architecture resnet18"),
        (("zoo", "import", "models", "x", "--activation", "tanh"), "--activation: name a network with --architecture"),
        (("zoo", "import", "models", "x", "--channels", 1), "--channels: name a network with --architecture"),
        (("zoo", "import", "models", "x", "--architecture", "resnet18", "--activation", "tanh"), "--activation: resnet18 has its own"),
        (("train", "--zoo", "z", "--out", "o", "--query-set", "svnh"), "svnh"),
        (("queries", "--zoo", "nowhere", "--out", "q.npz"), "nowhere"),
        (("ablate", "nowhere.toml"), "nowhere.toml"),
        (("gradients", "--run", "nowhere"), "nowhere"),
        (("gradients", "--run", "nowhere", "--models", 0), "models"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else None,
)
def test_a_mistake_is_named_and_nothing_is_left_behind(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = shell(*arguments, code=2)
    assert says in text
    assert "Traceback" not in text
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_figures_of_new_models_leave_out_those_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(evaluation, "say", said.append)
    arch = wslfast.Architecture.mlp(2, (3,), 4, dropout=0.0)
    columns: dict[str, tuple[float | None, ...]] = {"epoch": (0,) * 4, "test_acc": (0.1, 0.2, 0.6, 0.3), "novelty": (1.0, 2.0, None, 6.0)}
    columns["novelty_behavior"] = (None,) * 4  # as of a zoo without classes
    evaluation.Generate("run")._told(wslfast.Population(arch, torch.zeros(4, arch.num_weights), columns), "")
    assert said == [
        "test_acc: mean 0.300, median 0.200, from 0.100 to 0.600",
        "novelty: mean 3.000, median 2.000, from 1.000 to 6.000; 1 of 4 have none",
    ]


def test_python_m_wslfast_is_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wslfast", "info", "--json"]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["wslfast"]


@pytest.mark.slow
def test_a_quick_evaluation_of_digits_and_its_report(tmp_path: Path, shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way in small: two runs, every baseline, the page, and once more without computing."""
    zoo, out = tmp_path / "zoo", tmp_path / "results"
    shell("zoo", "build", "--models", 24, "--epochs", 3, "--out", zoo)
    for name, beta in (("S", 1.0), ("S+B-seed0", 0.1)):
        shell("train", "--zoo", zoo, "--out", tmp_path / name, "--beta", beta, "--gamma", 0, "--steps", 6, *TRAIN)
    runs = ("--run", tmp_path / "S", tmp_path / "S+B-seed0")
    text = shell("evaluate", "--zoo", zoo, *runs, "--out", out, "--quick")
    assert "linear-metric-55" in text
    rows = (out / "rows.csv").read_text()
    assert rows.startswith("zoo,variant,seed,metric,median,mean,spread\n")
    for metric in (
        "agreement",
        "agreement_others",
        "accuracy_original",
        "accuracy_reconstructed",
        "accuracy_change",
        "l2_masked",
        "probe_r2",
        "diversity",
    ):
        assert f"\ndigits,S+B,0,{metric}," in rows
    page = (out / "report.html").read_text()
    assert "CIFAR-10" in page
    again = shell("evaluate", "--zoo", zoo, *runs, "--out", out, "--quick")
    main([str(a) for a in ("evaluate", "--zoo", zoo, *runs, "--out", out, "--quick", "--json")])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["digits S 0"]["agreement"] > 0  # stages and log lines go elsewhere
    assert "there already" in printed.err
    assert again.count("there already") == text.count("- digits: ") - text.count("training")
    (out / "report.html").unlink()
    shell("report", "--out", out)
    assert (out / "report.html").read_text() == page
    shell("report", out, "--page", tmp_path / "elsewhere.html")
    assert (tmp_path / "elsewhere.html").read_text() == page
    assert (out / "rows.csv").read_text() == rows


@pytest.mark.slow
def test_the_demo_writes_its_page_and_figures(tmp_path: Path, shell: Shell) -> None:
    """In small: what is shown, not how well it does (that is for the full demo)."""
    out = tmp_path / "demo"
    logs = ("--log-to", "tensorboard") if importlib.util.find_spec("tensorboard") else ()
    small = ("demo", "--out", out, "--models", 24, "--epochs", 3, "--steps", 4, "--lrs", 1e-3, 2e-3, *logs)
    text = shell(*small)
    assert len({file.parent for file in out.rglob("events.out.tfevents*")}) == (5 if logs else 0)  # four runs, and the page
    figures = read_results(out)
    for name in ("structure", "structure+behavior", "linear-55", "linear-metric-55", "adaptive-55"):
        for metric in ("agreement", "agreement_others", "accuracy_original", "accuracy_reconstructed", "l2_masked"):
            assert len(figures.value("digits", name, metric)) == 1, (name, metric)
        assert figures.mean("digits", name, "latent_share") == pytest.approx(0.55, abs=0.02)
    assert figures.trained("digits") == ["structure", "structure+behavior"]
    page = (out / "report.html").read_text()
    for heading in ("Reconstruction", "What latents know: probes", "New models", "Latent maps", "Training"):
        assert f"<h2>{heading}</h2>" in page
    assert "structure+behavior" in page
    assert "learning rates" in page
    assert 'src="http' not in page
    assert "report.html" in text
    assert "structure+behavior" in text
    assert "already holds a demo" in shell(*small, code=2)
    # an interrupted one goes on: nothing that is there is made again
    (out / "report.html").unlink()
    again = shell(*small)
    assert "training" not in again
    assert again.count("there already") == text.count("- digits: ")
    assert (out / "report.html").read_text() == page
    (out / "report.html").unlink()
    assert "was built with models = 24" in shell(*small[:4], 12, *small[5:], code=2)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("zoo import m z --network A --network B", "zoo import m z --network A B"),
        (
            "zoo import m z --network=A --table t --network B C --epochs 1 --epochs 2",
            "zoo import m z --network A B C --table t --epochs 1 2",
        ),
        ("zoo import m z --network A B --json", "zoo import m z --network A B --json"),
        ("train --epochs 3 --epochs 5", "train --epochs 3 --epochs 5"),  # of a single value the last counts, as in any shell
    ],
)
def test_a_flag_that_is_there_twice_keeps_all_its_values(given: str, read: str) -> None:
    assert _once(given.split()) == read.split()
