"""Tokens of any network: every number of a row of weights once, in rows that are written out here by hand."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from random_networks import RandomNetwork
from torch import Tensor, nn
from view_networks import CASES

from wslfast import Architecture, TokenLayout
from wslfast.population import unstack
from wslfast.tokens import num_tokens

QUICK = (
    "resnet", "vit", "lstm", "gru-both-ways", "lora", "siren", "nerf", "experts", "policy", "tied-autoencoder", "lora-merged", "group-norm",
    "mixer-convolutions", "rotary", "shufflenet",
)  # fmt: skip
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@cache
def _architecture(name: str) -> Architecture:
    arch = Architecture.from_module(CASES[name].make(), CASES[name].input_shape, name)
    assert arch.graph is not None, arch.reason
    return arch


def _round_trip(arch: Architecture, size: int) -> None:
    tokens = TokenLayout(arch, size)
    assert tokens.complete
    assert torch.equal(tokens.index[tokens.mask].sort().values, torch.arange(arch.num_weights))  # each once
    weights = torch.randn(2, arch.num_weights)
    made = tokens.tokenize(weights).tokens
    assert not made[:, ~tokens.mask].any()
    assert torch.equal(tokens.detokenize(made), weights)
    order = [arch.slots[name].offset for name in tokens.layers]
    assert order == sorted(order)  # of keys
    place = tokens.positions.long()
    assert place[:, 0].tolist() == list(range(tokens.num_tokens))
    assert bool((place[1:, 1] >= place[:-1, 1]).all())
    assert num_tokens(arch, tokens.token_size) == tokens.num_tokens


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_one_place(name: str) -> None:
    for size in (0, 1, 5, 1000):
        _round_trip(_architecture(name), size)


@pytest.mark.parametrize("seed", range(6))
def test_every_weight_of_a_random_network_has_one_place(seed: int) -> None:
    torch.manual_seed(seed)
    arch = Architecture.from_module(RandomNetwork(seed, 3 + 2 * seed), (5,))
    assert arch.graph is not None, arch.reason
    _round_trip(arch, 0)
    _round_trip(arch, 3)


# -- rows by hand ------------------------------------------------------------------------------------------------------------


class Product(nn.Module):
    """``x @ W + b``, a table of positions, a scale, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.table, self.token = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.randn(1, 1, 4))
        self.scale, self.number = nn.Parameter(torch.randn(4)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.W + self.b + self.table + self.token) * self.scale * self.number


class Upwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.plain = nn.ConvTranspose1d(4, 3, 2, bias=False)
        self.norm = nn.LayerNorm((3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.plain(self.up(x)))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.cell = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(3, 7, bias=False)
        self.back = nn.Linear(2, 3)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(self.cell(self.table(x.long()))[0][:, -1]))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.prelu, self.mix = nn.Conv3d(2, 3, (1, 2, 2)), nn.PReLU(), nn.Bilinear(3, 3, 2)
        self.a, self.b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.conv(x)).flatten(2).mean(2)
        return F.linear(y, self.b @ self.a) + self.mix(y, y).repeat(1, 2)


def _rows(module: nn.Module, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of every layer, and the state."""
    arch = Architecture.from_module(module, shape)
    assert arch.graph is not None, arch.reason
    weights = torch.arange(1.0, arch.num_weights + 1)[None]
    tokens = TokenLayout(arch, 64)
    made = tokens.tokenize(weights)
    state = {name: value[0] for name, value in unstack(weights, arch).items()}
    rows = {}
    for i, name in enumerate(tokens.layers):
        mine = made.positions[:, 1] == i
        rows[name] = made.tokens[0, mine][:, made.mask[mine][0]]
    return rows, state


def test_products_and_parameters_of_their_own() -> None:
    rows, s = _rows(Product(), (5, 3))
    assert list(rows) == ["W", "table", "token", "scale", "number"]
    assert torch.equal(rows["W"], torch.cat([s["W"].T, s["b"][:, None]], 1))  # a row an output, its bias last
    assert torch.equal(rows["table"], s["table"][0])
    assert torch.equal(rows["token"], s["token"][0])
    assert torch.equal(rows["scale"], s["scale"][:, None])
    assert torch.equal(rows["number"], s["number"].view(1, 1))


def test_transposed_convolutions_and_norms_over_several_axes() -> None:
    rows, s = _rows(Upwards(), (6, 3))
    assert list(rows) == ["up.weight", "plain.weight", "norm.weight"]
    up = [torch.cat([s["up.weight"][3 * g : 3 * g + 3, o].flatten(), s["up.bias"][2 * g + o, None]]) for g in range(2) for o in range(2)]
    assert torch.equal(rows["up.weight"], torch.stack(up))
    assert torch.equal(rows["plain.weight"], s["plain.weight"].transpose(0, 1).flatten(1))
    assert torch.equal(rows["norm.weight"], torch.cat([s["norm.weight"], s["norm.bias"]], 1))


def test_embeddings_gates_and_tied_weights() -> None:
    rows, s = _rows(Lookup(), (4,))
    assert list(rows) == ["table.weight", "cell.weight_ih_l0", "cell.weight_hh_l0", "back.weight"]  # a tied weight once
    assert torch.equal(rows["table.weight"], s["table.weight"])
    for part in ("ih", "hh"):
        assert torch.equal(rows[f"cell.weight_{part}_l0"], torch.cat([s[f"cell.weight_{part}_l0"], s[f"cell.bias_{part}_l0"][:, None]], 1))


def test_volumes_slopes_bilinear_layers_and_factors() -> None:
    rows, s = _rows(Volume(), (2, 1, 3, 3))
    assert list(rows) == ["a", "b", "conv.weight", "prelu.weight", "mix.weight"]
    assert torch.equal(rows["conv.weight"], torch.cat([s["conv.weight"].flatten(1), s["conv.bias"][:, None]], 1))
    assert torch.equal(rows["mix.weight"], torch.cat([s["mix.weight"].flatten(1), s["mix.bias"][:, None]], 1))
    assert torch.equal(rows["prelu.weight"], s["prelu.weight"].view(1, 1))
    assert torch.equal(rows["a"], s["a"])
    assert torch.equal(rows["b"], s["b"])


def test_a_module_that_cannot_be_traced_is_tokenised_by_names_and_shapes() -> None:
    class Turning(Product):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) < 1e9 else -x)

    arch = Architecture.from_module(Turning(), (5, 3))
    assert arch.graph is None
    tokens = TokenLayout(arch)
    assert tokens.layers == ("W", "b", "table", "token", "scale", "number")
    _round_trip(arch, 0)
