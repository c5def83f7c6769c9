"""Views of any network: the same outputs in float64 from permuted weights, of some forty networks, group by group."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tolerances import FP64
from torch import Tensor, nn
from view_networks import CASES, queries

from wslfast.architecture import Architecture
from wslfast.permutation import following, groups, hidden_channels, inverse, kept_channels, permute, random_permutations, random_views
from wslfast.population import unstack
from wslfast.testing import relative_error

KIN = {
    "transformer-post-norm", "mobilenet", "densenet", "window-attention", "convnext", "gru-by-hand", "mixer", "vgg", "unet", "squeeze-excite",
    "decoder", "gpt", "rnn-last-state", "resnet-padded-shortcut", "pixel-shuffle", "gated", "one-block", "film", "lstm-projected",
}  # fmt: skip  # of those that stay in the quick tier: following a module takes torch a second or two
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in KIN else name for name in CASES]


@cache
def _network(name: str) -> tuple[nn.Module, Architecture]:
    torch.manual_seed(0)
    module = CASES[name].make().eval()
    arch = Architecture.from_module(module, CASES[name].input_shape, name)
    assert arch.graph is not None, arch.reason
    return module.double(), arch


def _weights(arch: Architecture, k: int) -> Tensor:
    rows = torch.randn(k, arch.num_weights, dtype=torch.float64) / 2
    for slot in arch.parameters:
        if slot.name.endswith("running_var"):
            rows[:, slot.offset : slot.stop] = rows[:, slot.offset : slot.stop].abs() + 0.1
    return rows


def _outputs(name: str, weights: Tensor, x: Tensor) -> Tensor:
    """The module itself, one model after another."""
    module, arch = _network(name)
    named = unstack(weights, arch)
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(module, {n: v[j] for n, v in named.items()}, (x,)) for j in range(len(weights))])


@pytest.mark.parametrize("name", NAMES)
def test_views_are_the_same_function(name: str) -> None:
    arch = _network(name)[1]
    weights, x = _weights(arch, 3), queries(CASES[name], 3)
    expected = _outputs(name, weights, x)
    drawn = random_permutations(arch, 3, torch.Generator().manual_seed(1))
    views = permute(weights, arch, drawn)
    assert relative_error(_outputs(name, views, x), expected) < FP64
    assert hidden_channels(arch) == CASES[name].groups
    assert torch.equal(permute(views, arch, inverse(drawn)), weights)
    assert torch.equal(views.sort(1).values, weights.sort(1).values)  # nothing is lost or doubled
    if drawn:
        assert not torch.equal(views, weights)
        assert float(expected.std(0).norm()) > 0.1  # other weights are another function: the comparison can fail


# -- group by group: none is idle, and each is a group of its own --------------------------------------------------------------

ALONE = (
    "resnet",
    "group-norm",
    "decoder",
    "vit",
    "fused-attention",
    "rotary",
    "shufflenet",
    "gru-both-ways",
    "experts",
    "filter-over-features",
)


@pytest.mark.parametrize("name", ALONE)
def test_every_group_moves_alone(name: str) -> None:
    arch = _network(name)[1]
    weights, x = _weights(arch, 1), queries(CASES[name], 2)
    expected = _outputs(name, weights, x)
    for g, size in enumerate(hidden_channels(arch)):
        drawn = [torch.arange(c).unsqueeze(0) for c in hidden_channels(arch)]
        drawn[g] = torch.arange(size).roll(1).unsqueeze(0)
        view = permute(weights, arch, tuple(drawn))
        assert not torch.equal(view, weights)
        assert relative_error(_outputs(name, view, x), expected) < FP64


@pytest.mark.parametrize("name", ["resnet", "vit", "lstm", "nerf"])
def test_other_inputs_scramble(name: str) -> None:
    arch = _network(name)[1]
    weights, x = _weights(arch, 2), queries(CASES[name], 3)
    outputs, inputs = (random_permutations(arch, 2, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    scrambled = permute(weights, arch, outputs, inputs)
    assert torch.equal(scrambled.sort(1).values, weights.sort(1).values)
    assert relative_error(_outputs(name, scrambled, x), _outputs(name, weights, x)) > 1e-3


# -- what stays in its order is said ---------------------------------------------------------------------------------------------

KEPT = {
    "running-sums": {"a.weight": "6 of 6: operation 1 (cumsum)"},
    "filter-over-features": {"a.weight": "8 of 8: operation 2 (conv1d)"},
    "gpt": {"wte.weight": "11 of 11: operation 1 (embedding)"},  # a vocabulary
    "mixer": {"tokens.2.weight": "4 of 4: operation 9 (add.Tensor)"},  # added to patches, which have an order
    "mixer-convolutions": {"back.weight": "4 of 4: operation 4 (add.Tensor)"},
}


@pytest.mark.parametrize("name", NAMES)
def test_what_stays_in_its_order_is_named(name: str) -> None:
    assert kept_channels(_network(name)[1]) == KEPT.get(name, {})


def test_an_operation_without_a_rule_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following._Follower, "_group_norm", lambda *_: None)
    groups._derived.cache_clear()
    arch = _network("group-norm")[1]
    assert hidden_channels(arch) == ()
    assert kept_channels(arch) == {
        "0.weight": "8 of 8: operation 1 (group_norm)", "3.weight": "6 of 6: operation 4 (group_norm)", "6.weight": "4 of 4: operation 7 (group_norm)"
    }  # fmt: skip
    groups._derived.cache_clear()


def test_a_wrong_rule_is_found_by_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following._Follower, "_group_norm", lambda self, name, given, shapes: given["input"])
    groups._derived.cache_clear()
    arch = _network("group-norm")[1]
    weights, x = _weights(arch, 2), queries(CASES["group-norm"], 3)
    assert relative_error(_outputs("group-norm", random_views(weights, arch), x), _outputs("group-norm", weights, x)) < FP64
    assert kept_channels(arch)["0.weight"] == "8 of 8: a permutation of them changes the outputs"
    groups._derived.cache_clear()


def test_a_module_that_cannot_be_traced_has_no_views() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if float(x.sum()) > 1e9 else torch.relu(self.a(x)))

    arch = Architecture.from_module(Turning(), (3,))
    weights = torch.randn(2, arch.num_weights)
    assert arch.graph is None
    assert hidden_channels(arch) == ()
    assert torch.equal(random_views(weights, arch), weights)
    assert kept_channels(arch)["a.weight"] == "the module cannot be traced"
