"""The published autoencoder: golden values, both transformer types, training states both ways, a step, and each departure's flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP32_DEEP, FP32_ROUNDING
from torch import nn

from wslfast.architecture import Architecture
from wslfast.codes.autoencoder import Autoencoder
from wslfast.errors import WslfastError
from wslfast.population import unstack
from wslfast.sane import AE, AEModule, load_state
from wslfast.sane.autoencoder import supports
from wslfast.sane.feedforward import feed_forward
from wslfast.sane.state import with_template, without_template
from wslfast.tokens import TokenLayout

CONFIG: dict[str, Any] = {
    "ae:i_dim": 289, "ae:d_model": 32, "ae:nhead": 4, "ae:num_layers": 2, "ae:lat_dim": 8, "ae:max_positions": [100, 10, 40],
    "training::windowsize": 93,
}  # fmt: skip
TYPES = ("pytorch", "gpt2")


def _golden(kind: str, **flags: bool) -> AE:
    """The state that golden G2 is made from: 0.2 sin(k) in state-dict order, layer norms at one and zero."""
    ae = AE(CONFIG | {"ae:transformer_type": kind}, **flags).eval()
    k, norms = 0, {name for name, m in ae.named_modules() if isinstance(m, nn.LayerNorm)}
    for name, value in ae.state_dict().items():
        sine = (0.2 * torch.arange(k, k + value.numel(), dtype=torch.float64).sin()).float().view(value.shape)
        k += value.numel()
        module, _, end = name.rpartition(".")
        value.copy_(torch.full_like(value, float(end == "weight")) if module in norms else sine)
    return ae


def _tokens() -> tuple[torch.Tensor, torch.Tensor]:
    arch = Architecture.cnn3()
    t, _, p = TokenLayout(arch).tokenize((0.3 * torch.arange(arch.num_weights, dtype=torch.float64).sin()).float().unsqueeze(0))
    return torch.cat([t, 0.5 * t, -t]), p.expand(3, -1, -1)


GOLDENS = {
    "pytorch": (236.28512, (-0.099016, 0.074714, 0.341135), (-0.099054, 0.074648, 0.341064), 134.0495, (-0.145683, 0.218867, 0.590557),
                (0, 1.120645, 0.955684, 0), (-0.098025, 0.073581, 0.338255)),
    "gpt2": (130.79525, (0.636005, 0.854944, 0.873246), (0.636005, 0.854944, 0.873246), 252.6344, (-0.400035, -0.243291, 0.111319),
             (0.5942, 1.316425, 0, 0), (0.558632, 0.557238, 0.453913)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_golden_g2(kind: str) -> None:
    ae, (x, p) = _golden(kind), _tokens()
    sum_z, first, alone, sum_y, last, projection, embedding = GOLDENS[kind]
    with torch.no_grad():
        z, y, zp = ae(x, p)  # int16 positions, as tokenising gives them
        assert z.sum().item() == pytest.approx(sum_z, rel=FP32_DEEP)
        assert z[0, 0, :3].tolist() == pytest.approx(first, abs=2 * FP32)
        assert ae.forward_encoder(x[:1], p[:1])[0, 0, :3].tolist() == pytest.approx(alone, abs=2 * FP32)
        assert y.sum().item() == pytest.approx(sum_y, rel=FP32_DEEP)
        assert y[2, 92, :3].tolist() == pytest.approx(last, abs=2 * FP32)
        assert zp[0, :4].tolist() == pytest.approx(projection, abs=FP32_DEEP)
        assert ae.forward_embeddings(x, p)[1, :3].tolist() == pytest.approx(embedding, abs=2 * FP32)


def test_parameters_of_the_papers_size() -> None:
    config = {
        "ae:i_dim": 289,
        "ae:d_model": 256,
        "ae:nhead": 8,
        "ae:num_layers": 8,
        "ae:lat_dim": 64,
        "ae:max_positions": [500, 50, 100],
        "training::windowsize": 93,
    }
    for kind, expected in (("pytorch", 21_485_533), ("gpt2", 13_035_485)):
        with torch.device("meta"):
            ae = AE(config | {"ae:transformer_type": kind})
        assert sum(p.numel() for p in ae.parameters()) == expected
    names = list(AE(CONFIG).state_dict())
    assert names[:3] == ["tokenizer.weight", "tokenizer.bias", "transformer_encoder.layers.0.self_attn.in_proj_weight"]
    assert names[-6:] == [f"projection_head.head.{i}" for i in ("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias")]


def test_initial_values_follow_the_published_recipe() -> None:
    ae = AE(CONFIG | {"ae:d_model": 64})
    layers = ae.transformer_encoder.layers
    assert torch.equal(layers[0].self_attn.in_proj_weight, layers[1].self_attn.in_proj_weight)  # deep copies of one layer
    bound = (6 / (4 * 64)) ** 0.5
    assert layers[0].self_attn.in_proj_weight.abs().max() <= bound
    assert layers[0].linear1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layers[0].linear1.bias.abs().max() == 0
    gpt2 = AE(CONFIG | {"ae:transformer_type": "gpt2", "ae:d_model": 64})
    assert gpt2.transformer_encoder.transformer[0].mlp.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert gpt2.pe.pe1.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_the_pytorch_type_is_torchs_own_stack_dropout_included(training: bool) -> None:
    ae, (x, p) = AE(CONFIG | {"ae:dropout": 0.2}).train(training), _tokens()
    results = []
    for own in (True, False):
        torch.manual_seed(1)
        ae.zero_grad()
        h = ae.dropout(ae.pe(ae.tokenizer(x), p))
        z = ae._transform(ae.transformer_encoder, h, None) if own else ae.transformer_encoder(h)
        z.square().sum().backward()
        results.append((z.detach(), [q.grad for q in ae.transformer_encoder.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=FP32, atol=FP32_ROUNDING)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=FP32_DEEP, atol=FP32)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [(1, 1), (7, 75), (2, 513)], ids=str)
def test_feed_forward_against_torch(rows: tuple[int, int], p: float, poisoned_empty: None) -> None:
    x, w1, b1 = torch.randn(*rows, 6), torch.randn(11, 6), torch.randn(11)
    w2, b2 = torch.randn(6, 11), torch.randn(6)
    found = []
    for own in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, w1, b1, w2, b2)]
        a, u1, c1, u2, c2 = leaves
        torch.manual_seed(2)
        y = feed_forward(a, u1, c1, u2, c2, p, True) if own else F.linear(F.dropout(F.relu(F.linear(a, u1, c1)), p), u2, c2)
        y.sum().backward()  # a gradient of stride zero
        found.append([y.detach(), *[t.grad for t in leaves]])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=FP32, atol=FP32)
    plain = feed_forward(x, w1, b1, w2, b2, 0.5, False)
    torch.testing.assert_close(plain, F.linear(F.relu(F.linear(x, w1, b1)), w2, b2))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_feed_forward_twice_against_torch(p: float) -> None:
    """Second derivatives, behind a gradient that is a constant."""
    values = [torch.randn(size) for size in ((7, 5, 6), (11, 6), (11,), (6, 11), (6,))]
    directions = [torch.randn_like(value) for value in values]
    found = []
    for own in (True, False):
        leaves = [value.clone().requires_grad_() for value in values]
        a, u1, c1, u2, c2 = leaves
        torch.manual_seed(2)
        y = feed_forward(a, u1, c1, u2, c2, p, True) if own else F.linear(F.dropout(F.relu(F.linear(a, u1, c1)), p), u2, c2)
        slopes = torch.autograd.grad(y.sum(), leaves, create_graph=True)
        along = sum((slope * direction).sum() for slope, direction in zip(slopes, directions, strict=True))
        assert isinstance(along, torch.Tensor)
        found.append([*(s.detach() for s in slopes), *torch.autograd.grad(along, leaves[:4])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=FP32_DEEP, atol=FP32_DEEP)


# -- departures --------------------------------------------------------------------------------------------------------


def test_defect_1_batch_attention() -> None:
    x, p = _tokens()
    changed, moved = x.clone(), x.clone()
    changed[2] += 1  # another model
    moved[0, 5] += 1  # another token of model 0
    for flag in (True, False):
        ae = _golden("pytorch", batch_attention=flag)
        with torch.no_grad():
            z, others, tokens = (ae.forward_encoder(t, p)[0] for t in (x, changed, moved))
        assert torch.equal(z, others) is not flag
        touched = (z != tokens).any(1)
        assert touched[5]
        assert bool(touched[torch.arange(93) != 5].any()) is not flag
    corrected = AE(CONFIG, semantics="corrected").eval()
    torch.testing.assert_close(corrected(x, p)[1][:1], corrected(x[:1], p[:1])[1], rtol=FP32, atol=FP32_ROUNDING)


def test_decoder_dropout_flag() -> None:
    x, p = _tokens()
    for flag in (True, False):
        ae = AE(CONFIG, decoder_dropout=flag).train()
        z = ae.forward_encoder(x, p)
        assert torch.equal(z, ae.forward_encoder(x, p))  # ae:dropout is 0
        assert torch.equal(ae.forward_decoder(z, p), ae.forward_decoder(z, p)) is not flag


def test_attention_masks_and_two_position_tables() -> None:
    x, p = _tokens()
    for kind, size in (("pytorch", 3), ("gpt2", 93)):
        ae = AE(CONFIG | {"ae:transformer_type": kind}).eval()
        nothing = torch.zeros(size, size)
        torch.testing.assert_close(ae(x, p, nothing)[1], ae(x, p)[1], rtol=FP32_DEEP, atol=FP32)
        own = torch.full((size, size), float("-inf")).fill_diagonal_(0)
        assert not torch.allclose(ae(x, p, own)[0], ae(x, p)[0], rtol=FP32_DEEP)
    two = AE(CONFIG | {"ae:max_positions": [100, 10]})
    assert two(x, p[:, :, :2])[1].shape == x.shape
    with pytest.raises(WslfastError, match=r"p: expected positions \[3, 93, 3\]"):
        AE(CONFIG)(x, p[:, :5])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ae:transformer_type": "perceiver"}, "ae:transformer_type"), ({"ae:nhead": 5}, "ae:d_model"), ({"ae:max_positions": [3]}, "ae:max_positions"),
     ({"ae:use_layer_embs": True}, "fork's network"), ({"ae:weight_init_type": "xavier"}, "fork's network"),
     ({"ae:nhead": 0}, "ae:nhead"), ({"ae:nhead": None}, "ae:nhead"), ({"ae:d_model": "64"}, "ae:d_model"), ({"ae:lat_dim": 0}, "ae:lat_dim"),
     ({"ae:num_layers": 2.0}, "ae:num_layers"), ({"ae:max_positions": 100}, "ae:max_positions"), ({"ae:max_positions": [100, 0]}, "ae:max_pos"),
     ({"ae:dropout": 2}, "ae:dropout"), ({"training::windowsize": None}, "training::windowsize")],
)  # fmt: skip
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WslfastError, match=message):
        AE(CONFIG | change)
    assert message in str(supports(CONFIG | change))


def test_a_config_is_a_mapping_of_whole_numbers_numpys_too() -> None:
    for wrong in (None, 5, ["ae:d_model"]):
        with pytest.raises(WslfastError, match="config: expected a mapping"):
            AE(wrong)  # type: ignore[arg-type]
    sizes = {key: np.int64(value) for key, value in CONFIG.items() if isinstance(value, int)}
    assert len(sizes) >= 4
    assert [p.shape for p in AE({**CONFIG, **sizes}).parameters()] == [p.shape for p in AE(CONFIG).parameters()]


# -- states ------------------------------------------------------------------------------------------------------------


def test_states_load_through_compile_and_parallel_prefixes() -> None:
    for kind in TYPES:
        ae, other = _golden(kind), AE(CONFIG | {"ae:transformer_type": kind})
        other.load_state_dict({f"_orig_mod.{k}": v for k, v in ae.state_dict().items()})
        other.load_state_dict({f"module.{k}": v for k, v in ae.state_dict().items()})
        assert all(torch.equal(a, b) for a, b in zip(ae.state_dict().values(), other.state_dict().values()))


def test_gpt2_states_are_the_cores_and_back() -> None:
    published = _golden("gpt2")
    layout = TokenLayout(Architecture.cnn3())
    core = Autoencoder(layout, d_model=32, heads=4, layers=2, latent=8, max_positions=(100, 10, 40)).eval()
    missing, unexpected = core.load_state_dict(published.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["latent_mask", "mask", "positions"], [])
    x, p = _tokens()
    torch.testing.assert_close(core.encode(x), published.forward_encoder(x, p), rtol=FP32, atol=FP32_ROUNDING)
    back = AE(CONFIG | {"ae:transformer_type": "gpt2"})
    back.load_state_dict({k: v for k, v in core.state_dict().items() if k not in ("latent_mask", "mask", "positions")})


def _module(**changes: Any) -> AEModule:
    arch = Architecture.cnn3()
    checkpoint = {n: v[0] for n, v in unstack(arch.initial_weights(["kaiming_uniform"], [0]), arch).items()}
    params = {"model::type": "CNN3", "model::channels_in": 3, "model::nlin": "relu", "model::dropout": 0}
    config = CONFIG | {"trainset::batchsize": 2, "training::n_queries_distillation": 3, "optim::lr": 1e-3} | changes
    return AEModule(config, checkpoint, params)


def _batch() -> tuple[torch.Tensor, ...]:
    arch = Architecture.cnn3()
    x, mask, p = TokenLayout(arch).tokenize(arch.initial_weights(["kaiming_uniform"] * 4, [1, 2, 3, 4]))
    m, p = mask.expand(2, -1, -1), p.int().expand(2, -1, -1)
    return x[:2], m, p, x[2:], m, p


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "sgd"])
def test_state_pt_round_trip(tmp_path: Path, optimiser: str) -> None:
    changes = {"optim::optimizer": optimiser, "optim::scheduler": "OneCycleLR", "training::steps_per_epoch": 5, "training::epochs_train": 2}
    a, b = (_module(**changes) for _ in range(2))
    a.train_step(*_batch())
    a.save_model(tmp_path)
    b.load_model(tmp_path)
    state = load_state(tmp_path)
    assert set(state) == {"model", "optimizer", "scheduler"}
    held = sum(len(g["params"]) for g in state["optimizer"]["param_groups"])
    assert held == len(list(a.parameters())) + 10  # the template's weights and biases, as the published code lists them
    for module in (a, b):
        module.criterion.loss_recon.recon_loss.scale = module.criterion.loss_recon.distillation_loss.scale = 1.0
        module.criterion.loss_contrast.scale = 1.0
        torch.manual_seed(9)
        module.train_step(*_batch())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert a.scheduler.state_dict()["last_epoch"] == b.scheduler.state_dict()["last_epoch"] == 2


def test_template_entries_come_and_go() -> None:
    state = {"state": {0: "a", 1: "b", 2: "c"}, "param_groups": [{"lr": 1, "params": [0, 1]}, {"lr": 1, "params": [2]}]}
    padded = with_template(state, [2, 1])
    assert [g["params"] for g in padded["param_groups"]] == [[0, 1, 2, 3], [4, 5]]
    assert padded["state"] == {0: "a", 1: "b", 4: "c"}
    assert without_template(padded, [2, 1]) == state
    with pytest.raises(WslfastError, match="expected groups of"):
        without_template(state, [2, 5])
    with pytest.raises(WslfastError, match="have been trained"):
        without_template(state, [1, 1])


def test_files_that_are_no_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WslfastError, match="expected a file"):
        load_state(tmp_path)
    torch.save({"weights": 1}, tmp_path / "state.pt")
    with pytest.raises(WslfastError, match="expected a key 'model'"):
        load_state(tmp_path)
    torch.save({"model": _module}, tmp_path / "state.pt")  # a function by name: nothing of it is imported or run
    with pytest.raises(WslfastError, match="plain containers"):
        load_state(tmp_path)


# -- steps -------------------------------------------------------------------------------------------------------------


def test_steps_train_and_epochs_average(tmp_path: Path) -> None:
    module = _module(**{"training::gradient_clipping": "norm", "training::precision": "amp"})
    batch = _batch()
    first = module.test_epoch([batch])
    assert first["loss/loss"] == pytest.approx(1, rel=FP32)
    losses = [module.train_epoch([batch, batch])["loss/loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert not module.model.training
    with pytest.raises(WslfastError, match="at least one batch"):
        module.test_epoch([])
    assert module.forward_embeddings(batch[0].half(), batch[2]).shape == (2, 8)


def test_transforms_may_be_functions_modules_or_none(tmp_path: Path) -> None:
    module, batch = _module(), _batch()
    plain = module.test_epoch([batch])
    for transforms in ((lambda *parts: parts,) * 3, (), (torch.nn.Sequential(),) * 3):
        module.set_transforms(*transforms)
        assert (module.transforms_downstream is transforms[2]) if transforms else module.transforms_downstream(3) == 3
    module = _module()
    module.set_transforms(lambda *parts: parts, lambda x, *parts: (x, *parts), lambda x: x)
    assert module.test_epoch([batch]).keys() == plain.keys()


def test_a_cycle_term_reads_the_encoded_reconstruction() -> None:
    plain, cycle = (_module(**{"training::lambda": weight}) for weight in (0.0, 1.0))
    batch = _batch()
    with torch.no_grad():
        latents = [plain.forward(batch[i], batch[2]) for i in (0, 3)]
        term = torch.cat([(z - plain.forward_encoder(y, batch[2])).norm(dim=1) for z, y, _ in latents]).mean()
    values = []
    for module in (plain, cycle):
        torch.manual_seed(4)
        values.append(module.test_step(*batch)["loss/loss"].item())
    assert values[1] - values[0] == pytest.approx(term.item(), rel=FP32_DEEP)


def test_corrected_steps_work_and_have_no_hidden_scale() -> None:
    module = AEModule(CONFIG | {"training::beta": 1.0, "trainset::batchsize": 2}, semantics="corrected")
    parts = module.train_step(*_batch())
    assert module.criterion.loss_recon.scale == 1
    assert parts["loss/loss"].isfinite()
    with pytest.raises(WslfastError, match="optim::optimizer"):
        _module(**{"optim::optimizer": "lamb"})
