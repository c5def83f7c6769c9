"""What a run and an evaluation tell TensorBoard, and any hook of three methods, read back; the documented hooks as they stand."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tolerances import FP32_ROUNDING

from wslfast import Architecture, Population, TrainConfig, WslfastError, profiling, train
from wslfast.measure.results import Unit, write_tables
from wslfast.page import report
from wslfast.training.hooks import LogHook, TensorBoard, hook_of

ROOT = Path(__file__).resolve().parents[2]
ARCH = Architecture.mlp(6, (5,), 3)
SIZES: dict[str, Any] = {
    "batch_size": 4,
    "queries": 8,
    "query_pool": 16,
    "d_model": 16,
    "heads": 2,
    "layers": 1,
    "log_every": 4,
    "checkpoint_every": 8,
}


class Kept:
    """A hook that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        self.pictures: dict[str, bytes] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.steps[step] = dict(values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[name] = list(columns), [list(row) for row in rows]

    def picture(self, name: str, png: bytes) -> None:
        self.pictures[name] = png


def run(out: Path, log_to: Any, steps: int = 24, **more: Any) -> list[dict[str, Any]]:
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 8, range(8)))
    images = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(zoo="", out=str(out), steps=steps, **SIZES)
    train(config, population=population, images=images, log_to=log_to, **more)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def results(folder: Path) -> Path:
    """An evaluation's tables, just enough for two figures."""
    models = [
        {"model": j, "agreement": 0.5 + 0.1 * j, "agreement_others": 0.3, "accuracy_original": 0.8, "accuracy_reconstructed": 0.7}
        for j in range(4)
    ]
    metrics = {"agreement": (0.65, 0.65, 0.1), "agreement_others": (0.3, 0.3, 0.1)}
    units = [Unit("digits", name, 0, "run", "f", {"losses": "S"}, metrics, {"models": models}) for name in ("S", "S+B")]
    write_tables(folder, units, {})
    return folder


def read_back(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0))
    events.Reload()
    return events


def text_of(events: Any, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_tensorboard_has_every_record_and_the_phases(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    records = run(tmp_path, "tensorboard")
    events = read_back(tmp_path / "tensorboard")
    assert [r["step"] for r in records] == [1, 4, 8, 12, 16, 20, 24]
    names = set(records[0]) - {"step"}
    assert set(events.Tags()["scalars"]) == names
    assert {"loss", "structural", "behavioral", "contrastive", "lr", "models_per_s"} <= names
    for name in names:
        kept = {e.step: e.value for e in events.Scalars(name)}
        assert kept == pytest.approx({r["step"]: r[name] for r in records}, rel=FP32_ROUNDING), name
    phases = text_of(events, "phases").splitlines()
    assert phases[0] == "| phase | share | calls | ms |"
    assert {"encode", "decode", "tokenise", "backward"} <= {line.split("|")[1].strip() for line in phases[2:]}
    assert not (tmp_path / "profile" / "trace.json").exists()  # the trace is --profile's


def test_a_resumed_run_hides_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def killed(record: dict[str, Any]) -> None:
        if record["step"] == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "tensorboard", on_record=killed)
    before = [e.step for e in read_back(tmp_path / "tensorboard").Scalars("loss")]
    assert before == [1, 4, 8, 12]  # the checkpoint is of step 8
    records = run(tmp_path, "tensorboard", resume=True)
    losses = [(e.step, e.value) for e in read_back(tmp_path / "tensorboard").Scalars("loss")]
    assert [step for step, _ in losses] == [1, 4, 8, 12, 16, 20, 24]
    assert dict(losses) == pytest.approx({r["step"]: r["loss"] for r in records}, rel=FP32_ROUNDING)


def test_tensorboard_has_the_pages_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    report(results(tmp_path), log_to="tensorboard")
    events = read_back(tmp_path / "tensorboard")
    assert events.Tags()["images"] == ["digits/overview", "digits/histograms"]
    pixels = image.open(io.BytesIO(events.Images("digits/overview")[0].encoded_image_string)).convert("L")
    assert pixels.width > 1000
    assert pixels.getextrema() == (pytest.approx(34, abs=40), 255)  # ink on white
    assert "| digits | S+B | 0.65 | 0.3 |" in text_of(events, "figures")
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from wslfast.cli import main

    main(["report", str(results(tmp_path)), "--log-to", "tensorboard"])
    assert read_back(tmp_path / "tensorboard").Tags()["images"]
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--log-to {None,tensorboard}" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_any_object_with_three_methods_is_a_hook(tmp_path: Path) -> None:
    kept = Kept()
    hook: LogHook = kept
    records = run(tmp_path / "run", hook)
    assert kept.steps == {r["step"]: {n: v for n, v in r.items() if n != "step"} for r in records}
    columns, rows = kept.tables["phases"]
    assert columns == ["phase", "share", "calls", "ms"]
    assert sum(row[1] for row in rows) == pytest.approx(1)
    assert not (tmp_path / "run" / "tensorboard").exists()
    plain = run(tmp_path / "plain", None)
    assert [r["loss"] for r in plain] == [r["loss"] for r in records]  # to the bit: who listens changes nothing


def test_a_hook_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Kept):
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            raise ConnectionError("the service is away")

    broken = Broken()
    records = run(tmp_path, broken)
    assert records[-1]["step"] == 24
    assert "phases" in broken.tables
    said = [r.message for r in caplog.records if "Broken.scalars failed" in r.message]
    assert len(said) == 1
    assert "the service is away" in said[0]


def test_who_profiles_already_is_left_alone(tmp_path: Path) -> None:
    kept = Kept()
    with profiling.profile():
        run(tmp_path, kept)
    assert kept.tables == {}
    assert len(kept.steps) == 7


@pytest.mark.parametrize(
    ("log_to", "words"),
    [
        ("wandb", "expected 'tensorboard' or an object with scalars, table, picture, got 'wandb'"),
        (object(), "object lacks"),
        (print, "lacks"),
    ],
)
def test_what_is_no_hook_is_refused_before_anything_is_written(tmp_path: Path, log_to: Any, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        run(tmp_path / "run", log_to)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(WslfastError, match=r"pip install 'wslfast\[tensorboard\]'"):
        hook_of("tensorboard", tmp_path)
    with pytest.raises(WslfastError, match="needs tensorboard"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_documented_hooks_are_hooks(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/logging.md as they stand, at most ten lines below their imports; with the service's own package where there is
    one, else with a stand-in that takes any call."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "logging.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if name in block.splitlines()[0]]
    assert len([line for line in code.split("\n\n", 1)[1].splitlines() if line.strip()]) <= 10
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new("RGB", (8, 8), "white").save(buffer, format="png")
    real = importlib.util.find_spec(name) is not None
    stand_in = MagicMock()
    if not real:
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.chdir(tmp_path)
    for variable, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns"),
    ):
        monkeypatch.setenv(variable, value)
    space: dict[str, Any] = {}
    exec(compile(code, name, "exec"), space)
    hook = space["WandB" if name == "wandb" else "MLflow"]()
    hook.scalars(3, {"loss": 0.5})
    hook.table("phases", ("phase", "ms"), [["encode", 1.0], ["decode", 2.0]])
    hook.picture("digits/overview", buffer.getvalue())
    if real and name == "mlflow":
        import mlflow

        run_id = mlflow.last_active_run().info.run_id
        assert mlflow.get_run(run_id).data.metrics == {"loss": 0.5}
        mlflow.end_run()
    if real and name == "wandb":
        import wandb

        wandb.finish()
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    if not real:
        assert len(stand_in.mock_calls) >= 4
