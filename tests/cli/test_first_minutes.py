"""What a newcomer meets: Ctrl-C, progress, narrow terminals, folders that are something else's, counts that are kept."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import wslfast
from wslfast import Architecture, Population, TrainConfig, WslfastError, __version__, save_zoo, train
from wslfast.cli import main
from wslfast.queries import load_queries
from wslfast.training.progress import Interrupted, shown

ARCH = Architecture.mlp(16, (6,), 3, "relu")
SMALL: dict[str, Any] = {"queries": 8, "batch_size": 4, "d_model": 16, "heads": 2, "layers": 1, "log_every": 1}
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("first")
    rng = np.random.default_rng(0)
    np.savez(root / "images.npz", images=rng.random((60, 4, 4), dtype=np.float32), labels=np.arange(60) % 3)
    population = Population(ARCH, ARCH.initial_weights(["default"] * 12, range(12)))
    save_zoo(population, root / "zoo", dataset=root / "images.npz")
    return root / "zoo"


consoles = sys.modules["wslfast.cli.console"]  # the package has its console under that name


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as at a terminal: a process in the background of a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _press(at: int) -> Any:
    """Ctrl-C while the step after ``at`` is under way."""

    def on_record(record: dict[str, Any]) -> None:
        if record["step"] == at:
            os.kill(os.getpid(), signal.SIGINT)

    return on_record


def test_ctrl_c_saves_and_the_run_goes_on_to_the_bit(zoo: Path, tmp_path: Path) -> None:
    whole = train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "whole"), steps=6, **SMALL))
    config = TrainConfig(zoo=str(zoo), out=str(tmp_path / "cut"), steps=6, checkpoint_every=100, **SMALL)
    with pytest.raises(Interrupted, match=r"interrupted at step 3 of 6, which is saved in .*cut; the run goes on with --resume"):
        train(config, on_record=_press(3))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(config, resume=True)
    for name, value in whole.autoencoder.state_dict().items():
        assert torch.equal(resumed.autoencoder.state_dict()[name], value)


def test_what_is_said_after_ctrl_c_is_true(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*arguments: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    def interrupted(*command: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(command))
        assert end.value.code == 130
        return capsys.readouterr().err

    run = tmp_path / "run"
    train(TrainConfig(zoo=str(zoo), out=str(run), steps=1, **SMALL))
    monkeypatch.setattr("wslfast.cli.evaluation.generate_each", stopped)
    monkeypatch.setattr("wslfast.cli.evaluation.evaluate", stopped)
    monkeypatch.setattr("wslfast.cli.evaluation.study", stopped)
    monkeypatch.setattr("wslfast.cli.zoo.import_zoo", stopped)
    monkeypatch.setattr("wslfast.cli.zoo.build_zoo", stopped)
    monkeypatch.setattr("wslfast.cli.training.train", stopped)
    for command in (
        ("generate", "--run", str(run)), ("evaluate", "--run", str(run)), ("zoo", "import", "a", "b"),
        ("train", "--zoo", str(zoo), "--out", "o"), ("evaluate", "--run", str(run), "--out", str(tmp_path / "figures.json")),
        ("zoo", "build", "--out", str(tmp_path / "none")),
    ):  # fmt: skip
        assert "nothing was saved" in interrupted(*command)
    assert "goes on from its last checkpoint with --resume" in interrupted("train", "--zoo", str(zoo), "--out", str(run), "--resume")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "unfinished.safetensors").write_text("")
    assert "from the end of its last epoch with --resume" in interrupted("zoo", "build", "--out", str(tmp_path / "begun"))
    assert "the same command goes on" in interrupted("evaluate", "--run", str(run), "--out", str(tmp_path / "page"))


def test_ctrl_c_while_torch_is_loaded_is_one_line() -> None:
    hook = (
        "import sys\nclass Stop:\n    def find_spec(self, name, *rest):\n        if name == 'torch':\n            raise KeyboardInterrupt\n"
    )
    code = f"{hook}sys.meta_path.insert(0, Stop())\nfrom wslfast.__main__ import main\nmain()\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(wslfast.__file__).parent.parent)
    assert (ended.returncode, ended.stderr) == (130, "wslfast: interrupted; nothing was begun\n")


class Reached(Exception):
    """A zoo is there, and nothing more is wanted."""


def reached(*arguments: Any, **settings: Any) -> Any:
    raise Reached


@pytest.mark.parametrize("command", ["demo", "ablate"])
def test_an_interrupted_zoo_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A command that builds its zoo itself, stopped after the first epoch: the same command again builds the same zoo."""
    from wslfast.study import ablations, demo
    from wslfast.study.ablation_file import Ablation
    from wslfast.zoo.unfinished import Unfinished

    pytest.importorskip("sklearn")
    sizes = "models = 6\nepochs = 2\nseed = 0"
    text = f"seeds = [0]\n[zoo]\ndataset = 'digits'\n{sizes}\n[base]\nsteps = 1\n[axis]\nbeta = [0.5]\n"
    (tmp_path / "a.toml").write_text(text)

    def again(out: Path) -> bytes:
        ablation, config = Ablation.from_toml(str(tmp_path / "a.toml")), demo.DemoConfig(out=str(out), models=6, epochs=2)
        with pytest.raises(Reached):
            demo.demo(config) if command == "demo" else ablations.run_ablation(ablation, out)
        (shard,) = out.rglob("shard-*.safetensors")
        return shard.read_bytes()

    monkeypatch.setattr(demo, "trained", reached)
    monkeypatch.setattr(ablations, "_all_cells", reached)
    whole = again(tmp_path / "whole")
    save = Unfinished.save

    def pressed(self: Unfinished, state: Any) -> None:
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "save", pressed)
    with pytest.raises(KeyboardInterrupt):
        again(tmp_path / "cut")
    assert list((tmp_path / "cut").rglob("unfinished.safetensors"))
    monkeypatch.setattr(Unfinished, "save", save)
    assert again(tmp_path / "cut") == whole


def test_training_shows_progress_when_asked(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=3, **SMALL), progress=True)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" loss")[0] for line in said] == ["step 1 of 3", "step 3 of 3"]  # off a terminal: the first, the last, now and then


def test_the_bar_fits_80_columns() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, legacy_windows=False, color_system=None)
    record = {"step": 12_345, "loss": 123.4567, "structural": 1.0, "behavioral": 2.0, "contrastive": 3.0, "models_per_s": 12_345.0}
    with shown(console, 30_000) as on_record:
        on_record(record)
    (line,) = [line for line in text.getvalue().replace("\r", "\n").splitlines() if "12345/30000" in line][-1:]
    for part in ("loss 123.4567", "12345 models/s", ":"):  # the last one is the time that is left
        assert part in line


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_keep_the_rows_name(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(consoles, "console", Console(file=text, width=width, highlight=False))
    figures = dict.fromkeys(consoles._FIGURES, 0.1234)
    consoles.figures_table({"structure+behavior": figures, "linear-views": {**figures, "psnr": None}})
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    named = [line for line in lines if "0.123" in line]
    assert all(line.startswith(("structure+behavior", "linear-views")) for line in named)
    assert sum(line.count("0.123") for line in named) == 2 * (len(figures) - 1) - 1  # latent numbers are whole


@pytest.mark.parametrize("width", [24, 40, 80])
def test_values_are_there_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = io.StringIO()
    monkeypatch.setattr(consoles, "console", Console(file=text, width=width, highlight=False))
    consoles.show({"rows": 45, "accuracies (least, quartiles, greatest)": {"test_acc": "0.572"}}, as_json=False)
    words = text.getvalue().split()
    assert {"rows", "45", "accuracies", "test_acc:", "0.572"} <= set(words)


@pytest.mark.parametrize("width", [60, 80])
def test_tables_of_an_analysis_are_whole(zoo: Path, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ablate and gradients: no name and no number of a row is cut."""
    (tmp_path / "a.toml").write_text(f"zoo = {str(zoo)!r}\nseeds = [0]\n[base]\nsteps = 1\n[axis]\ncriterion = ['softmax_mse', 'mse']\n")
    train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=1, **SMALL))
    text = io.StringIO()
    monkeypatch.setattr(consoles, "console", Console(file=text, width=width, highlight=False))
    main(["ablate", str(tmp_path / "a.toml"), "--out", str(tmp_path / "out")])
    main(["gradients", "--run", str(tmp_path / "run"), "--models", "1", "--queries", "4"])
    said = text.getvalue()
    assert "…" not in said
    assert sum(line.startswith("criterion=softmax_mse") for line in said.splitlines()) >= (2 if width == 60 else 1)
    assert any(line.startswith("reconstruction") for line in said.splitlines())


def test_the_bar_of_a_zoo_fits_60_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich

    from wslfast.zoo.progress import bar

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=60, legacy_windows=False, color_system=None)
    monkeypatch.setattr(rich, "_console", console)
    with bar(True, 11_950) as advance:
        for _ in range(10):
            advance(12, 50, torch.full((3,), 2.278))
    (line,) = [line for line in text.getvalue().replace("\r", "\n").splitlines() if "10/11950" in line][-1:]
    assert "epoch 12/50 loss 2.278" in line
    assert "…" not in line


def test_no_folder_of_something_else_is_written_into(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(TrainConfig(zoo=str(zoo), out=str(run), steps=1, **SMALL))
    (tmp_path / "project" / ".git").mkdir(parents=True)
    torch.save(Population(ARCH, ARCH.initial_weights(["default"], [0])).state_dict(0), tmp_path / "a.pt")
    commands = [
        (["train", "--zoo", str(zoo), "--out", str(zoo), *FLAGS], "holds a zoo already"),
        (["zoo", "import", str(tmp_path / "a.pt"), str(run)], "holds a training run already"),
        (["evaluate", "--run", str(run), "--out", str(zoo)], "holds a zoo already"),
        (["generate", "--run", str(run), "--samples", "1", "--out", str(run)], "holds a training run already"),
        (["train", "--zoo", str(zoo), "--out", str(tmp_path / "project"), *FLAGS], "somebody's project"),
        (["zoo", "build", "--dataset", str(zoo.parent / "images.npz"), "--out", str(run)], "holds a training run already"),
        (["demo", "--out", str(zoo)], "holds a zoo already"),
        (["gradients", "--run", str(run), "--out", str(zoo)], "holds a zoo already"),
        (["ablate", str(tmp_path / "a.toml"), "--out", str(zoo)], "holds a zoo already"),
        (["queries", "--zoo", str(zoo), "--kind", "val", "--out", str(tmp_path / "mine.npz")], "mine.npz is something else already"),
    ]
    (tmp_path / "a.toml").write_text(f"zoo = {str(zoo)!r}\nseeds = [0]\n[base]\nsteps = 1\n[axis]\nbeta = [0.5]\n")
    np.savez(tmp_path / "mine.npz", images=np.zeros(3))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for command, says in commands:
        with pytest.raises(SystemExit):
            main(command)
        assert says in capsys.readouterr().err
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_queries_gives_as_many_as_asked_or_an_error(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "q.npz")
    for kind, n in (("noise", 200), ("optimised", 140), ("data", 9), ("data+strokes", 31)):
        main(["queries", "--zoo", str(zoo), "--kind", kind, "--n", str(n), "--out", out])
        assert len(load_queries(out, ARCH)) == n, kind
    with pytest.raises(SystemExit):
        main(["queries", "--zoo", str(zoo), "--kind", "data", "--n", "500", "--out", out])
    assert "has 42 images" in capsys.readouterr().err


def test_names_are_printed_as_they_are(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder or a variant in brackets is no markup, which would vanish or be an error."""
    out = tmp_path / "[b]" / "q.npz"
    main(["queries", "--zoo", str(zoo), "--kind", "noise", "--n", "3", "--out", str(out)])
    assert f"{out}: 3 query images" in capsys.readouterr().out
    settings = "".join(f"{name} = {value}\n" for name, value in SMALL.items())
    (tmp_path / "a.toml").write_text(f"zoo = {str(zoo)!r}\nseeds = [0]\n[base]\nsteps = 1\n{settings}[variants.'less [/b]']\n")
    main(["ablate", str(tmp_path / "a.toml"), "--out", str(tmp_path / "[red]")])
    said = capsys.readouterr().out
    assert "1 of 1: less [/b], seed 0" in said
    assert f"rows in {tmp_path / '[red]' / 'ablations.csv'}" in said


def test_a_command_leaves_no_handler_behind() -> None:
    before = list(logging.getLogger("wslfast").handlers)
    main(["--version"])
    assert logging.getLogger("wslfast").handlers == before


def test_version_and_a_broken_package(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"wslfast {__version__}\n"
    (tmp_path / "nvtx.py").write_text("raise RuntimeError('operator nvtx::x does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["info"])
    said = " ".join(capsys.readouterr().out.split())
    assert "nvtx: there, and does not import: RuntimeError: operator nvtx::x does not exist" in said


def test_a_demo_goes_on_with_its_own_zoo_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wslfast.study import demo

    pytest.importorskip("sklearn")

    monkeypatch.setattr(demo, "trained", reached)
    for _ in range(2):
        with pytest.raises(Reached):
            demo.demo(demo.DemoConfig(out=str(tmp_path), models=4, epochs=1))
    for other in ({"models": 5}, {"epochs": 2}, {"seed": 1}):
        (name,) = other
        with pytest.raises(WslfastError, match=f"was built with {name} = .*, not the {other[name]} asked for"):
            demo.demo(demo.DemoConfig(**{"out": str(tmp_path), "models": 4, "epochs": 1, **other}))
