"""What ``mzsane`` has another way: tokens without running statistics, and the standardised loss, beside loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sane_package import SANE, forget, write
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP, FP32_ROUNDING
from torch import nn

from wslfast.errors import WslfastError
from wslfast.sane import multizoo, package_sane, patched, replaced


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(2, 3, 2))
    net.add_module("bn", nn.BatchNorm2d(3))
    net.add_module("normalization", nn.LayerNorm(3))
    net.add_module("head", nn.Linear(3, 4, bias=False))
    return {name: value + torch.randn_like(value) if value.is_floating_point() else value for name, value in net.state_dict().items()}


def _rows(
    state: dict[str, torch.Tensor], d: int, ignore_bn: bool
) -> tuple[list[list[float]], list[list[bool]], list[tuple[int, int, int]]]:
    rows, masks, places, layer = [], [], [], 0
    for name, weight in state.items():
        if "weight" not in name or (ignore_bn and ("bn" in name or "normalization" in name)):
            continue
        bias = state.get(name.replace("weight", "bias"))
        for channel, values in enumerate(weight.reshape(len(weight), -1).tolist()):
            values += [] if bias is None else [float(bias[channel])]
            for start in range(0, len(values), d):
                chunk = values[start : start + d]
                rows.append(chunk + [0.0] * (d - len(chunk)))
                masks.append([True] * len(chunk) + [False] * (d - len(chunk)))
                places.append((len(places), layer, channel))
        layer += 1
    return rows, masks, places


@pytest.mark.parametrize("ignore_bn", [False, True])
@pytest.mark.parametrize("d", [4, 9, 0])
def test_tokens_hold_no_running_statistics(d: int, ignore_bn: bool) -> None:
    state, reference = _state(), _state(1)
    tokens, mask, positions = multizoo.tokenize_checkpoint(state, d, ignore_bn=ignore_bn)
    rows, masks, places = _rows(state, d or 9, ignore_bn)
    assert torch.equal(tokens, torch.tensor(rows))
    assert mask.tolist() == masks
    assert positions.tolist() == [list(place) for place in places]
    assert len(multizoo.tokenize_checkpoint(state, 4, return_mask=False, device=torch.device("cpu"))) == 2
    back = multizoo.tokens_to_checkpoint(tokens, positions, reference, ignore_bn)
    assert list(back) == list(reference)
    for name, value in back.items():
        norm = "bn" in name or "normalization" in name
        kept = "running" in name or "num_batches" in name or (ignore_bn and norm)
        assert torch.equal(value, reference[name] if kept else state[name]), name
        assert value is not reference[name]
    with pytest.raises(WslfastError, match="cannot be filled"):
        multizoo.tokens_to_checkpoint(tokens[:-1], positions[:-1], reference, ignore_bn)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_standardised_loss_is_of_real_weights_in_units_of_their_deviation(reduction: str) -> None:
    mask = torch.rand(4, 5, 6) < 0.6
    x = torch.randn(4, 5, 6) * mask
    y = torch.randn(4, 5, 6, requires_grad=True)
    found = multizoo.MaskedReconLoss(reduction, standardize=True, std_eps=0.01)(y, x, mask)
    real = [float(v) for v in x[mask].double()]
    mean = sum(real) / len(real)
    deviation = (sum((v - mean) ** 2 for v in real) / len(real)) ** 0.5 + 0.01
    squares = [((a - b) / deviation) ** 2 for a, b in zip(y[mask].tolist(), x[mask].tolist())]
    expected = sum(squares) / (len(squares) if reduction == "mean" else 1)
    assert float(found["loss_recon"].detach()) == pytest.approx(expected, rel=FP32)
    (gradient,) = torch.autograd.grad(found["loss_recon"], y)
    n = len(real) if reduction == "mean" else 1
    torch.testing.assert_close(gradient, 2 * torch.where(mask, y - x, 0.0) / deviation**2 / n, rtol=FP32_DEEP, atol=FP32_ROUNDING)
    shown = [(torch.where(mask, y, 0.0) - mean) / deviation, (x - mean) / deviation]
    error = (shown[1] - shown[0]).detach().var(0, unbiased=False)
    spread = shown[1].var(0, unbiased=False)
    scores = torch.where(spread > 0, 1 - error / spread, torch.where(error > 0, 0.0, 1.0))
    assert float(found["rsq"]) == pytest.approx(float(scores.mean()), rel=FP32_AMPLIFIED)
    plain = multizoo.MaskedReconLoss(reduction)(y, x, mask)  # the published code raises a NameError here
    assert torch.equal(plain["loss_recon"], package_sane.MaskedReconLoss(reduction)(y, x, mask)["loss_recon"])


def test_the_objective_reports_the_share_of_real_weights() -> None:
    mask = torch.rand(6, 5, 4) < 0.5
    x, z = torch.randn(6, 5, 4) * mask, torch.randn(3, 7)
    loss = multizoo.GammaContrastReconLoss(0.1, "mean", 3, 0.1, standardize_token=True)
    out = loss(z, z + 1, x + 0.1, x, mask)
    assert float(out["debug/mask_to_signal_ratio"]) == pytest.approx(float(mask.float().mean()))
    assert float(out["debug/signal_compression_ratio"]) == pytest.approx(float(mask.sum()) / z.numel())
    total = 0.1 * out["loss/loss_contrast"] + 0.9 * out["loss/loss_recon"]
    assert float(out["loss/loss"]) == pytest.approx(float(total), rel=FP32_ROUNDING)


def test_the_patch_takes_them_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    forget("mzsane")
    files = dict(SANE)
    tokens = files["datasets/dataset_auxiliaries.py"]
    files["datasets/dataset_auxiliaries.py"] = tokens.replace(
        "ignore_bn=False):\n            return", 'ignore_bn=False, device="cpu"):\n            return', 1
    )
    losses = files["models/def_loss.py"].replace(
        "def __init__(self, reduction):", "def __init__(self, reduction, standardize=False, std_eps=1e-4):"
    )
    more = "z_norm_penalty: float = 0.0, standardize_token: bool = False, standardize_std_eps: float = 1e-4) -> None:"
    files["models/def_loss.py"] = losses.replace("z_norm_penalty: float = 0.0) -> None:", more)
    write(tmp_path, "mzsane", files)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    loss = importlib.import_module("mzsane.models.def_loss")
    auxiliaries = importlib.import_module("mzsane.datasets.dataset_auxiliaries")
    try:
        with patched():
            assert issubclass(loss.MaskedReconLoss, multizoo.MaskedReconLoss)
            assert issubclass(loss.GammaContrastReconLoss, multizoo.GammaContrastReconLoss)
            names = {row["name"] for row in replaced()}
            assert {"datasets.dataset_auxiliaries.tokenize_checkpoint", "datasets.dataset_auxiliaries.tokens_to_checkpoint"} <= names
            assert len(auxiliaries.tokenize_checkpoint(_state(), 4, device="cpu")) == 3
        assert auxiliaries.tokenize_checkpoint({}, 4) == "theirs"
    finally:
        forget("mzsane")
