"""The behavioral loss as a loss of ``sane`` 2.x: its values beside plain modules, its interface, and tokens that are of no whole network."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sane2_package import CNN3, forget, sane2, trial  # noqa: F401 - a fixture
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP, FP32_ROUNDING, FP32_SMALL
from torch import nn

from wslfast import Architecture, WslfastError, batched_behavioral_loss
from wslfast.sane import v2
from wslfast.sane.v2 import behavior
from wslfast.sane.v2.layout import layout_for
from wslfast.sane.v2.networks import networks_of

Parts = dict[str, torch.Tensor]
SMALL = {"model::type": "Small", "model::o_dim": 3}
D = {"CNN3": 97, "Small": 11}


def _model(p: SimpleNamespace, config: dict[str, Any], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = p.zoo_dataset_models.get_model(config)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_mean" in name or name.startswith("bn"):
                value.add_(torch.rand_like(value.float()) if value.is_floating_point() else 0)
    return model.eval()


def _batch(p: SimpleNamespace, configs: list[dict[str, Any]], kind: str = "Sparse", length: int = 0) -> tuple[list[nn.Module], Parts]:
    """Networks, and their tokens padded to ``length``, reconstructed with an error of 5 %."""
    models = [_model(p, config, seed) for seed, config in enumerate(configs)]
    made = getattr(p.tokenizers, f"{kind}Tokenizer")(tokensize=D[configs[0]["model::type"]], mode="full_model")
    cut = [made.tokenize(model.state_dict()) for model in models]
    t = max(length, *(len(tokens) for tokens, _, _ in cut))
    rows = []
    for tokens, mask, position in cut:
        more = t - len(tokens)
        steps = torch.arange(1, more + 1, dtype=torch.int32).unsqueeze(1)
        grown = position[-1:] + steps * torch.tensor([[1, 0, 1]], dtype=torch.int32)
        empty = torch.zeros(more, tokens.shape[1])
        rows.append((torch.cat([tokens, empty]), torch.cat([mask, empty.bool()]), torch.cat([position, grown])))
    x, mask, position = (torch.stack(part) for part in zip(*rows))
    torch.manual_seed(9)
    return models, {"x": x, "x_hat": x * (1 + 0.05 * torch.randn_like(x)), "mask": mask, "p": position}


def _expected(p: SimpleNamespace, models: list[nn.Module], parts: Parts, queries: torch.Tensor, kind: str = "Sparse") -> torch.Tensor:
    """Modules one after another, in float64, each with its original's running statistics."""
    values = []
    for j, model in enumerate(models):
        made = getattr(p.tokenizers, f"{kind}Tokenizer")(
            tokensize=parts["x"].shape[2], mode="full_model", reference_statedict=model.state_dict()
        )
        outputs = []
        for key in ("x", "x_hat"):
            copy_ = copy.deepcopy(model)
            real = parts["mask"][j].any(1)
            copy_.load_state_dict(made.detokenize(parts[key][j][real], parts["mask"][j][real], parts["p"][j][real]))
            outputs.append(copy_.double()(queries.double()))
        values.append((outputs[0] - outputs[1]).square().sum(1).mean() / 2)
    return torch.stack(values).detach()


def _drawn(loss: Any, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    return loss.queries.draw()


@pytest.mark.parametrize("kind", ["Sparse", "Dense"])
def test_it_is_the_library_call_on_their_tokens(sane2: SimpleNamespace, kind: str) -> None:  # noqa: F811
    models, parts = _batch(sane2, [CNN3] * 3, kind)
    loss = v2.BehavioralLoss(zoo=models[0], n_queries=7, input_shape=(3, 32, 32))
    assert isinstance(loss, sane2.loss.SANELoss)
    leaf = parts["x_hat"].clone().requires_grad_()
    queries = _drawn(loss)
    torch.manual_seed(3)
    out = loss(parts | {"x_hat": leaf})
    out["loss"].backward()
    arch = Architecture.from_module(models[0], (3, 32, 32))
    layout = layout_for(kind.lower(), 97, arch)
    other = parts["x_hat"].clone().requires_grad_()
    expected = batched_behavioral_loss(layout.detokenize(other), layout.detokenize(parts["x"]), queries, arch)
    expected.backward()
    assert float(out["loss"].detach()) == pytest.approx(float(expected.detach()), rel=FP32_ROUNDING)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=FP32, atol=FP32_SMALL)
    assert not leaf.grad[~parts["mask"]].any()  # type: ignore[index]
    assert float(out["loss"].detach()) == pytest.approx(
        float(_expected(sane2, models, parts, queries, kind).detach().mean()), rel=FP32_DEEP
    )
    assert out["loss"] is out["loss_behavioral"]
    assert not list(loss.parameters())
    assert not loss.state_dict()


@pytest.mark.parametrize("criterion", ["softmax_mse", "cross_entropy", "distillation"])
def test_criteria_reductions_and_units(sane2: SimpleNamespace, criterion: str) -> None:  # noqa: F811
    models, parts = _batch(sane2, [CNN3] * 2)
    settings: dict[str, Any] = {"zoo": models[0], "n_queries": 5, "input_shape": (3, 32, 32)}
    loss = v2.BehavioralLoss(**settings, criterion=criterion, temperature=3.0, reduction="sum")
    queries = _drawn(loss)
    torch.manual_seed(3)
    out = loss(parts)
    arch = Architecture.from_module(models[0], (3, 32, 32))
    rows = [layout_for("sparse", 97, arch).detokenize(parts[key]) for key in ("x_hat", "x")]
    expected = batched_behavioral_loss(*rows, queries, arch, criterion=criterion, temperature=3.0, reduction="sum")
    assert float(out["loss"]) == pytest.approx(float(expected), rel=FP32_ROUNDING)
    assert set(out) == {"loss", "loss_behavioral"}
    plain, unit = (v2.BehavioralLoss(**settings, normalize=n) for n in (None, "batch"))
    flat = _expected_mean(plain, parts)
    results = []
    for made in (plain, unit):
        torch.manual_seed(3)
        results.append(made(parts))
    assert float(results[1]["loss"]) == pytest.approx(float(results[0]["loss"]) / flat, rel=FP32)
    assert float(results[0]["loss_behavioral_rsq"]) == pytest.approx(1 - float(results[1]["loss"]), rel=FP32_DEEP)


def _expected_mean(loss: Any, parts: Parts) -> float:
    """Half the variance of the originals' outputs over queries, summed over classes."""
    networks = loss.networks[0]
    arch = networks.architecture(networks.classes)
    rows = layout_for("sparse", 97, arch).detokenize(parts["x"])
    from wslfast import batched_forward

    return float(batched_forward(rows, _drawn(loss), arch).double().var(1, unbiased=False).sum(1).mean() / 2)


def test_networks_of_several_class_counts_in_padded_windows(sane2: SimpleNamespace) -> None:  # noqa: F811
    configs = [{**CNN3, "model::o_dim": k} for k in (10, 4, 10, 7)]
    models, parts = _batch(sane2, configs, length=130)
    loss = v2.BehavioralLoss(zoo=models[0], n_queries=6, input_shape=(3, 32, 32))
    queries = _drawn(loss)
    found = loss.values([(parts["x"], parts["x_hat"], parts["mask"], parts["p"])], queries)[0]
    torch.testing.assert_close(found.double(), _expected(sane2, models, parts, queries), rtol=FP32_DEEP, atol=FP32_SMALL)


def test_two_views_are_one_batch(sane2: SimpleNamespace) -> None:  # noqa: F811
    models, parts = _batch(sane2, [CNN3] * 3)
    spec = sane2.git_re_basin.zoo_cnn_large_permutation_spec()
    viewed = sane2.checkpoint_augmentation.PermutationAugmentation(spec, 1)
    made = sane2.tokenizers.SparseTokenizer(tokensize=97, mode="full_model")
    x = torch.stack([made.tokenize(viewed(sane2.checkpoint.Checkpoint(m))[1].model.state_dict())[0] for m in models])
    tensors = {f"{k}_i": v for k, v in parts.items()} | {
        "x_j": x, "x_hat_j": 1.02 * x, "mask_j": parts["mask"], "p_j": parts["p"]
    }  # fmt: skip
    loss = v2.BehavioralLoss(zoo=models[0], n_queries=6, input_shape=(3, 32, 32))
    queries = _drawn(loss)
    torch.manual_seed(3)
    out = loss(tensors)
    one = _expected(sane2, models, parts, queries)
    two = _expected(sane2, models, {**parts, "x": x, "x_hat": 1.02 * x}, queries)
    assert float(out["loss"]) == pytest.approx(float(torch.cat([one, two]).mean()), rel=FP32_DEEP)


def test_windows_in_a_row_are_put_together(sane2: SimpleNamespace) -> None:  # noqa: F811
    models, parts = _batch(sane2, [CNN3, {**CNN3, "model::o_dim": 6}])
    loss = v2.BehavioralLoss(zoo=models[0], n_queries=4, input_shape=(3, 32, 32))
    queries = _drawn(loss)
    expected = loss.values([tuple(parts.values())], queries)[0]
    t = parts["x"].shape[1]
    for width, step in ((50, 50), (50, 37)):  # one after another, and overlapping
        cut: dict[str, list[torch.Tensor]] = {key: [] for key in parts}
        for j in range(2):
            for start in range(0, t - (width - step), step):
                for key, value in parts.items():
                    window = value[j, start : start + width]
                    cut[key].append(torch.cat([window, window.new_zeros(width - len(window), window.shape[1])]))
        windows = {key: torch.stack(value) for key, value in cut.items()}
        found = loss.values([tuple(windows.values())], queries)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        with pytest.raises(WslfastError, match=r"row 0 is a window of tokens \d+ to \d+ of a network, and the batch begins with it"):
            loss({key: value[1:] for key, value in windows.items()})
        order = [0, 2, 1, *range(3, len(windows["x"]))]
        with pytest.raises(WslfastError, match=r"unshuffled|consecutive"):
            loss({key: value[order] for key, value in windows.items()})
    with pytest.raises(WslfastError, match="a window that does not cover the network"):
        loss({key: value[:, :60] for key, value in parts.items()})


@pytest.mark.parametrize("statistics", ["queries", "reference"])
def test_batch_norm(sane2: SimpleNamespace, statistics: str) -> None:  # noqa: F811
    models, parts = _batch(sane2, [SMALL, SMALL, {**SMALL, "model::o_dim": 5}], length=30)
    loss = v2.BehavioralLoss(zoo=models[0], n_queries=12, input_shape=(1, 9, 9), statistics=statistics)
    queries = _drawn(loss)
    found = loss.values([tuple(parts.values())], queries)[0]
    for model in models:  # what each of these networks has in place of the statistics that no token holds
        if statistics == "reference":
            for name, value in models[0].state_dict().items():
                if "running" in name:
                    model.get_buffer(name).copy_(value)
        else:
            hooks = []
            for norm in (model.bn1, model.bn2):

                def note(part: nn.Module, arguments: Any) -> None:
                    x = arguments[0].detach()
                    part.running_mean = x.mean((0, 2, 3)).clone()
                    part.running_var = x.var((0, 2, 3), unbiased=False).clone()

                hooks.append(norm.register_forward_pre_hook(note))
            with torch.no_grad():
                model(queries)
            for hook in hooks:
                hook.remove()
    torch.testing.assert_close(found.double(), _expected(sane2, models, parts, queries), rtol=FP32_AMPLIFIED, atol=FP32_ROUNDING)
    leaf = parts["x_hat"].clone().requires_grad_()
    loss({**parts, "x_hat": leaf})["loss"].backward()
    assert bool(leaf.grad[parts["mask"]].isfinite().all())  # type: ignore[index]
    assert float(leaf.grad.abs().sum()) > 0  # type: ignore[union-attr]
    torch.manual_seed(3)
    assert float(loss({**parts, "x_hat": parts["x"]})["loss"]) == 0


def test_it_composes_and_scripts_find_it_by_name(sane2: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    models, parts = _batch(sane2, [CNN3] * 3)
    info = trial(tmp_path / "zoo", CNN3, models[0])
    torch.save({"trainset": torch.utils.data.TensorDataset(torch.randn(9, 3, 32, 32), torch.zeros(9))}, tmp_path / "zoo" / "dataset.pt")
    assert Path(info.state_dict_path).is_file()
    settings = {
        "class": "GammaContrastReconBehavioralLoss", "gamma": 0.1, "beta": 0.25, "normalize": "batch",
        "behavior": {"zoo": str(tmp_path / "zoo"), "queryset": "data", "n_queries": 4},
    }  # fmt: skip
    assert not hasattr(sane2.loss, "BehavioralLoss")
    trainer = v2.SANETrainer()
    assert isinstance(trainer, sane2.trainer.SANETrainer)
    assert type(trainer).__name__ == "SANETrainer"
    from wslfast.sane import patching

    try:
        trainer.setup({"loss": settings})
        assert sys.modules["sane.loss"].BehavioralLoss is v2.BehavioralLoss
        z, projections = torch.randn(3, 4, 2), torch.randn(3, 5)
        tensors = {f"{k}_{v}": t for v in "ij" for k, t in {**parts, "z": z, "z_p": projections + (v == "j")}.items()}
        out = trainer.loss_fn(tensors)
        expected = 0.1 * out["loss_contrastive"] + 0.9 * (0.25 * out["loss_mse_reconstruction"] + 0.75 * out["loss_behavioral"])
        assert float(out["loss"]) == pytest.approx(float(expected), rel=FP32)
        made = v2.BehavioralLoss(name="mine", zoo=models[0], input_shape=(3, 32, 32))
        assert made.name == "loss_mine"
        whole = sane2.loss.CompositeLoss("both", [made, sane2.loss.MSEReconstructionLoss()], [0.5, 0.5])
        assert {"loss", "loss_both", "loss_mine", "loss_mse_reconstruction"} <= set(whole({**parts, "z": z}))
        assert type(pickle.loads(pickle.dumps(made))) is v2.BehavioralLoss
        assert type(copy.deepcopy(made)) is v2.BehavioralLoss
        assert pickle.loads(pickle.dumps(v2.SANETrainer)) is v2.SANETrainer  # as a worker of ray finds it
    finally:
        if (on := patching.current()) is not None:
            on.undo()
    images = trainer.loss_fn.losses[2].queries.images
    assert images.shape == (9, 3, 32, 32)


def test_tokens_without_a_mask_that_may_be_of_two_tokenizers_are_not_guessed_at(sane2: SimpleNamespace) -> None:  # noqa: F811
    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 2)).eval()  # of 12 numbers two tokens of 10, dense or sparse
    state = network.state_dict()
    values = {}
    for kind in ("Dense", "Sparse"):
        made = getattr(sane2.tokenizers, f"{kind}Tokenizer")(tokensize=10, mode="full_model")
        x, mask, position = (part.unsqueeze(0) for part in made.tokenize(state))
        assert x.shape == (1, 2, 10)
        parts = {"x": x, "x_hat": 1.1 * x}
        settings: dict[str, Any] = {"zoo": network, "n_queries": 7, "input_shape": (5,)}
        with pytest.raises(WslfastError, match="as many dense as sparse ones"):
            v2.BehavioralLoss(**settings)(parts)
        for more, own in (({"mask": mask, "p": position}, {}), ({}, {"tokenizer": kind.lower()})):
            torch.manual_seed(0)
            values[kind, len(own)] = float(v2.BehavioralLoss(**settings, **own)({**parts, **more})["loss"])
    assert len(set(values.values())) == 1


def test_no_mask_no_positions_and_other_input(sane2: SimpleNamespace) -> None:  # noqa: F811
    models, parts = _batch(sane2, [CNN3] * 2)
    loss = v2.BehavioralLoss(
        zoo=[models[0], sane2.checkpoint.Checkpoint(models[1], {"model_config": CNN3})], n_queries=3, input_shape=(3, 32, 32)
    )
    assert len(loss.networks) == 1
    torch.manual_seed(3)
    expected = float(loss(parts)["loss"])
    torch.manual_seed(3)
    assert float(loss({"x": parts["x"], "x_hat": parts["x_hat"]})["loss"]) == expected
    for change, words in (
        ({"x_hat": parts["x_hat"][:1]}, "of one shape"), ({"mask": parts["mask"][:1]}, "mask: expected the shape of x"),
        ({"p": parts["p"][..., :2]}, "p: expected positions"), ({"mask": torch.zeros_like(parts["mask"])}, "padding alone"), ({"x": None}, "x: expected tokens"),
    ):  # fmt: skip
        with pytest.raises(WslfastError, match=words):
            loss({**parts, **change})
    with pytest.raises(WslfastError, match="expected 'x' and 'x_hat'"):
        loss({"tokens": parts["x"]})
    with pytest.raises(WslfastError, match="where there is no mask"):
        loss({"x": parts["x"][:, :9], "x_hat": parts["x"][:, :9]})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"criterion": "l2"}, "criterion"), ({"queryset": "mine"}, "queryset"), ({"normalize": "token"}, "normalize"), ({"reduction": "none"}, "reduction"),
        ({"statistics": "own"}, "statistics"), ({"tokenizer": "dense "}, "tokenizer"), ({"zoo": None}, "zoo"), ({"zoo": "nowhere"}, "no such folder"),
        ({"queryset": "data"}, "dump"), ({"normalize": "batch", "criterion": "distillation"}, "normalize"), ({"input_shape": None}, "input_shape"),
        ({"n_querys": 3}, r"expected settings of \['queryset', .*\], got \['n_querys'\]"),
    ]  # fmt: skip
    for settings, words in wrong:
        with pytest.raises(WslfastError, match=words):
            v2.BehavioralLoss(**{"zoo": models[0], "input_shape": (3, 32, 32), **settings})
    for lacking in (None, {}, {"n_queries": 3}):
        with pytest.raises(WslfastError, match="behavior: expected the settings of BehavioralLoss, with 'zoo'"):
            v2.GammaContrastReconBehavioralLoss(behavior=lacking)


def test_a_broken_reconstruction_is_left_out_where_asked(sane2: SimpleNamespace) -> None:  # noqa: F811
    models, parts = _batch(sane2, [CNN3] * 3)
    broken = parts["x_hat"].clone()
    broken[1] = float("nan")
    settings: dict[str, Any] = {"zoo": models[0], "n_queries": 3, "input_shape": (3, 32, 32)}
    loss = v2.BehavioralLoss(**settings, nan_policy="omit")
    queries = _drawn(loss)
    torch.manual_seed(3)
    found = loss({**parts, "x_hat": broken})["loss"]
    kept = loss.values([tuple(parts.values())], queries)[0][[0, 2]].mean()
    assert float(found) == pytest.approx(float(kept), rel=FP32_ROUNDING)
    assert bool(v2.BehavioralLoss(**settings)({**parts, "x_hat": broken})["loss"].isnan())
    # an original without finite outputs has no unit either: what is left is in the units of what is left
    torch.manual_seed(3)
    lost = v2.BehavioralLoss(**settings, nan_policy="omit", normalize="batch")
    x = parts["x"].clone()
    x[1] = float("nan")
    torch.manual_seed(3)
    found = lost({**parts, "x": x})
    values, units = lost.values([tuple(parts.values())], queries)
    assert units is not None
    share = float(values[[0, 2]].mean() / units[[0, 2]].mean())
    assert float(found["loss"]) == pytest.approx(share, rel=FP32_ROUNDING)
    assert float(found["loss_behavioral_rsq"]) == pytest.approx(1 - share, rel=FP32_ROUNDING, abs=FP32_ROUNDING)
    with pytest.raises(WslfastError, match="no network of the batch"):
        loss({**parts, "x_hat": torch.full_like(broken, float("nan"))})


def _answers(module: nn.Module, architecture: Architecture, row: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """``[n, numbers]`` of a module with a row's weights, in float64."""
    state = {name: row[slot.offset : slot.stop].view(slot.shape).double() for name, slot in architecture.slots.items()}
    return torch.func.functional_call(module, state, (queries,)).flatten(1 if queries.ndim == 4 else 0).view(len(queries), -1).detach()


def _set_up(module: nn.Module, **options: Any) -> behavior.Behavior:
    loss = behavior.Behavior()
    loss.name = "behavior"
    loss.set_up(module.eval(), **options)
    return loss


@pytest.mark.parametrize("normalize", [None, "batch"])
@pytest.mark.parametrize("answers", ["images", "one number"])
def test_the_variance_of_answers_of_any_shape(answers: str, normalize: str | None) -> None:
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    numbers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    module, shape = (images, (1, 7, 7)) if answers == "images" else (numbers, (4,))
    loss = _set_up(module, input_shape=shape, n_queries=6, statistics="reference", normalize=normalize)
    networks = loss.networks[0]
    architecture = networks.architecture(networks.classes)
    place = layout_for("sparse", 9, architecture)
    originals = networks.reference_row(networks.classes) + 0.1 * torch.randn(3, architecture.num_weights)
    rows = originals + 0.01 * torch.randn_like(originals)
    x, x_hat = place.tokenize(originals).tokens, place.tokenize(rows).tokens
    queries = _drawn(loss).double()
    torch.manual_seed(3)
    out = loss.forward({"x": x, "x_hat": x_hat, "mask": place.mask.expand_as(x), "p": place.positions.expand(3, -1, -1)})
    made = [torch.stack([_answers(module, architecture, row, queries) for row in part]) for part in (originals, rows)]
    value = (made[1] - made[0]).square().sum((1, 2)).mean() / 12
    unit = (made[0] - made[0].mean(1, keepdim=True)).square().sum((1, 2)).mean() / 12
    assert out["loss"].item() == pytest.approx((value / unit if normalize else value).item(), rel=1e-4)
    assert out["behavior_rsq"].item() == pytest.approx(1 - (value / unit).item(), rel=1e-4)


def test_one_number_a_channel_has_no_variance() -> None:
    loss = _set_up(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), input_shape=(4,), n_queries=1)
    networks = loss.networks[0]
    place = layout_for("sparse", 9, networks.architecture(networks.classes))
    x = place.tokenize(networks.reference_row(networks.classes)[None]).tokens
    with pytest.raises(WslfastError, match="n_queries: expected 2 or more, as batch norm '1' has one number a channel"):
        loss.forward({"x": x, "x_hat": x, "mask": place.mask[None]})


def test_importing_needs_no_package_and_using_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setitem(sys.modules, "sane", None)
    assert behavior.Behavior.__doc__
    assert "BehavioralLoss" in v2.__all__
    for name in ("BehavioralLoss", "SANETrainer"):
        with pytest.raises(WslfastError, match=r"needs the package sane 2\.x"):
            getattr(v2, name)
    with pytest.raises(WslfastError, match=r"needs the package sane 2\.x"):
        v2.register()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = v2.Nothing


def test_tied_parameters_are_refused() -> None:
    """The published tokens hold each copy: of a layer as wide as the head they would count as ten classes."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.head = nn.Linear(36, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.third.weight = self.second.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.third(self.second(self.first(x.flatten(1)))))

    with pytest.raises(WslfastError, match=r"got 'third\.weight' tied to 'second\.weight'"):
        networks_of(Tied().eval(), (1, 6, 6))
