"""The published losses: golden values of the published code, its formulas restated with autograd, and each departure's flag."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from loss_cases import NETS, case
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP, FP32_ROUNDING, FP32_SMALL
from torch_settings import default_dtype, threads_of

from wslfast import engine
from wslfast.architecture import Architecture
from wslfast.engine import paths
from wslfast.errors import WslfastError
from wslfast.kernels import reference
from wslfast.population import unstack
from wslfast.sane import (
    AEModule,
    DistillationLoss,
    GammaContrastReconLoss,
    MaskedReconLoss,
    NT_Xent,
    NT_Xent_pos,
    ReconDistillationLoss,
    package_sane,
)
from wslfast.tokens import TokenLayout


def _published(loss: str, output: torch.Tensor, target: torch.Tensor, reduction: str = "mean", t: float = 2.0) -> torch.Tensor:
    """The published value of one model from its outputs and the original's, ``[n, K]`` each."""
    n = len(output)
    mean = reduction == "mean"
    if loss == "l2":
        squares = (torch.nan_to_num(output.softmax(-1)) - torch.nan_to_num(target.softmax(-1))) ** 2
        return squares.mean() if mean else squares.sum()
    if loss == "cross_entropy":
        return -(target * torch.nan_to_num(output, nan=0.0).log_softmax(-1)).sum() / (n if mean else 1)
    q, log_p = (target / t).softmax(-1), (output / t).log_softmax(-1)
    return (q * (q.log() - log_p)).sum() / n * t**2


def _by_hand(arch: Architecture, y: torch.Tensor, x: torch.Tensor, queries: torch.Tensor, loss: str, reduction: str) -> torch.Tensor:
    place = TokenLayout(arch, y.shape[2])
    values = []
    for row, original in zip(place.detokenize(y), place.detokenize(x)):
        outputs = [reference.forward_one(w, queries, arch.layers) for w in (row, original)]
        values.append(_published(loss, outputs[0], outputs[1].detach(), reduction))
    stacked = torch.stack(values)
    kept = stacked[stacked.isfinite()]
    return kept.mean() if reduction == "mean" else kept.sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["l2", "cross_entropy", "distillation"])
@pytest.mark.parametrize("net", NETS)
def test_values_and_gradients_are_the_published_ones(net: str, loss: str, reduction: str) -> None:
    checkpoint, params, x, mask, p = case(net)
    x = (4 if loss == "l2" else 1) * x  # logits that differ: squares of tiny differences of probabilities are rounding
    mine = DistillationLoss(checkpoint, params, n_queries=5, loss=loss, reduction=reduction)
    assert mine.scale is None
    for step in range(2):  # the first call sets the scale, the second is divided by it
        y = (x * (1.3 + step) + 0.01).requires_grad_()
        expected_y = y.detach().clone().requires_grad_()
        torch.manual_seed(step)
        out = mine(y, x, mask, p)
        torch.manual_seed(step)
        raw = _by_hand(mine.architecture, expected_y, x, mine.generate_queries(), loss, reduction)
        if step == 0:
            scale = raw.item()
            assert mine.scale == pytest.approx(scale, rel=FP32_DEEP)
        assert set(out) == {"loss_recon", "loss_structure", "loss_behaviour"}
        assert out["loss_behaviour"] is out["loss_recon"]
        assert out["loss_recon"].item() == pytest.approx(raw.item() / scale, rel=5 * FP32_DEEP)
    out["loss_recon"].backward()
    (raw / scale).backward()
    assert y.grad is not None
    assert expected_y.grad is not None
    assert (y.grad - expected_y.grad).norm() <= 1e-4 * expected_y.grad.norm()  # both in float32, as the published code runs
    assert list(mine.parameters()) == []  # the template network is no child


def test_an_original_that_is_not_finite_under_another_default_type() -> None:
    checkpoint, params, x, _, p = case("CNN", 3)
    lost = x.clone()
    lost[1, 0, 0] = float("nan")
    made, queries = DistillationLoss(checkpoint, params, nan_gradients=True), torch.randn(4, 1, 28, 28)
    expected = made.values(1.3 * x, lost, queries, p)
    with default_dtype(torch.float64):
        found = made.values(1.3 * x, lost, queries, p)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_second_derivative_of_raw_cross_entropy_is_an_error_and_not_zero() -> None:
    checkpoint, params, x, mask, p = case("CNN3")
    made = DistillationLoss(checkpoint, params, n_queries=5, loss="cross_entropy")
    y = (1.3 * x + 0.01).requires_grad_()
    (slope,) = torch.autograd.grad(made(y, x, mask, p)["loss_recon"], y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(slope.square().sum(), y, allow_unused=True)


@pytest.mark.parametrize("nan_gradients", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_raw_cross_entropy_is_the_same_on_every_path(reduction: str, nan_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gets the criterion as a function: the CPU's, and torch's with a graph; a model that is not finite included."""
    checkpoint, params, x, mask, p = case("CNN3")
    results = []
    for path in (paths.Cpu, paths.Loop, paths.Stacked):
        monkeypatch.setattr(engine, "choose", lambda architecture, *_, path=path, **__: path(architecture, "test"))
        made = DistillationLoss(checkpoint, params, n_queries=5, loss="cross_entropy", reduction=reduction, nan_gradients=nan_gradients)
        made.scale = 1.0
        y = 1.3 * x + 0.01
        y[0] = float("inf")
        y.requires_grad_()
        torch.manual_seed(0)
        value = made(y, x, mask, p)["loss_recon"]
        value.backward()
        assert y.grad is not None
        results.append((value.detach(), y.grad))
    (one, gradient), *others = results
    assert one.isfinite()
    for two, expected in others:
        torch.testing.assert_close(one, two)
        assert torch.equal(gradient.isnan(), expected.isnan())
        assert bool(gradient.isnan().any()) == nan_gradients
        torch.testing.assert_close(
            gradient[1:], expected[1:], rtol=FP32_DEEP, atol=FP32_ROUNDING * float(expected[1:].abs().max()), equal_nan=True
        )


# -- goldens of the published code -------------------------------------------------------------------------------------


def _sine(arch: Architecture) -> torch.Tensor:
    return (0.3 * torch.arange(arch.num_weights, dtype=torch.float64).sin()).float().unsqueeze(0)


def test_golden_g3() -> None:
    arch = Architecture.cnn3()
    t, mask, p = TokenLayout(arch).tokenize(_sine(arch))
    queries = (0.01 * torch.arange(8 * 3 * 32 * 32, dtype=torch.float64)).sin().float().view(8, 3, 32, 32)
    checkpoint = {n: v[0] for n, v in unstack(_sine(arch), arch).items()}
    params = {"model::type": "CNN3", "model::channels_in": 3, "model::nlin": "relu", "model::dropout": 0}
    for loss, golden in (("l2", 1.109059e-5), ("cross_entropy", -3.412114), ("distillation", 5.544150e-4)):
        made = DistillationLoss(checkpoint, params, n_queries=8, loss=loss)
        assert made.values(1.05 * t, t, queries, p.unsqueeze(0)).item() == pytest.approx(golden, rel=2 * FP32_DEEP)
    structure = MaskedReconLoss("mean")
    assert structure(1.1 * t + 0.01, t, mask.unsqueeze(0), p)["loss_recon"].item() == 1
    assert structure.scale == pytest.approx(2.220978e-4, rel=FP32)
    k = torch.arange(120.0).view(4, 30)
    for kind, golden in ((NT_Xent, 3.405521), (NT_Xent_pos, 5.560753)):
        contrast = kind(4, 0.1)
        assert contrast(1 + k.sin(), 1 + k.cos()).item() == 1
        assert contrast.scale == pytest.approx(golden, rel=FP32)


def test_golden_cycle_term() -> None:
    z = torch.arange(2 * 93 * 8.0).sin().view(2, 93, 8)
    y = torch.randn(2, 3, 4)
    values = []
    for weight in (0.0, 1.0):
        loss = GammaContrastReconLoss(0.0, "mean", 1, 0.1, beta=1.0, lambda_=weight)
        values.append(loss(torch.ones(2, 3), torch.ones(2, 3), y, y + 1, torch.ones_like(y), None, z, 0.9 * z)["loss/loss"].item())
    assert values[1] - values[0] == pytest.approx(0.681781, abs=FP32)


# -- composition -------------------------------------------------------------------------------------------------------

_KEYS = {"loss/loss", "loss/loss_contrast", "loss/loss_recon", "loss/loss_structure", "loss/loss_behaviour", "debug/z_norm", "debug/z_var"}


@pytest.mark.parametrize(
    ("gamma", "beta", "kind", "rsq"),
    [(0.05, 0.1, ReconDistillationLoss, True), (0.0, 0.0, DistillationLoss, False), (0.3, 1.0, MaskedReconLoss, True), (1.0, 1.0, MaskedReconLoss, False)],
    ids=["all", "behavior", "contrast-structure", "contrast"],
)  # fmt: skip
def test_composition_and_keys(gamma: float, beta: float, kind: type, rsq: bool) -> None:
    checkpoint, params, x, mask, p = case("CNN", 4)
    loss = GammaContrastReconLoss(
        gamma, "mean", 2, 0.1, beta=beta, n_queries_distillation=3, reference_checkpoint=checkpoint, reference_params=params
    )
    assert type(loss.loss_recon) is kind
    z_i, z_j = torch.randn(2, 30), torch.randn(2, 30)
    for step in range(2):
        out = loss(z_i + step, z_j, x * (1.5 + step), x, mask, p, None, None)
        assert set(out) == (_KEYS | {"loss/rsq"} if rsq else _KEYS)
        parts = {name: out[f"loss/loss_{name}"] for name in ("contrast", "structure", "behaviour", "recon")}
        expected = gamma * parts["contrast"] + (1 - gamma) * (beta * parts["structure"] + (1 - beta) * parts["behaviour"])
        assert out["loss/loss"].item() == pytest.approx(expected.item(), rel=FP32_ROUNDING)
        if step == 0:
            assert out["loss/loss"].item() == pytest.approx(1, rel=FP32_ROUNDING)
    assert out["debug/z_norm"].item() == pytest.approx((z_i + 1).norm(dim=1).mean().item(), rel=FP32_ROUNDING)
    assert out["debug/z_var"].item() == pytest.approx((z_i + 1).var(0).mean().item(), rel=FP32_ROUNDING)


def test_penalties_and_a_scale_that_is_restored() -> None:
    y, z = torch.randn(4, 3, 2), torch.randn(2, 5)
    plain, more = (GammaContrastReconLoss(0.0, "sum", 2, 0.1, "none", v, n, beta=1.0) for v, n in ((0, 0), (2.0, 3.0)))
    for loss in (plain, more):
        loss.loss_recon.scale = 8.0
    a, b = (loss(z, z, y, y + 1, torch.ones_like(y)) for loss in (plain, more))
    assert a["loss/loss"].item() == pytest.approx(((y - (y + 1)) ** 2).sum().item() / 8, rel=FP32)
    assert (b["loss/loss"] - a["loss/loss"]).item() == pytest.approx((2 * a["debug/z_var"] + 3 * a["debug/z_norm"]).item(), rel=FP32)


def test_mean_loss_makes_rsq_relative_to_it() -> None:
    loss = GammaContrastReconLoss(0.0, "mean", 2, 0.1, beta=1.0)
    data = torch.randn(6, 3, 2)
    loss.set_mean_loss(data)
    out = loss(torch.ones(2, 3), torch.ones(2, 3), data.mean(0).expand_as(data), data, torch.ones_like(data))
    assert out["loss/rsq"].item() == pytest.approx(0, abs=FP32_ROUNDING)


def test_explained_variance_against_a_loop() -> None:
    y, x = torch.randn(7, 3, 2), torch.randn(7, 3, 2)
    x[:, 0, 0] = y[:, 0, 0] = 2.0  # neither varies: 1
    x[:, 0, 1] = 3.0  # the error varies, the target does not: 0
    scores = []
    for a, b in zip(y.flatten(1).double().T, x.flatten(1).double().T):
        scores.append(1 - (b - a).var(unbiased=False) / b.var(unbiased=False) if b.std() > 0 else torch.tensor(float((b - a).std() == 0)))
    assert MaskedReconLoss("mean")(y, x, torch.ones_like(x))["rsq"].item() == pytest.approx(float(torch.stack(scores).mean()), abs=FP32)


# -- the departures, one flag each -------------------------------------------------------------------------------------


def test_defect_3_unmasked_target() -> None:
    y, x = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    x[:, :, 2:] = 5.0  # corrupted padding
    made = {flag: MaskedReconLoss("mean", unmasked_target=flag) for flag in (True, False)}
    for loss in made.values():
        loss(y, x, mask)
    assert made[True].scale == pytest.approx((12 * 1 + 12 * 25) / 24)
    assert made[False].scale == pytest.approx(1)
    y = torch.full((2, 3, 4), float("nan")).masked_fill(mask, 2.0).requires_grad_()  # nor does its padding's gradient
    loss = MaskedReconLoss("mean", semantics="corrected")
    loss(y, x, mask)["loss_recon"].backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.where(mask, 2 * 2 / 12, 0.0))


def test_defect_4_first_value_scale() -> None:
    y, x, mask = torch.ones(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    published, corrected = (MaskedReconLoss("mean", first_value_scale=flag) for flag in (True, False))
    assert [published(s * y, x, mask)["loss_recon"].item() for s in (2, 4)] == [1, 4]
    assert [corrected(s * y, x, mask)["loss_recon"].item() for s in (2, 4)] == [4, 16]
    assert (published.scale, corrected.scale) == (4, 1)
    # the published division by a negative first value turns minimisation into maximisation
    checkpoint, params, x, mask, p = case("CNN3")
    loss = DistillationLoss(checkpoint, params, loss="cross_entropy", n_queries=4)
    assert loss(-3 * x, x, mask, p)["loss_recon"].item() == pytest.approx(1)


def test_defect_5_raw_logit_cross_entropy() -> None:
    checkpoint, params, x, _, p = case("CNN3", 2)
    arch = NETS["CNN3"][0]
    queries = torch.randn(4, 3, 32, 32)
    place = TokenLayout(arch)
    outputs, targets = (reference.forward(place.detokenize(tokens), queries, arch.layers) for tokens in (x * 1.5, x))
    soft = torch.stack([F.cross_entropy(o, t.softmax(-1)) for o, t in zip(outputs, targets)])
    raw = torch.stack([F.cross_entropy(o, t) for o, t in zip(outputs, targets)])
    for flag, expected in ((True, raw), (False, soft)):
        loss = DistillationLoss(checkpoint, params, loss="cross_entropy", raw_logit_cross_entropy=flag)
        torch.testing.assert_close(loss.values(x * 1.5, x, queries, p), expected, rtol=FP32_DEEP, atol=FP32_ROUNDING)
    assert not torch.allclose(raw, soft, rtol=0.05)


@pytest.mark.parametrize("loss", ["l2", "cross_entropy", "distillation"])
def test_defect_6_nan_gradients(loss: str) -> None:
    checkpoint, params, x, _, p = case("CNN", 3)
    queries = torch.randn(4, 1, 28, 28)

    def run(flag: bool) -> tuple[torch.Tensor, torch.Tensor]:
        y = (1.5 * x).clone()
        y[1] *= 1e30  # overflows
        y.requires_grad_()
        made = DistillationLoss(checkpoint, params, loss=loss, n_queries=4, nan_gradients=flag, raw_logit_cross_entropy=False)
        values = made.values(y, x, queries, p)
        values[values.isfinite()].mean().backward()
        assert y.grad is not None
        return values.detach(), y.grad

    (values, gradient), (kept, safe) = run(True), run(False)
    assert not gradient[1].isfinite().all() or not values[1].isfinite()
    assert kept[1].isnan()
    assert safe.isfinite().all()
    assert safe[1].abs().sum() == 0
    assert safe[0].abs().sum() > 0
    torch.testing.assert_close(kept[[0, 2]], values[[0, 2]], rtol=FP32, atol=0)


@pytest.mark.parametrize("loss", ["l2", "distillation"])
def test_an_original_that_is_not_finite_leaves_its_reconstruction_a_gradient(loss: str) -> None:
    checkpoint, params, x, _, p = case("CNN", 3)
    arch, queries = NETS["CNN"][0], torch.randn(4, 1, 28, 28)
    lost = x.clone()
    lost[1, 0, 0] = float("nan")
    y, other = ((1.5 * x).clone().requires_grad_() for _ in range(2))
    values = DistillationLoss(checkpoint, params, loss=loss, nan_gradients=True).values(y, lost, queries, p)
    values.sum().backward()
    outputs = reference.forward(TokenLayout(arch).detokenize(other[1:2]).double(), queries.double(), arch.layers)[0]
    if loss == "l2":  # probabilities of the original count as zero
        expected = outputs.softmax(-1).square().mean()
    else:  # and here as 1e-9
        expected = 4 * (1e-9 * (math.log(1e-9) - (outputs / 2).log_softmax(-1))).sum() / 4
    expected.backward()
    assert y.grad is not None
    assert other.grad is not None
    assert values[1].item() == pytest.approx(expected.item(), rel=FP32_DEEP)
    assert y.grad.isfinite().all()
    torch.testing.assert_close(y.grad[1], other.grad[1], rtol=FP32_AMPLIFIED, atol=FP32_AMPLIFIED * other.grad[1].abs().max().item())
    alone = (1.5 * x).clone().requires_grad_()
    DistillationLoss(checkpoint, params, loss=loss).values(alone, x, queries, p).sum().backward()
    assert alone.grad is not None
    torch.testing.assert_close(y.grad[[0, 2]], alone.grad[[0, 2]])


def test_flags_combine() -> None:
    checkpoint, params, x, _, p = case("CNN", 3)
    y = (1.5 * x).clone()
    y[1] = float("nan")
    y.requires_grad_()
    loss = DistillationLoss(checkpoint, params, loss="cross_entropy", n_queries=4, nan_gradients=False)
    values = loss.values(y, x, torch.randn(4, 1, 28, 28), p)
    values[values.isfinite()].mean().backward()
    assert y.grad is not None
    assert values[[0, 2]].isfinite().all()
    assert values[1].isnan()
    assert y.grad.isfinite().all()
    assert y.grad[1].abs().sum() == 0


def test_published_l2_of_a_model_that_is_not_finite_counts() -> None:
    checkpoint, params, x, _, p = case("CNN3", 2)
    queries = torch.randn(4, 3, 32, 32)
    y = x.clone()
    y[0] = float("nan")
    value = DistillationLoss(checkpoint, params).values(y, x, queries, p)
    arch = NETS["CNN3"][0]
    probability = reference.forward(TokenLayout(arch).detokenize(x[:1]), queries, arch.layers).softmax(-1)
    assert value[0].item() == pytest.approx(probability.square().mean().item(), rel=FP32_DEEP)  # NaN probabilities count as zero


def test_softmax_mse_flag_is_the_papers_formula_when_off() -> None:
    checkpoint, params, x, _, p = case("CNN3", 2)
    arch, queries = NETS["CNN3"][0], torch.randn(4, 3, 32, 32)
    outputs, targets = (reference.forward(TokenLayout(arch).detokenize(t), queries, arch.layers) for t in (x * 1.5, x))
    value = DistillationLoss(checkpoint, params, softmax_mse=False).values(x * 1.5, x, queries, p)
    torch.testing.assert_close(value, (outputs - targets).square().sum((1, 2)) / 8, rtol=FP32_DEEP, atol=1e-8)


def test_half_precision_rounds_queries_and_weights() -> None:
    checkpoint, params, x, mask, p = case("CNN3", 2)
    loss = DistillationLoss(checkpoint, params, n_queries=4)
    y = (1.5 * x).half().requires_grad_()
    out = loss(y, x.half(), mask, p)["loss_recon"]
    out.backward()
    assert loss.scale is not None
    assert y.grad is not None
    assert y.grad.dtype == torch.float16
    torch.manual_seed(3)
    queries = torch.rand(4, 3, 32, 32)
    rounded = loss.values(y, x, queries.half(), p)
    exact = DistillationLoss(checkpoint, params).values(y.detach().float(), x.half().float(), queries.half().float(), p)
    torch.testing.assert_close(rounded, exact, rtol=FP32_AMPLIFIED, atol=FP32_SMALL)


def test_the_losses_of_sane_itself() -> None:
    y, x, mask = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.ones(4, 3, 2, dtype=torch.bool)
    structure = package_sane.MaskedReconLoss("mean")
    assert set(structure(y, x, mask)) == {"loss_recon", "rsq"}
    assert structure(y, x, mask)["loss_recon"].item() == pytest.approx(F.mse_loss(y, x).item())
    a, b = torch.randn(2, 5), torch.randn(2, 5)
    scaled = NT_Xent(2, 0.1)
    scaled(a, b)
    assert package_sane.NT_Xent(2, 0.1)(a, b).item() == pytest.approx(scaled.scale)
    total = package_sane.GammaContrastReconLoss(0.25, "mean", 2, 0.1)(a, b, y, x, mask)
    assert total["loss/loss"].item() == pytest.approx(0.25 * (scaled.scale or 0) + 0.75 * F.mse_loss(y, x).item(), rel=FP32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads_of(1):
        yield


def test_the_module_of_the_package_sane_needs_its_config_alone() -> None:
    config = {
        "ae:i_dim": 9,
        "ae:d_model": 8,
        "ae:nhead": 2,
        "ae:num_layers": 1,
        "ae:lat_dim": 4,
        "ae:max_positions": [6, 3, 4],
        "training::windowsize": 6,
        "trainset::batchsize": 2,
        "training::gamma": 0.3,
        "training::gradient_clipping": "none",
    }
    with pytest.raises(WslfastError, match=r"reference_params: .*package_sane\.AEModule"):
        AEModule(config)
    module = package_sane.AEModule(config)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 6, 9, generator=generator) for _ in range(2))
    mask, p = torch.ones(2, 6, 9), torch.zeros(2, 6, 3, dtype=torch.int)
    (_, y_i, z_i), (_, y_j, z_j) = module(x, p), module(y, p)
    joined = torch.cat((y_i, y_j)), torch.cat((x, y)), torch.cat((mask, mask))
    wanted = package_sane.GammaContrastReconLoss(0.3, "mean", 2, 0.1)(z_i, z_j, *joined)
    found = module.test_step(x, mask, p, y, mask, p)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
    before = [v.clone() for v in module.parameters()]
    module.train_step(x, mask, p, y, mask, p)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters()))


def _answers(arch: Architecture, row: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """What the network of :func:`_of_images` answers."""
    weight, bias, *last = (row[slot.offset : slot.stop].view(slot.shape) for slot in arch.parameters)
    return F.conv2d(F.conv2d(queries, weight, bias).relu(), *last)


def _of_images() -> tuple[Architecture, TokenLayout, torch.Tensor, torch.Tensor]:
    """A network that answers with images ``[3, 3, 3]``, and weights of reconstructions and originals."""
    torch.manual_seed(0)
    arch = Architecture.from_module(
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3)).eval(), (1, 7, 7)
    )
    originals = torch.randn(2, arch.num_weights) * 0.3
    return arch, TokenLayout(arch), originals + 0.1 * torch.randn_like(originals), originals


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["l2", "cross_entropy", "distillation"])
def test_outputs_of_several_axes(loss: str, reduction: str) -> None:
    arch, place, rows, originals = _of_images()
    mine = DistillationLoss(None, None, n_queries=7, loss=loss, reduction=reduction, architecture=arch)
    queries = mine.generate_queries()
    tokens = place.tokenize(rows).tokens.requires_grad_()
    values = mine.values(tokens, place.tokenize(originals).tokens, queries)
    by_hand = rows.double().requires_grad_()
    outputs = [_answers(arch, row, queries.double()) for row in (*by_hand, *originals.double())]
    expected = torch.stack([_published(loss, outputs[j], outputs[j + 2].detach(), reduction) for j in range(2)])
    torch.testing.assert_close(values.double(), expected, rtol=FP32_SMALL, atol=FP32_SMALL)
    (slope,) = torch.autograd.grad(values.sum(), tokens)
    (expected_slope,) = torch.autograd.grad(expected.sum(), by_hand)
    assert ((place.detokenize(slope) - expected_slope).norm() / expected_slope.norm()).item() < FP32_AMPLIFIED


@pytest.mark.parametrize("broken", ["reconstruction", "original"])
@pytest.mark.parametrize("loss", ["l2", "cross_entropy", "distillation"])
def test_a_model_of_several_axes_that_is_not_finite_is_dropped(loss: str, broken: str) -> None:
    arch, place, rows, originals = _of_images()
    (rows if broken == "reconstruction" else originals)[1, 0] = float("nan")
    mine = DistillationLoss(None, None, n_queries=7, loss=loss, architecture=arch)
    tokens = place.tokenize(rows).tokens.requires_grad_()
    values = mine.values(tokens, place.tokenize(originals).tokens, mine.generate_queries())
    assert values.shape == (2,)
    assert values[0].isfinite()


@pytest.mark.parametrize("loss", ["l2", "cross_entropy", "distillation"])
def test_one_number_a_query_has_no_classes(loss: str) -> None:
    arch = Architecture.from_module(torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0)).eval(), (4,))
    with pytest.raises(WslfastError, match=f"architecture: expected outputs .* of classes for loss '{loss}'"):
        DistillationLoss(None, None, loss=loss, architecture=arch)
    if loss == "l2":  # whose corrected version compares numbers as they are
        DistillationLoss(None, None, loss=loss, architecture=arch, softmax_mse=False)


def test_a_mean_over_more_numbers_than_float16_counts() -> None:
    torch.manual_seed(1)
    target = torch.randn(16, 60, 200).half()
    output = (target + torch.randn(16, 60, 200)).half()
    loss = MaskedReconLoss("mean", semantics="corrected")(output, target, torch.ones_like(target, dtype=torch.bool))["loss_recon"]
    assert loss.item() == pytest.approx((output.double() - target.double()).square().mean().item(), rel=1e-3)
