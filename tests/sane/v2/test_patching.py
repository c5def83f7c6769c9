"""The patch on ``sane`` 2.x: every name is replaced and reported, undone by identity, all or none; and what runs scripts and tests on it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sane2_package import CNN3, FILES, forget, lay_out, load, sane2  # noqa: F401 - a fixture
from tolerances import FP32

from wslfast.errors import WslfastError
from wslfast.sane import patch, patched, patching, replaced, v2
from wslfast.sane.__main__ import main
from wslfast.sane.v2.surface import TABLE

HERE = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    if patching._active is not None:
        patching._active.undo()
    forget()


def _everything(p: SimpleNamespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in vars(p).values():
        for name, value in vars(module).items():
            if not name.startswith("__"):
                found[f"{module.__name__}.{name}"] = value
                if isinstance(value, type):
                    found |= {f"{module.__name__}.{name}.{key}": body for key, body in vars(value).items() if key != "__dict__"}
    return found


def test_every_name_is_replaced_reported_and_put_back(sane2: SimpleNamespace) -> None:  # noqa: F811
    before = _everything(sane2)
    state = sane2.zoo_dataset_models.get_model(CNN3).state_dict()
    made = sane2.tokenizers.SparseTokenizer(tokensize=97, mode="full_model", reference_statedict=state)
    with patched() as handle:
        assert sorted(row["name"] for row in replaced()) == sorted(TABLE)
        assert {row["package"] for row in replaced()} == {"sane"}
        rows = {row["name"]: row["places"] for row in replaced()}
        assert rows["utils.git_re_basin.weight_matching"] == [
            "sane.utils.git_re_basin.weight_matching",
            "sane.data.checkpoint.checkpoint_augmentation.weight_matching",
        ]
        assert handle.added == ["sane.loss.BehavioralLoss", "sane.loss.GammaContrastReconBehavioralLoss"]
        assert sys.modules["sane.loss"].BehavioralLoss is v2.BehavioralLoss
        assert sane2.base.SANETokenizer.tokenize._wslfast
        tokens, mask, position = made.tokenize(statedict=state)  # objects made before, and names of arguments
        back = made.detokenize(tokens, mask=mask, position=position)
        assert all(torch.equal(back[name], state[name]) for name in state)
    assert replaced() == []
    after = _everything(sane2)
    assert list(after) == list(before)
    assert all(after[name] is value for name, value in before.items())
    assert torch.equal(made.tokenize(state)[0], tokens)


def test_a_run_is_the_same_patched_and_not(sane2: SimpleNamespace) -> None:  # noqa: F811
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    checkpoint = sane2.checkpoint.Checkpoint(sane2.zoo_dataset_models.get_model(CNN3), {})
    views = sane2.checkpoint_augmentation.PermutationAugmentation(sane2.git_re_basin.zoo_cnn_large_permutation_spec(), 2)
    made = sane2.tokenizers.DenseTokenizer(tokensize=97, mode="full_model")
    loss = sane2.reconstruction.MSEReconstructionLoss(normalize="batch")

    def run() -> tuple[torch.Tensor, float]:
        torch.manual_seed(1)
        x, mask, _ = (torch.stack(part) for part in zip(*(made.tokenize(one.model.state_dict()) for one in views(checkpoint))))
        return x, float(loss({"x": x, "x_hat": x + 0.1 * torch.randn_like(x), "mask": mask})["loss"])

    expected = run()
    with patched():
        found = run()
    assert torch.equal(expected[0], found[0])
    assert found[1] == pytest.approx(expected[1], rel=FP32)


def test_modules_imported_during_the_patch_are_patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    lay_out(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with patched() as handle:
        assert replaced() == []
        importlib.import_module("sane.loss")
        assert {row["name"] for row in replaced()} == {name for name in TABLE if name.startswith("loss.")}
        assert len(handle.added) == 2
        loaded = load()
        assert {row["name"] for row in replaced()} == set(TABLE)
    assert not hasattr(loaded.loss, "BehavioralLoss")


def test_drift_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    lay_out(tmp_path, drift=("def tokenize(self, statedict)", "def tokenize(self, checkpoint)"))
    monkeypatch.syspath_prepend(tmp_path)
    p = load()
    before = _everything(p)
    with pytest.raises(WslfastError, match=r"sane: nothing was replaced.*SANETokenizer\.tokenize.*\(self, checkpoint\)"):
        patch()
    assert _everything(p) == before


def test_another_package_of_the_name_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    lay_out(tmp_path)
    (tmp_path / "sane" / "orchestrator.py").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("sane.loss")
    importlib.import_module("sane.utils.git_re_basin")
    with patched() as handle:
        assert replaced() == []
        assert handle.added == []


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(folder)])}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_pytest_plugin_patches_and_lists(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "test_theirs.py").write_text(
        "from sane.utils.git_re_basin import weight_matching\n"
        "from sane.data.tokenizers import SparseTokenizer\n"
        "def test_it():\n    assert weight_matching._wslfast and SparseTokenizer.tokenize._wslfast\n"
    )
    done = _run(tmp_path, "-m", "pytest", "-q", "-p", "wslfast.sane.pytest_patch", "-p", "no:cacheprovider", "test_theirs.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "sane: utils.git_re_basin.weight_matching" in done.stdout
    assert "sane: data.tokenizers.base.SANETokenizer.tokenize" in done.stdout


@pytest.mark.slow
def test_a_script_runs_on_ours_as_it_is(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "helper.py").write_text("HELP = 1\n")
    (tmp_path / "sub" / "run.py").write_text(
        "import sys, helper\nfrom sane.trainer import SANETrainer\nimport sane.loss\n"
        "if __name__ == '__main__':\n    print(sys.argv, sane.loss.BehavioralLoss.__name__, SANETrainer.__module__, helper.HELP)\n"
    )
    done = _run(tmp_path, "-m", "wslfast.sane", "sub/run.py", "--config-name", "x")
    assert done.stdout.strip() == "['sub/run.py', '--config-name', 'x'] BehavioralLoss sane.trainer 1", done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--help"], 0), ([], 2), (["nothing.py"], "python -m wslfast.sane: nothing.py: no such file")]
)
def test_the_launcher_says_what_it_wants(
    arguments: list[str], said: int | str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wslfast.sane", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == said
    assert ("usage: python -m wslfast.sane SCRIPT.py" in capsys.readouterr().out) == (said in (0, 2))


def test_the_stand_in_has_every_name() -> None:
    paths = {path[:-3].replace("/", ".") for path in FILES}
    for name in TABLE:
        assert any(name.startswith(f"{path}.") for path in paths), name
