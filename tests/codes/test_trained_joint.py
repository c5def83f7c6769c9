"""The trained importance of answers against the same algebra written out in float64, and against what it promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_joint import ARCH, LAYERS, fitted, images, models
from tolerances import FP32_DEEP
from torch import Tensor

from wslfast import WslfastError, batched_behavioral_loss
from wslfast.codes import joint
from wslfast.codes.joint import JointCodec, centered
from wslfast.codes.trained_joint import OutputImportance, corrected, examples_of, features, threshold_of, train_importance
from wslfast.kernels.reference import forward_one


def softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(-1)


def fisher(outputs: Tensor) -> Tensor:
    p = outputs.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def test_combinations_have_the_second_moment_that_the_importance_says() -> None:
    outputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double() * 3
    eye = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 5, 4)
    roots = centered(eye, softmax(outputs)).transpose(0, 1)
    torch.testing.assert_close(roots.mT @ roots, fisher(outputs))
    scaled = centered(eye, 7 * softmax(outputs)).transpose(0, 1)
    torch.testing.assert_close(scaled.mT @ scaled, 7 * fisher(outputs))


def test_with_softmax_outputs_the_sketch_is_the_fisher_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch.func, of 4,096 combinations of outputs an image."""
    codec = fitted()
    monkeypatch.setattr(joint, "_DRAWN", 4096)
    codec.queries = codec.queries[:6]
    row = models(1, 7).weights[0]
    flat = torch.cat([part.flatten(1) for part in codec._jacobian(row, softmax)], 1).double()
    found = flat.T @ flat
    slopes = torch.func.jacrev(lambda w: forward_one(w, codec.queries.double(), LAYERS))(row.double())
    in_rows = torch.stack([torch.stack([codec._rows(one.float()) for one in image]) for image in slopes]).double()
    metric = fisher(forward_one(row.double(), codec.queries.double(), LAYERS))
    expected = torch.einsum("nka,nkl,nlb->ab", in_rows, metric, in_rows) / 6
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_a_jacobian_is_that_of_torch_func() -> None:
    codec, seen = fitted(), images(5)
    row = models(1, 7).weights[0]
    outputs, layers = codec.jacobian(row, seen)
    slopes = torch.func.jacrev(lambda w: forward_one(w, seen.double(), LAYERS))(row.double()).flatten(0, 1)
    found = torch.stack([codec._weights(one) for one in torch.cat([part.flatten(1) for part in layers], 1)])
    assert float((found - slopes).abs().max()) < FP32_DEEP * float(slopes.abs().max())
    expected = forward_one(row.double(), seen.double(), LAYERS)
    assert float((outputs - expected).abs().max()) < FP32_DEEP * float(expected.abs().max())


def test_before_training_all_classes_count_alike() -> None:
    outputs = 5 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OutputImportance()(outputs), torch.ones(6, 3))
    weights = models(3, 7).weights
    ones = fitted(steps=0, importance=torch.ones_like).reconstruct(weights)
    assert torch.equal(fitted(steps=0, importance=train_importance(fitted(), models(8), images(16), steps=0)).reconstruct(weights), ones)


def test_features_do_not_see_what_all_classes_have_in_common_nor_their_order() -> None:
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features(outputs + 4), features(outputs), rtol=FP32_DEEP, atol=FP32_DEEP)
    torch.testing.assert_close(features(outputs[:, [2, 0, 1]]), features(outputs)[:, [2, 0, 1]])


def test_the_relaxed_correction_is_a_ridge_in_float64() -> None:
    """With A the metric of the answers in units of what is left open: ``L A (A + t)^-1 L^+ (w - w0)``, shares adding up to the numbers."""
    codec, seen, weights = fitted(), images(12, 3), models(2, 7).weights
    for example, row in zip(examples_of(codec, weights, seen), weights, strict=True):
        found = corrected(codec, example, softmax)
        blocks = [part.double() for part, members in zip(example.left, codec.base.groups.members, strict=True) for _ in range(members)]
        root = torch.block_diag(*blocks)
        _, layers = codec.jacobian(example.weights, seen)
        flat = torch.cat([part.flatten(1) for part in layers], 1).double() @ root
        flat = flat.unflatten(0, (12, -1))
        metric = torch.einsum("nka,nkl,nlb->ab", flat, fisher(example.outputs.double()), flat) / 12
        values = torch.linalg.eigvalsh(metric).clamp_min(0)
        t = float(threshold_of(values, min(codec.joint_size, 12 * 3 // 2)))
        missing = torch.linalg.pinv(root, rtol=1e-3) @ codec._rows(row - example.weights).double()
        kept = metric @ torch.linalg.solve(metric + t * torch.eye(len(metric), dtype=torch.float64), missing)
        expected = root @ kept
        assert float((codec._rows(found).double() - expected).norm() / expected.norm()) < 0.02


def test_shares_add_up_and_what_counts_more_everywhere_is_worth_nothing() -> None:
    values = torch.logspace(-4, 2, 40, dtype=torch.float64).requires_grad_()
    t = threshold_of(values, 10)
    assert float((values / (values + t)).sum().detach()) == pytest.approx(10, rel=1e-6)
    (slope,) = torch.autograd.grad(t, values)
    step = 1e-6 * values.detach()
    differences = torch.stack([threshold_of(values.detach() + step * (torch.arange(40) == i), 10) - t.detach() for i in (0, 20, 39)])
    torch.testing.assert_close(slope[[0, 20, 39]], differences / step[[0, 20, 39]], rtol=1e-3, atol=1e-9)
    codec = fitted()
    (example,) = examples_of(codec, models(1, 7).weights, images(12, 3))
    size = torch.zeros((), requires_grad=True)
    fresh = torch.randn(ARCH.num_weights, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((corrected(codec, example, lambda x: softmax(x) * size.exp()) * fresh).sum(), size)
    (alone,) = torch.autograd.grad((corrected(codec, example, lambda x: (x * (1 + size)).softmax(-1)) * fresh).sum(), size)
    assert abs(float(slope)) < 1e-2 * abs(float(alone))


@pytest.mark.slow
def test_training_lowers_the_loss_of_other_models_on_other_images() -> None:
    """Of confident networks, whose answers matter at few images; the same run twice is the same network, and a code that has it decodes."""
    population, seen, fresh = models(40), images(96, 3), images(200, 8)
    population.weights.mul_(2)
    codec = JointCodec(population, queries=seen, latent=0.4, joint=0.25, models=8, steps=0)
    told: list[float] = []
    network = train_importance(codec, population, seen, steps=60, models=24, progress=lambda step, loss: told.append(loss))
    assert len(told) == 60
    weights = models(12, 7).weights * 2
    found = {}
    for name, importance in (("trained", network), ("alike", torch.ones_like)):
        code = JointCodec(population, queries=seen, latent=0.4, joint=0.25, models=8, steps=0, importance=importance)
        rebuilt = code.reconstruct(weights)
        found[name] = batched_behavioral_loss(rebuilt, weights, fresh, ARCH, criterion="distillation", temperature=1.0)
        latents = code.encode(weights)
        assert latents.shape == (12, codec.latent_size)
        torch.testing.assert_close(code.decode(latents), rebuilt, rtol=FP32_DEEP, atol=FP32_DEEP)
    assert float(found["trained"]) < float(found["alike"])
    again = train_importance(codec, population, seen, steps=60, models=24)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(WslfastError, match="images: expected at least 8, got 5"):
        train_importance(fitted(), models(8), images(5))


@pytest.mark.parametrize("importance", [lambda x: -x.softmax(1), torch.zeros_like, lambda x: x[:, 0], lambda x: x / 0, lambda x: None])
def test_an_importance_that_is_none_is_said(importance: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(WslfastError, match=r"importance: expected finite \[n, K\]"):
        fitted(importance=importance)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": -1}, "steps: expected an integer >= 0, got -1"),
        ({"steps": 1.5}, "steps: expected an integer >= 0, got 1.5"),
        ({"models": 0}, "models: expected a positive integer, got 0"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"lr": float("inf")}, "lr: expected a positive number, got inf"),
        ({"seed": -1}, "seed: expected an integer from 0"),
    ],
)
def test_numbers_out_of_range_are_refused(changed: dict, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        train_importance(fitted(), models(4), images(12), **changed)
