"""Published tokens, recipes, permutations, probe and sampler, against the core, loops, sklearn and golden values."""

from __future__ import annotations

import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP, FP32_ROUNDING
from torch import Tensor

from wslfast import batched_forward
from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.permutation import permute
from wslfast.population import stack, unstack
from wslfast.sane import (
    AE,
    DownstreamTaskLearner,
    MiniAlexNet_permutation_spec,
    apply_permutation,
    generate_z_samples,
    mlp_permutation_spec,
    permutation_spec_from_axes_to_perm,
    permute_model_vector,
    precompute_permutations,
    printProgressBar,
    resnet18_permutation_spec,
    resnet34_permutation_spec,
    resnet50_permutation_spec,
    sample_latents,
    sample_models,
    test_checkpoint_for_nan,
    test_checkpoint_with_threshold,
    tokenize_checkpoint,
    tokens_to_checkpoint,
    tokens_to_recipe,
    weight_matching,
    zoo_cnn_large_permutation_spec,
    zoo_cnn_permutation_spec,
    zoo_lenet_permutation_spec,
)
from wslfast.sane.checkpoints import tokens_to_checkpoint_without_batchnorm
from wslfast.tokens import TokenLayout


def _checkpoint(arch: Architecture, seed: int = 0) -> OrderedDict[str, Tensor]:
    if arch.planned:
        weights = arch.initial_weights(["kaiming_uniform"], [seed])
    else:
        weights = torch.randn(1, arch.num_weights, generator=torch.Generator().manual_seed(seed))
    return OrderedDict((name, value[0]) for name, value in unstack(weights, arch).items())


NETS = {
    "cnn": (Architecture.cnn(), 0), "cnn3": (Architecture.cnn3(), 0), "lenet5": (Architecture.lenet5(), 256), "mlp": (Architecture.mlp(), 7),
    "no-bias": (Architecture.mlp(5, (4, 3), 2, use_bias=False), 3), "resnet18": (Architecture.resnet18(3, 4, 4), 0),
}  # fmt: skip


@pytest.mark.parametrize("ignore_bn", [False, True])
@pytest.mark.parametrize(("arch", "size"), NETS.values(), ids=NETS)
def test_tokens_are_the_cores_and_come_back(arch: Architecture, size: int, ignore_bn: bool) -> None:
    checkpoint = _checkpoint(arch)
    layout = TokenLayout(arch, size, ignore_bn=ignore_bn)
    expected = layout.tokenize(stack({n: v[None] for n, v in checkpoint.items()}, arch))
    tokens, mask, pos = tokenize_checkpoint(checkpoint, size, ignore_bn=ignore_bn)
    assert torch.equal(tokens, expected.tokens[0])
    assert torch.equal(mask, expected.mask)
    assert torch.equal(pos, expected.positions)
    assert pos.dtype == torch.int16
    again, same = tokenize_checkpoint(checkpoint, size, return_mask=False, ignore_bn=ignore_bn)
    assert torch.equal(again, tokens)
    assert torch.equal(same, pos)
    if layout.complete:
        zeros = {n: torch.zeros_like(v) for n, v in checkpoint.items()}
        dirty = torch.where(mask, tokens, float("nan")).requires_grad_()  # padding is dropped
        recipe = tokens_to_recipe(pos, zeros, ignore_bn)
        for back in (
            tokens_to_checkpoint(dirty, pos, zeros, ignore_bn),
            tokens_to_checkpoint(dirty, None, zeros, ignore_bn, recipe=recipe),
        ):
            assert list(back) == list(checkpoint)
            assert all(torch.equal(back[n], v) for n, v in checkpoint.items())
        sum(v.sum() for v in back.values()).backward()  # type: ignore[union-attr]
        assert torch.equal(dirty.grad, mask.float())


def test_what_has_no_token_is_copied_from_the_reference() -> None:
    arch = Architecture.resnet18(3, 4, 4)
    checkpoint, reference = _checkpoint(arch), _checkpoint(arch, 1)
    reference["bn1.num_batches_tracked"] = torch.tensor(7)
    tokens, _, pos = tokenize_checkpoint(checkpoint, 0, ignore_bn=True)
    for inverse in (tokens_to_checkpoint, tokens_to_checkpoint_without_batchnorm):
        back = inverse(tokens, pos, reference, ignore_bn=True)
        assert torch.equal(back["layer1.0.conv1.weight"], checkpoint["layer1.0.conv1.weight"])
        assert torch.equal(back["bn1.running_var"], reference["bn1.running_var"])
        assert back["bn1.num_batches_tracked"] == 7
        assert back["bn1.running_var"] is not reference["bn1.running_var"]  # nothing of the reference may change with it


def test_names_with_batchnorm_are_where_the_packages_differ() -> None:
    checkpoint = {"conv1.weight": torch.randn(2, 3), "batchnorm1.weight": torch.randn(2), "fc.weight": torch.randn(2, 3)}
    tokens, _, pos = tokenize_checkpoint(checkpoint, 3, ignore_bn=True)
    assert torch.equal(tokens_to_checkpoint_without_batchnorm(tokens, pos, checkpoint, True)["fc.weight"], checkpoint["fc.weight"])
    with pytest.raises(WslfastError, match=r"'fc\.weight'"):  # the paper's inverse counts a layer that has no token
        tokens_to_checkpoint(tokens, pos, checkpoint, True)


def test_wrong_checkpoints() -> None:
    with pytest.raises(WslfastError, match="checkpoint: expected a layer"):
        tokenize_checkpoint({"bias": torch.ones(2)}, 0)
    with pytest.raises(WslfastError, match="checkpoint: expected a state dict"):
        tokenize_checkpoint({}, 0)
    with pytest.raises(WslfastError, match="pos: expected positions"):
        tokens_to_checkpoint(torch.ones(1, 2), None, {"weight": torch.ones(1, 2)})
    with pytest.raises(WslfastError, match="pos: expected positions"):
        tokens_to_checkpoint(torch.ones(1, 2), torch.zeros(3), {"weight": torch.ones(1, 2)})
    with pytest.raises(WslfastError, match=r"tokens: expected those of one model, \[T, D\], got \[1, 1, 2\]"):
        tokens_to_checkpoint(torch.ones(1, 1, 2), torch.zeros(1, 3), {"weight": torch.ones(1, 2)})
    with pytest.raises(WslfastError, match=r"'a.bias': expected \[3\], a number for each channel of 'a.weight', got \[2\]"):
        tokenize_checkpoint({"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2)}, 0)
    with pytest.raises(WslfastError, match=r"'a.weight' \[\] has no channels"):
        tokenize_checkpoint({"a.weight": torch.tensor(1.0), "b.weight": torch.ones(2, 2)}, 4)
    assert test_checkpoint_for_nan({"a": torch.tensor([1.0, float("nan")])})
    assert not test_checkpoint_for_nan({"a": torch.ones(2)})
    assert test_checkpoint_with_threshold({"a": torch.tensor([-3.0])}, 2)
    assert not test_checkpoint_with_threshold({"a": torch.tensor([-3.0])}, float("inf"))


# -- permutations ------------------------------------------------------------------------------------------------------

SPECS = {
    "cnn": (Architecture.cnn(3), zoo_cnn_permutation_spec), "cnn2": (Architecture.cnn2(), zoo_cnn_permutation_spec),
    "cnn3": (Architecture.cnn3(), zoo_cnn_large_permutation_spec), "lenet5": (Architecture.lenet5(1), zoo_lenet_permutation_spec),
}  # fmt: skip


@pytest.mark.parametrize(("arch", "spec"), SPECS.values(), ids=SPECS)
def test_a_permutation_is_the_cores(arch: Architecture, spec: Any) -> None:
    ps, checkpoint = spec(), _checkpoint(arch)
    assert set(ps.axes_to_perm) == set(checkpoint)
    sizes = [checkpoint[axes[0][0]].shape[axes[0][1]] for axes in ps.perm_to_axes.values()]
    drawn = [torch.randperm(n) for n in sizes]
    moved = apply_permutation(ps, dict(zip(ps.perm_to_axes, (d.float() for d in drawn))), checkpoint)  # floats, as published
    expected = permute(stack({n: v[None] for n, v in checkpoint.items()}, arch), arch, tuple(d[None] for d in drawn))
    assert torch.equal(stack({n: v[None] for n, v in moved.items()}, arch), expected)
    assert type(moved) is dict


@pytest.mark.parametrize("match_last", [True, False])
def test_resnet_views_are_the_same_function(match_last: bool) -> None:
    arch = Architecture.resnet18(3, 4, 4)
    checkpoint, ps = _checkpoint(arch), resnet18_permutation_spec(match_last=match_last)
    for name in checkpoint:
        if name.endswith("running_var"):
            checkpoint[name] = checkpoint[name].abs() + 1
    perm = {p: torch.randperm(checkpoint[axes[0][0]].shape[axes[0][1]]) for p, axes in ps.perm_to_axes.items()}
    if not match_last:
        perm["P_bg3"] = torch.arange(len(perm["P_bg3"]))  # the classifier's inputs are not in that spec
    moved = apply_permutation(ps, perm, checkpoint)
    assert not torch.equal(moved["layer2.0.conv1.weight"], checkpoint["layer2.0.conv1.weight"])
    queries = torch.randn(2, 3, 32, 32)
    outputs = [batched_forward({name: value[None] for name, value in c.items()}, queries, arch) for c in (checkpoint, moved)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=FP32_AMPLIFIED, atol=FP32_AMPLIFIED)


def test_specs_have_the_published_names() -> None:
    lenet = zoo_lenet_permutation_spec()
    assert lenet.axes_to_perm["module_list.9.weight"] == ("P_bg2", "P_bg1")
    assert lenet.perm_to_axes["P_bg3"] == [("module_list.12.weight", 0), ("module_list.12.bias", 0), ("module_list.15.weight", 1)]
    resnet = resnet34_permutation_spec().axes_to_perm
    assert resnet["layer3.0.downsample.0.weight"] == ("P_bg2", "P_bg1", None, None)
    assert resnet["layer3.0.bn1.running_mean"] == ("P_layer3.0_inner",)
    assert "layer3.5.conv2.weight" in resnet
    assert "bn1.weight" not in resnet18_permutation_spec(batchnorm=False).axes_to_perm
    assert resnet50_permutation_spec().axes_to_perm["layer1.0.conv3.weight"] == ("P_bg1", "P_layer1.0_inner2", None, None)
    assert mlp_permutation_spec(2).axes_to_perm["layer1.weight"] == ("P_1", "P_0")
    assert MiniAlexNet_permutation_spec().axes_to_perm["fc1.weight"] == ("P_bg2", "P_bg1")
    with pytest.raises(WslfastError, match="'other' is not in the permutation spec"):
        apply_permutation(lenet, {}, {"other": torch.ones(1)})
    with pytest.raises(WslfastError, match="does not divide into 2 blocks"):
        apply_permutation(permutation_spec_from_axes_to_perm({"w": ("P", None)}), {"P": torch.arange(2)}, {"w": torch.ones(3, 1)})


def test_matching_finds_the_permutation() -> None:
    pytest.importorskip("scipy")
    arch, ps = Architecture.cnn3(), zoo_cnn_large_permutation_spec()
    checkpoint = _checkpoint(arch)
    perm = {p: torch.randperm(checkpoint[axes[0][0]].shape[axes[0][1]]) for p, axes in ps.perm_to_axes.items()}
    moved = apply_permutation(ps, perm, checkpoint)
    found = apply_permutation(ps, weight_matching(ps, checkpoint, moved), moved)
    assert all(torch.equal(found[n], v) for n, v in checkpoint.items())


def test_defect_2_corrupted_padding() -> None:
    arch, ps = Architecture.cnn3(), zoo_cnn_large_permutation_spec()
    checkpoint = _checkpoint(arch)
    tokens, mask, _ = tokenize_checkpoint(checkpoint, 0)
    for flag in (True, False):
        torch.manual_seed(5)
        maps, drawn = precompute_permutations(checkpoint, 3, ps, 0, False, corrupted_padding=flag)
        for index, perm in zip(maps, drawn):
            view = permute_model_vector(tokens, 0, 93, index)
            assert index.dtype == torch.int32
            expected, *_ = tokenize_checkpoint(apply_permutation(ps, perm, checkpoint), 0)
            assert torch.equal(view[mask], expected[mask])
            assert (view[~mask] == (tokens[0, 0] if flag else 0)).all()
            assert torch.equal(permute_model_vector(tokens, 7, 20, index), view[7:27])


# -- probe and sampler -------------------------------------------------------------------------------------------------


def _sine(*shape: int, step: float) -> Tensor:
    return (step * torch.arange(math.prod(shape), dtype=torch.float64)).sin().view(shape)


def test_golden_g4() -> None:
    x = _sine(60, 5, step=1.3)
    y = x @ torch.tensor([1, -2, 0.5, 0, 3], dtype=torch.float64) + 0.3 * (2.1 * torch.arange(60, dtype=torch.float64)).cos() + 1
    train, test, val = slice(0, 40), slice(40, 50), slice(50, 60)
    found = DownstreamTaskLearner().compute_closed_form_solution(
        x[train], y[train].tolist(), x[test], y[test].tolist(), x[val], y[val].tolist(), return_reg=True
    )
    assert found == pytest.approx((1e-5, 0.995228, 0.978993, 0.974170), abs=2 * FP32_ROUNDING)


def test_the_probe_reads_data_sets() -> None:
    arch = Architecture.cnn()
    x, mask, pos = TokenLayout(arch).tokenize(arch.initial_weights(["kaiming_uniform"] * 24, list(range(24))))

    def data(rows: slice) -> Any:
        tokens = x[rows]
        target = tokens[:, 3, 4].tolist()
        nested = [target[i : i + 2] for i in range(0, len(target), 2)]  # a model and epoch
        names = [["a" if v > 0 else "b" for v in pair] for pair in nested]
        return SimpleNamespace(__get_weights__=lambda: (tokens, mask), positions=pos, properties={"test_acc": nested, "sign": names})

    model = SimpleNamespace(forward_embeddings=lambda t, p: t[:, :4, :6].flatten(1) + 0 * p.sum((1, 2)).unsqueeze(1))
    out = DownstreamTaskLearner().eval_dstasks(model, data(slice(0, 16)), data(slice(16, 20)), data(slice(20, 24)), ["test_acc", "sign"], 5)
    assert set(out) == {f"{task}_{split}" for task in ("test_acc", "sign") for split in ("train", "test", "val")}
    assert out["test_acc_train"] > 0.9
    assert 0 <= out["sign_test"] <= 1
    z = torch.randn(3, 4)
    polar = DownstreamTaskLearner().map_embeddings(z, torch.zeros(3, 1), SimpleNamespace(forward_embeddings=lambda t, p: t), 2, True)
    torch.testing.assert_close(polar[:, :1] * polar[:, 1:].cos(), z, rtol=FP32_DEEP, atol=FP32)


@pytest.mark.parametrize("mode", ["individual", "token", "joint"])
def test_published_densities_are_sklearns(mode: str) -> None:
    kde = pytest.importorskip("sklearn.neighbors").KernelDensity(kernel="gaussian", bandwidth=0.2)
    z = torch.randn(6, 4, 3)
    groups = {"individual": z.flatten(1).T.unsqueeze(2), "token": z.transpose(0, 1), "joint": z.flatten(1).unsqueeze(0)}[mode]
    drawn = [torch.tensor(kde.fit(group.numpy()).sample(7, random_state=42)) for group in groups]
    expected = torch.stack(drawn, 1).reshape(7, 4, 3)
    torch.testing.assert_close(sample_latents(z, 7, mode).double(), expected, rtol=FP32_ROUNDING, atol=FP32_ROUNDING)


def test_published_densities_share_anchor_and_noise_and_a_generator_parts_them() -> None:
    anchors = torch.arange(50.0).view(50, 1, 1).expand(50, 2, 3)
    published = sample_latents(anchors, 20)
    assert torch.equal(published[:, 0, 0], published[:, 1, 2])
    apart = sample_latents(anchors, 20, generator=np.random.default_rng(0))
    assert not torch.equal(apart[:, 0, 0].round(), apart[:, 1, 2].round())
    near = generate_z_samples(np.ones((3, 4)), 9)
    assert near.shape == (9, 4)
    assert 0 < np.abs(near - 1).max() < 0.01
    with pytest.raises(WslfastError, match="mode: expected one of"):
        sample_latents(anchors, 3, "umap")


def test_a_decoder_of_ones_own_needs_nothing_but_its_method() -> None:
    arch = Architecture.mlp(2, (3,), 4, dropout=0.0)
    reference = _checkpoint(arch)
    tokens, _, pos = tokenize_checkpoint(reference, 0)

    class Decoder:
        def forward_decoder(self, z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            assert (z.dtype, tuple(p.shape)) == (torch.float32, (*z.shape[:2], 3))
            return z.mean(2, keepdim=True).expand(*z.shape[:2], tokens.shape[1])

    made, z, _, _ = sample_models(Decoder(), reference, 2, torch.randn(3, len(tokens), 5), pos, [3, *tokens.shape])
    for row, checkpoint in zip(z.mean(2), made):
        weight = next(iter(checkpoint.values()))
        assert torch.equal(weight, row[: len(weight), None].expand_as(weight))


def test_anchors_of_another_length_are_not_cut_to_fit() -> None:
    reference = _checkpoint(Architecture.mlp(2, (3,), 4, dropout=0.0))
    tokens, _, pos = tokenize_checkpoint(reference, 0)
    t, shape = len(tokens), [3, *tokens.shape]

    class Decoder:
        def forward_decoder(self, z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*z.shape[:2], tokens.shape[1])

    for z, p, of, message in (
        (torch.randn(3, t + 2, 5), pos, shape, r"anchor_z: expected latents \[M, 7, latent\]"),
        (torch.randn(3, t, 5), pos.unsqueeze(0), shape, r"anchor_pos: expected positions \[7, 3\]"),
        (torch.randn(3, t, 5), pos[:-1], shape, "anchor_pos"),
        (torch.randn(3, t, 5), pos, [t], "anchor_w_shape"),
    ):
        with pytest.raises(WslfastError, match=message):
            sample_models(Decoder(), reference, 2, z, p, of)


@pytest.mark.parametrize("anchors", ["text", torch.zeros(3), [], torch.zeros(0, 3), None], ids=str)
def test_anchors_are_numbers_by_model(anchors: Any) -> None:
    with pytest.raises(WslfastError, match=r"anchors: expected numbers \[M, n\]"):
        generate_z_samples(anchors)
    with pytest.raises(WslfastError, match="samples"):
        generate_z_samples([[1.0, 2.0]], samples=-1)
    assert generate_z_samples(torch.zeros(2, 3, requires_grad=True), 4).shape == (4, 3)


def test_models_are_decoded_whole_and_by_windows() -> None:
    arch = Architecture.cnn()
    reference = _checkpoint(arch)
    _, _, pos = tokenize_checkpoint(reference, 0)
    config = {
        "ae:i_dim": 201,
        "ae:d_model": 8,
        "ae:nhead": 2,
        "ae:num_layers": 1,
        "ae:lat_dim": 3,
        "training::windowsize": 48,
        "ae:max_positions": [48, 5, 20],
    }
    ae = AE(config).eval()
    anchors = torch.randn(5, 48, 3)
    shape = torch.Size([5, 48, 201])
    made, z, positions, new_shape = sample_models(ae, reference, 4, anchors, pos, shape, "joint", batch_size=4)
    assert new_shape == (4, 48, 201)
    assert torch.equal(positions, pos.int())
    decoded = ae.forward_decoder(z.float(), pos.int().expand(4, -1, -1))
    for row, checkpoint in zip(decoded, made):
        expected = tokens_to_checkpoint(row, pos, reference)
        assert all(torch.allclose(checkpoint[n], v, atol=FP32_ROUNDING) for n, v in expected.items())
    # windows of all models are one sequence of a batch's entries, and the published stack attends over those
    halo = sample_models(ae, reference, 4, anchors, pos, shape, "joint", 4, False, halo=True, halo_wse=10, halo_hs=4)
    low = [0, 6, 16, 26, 30]  # 18 tokens each: ten of their own and four on either side, moved inwards at the ends
    windows = [(model, start) for model in range(4) for start in low]
    assembled = torch.zeros(4, 48, 201)
    for i in range(0, 20, 4):
        some = windows[i : i + 4]
        batch = torch.stack([z[model, start : start + 18] for model, start in some]).float()
        part = ae.forward_decoder(batch, torch.stack([pos[start : start + 18].int() for _, start in some]))
        for (model, start), tokens in zip(some, part):
            own = slice(10 * low.index(start), min(10 * low.index(start) + 10, 48))
            assembled[model, own] = tokens[own.start - start : own.stop - start]
    for row, checkpoint in zip(assembled, halo):
        assert all(torch.allclose(checkpoint[n], v, atol=FP32_ROUNDING) for n, v in tokens_to_checkpoint(row, pos, reference).items())
    assert not all(torch.allclose(a[n], b[n], atol=FP32) for a, b in zip(halo, made) for n in a)
    wider = _checkpoint(Architecture.from_layers([*arch.layers[:-1], type(arch.layers[-1])("module_list.11", 20, 13)], (1, 28, 28)))
    with pytest.raises(WslfastError, match="expected a network of 48 tokens"):
        sample_models(ae, wider, 2, anchors, pos, shape)
    reset = sample_models(ae, wider, 2, anchors, pos, shape, "joint", 2, False, True)
    assert reset[0]["module_list.11.weight"].shape == (13, 20)
    assert not torch.equal(reset[0]["module_list.11.weight"], reset[1]["module_list.11.weight"])


def test_a_line_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    printProgressBar(1, 4, "load", "of it", decimals=0, length=8, fill="#")
    printProgressBar(4, 4, length=3, fill="#")
    assert capsys.readouterr().out == "\rload |##------| 25% of it\r\r |###| 100.0% \r\n"
