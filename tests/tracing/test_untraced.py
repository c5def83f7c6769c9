"""A network that cannot be traced goes through every command as any other, when its code is named; files hold what it is called."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wslfast
from wslfast import Architecture, WslfastError, load_zoo
from wslfast.cli import main
from wslfast.tracing import untraced

CODE = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        if x.max() > 100:
            x = x / 255
        return super().forward(x)


class Pair(Net):
    def forward(self, x):
        return x, super().forward(x)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Twelve such networks' files, with their accuracies, and the images."""
    torch.manual_seed(0)
    images, labels = torch.rand(60, 1, 4, 4), torch.arange(60) % 3
    np.savez(
        tmp_path / "images.npz",
        train_images=images[:30], train_labels=labels[:30], test_images=images[30:], test_labels=labels[30:],
    )  # fmt: skip
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "models").mkdir()
    lines = ["file,test_acc"]
    for i in range(12):
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        net(images[:30])
        torch.save(net.state_dict(), tmp_path / "models" / f"{i}.pt")
        right = net.eval()(images[30:]).argmax(1) == labels[30:]
        lines.append(f"{i}.pt,{float(right.double().mean())}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No architecture of another test is found."""
    gc.collect()
    untraced._held.clear()
    yield
    untraced._held.clear()


def imported(at: Path, name: str = "Net", *further: str) -> Path:
    main(["zoo", "import", f"{at}/models", f"{at}/zoo", "--network", f"{at}/net.py:{name}", "--dataset", f"{at}/images.npz",
          "--table", f"{at}/table.csv", *further])  # fmt: skip
    untraced._held.clear()  # the next command is another process
    return at / "zoo"


@pytest.mark.parametrize("name", ["Net", "Pair"])
def test_the_commands_with_the_code_named_again(models: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    zoo, run, named = imported(models, name, *(["--output", "1"] if name == "Pair" else [])), models / "run", f"{models}/net.py:{name}"
    said = capsys.readouterr().out
    assert f"{name} cannot be traced" in said
    assert f"next: wslfast train --zoo {zoo} --out RUN --network {named}" in said.replace("\n", "")
    for command in (
        f"train --zoo {zoo} --out {run} --steps 2 --queries 8 --layers 1 --d-model 16 --heads 2",
        f"evaluate --run {run}",
        f"generate --run {run} --samples 3 --out {models}/new",
        f"gradients --run {run} --models 2 --queries 4",
        f"zoo export {zoo} {models}/exported --format state-dicts",
    ):
        main([*command.split(), "--network", named])
        untraced._held.clear()
    figures = json.loads((run / "evaluation-test.json").read_text())["variants"]["run"]
    owners = [acc for acc, split in zip(*(wslfast.zoo.read_manifest(zoo).properties[n] for n in ("test_acc", "split"))) if split == "test"]
    assert figures["accuracy_original"] == pytest.approx(np.mean(owners), abs=1e-6)
    again = torch.load(models / "exported" / "00000.pt", weights_only=True)
    assert any(torch.equal(again["1.weight"], torch.load(file, weights_only=True)["1.weight"]) for file in (models / "models").iterdir())


def test_without_its_code_there_is_one_error_that_names_the_flag(models: Path) -> None:
    zoo = imported(models)
    command = [sys.executable, "-m", "wslfast", "train", "--zoo", str(zoo), "--out", str(models / "run"), "--steps", "1"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(wslfast.__file__).parent.parent)
    assert told.returncode == 2
    assert "--network FILE.py:NAME" in told.stderr
    assert not (models / "run").exists()


def test_another_network_than_the_zoos_is_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = imported(models)
    (models / "other.py").write_text(CODE.replace("16, 6", "16, 5").replace("(6", "(5"))
    with pytest.raises(SystemExit):
        main(["train", "--zoo", str(zoo), "--out", str(models / "run"), "--steps", "1", "--network", f"{models}/other.py:Net"])
    assert "other names or shapes of weights than 'Net'" in capsys.readouterr().err


def test_in_python_the_architecture_that_is_kept_is_found(models: Path) -> None:
    zoo = imported(models)
    with pytest.raises(WslfastError, match=r"keep Architecture\.from_module"):
        load_zoo(zoo)
    namespace: dict[str, type[nn.Module]] = {}
    exec(CODE, namespace)
    kept = Architecture.from_module(namespace["Net"](), (1, 4, 4))
    assert load_zoo(zoo).architecture is kept
    config = wslfast.TrainConfig(zoo=str(zoo), out=str(models / "run"), steps=1, queries=4, layers=1, d_model=16, heads=2)
    wslfast.train(config)
    assert wslfast.evaluate(models / "run", baselines=False)["run"]["n_models"] == 2
    exec(CODE.replace("x / 255", "x - 255"), namespace)
    both = kept, Architecture.from_module(namespace["Net"](), (1, 4, 4))
    assert both[0].to_dict() == both[1].to_dict()
    with pytest.raises(WslfastError, match="different code"):
        load_zoo(zoo)
