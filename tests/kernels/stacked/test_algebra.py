"""Rules of shapes, joins, reductions and products, each against torch's own graph through its form, and with no call left to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tape_cases import WIDTH, Between, check, check_without_islands, kinds_of_calls, population
from torch import Tensor, nn

from wslfast.kernels.stacked.tape import Island

TWO = (WIDTH, 4)
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "reshape by the queries": (lambda x, w: (x * w).reshape(x.shape[0], 2, 3).squeeze(-1), (WIDTH,)),
    "unsqueeze and squeeze": (lambda x, w: ((x * w).unsqueeze(1) * x.unsqueeze(2)).sum(2).unsqueeze(1).squeeze(1), (WIDTH,)),
    "expand": (lambda x, w: w.expand(x.shape[0], -1) * x, (WIDTH,)),
    "expand over a new axis": (lambda x, w: (x * w).unsqueeze(1).expand(-1, 4, -1).reshape(x.shape[0], -1), (WIDTH,)),
    "transpose": (lambda x, w: (x * w).unflatten(1, (2, 3)).transpose(1, 2), (WIDTH,)),
    "permute": (lambda x, w: (x * w).unflatten(1, (1, 2, 3)).permute(0, 3, 1, 2), (WIDTH,)),
    "flip": (lambda x, w: (x * w).flip(1) * x, (WIDTH,)),
    "cat": (lambda x, w: torch.cat((x, x * w, x.sin()), 1), (WIDTH,)),
    "cat of rows": (lambda x, w: torch.cat((w.expand(x.shape[0], 1, -1), x.unsqueeze(1)), 1).tanh(), (1, WIDTH)),
    "stack": (lambda x, w: torch.stack((x, x * w, w.expand_as(x)), 1), (WIDTH,)),
    "chunk": (lambda x, w: (x * w).chunk(2, 1)[0] * (x * w).chunk(2, 1)[1], (WIDTH,)),
    "a part that nobody reads": (lambda x, w: (x * w).chunk(3, 1)[1] + 1, (WIDTH,)),
    "a part twice": (lambda x, w: (lambda a, b: a * a.sin() + b)(*(x * w).split(3, 1)), (WIDTH,)),
    "uneven parts": (lambda x, w: torch.cat((x * w).split((1, 2, 3), 1)[::2], 1), (WIDTH,)),
    "three selected": (lambda x, w: (lambda y: y[..., 0] * y[..., 1].sin() + y[..., 2])((x * w).unflatten(1, (2, 3))), (WIDTH,)),
    "selected twice, and whole": (lambda x, w: (lambda y: y[..., 1:2] * y[..., 1:2].cos() + y.sin() * y[..., -1:])(x * w), (WIDTH,)),
    "cuts that overlap, with a step": (lambda x, w: (lambda y: y[..., 0:4:2] * y[..., 1:3] + y[..., 4:])(x * w), (WIDTH,)),
    "cuts of a parameter": (lambda x, w: x[..., :3] * w[..., :3] + x[..., 3:] * w[..., 2:5] - w[..., 0], (WIDTH,)),
    "unbind": (lambda x, w: (lambda q, k, v: q * k + v)(*(x * w).view(-1, 2, 3).unbind(2)), (WIDTH,)),
    "sum": (lambda x, w: (x * w).unflatten(1, (2, 3)).sum((1, 2), keepdim=True) + w.sum(-1), (WIDTH,)),
    "sum without its axis": (lambda x, w: (x * w).unflatten(1, (2, 3)).sum(1), (WIDTH,)),
    "amax": (lambda x, w: (x * w).unflatten(1, (2, 3)).amax(2), (WIDTH,)),
    "amin of equal ones": (lambda x, w: (x * w).relu().unflatten(1, (2, 3)).amin((1, 2), keepdim=True), (WIDTH,)),
    "length": (lambda x, w: F.normalize(x * w, dim=1) + (x * w).norm(dim=1, keepdim=True), (WIDTH,)),
    "length over two axes": (lambda x, w: (x * w).unflatten(1, (2, 3)).norm(dim=(1, 2), keepdim=True).flatten(1) + x, (WIDTH,)),
    "length of zero": (lambda x, w: (0 * x * w).norm(dim=1, keepdim=True) + x * w, (WIDTH,)),
    "matmul": (lambda x, w: x @ w, TWO),
    "matmul over more axes": (lambda x, w: w @ (x * 2).unflatten(1, (3, 2)), (4, 3)),
    "matmul of two of the queries'": (lambda x, w: (x * w).unflatten(1, (3, 2)) @ x.unflatten(1, (2, 3)), (WIDTH,)),
    "bmm": (lambda x, w: torch.bmm((x * w).unflatten(1, (3, 2)), x.unflatten(1, (2, 3))), (WIDTH,)),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), TWO),
    "einsum that finds its output": (lambda x, w: torch.einsum("bi, io", x, w), TWO),
    "einsum of one for all queries": (lambda x, w: torch.einsum("bij,bkj->bik", x.sin().unflatten(1, (3, 2)), w), (1, 4, 2)),
    "einsum of a sum over one": (lambda x, w: torch.einsum("bij,jk->bik", x.unsqueeze(2) + w[0, 0], w), (4, 3)),
    "einsum of a sum over one and more": (lambda x, w: torch.einsum("bi,ik->bk", x, w[:1]), TWO),
}


def _attention(x: Tensor, w: Tensor, **options) -> Tensor:
    q, k, v = (part.unflatten(1, (1, 3, 2)) for part in (x * w, x.sin(), x + w))
    return F.scaled_dot_product_attention(q, k, v, **options)


def _asked(q: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, seen, seen.cos())


CASES |= {
    "attention": (lambda x, w: _attention(x, w), (WIDTH,)),
    "attention that looks back": (lambda x, w: _attention(x, w, is_causal=True, scale=0.3), (WIDTH,)),
    "attention with a mask": (lambda x, w: _attention(x, w, attn_mask=torch.eye(3)), (WIDTH,)),
    "attention that one query asks": (lambda x, w: _asked(w, x.sin().unflatten(1, (1, 3, 2))), (1, 1, 4, 2)),
    "attention to what all queries see": (lambda x, w: _asked(x.sin().unflatten(1, (1, 3, 2)), w), (1, 1, 4, 2)),
    "attention by shares of its own": (
        lambda x, w: F.scaled_dot_product_attention(w[..., 0, :, :], w[..., 1, :, :], x.sin().view(-1, 1, 3, 2)),
        (1, 1, 2, 3, 2),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients_without_an_island(name: str) -> None:
    check_without_islands(*CASES[name])


ISLANDS = {
    "einsum of three": (lambda x, w: torch.einsum("bij,jk,bi->bk", x.unflatten(1, (2, 3)), w, x[:, :2]), (3, 4)),
    "a cut before what has no rule": (lambda x, w: (x * w)[..., 1:4].sort(-1)[0], (WIDTH,)),
    "einsum of a diagonal": (lambda x, w: torch.einsum("bi,oo->bio", x, w), (4, 4)),
    "einsum with a letter that is summed alone": (lambda x, w: torch.einsum("bi,ok->bi", x, w), TWO),
    "einsum with dots": (lambda x, w: torch.einsum("...i,io->...o", x, w), TWO),
    "parts among which one has no rule": (lambda x, w: (x * w).chunk(2, 1)[0].sort(1)[0], (WIDTH,)),
    "a matrix times a vector": (lambda x, w: (x @ w).unsqueeze(1), (WIDTH,)),
}


@pytest.mark.parametrize("name", list(ISLANDS))
def test_what_has_no_rule_gives_the_same(name: str) -> None:
    run, shape = ISLANDS[name]
    check(lambda: Between(run, shape))


@pytest.mark.parametrize("padding", [None, 2])
def test_tables(padding: int | None) -> None:
    """Indices that all models share: rows that come twice add up, and the row of the padding gets no gradient."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(3, 5, padding_idx=padding), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.table((x > 0).long() + (x > 1).long()).sum(1))

    check(Words)
    assert Island not in kinds_of_calls(population(Words)[0])
