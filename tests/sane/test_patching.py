"""The patched route on a stand-in package: who is replaced where, what undo restores, and the ways that patching breaks."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
import runpy
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sane_package import PAPER, SANE, forget, write
from tolerances import FP32

import wslfast.sane
from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.population import Population, unstack
from wslfast.sane import package_sane, patch, patched, patching, replaced

NAMES = ("shrp", "SANE", "mzsane")
PARAMS = {"model::type": "CNN", "model::channels_in": 1, "model::nlin": "relu", "model::dropout": 0}
CONFIG = {
    "ae:i_dim": 201, "ae:d_model": 16, "ae:nhead": 2, "ae:num_layers": 1, "ae:lat_dim": 4, "ae:max_positions": [48, 5, 20],
    "training::windowsize": 48, "trainset::batchsize": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget(*NAMES)
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield
    left = replaced()
    forget(*NAMES)
    if patching._active is not None:
        patching._active.undo()  # one failure is not to take the tests after it down
    assert left == []
    assert sys.meta_path == finders


def _load(folder: Path, package: str = "shrp", files: dict[str, str] = PAPER, **changes: tuple[str, str]) -> types.SimpleNamespace:
    write(folder, package, files, **changes)
    importlib.invalidate_caches()
    modules = {Path(path).stem: importlib.import_module(f"{package}.{path[:-3].replace('/', '.')}") for path in files}
    return types.SimpleNamespace(**modules)


def _checkpoint() -> dict[str, torch.Tensor]:
    arch = Architecture.cnn()
    return {name: value[0] for name, value in unstack(arch.initial_weights(["kaiming_uniform"], [0]), arch).items()}


def _batch(k: int = 3) -> tuple[torch.Tensor, ...]:
    arch = Architecture.cnn()
    x, mask, positions = wslfast.TokenLayout(arch).tokenize(arch.initial_weights(["kaiming_uniform"] * k, list(range(k))))
    views = (x, mask.expand_as(x), positions.int().expand(k, -1, -1))
    return (*views, *views)


def _everything(p: types.SimpleNamespace) -> dict[str, Any]:
    return {f"{m.__name__}.{name}": value for m in vars(p).values() for name, value in vars(m).items() if not name.startswith("__")}


def test_names_are_rebound_in_every_importing_module_and_restored_by_identity(tmp_path: Path) -> None:
    p = _load(tmp_path)
    script = types.ModuleType("a_users_script")
    sys.modules["a_users_script"] = script
    script.Loss, script.cut = p.def_loss.GammaContrastReconLoss, p.dataset_auxiliaries.tokens_to_checkpoint  # under names of their own
    before, step = _everything(p), p.def_AE_module.AEModule.train_step
    bodies = {name: dict(vars(value)) for name, value in before.items() if isinstance(value, type)}
    with patched() as handle:
        assert handle.active
        assert script.Loss is p.def_loss.GammaContrastReconLoss is p.def_AE_module.GammaContrastReconLoss
        assert issubclass(script.Loss, wslfast.sane.GammaContrastReconLoss)
        assert script.Loss is not before["shrp.models.def_loss.GammaContrastReconLoss"]
        assert script.cut is p.dataset_auxiliaries.tokens_to_checkpoint is p.def_loss.tokens_to_checkpoint
        assert p.def_AE_module.AEModule.train_step is not step
        rows = {row["name"]: row for row in replaced()}
        assert rows["models.def_loss.GammaContrastReconLoss"]["places"] == [
            "shrp.models.def_loss.GammaContrastReconLoss",
            "shrp.models.def_AE_module.GammaContrastReconLoss",
            "a_users_script.Loss",
        ]
        assert rows["models.def_AE_module.AEModule.train_step"]["package"] == "shrp"
        assert len(rows) == 15
    assert not handle.active
    after = _everything(p)
    assert all(after[name] is value for name, value in before.items())
    assert script.Loss is before["shrp.models.def_loss.GammaContrastReconLoss"]
    assert p.def_AE_module.AEModule.train_step is step
    for name, body in bodies.items():
        assert all(vars(before[name]).get(key) is value for key, value in body.items() if key != "__dict__"), name


def test_a_published_step_runs_on_ours(tmp_path: Path) -> None:
    p = _load(tmp_path)
    with patched():
        module = p.def_AE_module.AEModule(CONFIG, _checkpoint(), PARAMS)
        parts = [module.train_step(*_batch())["loss/loss"] for _ in range(3)]
        assert parts[0].item() == pytest.approx(1, abs=FP32)  # every term over its first value
        assert parts[2] < parts[0]
        held = {id(q) for group in module.optimizer.param_groups for q in group["params"]}
        assert held == {id(q) for q in module.model.parameters()}  # no template network among them
        assert module.criterion.loss_recon.distillation_loss.scale > 0
    assert p.def_AE_module.AEModule(CONFIG, _checkpoint(), PARAMS).train_step(*_batch())["loss/loss"] == -1


def test_an_exception_in_the_block_restores_and_passes(tmp_path: Path) -> None:
    p = _load(tmp_path)
    before = _everything(p)
    with pytest.raises(KeyError, match="mine"), patched():
        raise KeyError("mine")
    assert _everything(p) == before


def test_a_second_call_is_a_no_op_and_the_outer_block_undoes(tmp_path: Path) -> None:
    p = _load(tmp_path)
    original = p.def_AE.AE
    with patched() as outer:
        ours = p.def_AE.AE
        with patched() as inner:
            assert inner is outer
        assert patch() is outer
        assert p.def_AE.AE is ours
        with pytest.raises(WslfastError, match="another patch is on"):
            patch(semantics="corrected")
    assert p.def_AE.AE is original
    handle = patch()
    handle.undo()
    handle.undo()
    assert p.def_AE.AE is original


def test_modules_imported_during_the_patch_are_patched_and_restored(tmp_path: Path) -> None:
    write(tmp_path, "shrp", PAPER)
    (tmp_path / "a_users_script.py").write_text("from shrp.models.def_AE_module import AEModule, AE\nfrom shrp.models import def_loss\n")
    importlib.invalidate_caches()
    with patched():
        assert replaced() == []
        script = importlib.import_module("a_users_script")
        assert issubclass(script.AE, wslfast.sane.AE)
        assert script.AE is sys.modules["shrp.models.def_AE"].AE
        assert issubclass(script.def_loss.NT_Xent, wslfast.sane.NT_Xent)
        assert script.AEModule.train_step._wslfast
        assert type(script.def_loss.__loader__).__module__ != "wslfast.sane.hook"
    assert not issubclass(script.AE, wslfast.sane.AE)
    assert script.AE is sys.modules["shrp.models.def_AE"].AE
    assert script.def_loss.NT_Xent.__mro__[1] is torch.nn.Module


def test_a_script_of_the_package_runs_as_main(tmp_path: Path) -> None:
    write(tmp_path, "shrp", PAPER)
    (tmp_path / "shrp" / "train.py").write_text("from shrp.models.def_loss import NT_Xent\n")
    importlib.invalidate_caches()
    with patched():
        names = runpy.run_module("shrp.train", run_name="__main__")  # asks the loader for the code
        assert issubclass(names["NT_Xent"], wslfast.sane.NT_Xent)


def test_signature_drift_replaces_nothing(tmp_path: Path) -> None:
    p = _load(tmp_path, drift=("tokens, pos, reference_checkpoint, ignore_bn=False, recipe=None", "tokens, pos, reference, recipe=None"))
    before = _everything(p)
    with pytest.raises(WslfastError, match=r"shrp: nothing was replaced.*tokens_to_checkpoint.*\(tokens, pos, reference, recipe=None\)"):
        patch()
    assert _everything(p) == before


@pytest.mark.parametrize(
    "change",
    [("temperature=2.0):", "temperature=3.0):"), ("def forward(self, z_i, z_j, y, t, m, p, z, z_hat)", "def forward(self, z_i, z_j, y, t, m)"),
     ("def train_step(self, x_i, m_i, p_i, x_j, m_j, p_j)", "def train_step(self, batch)")],
    ids=["default", "forward", "method"],
)  # fmt: skip
def test_drift_of_a_default_of_a_forward_and_of_a_method(tmp_path: Path, change: tuple[str, str]) -> None:
    p = _load(tmp_path, drift=change)
    before = _everything(p)
    with pytest.raises(WslfastError, match="nothing was replaced"), patched():
        pytest.fail("entered")
    assert _everything(p) == before


def test_drift_in_a_module_imported_later_takes_the_whole_patch_back(tmp_path: Path) -> None:
    write(tmp_path, "shrp", PAPER, drift=("def __init__(self, config):", "def __init__(self, settings):"))
    importlib.invalidate_caches()
    handle = patch()
    tokens = importlib.import_module("shrp.datasets.dataset_auxiliaries")
    assert tokens.tokenize_checkpoint({"weight": torch.ones(1, 2)}, 2) != "theirs"
    with pytest.raises(WslfastError, match=r"def_AE\.AE"):
        importlib.import_module("shrp.models.def_AE")
    assert not handle.active
    assert tokens.tokenize_checkpoint({}, 2) == "theirs"


def test_an_unsupported_network_falls_back_once_or_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    p = _load(tmp_path)
    original = p.def_loss.GammaContrastReconLoss
    params = PARAMS | {"model::type": f"Net of {tmp_path.name}"}
    with patched(), caplog.at_level(logging.WARNING, logger="wslfast"):
        made = [p.def_loss.GammaContrastReconLoss(0.5, "mean", 3, 0.1, reference_checkpoint={}, reference_params=params) for _ in range(2)]
        assert all(type(loss) is original for loss in made)  # and it names itself, its parts and a static method as before
        y = torch.ones(2, 3, 4)
        assert made[0](y, y, y, y, y, None, None, None)["loss/loss"] == 48
    assert sum("stays the original" in record.message for record in caplog.records) == 1
    assert made[0](y, y, y, y, y, None, None, None)["loss/loss"] == 48
    with patched(strict=True), pytest.raises(WslfastError, match=r"strict=True.*model::type"):
        p.def_loss.DistillationLoss({}, params)
    with patched():
        config = CONFIG | {"ae:use_layer_embs": True}
        assert p.def_AE.AE(config).config is config


def test_a_dump_that_only_running_its_code_could_read_falls_back(tmp_path: Path) -> None:
    p = _load(tmp_path)
    original = p.def_loss.GammaContrastReconLoss
    (tmp_path / "dump.pt").write_bytes(b"a pickle of something")
    checkpoint = Architecture.cnn().initial_weights(["kaiming_uniform"], [0])
    state = dict(Population(Architecture.cnn(), checkpoint).state_dict(0))
    given = {
        "reference_checkpoint": state,
        "reference_params": PARAMS,
        "queryset_distillation": "data",
        "queryset_dump": str(tmp_path / "dump.pt"),
    }
    with patched():
        assert type(p.def_loss.GammaContrastReconLoss(0.5, "mean", 3, 0.1, **given)) is original
    with patched(strict=True), pytest.raises(WslfastError, match=r"strict=True.*dump: cannot be read"):
        p.def_loss.GammaContrastReconLoss(0.5, "mean", 3, 0.1, **given)


def test_objects_and_subclasses_made_before_keep_working(tmp_path: Path) -> None:
    p = _load(tmp_path)
    loss = p.def_loss.DistillationLoss({}, PARAMS)

    class Mine(p.def_loss.ReconDistillationLoss):  # type: ignore[misc, name-defined]
        pass

    y = torch.ones(2, 3, 4)
    with patched():
        assert loss(y, y, y, None)["loss_recon"] == 48
        assert Mine({}, PARAMS)(y, y, y, None)["loss_recon"] == 48
        assert pickle.loads(pickle.dumps(p.def_loss.NT_Xent)) is p.def_loss.NT_Xent
    assert loss(y, y, y, None)["loss_recon"] == 48


def test_objects_made_during_the_patch_can_be_copied_and_pickled(tmp_path: Path) -> None:
    p = _load(tmp_path)
    x, _, positions = _batch()[:3]
    with patched():
        module = p.def_AE_module.AEModule(CONFIG, _checkpoint(), PARAMS)
        stored = tmp_path / "whole.pt"
        torch.save(module.model, stored)
        # not under the published name's constructor: none of these has arguments to decide by
        for other in (copy.deepcopy(module).model, pickle.loads(pickle.dumps(module.model)), torch.load(stored, weights_only=False)):
            assert type(other) is p.def_AE.AE
            assert torch.equal(other.forward_encoder(x, positions), module.model.forward_encoder(x, positions))
        assert type(copy.copy(module.criterion)) is p.def_loss.GammaContrastReconLoss
    assert torch.equal(copy.deepcopy(module).model.forward_encoder(x, positions), module.model.forward_encoder(x, positions))


def test_objects_of_either_time_are_of_the_published_name_during_the_patch(tmp_path: Path) -> None:
    p = _load(tmp_path)
    before = p.def_loss.DistillationLoss({}, PARAMS)
    with patched():
        during = p.def_loss.DistillationLoss(_checkpoint(), PARAMS)
        fallen = p.def_loss.DistillationLoss({}, PARAMS | {"model::type": "ResCNN"})
        assert all(isinstance(loss, p.def_loss.DistillationLoss) for loss in (before, during, fallen))
        assert not isinstance(before, p.def_loss.NT_Xent)

        class Mine(p.def_loss.DistillationLoss):  # type: ignore[misc, name-defined]
            pass

        assert not isinstance(before, Mine)


def test_modules_made_in_memory_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    class NT_Xent(torch.nn.Module):
        def __init__(self, batch_size: int, temperature: float) -> None:
            super().__init__()

        def forward(self, z_i: torch.Tensor, z_j: torch.Tensor) -> torch.Tensor:
            return z_i

    for name in ("shrp", "shrp.models", "shrp.models.def_loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # without a spec, a file or a loader
    home = sys.modules["shrp.models.def_loss"]
    home.NT_Xent = NT_Xent  # type: ignore[attr-defined]
    with patched():
        assert home.NT_Xent is not NT_Xent
        assert [row["name"] for row in replaced()] == ["models.def_loss.NT_Xent"]
        assert home.NT_Xent(2, 0.1)(torch.randn(2, 3), torch.randn(2, 3)).shape == ()
    assert home.NT_Xent is NT_Xent


def test_a_reloaded_module_is_patched_again(tmp_path: Path) -> None:
    p = _load(tmp_path)
    held = p.def_AE_module.GammaContrastReconLoss
    with patched():
        importlib.reload(p.def_loss)
        assert issubclass(p.def_loss.NT_Xent, wslfast.sane.NT_Xent)
        importlib.reload(p.def_AE_module)
        module = p.def_AE_module.AEModule(CONFIG, _checkpoint(), PARAMS)
        assert module.train_step(*_batch())["loss/loss"].item() == pytest.approx(1, abs=FP32)
        names = {row["name"] for row in replaced()}
        assert len(names) == 15
    assert not issubclass(p.def_loss.NT_Xent, wslfast.sane.NT_Xent)
    assert p.def_AE_module.AEModule(CONFIG, {}, PARAMS).train_step(*_batch())["loss/loss"] == -1
    assert held is not p.def_loss.GammaContrastReconLoss


def test_modules_that_answer_nothing_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"no {name}")

    lazy = Lazy("a_lazy_module")
    del vars(lazy)["__name__"]
    monkeypatch.setitem(sys.modules, "a_lazy_module", lazy)
    p = _load(tmp_path)
    with patched():
        assert issubclass(p.def_loss.NT_Xent, wslfast.sane.NT_Xent)


def test_threads_that_patch_at_once_leave_nothing_behind(tmp_path: Path) -> None:
    p = _load(tmp_path)
    original = p.def_loss.NT_Xent
    failed: list[BaseException] = []

    def work() -> None:
        for _ in range(20):
            try:
                with patched():
                    p.def_loss.NT_Xent(2, 0.1)
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert p.def_loss.NT_Xent is original
    assert replaced() == []


def test_subclasses_made_during_the_patch_are_of_ours(tmp_path: Path) -> None:
    p = _load(tmp_path)
    with patched():

        class Mine(p.def_AE.AE):  # type: ignore[misc, name-defined]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.mine = True

        assert Mine(CONFIG).mine
        assert isinstance(Mine(CONFIG), wslfast.sane.AE)


def test_sane_itself_has_no_scale_no_positions_and_its_own_keys(tmp_path: Path) -> None:
    p = _load(tmp_path, "SANE", SANE)
    with patched():
        assert issubclass(p.def_loss.NT_Xent, package_sane.NT_Xent)
        loss = p.def_loss.GammaContrastReconLoss(0.05, "mean", 2, 0.1)
        y = torch.randn(4, 5, 6)
        out = loss(z_i=torch.randn(2, 3), z_j=torch.randn(2, 3), y=y, t=y + 1, m=torch.ones_like(y, dtype=torch.bool))
        assert set(out) == {"loss/loss", "loss/loss_contrast", "loss/loss_recon", "loss/rsq", "debug/z_norm", "debug/z_var"}
        assert out["loss/loss_recon"].item() == pytest.approx(1)
        assert {row["package"] for row in replaced()} == {"SANE"}
    assert p.def_loss.MaskedReconLoss("mean")(y, y, y) == "theirs"


def test_both_packages_at_once_are_all_or_none(tmp_path: Path) -> None:
    paper = _load(tmp_path, "shrp")
    other = _load(tmp_path, "mzsane", SANE, drift=("batch_size, temperature", "batch_size, tau"))
    before = _everything(paper) | _everything(other)
    with pytest.raises(WslfastError, match="mzsane: nothing was replaced"):
        patch()
    assert _everything(paper) | _everything(other) == before


def test_an_unrelated_sane_is_not_touched(tmp_path: Path) -> None:
    other = _load(tmp_path, "sane", PAPER)
    before = _everything(other)
    try:
        with patched():
            assert replaced() == []
            assert _everything(other) == before
    finally:
        forget("sane")


def test_semantics_and_flags_reach_the_replacements(tmp_path: Path) -> None:
    p = _load(tmp_path)
    with patched(batch_attention=False):
        assert not p.def_AE.AE(CONFIG).semantics.batch_attention
        assert p.def_AE.AE(CONFIG).semantics.decoder_dropout
    with patched(semantics="corrected"):
        assert p.def_loss.NT_Xent(3, 0.1).scale == 1
    with pytest.raises(WslfastError, match="got 'batch_atention'"):
        patch(batch_atention=False)
    with pytest.raises(WslfastError, match="'published' or 'corrected'"):
        patch(semantics="fixed")


def test_explicit_imports_stay_what_they_are(tmp_path: Path) -> None:
    p = _load(tmp_path)
    script = types.ModuleType("a_users_script")
    sys.modules["a_users_script"] = script
    script.AE = wslfast.sane.AE
    with patched():
        assert script.AE is wslfast.sane.AE is not p.def_AE.AE
    assert script.AE is wslfast.sane.AE
