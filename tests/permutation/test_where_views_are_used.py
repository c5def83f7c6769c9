"""What is built on views, with networks that are graphs: sorted channels, linear codes, re-basin, the drop-in's shared originals, training."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from tolerances import FP32, FP32_ROUNDING
from torch import Tensor, nn
from view_networks import CASES, Recurrent, Siren, ViT

from wslfast import Architecture, LinearCodec, Population, TokenLayout, TrainConfig, WslfastError, load_zoo, permutation, sane, train
from wslfast.measure.diversity import sorted_channels
from wslfast.measure.evaluation import reconstruct
from wslfast.permutation import hidden_channels, permute, random_permutations, random_views
from wslfast.population import unstack
from wslfast.sane import rebasin
from wslfast.sane.views import same_functions
from wslfast.testing import oracle_outputs, relative_error
from wslfast.training import load_run
from wslfast.zoo import save_zoo

NARROW = Architecture.resnet18(width=2)


@cache
def _small(name: str) -> Architecture:
    torch.manual_seed(0)
    return Architecture.from_module(CASES[name].make(), CASES[name].input_shape, name)


@pytest.mark.parametrize("name", ["resnet", "lstm", "rotary", "shufflenet", "experts"])
def test_sorted_channels_are_the_same_for_every_view(name: str) -> None:
    arch = _small(name)
    weights = torch.randn(3, arch.num_weights, dtype=torch.float64)
    one, other = sorted_channels(weights, arch), sorted_channels(random_views(weights, arch), arch)
    assert torch.equal(one, other)
    assert torch.equal(one.sort(1).values, weights.sort(1).values)
    assert not torch.equal(one, weights)


def test_many_models_are_permuted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = _small("resnet")
    weights, drawn = torch.randn(7, arch.num_weights), random_permutations(arch, 7)
    inputs = random_permutations(arch, 7)
    expected = permute(weights, arch, drawn), permute(weights, arch, drawn, inputs)
    monkeypatch.setattr(permutation.views, "_AT_ONCE", 2 * arch.num_weights + 1)
    assert torch.equal(permute(weights, arch, drawn), expected[0])
    assert torch.equal(permute(weights, arch, drawn, inputs), expected[1])
    assert permute(weights[:0], arch, tuple(p[:0] for p in drawn)).shape == (0, arch.num_weights)


def test_linear_codes_of_views() -> None:
    """Fitted on views, a code has a mean that no permutation changes much; as stored, it has the zoo's."""
    arch = _small("lstm")
    base = torch.randn(1, arch.num_weights)
    slot = arch.slots["layer.weight_hh_l0"]
    base[:, slot.offset : slot.stop] += (3 * torch.arange(5.0)).repeat(slot.shape[0])  # columns that a view moves
    population = Population(arch, base + 0.01 * torch.randn(16, arch.num_weights))  # one model, nearly, in one view
    views, stored = LinearCodec(population, latent=0.5), LinearCodec(population, latent=0.5, views=False)
    others = random_views(population.weights, arch, torch.Generator().manual_seed(5))
    errors = [float((reconstruct(code, others) - others).norm()) for code in (views, stored)]
    assert errors[0] < 0.7 * errors[1]
    rows = TokenLayout(arch).tokenize(population.weights).tokens
    assert torch.allclose(stored.center[0], rows[:, :20].mean((0, 1)), atol=FP32)


# -- re-basin ------------------------------------------------------------------------------------------------------------------


def test_the_spec_of_a_resnet_is_the_published_one() -> None:
    """The published spec names the permutations of a torchvision ResNet-18; ours are found in its graph."""
    ours, published = sane.permutation_spec_of(NARROW), sane.resnet18_permutation_spec()
    names: dict[str, str] = {}
    for key, axes in ours.axes_to_perm.items():
        for mine, theirs in zip(axes, published.axes_to_perm[key], strict=True):
            assert (mine is None) == (theirs is None), key
            if mine is not None:
                assert names.setdefault(mine, theirs) == theirs
    assert len(set(names.values())) == len(names) == len(hidden_channels(NARROW))


def test_matching_undoes_a_view() -> None:
    pytest.importorskip("scipy")
    weights = NARROW.initial_weights(["default"], [0])
    weights = weights + 0.05 * torch.randn(weights.shape)
    view = random_views(weights, NARROW, torch.Generator().manual_seed(3))
    a, b = ({name: value[0] for name, value in unstack(rows, NARROW).items()} for rows in (weights, view))
    spec = sane.permutation_spec_of(NARROW)
    torch.manual_seed(0)
    found = rebasin.weight_matching(spec, a, b)
    back = sane.apply_permutation(spec, found, b)
    assert rebasin.objective(spec, a, b, found) > rebasin.objective(spec, a, b, {p: torch.arange(len(i)) for p, i in found.items()})
    row = torch.cat([back[slot.name].flatten() for slot in NARROW.parameters])[None]
    queries = torch.randn(2, 3, 32, 32)
    assert relative_error(oracle_outputs(row, queries, NARROW), oracle_outputs(weights, queries, NARROW)) < FP32_ROUNDING


def test_a_spec_leaves_out_what_it_cannot_say() -> None:
    assert set(sane.permutation_spec_of(_small("lstm")).perm_to_axes) == set()  # gates: an axis of four blocks
    spec = sane.permutation_spec_of(_small("fused-attention"))
    sizes = {p: _small("fused-attention").slots[axes[0][0]].shape[axes[0][1]] for p, axes in spec.perm_to_axes.items()}
    assert sorted(sizes.values()) == [8, 10, 10]  # the residual stream and the hidden units; no heads


def test_originals_of_graphs_are_shared_only_where_they_are_equal() -> None:
    weights = torch.randn(2, NARROW.num_weights)
    assert same_functions(torch.cat([weights, weights]), NARROW).tolist() == [True, True]
    assert same_functions(torch.cat([weights, random_views(weights, NARROW)]), NARROW).tolist() == [False, False]


# -- from modules in a zoo to reconstructed modules -----------------------------------------------------------------------------


def _zoo(name: str, folder: Path) -> Architecture:
    torch.manual_seed(0)
    makers = {"siren": Siren, "lstm": lambda: Recurrent(nn.LSTM(3, 5, 2, batch_first=True), 5), "vit": ViT}
    if name == "resnet18":
        arch = Architecture.resnet18(width=8)
        weights = arch.initial_weights(["default"] * 8, range(8))
    else:
        modules = [makers[name]() for _ in range(8)]
        arch = Architecture.from_module(modules[0], {"siren": (2,), "lstm": (4, 3), "vit": (1, 8, 8)}[name], name)
        weights = torch.stack([torch.cat([m.state_dict()[slot.name].flatten() for slot in arch.parameters]) for m in modules])
    save_zoo(Population(arch, weights), folder, splits=["train"] * 6 + ["val", "test"], provenance={"made_by": "a test"})
    return arch


@pytest.mark.slow
@pytest.mark.parametrize("start", ["random", "linear"])
@pytest.mark.parametrize("name", ["siren", "lstm", "vit", "resnet18"])
def test_training_on_a_zoo_of_modules(name: str, start: str, tmp_path: Path) -> None:
    arch = _zoo(name, tmp_path / "zoo")
    sizes = {"d_model": 16, "heads": 2, "layers": 1, "latent": 4, "window": 16, "token_size": 64 if name == "resnet18" else 0}
    config = TrainConfig(
        zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), steps=3, batch_size=4, queries=2, query_pool=4, query_set="uniform",
        start=start, share=0.2, **sizes,
    )  # fmt: skip
    train(config)
    loaded = load_run(tmp_path / "run")
    zoo = load_zoo(tmp_path / "zoo", "test")
    assert loaded.autoencoder.layout.architecture.same_network(arch)
    assert zoo.architecture == arch
    rebuilt = reconstruct(loaded.autoencoder, zoo.weights)
    assert rebuilt.shape == zoo.weights.shape
    assert bool(rebuilt.isfinite().all())
    assert not torch.equal(rebuilt, zoo.weights)


def test_scrambled_views_are_their_own_originals(tmp_path: Path) -> None:
    _zoo("siren", tmp_path / "zoo")
    train(
        TrainConfig(
            zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), steps=2, batch_size=4, queries=2, query_pool=4, query_set="uniform",
            start="random", d_model=16, heads=2, layers=1, latent=4, permutations="random",
        )
    )  # fmt: skip


class Mapped(nn.Module):
    """An image out: answers of more than one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


def test_training_on_networks_that_answer_with_images(tmp_path: Path) -> None:
    arch = Architecture.from_module(Mapped(), (1, 4, 4))
    weights = torch.randn(6, arch.num_weights).abs()
    save_zoo(Population(arch, weights), tmp_path / "zoo", splits=["train"] * 4 + ["val", "test"], provenance={"made_by": "a test"})
    train(
        TrainConfig(
            zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), steps=2, batch_size=4, queries=2, query_pool=4, query_set="uniform",
            start="random", d_model=16, heads=2, layers=1, latent=4,
        )
    )  # fmt: skip


def test_the_activation_metric_says_what_it_needs() -> None:
    population = Population(NARROW, NARROW.initial_weights(["default"] * 4, range(4)))
    with pytest.raises(WslfastError, match="use metric='plain'"):
        LinearCodec(population, metric="activation", queries=torch.randn(4, 3, 32, 32), token_size=64)
