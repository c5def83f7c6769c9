"""A model's bits do not depend on its place among the others: products of weights with any number of numbers, which begin anywhere."""

from __future__ import annotations

import pytest
import torch
from place_cases import Of, check_places
from torch import Tensor, nn


def _three(x: Tensor) -> Tensor:
    return x.unflatten(1, (3, 3))


CASES = {
    "matmul": lambda: Of(lambda m, x: torch.tanh(x @ m.a) @ m.b, (9, 7), (7, 3)),
    "mv": lambda: Of(lambda m, x: torch.stack([x @ m.a, x.square() @ m.b], 1), (9,), (9,)),
    "addmm": lambda: Of(lambda m, x: torch.addmm(m.a, x, m.b), (5,), (9, 5)),
    "gram": lambda: Of(lambda m, x: x @ (m.a.T @ m.a), (5, 9)),
    "einsum": lambda: Of(lambda m, x: torch.einsum("nti,oi->nto", _three(x), m.a).flatten(1), (7, 3)),
    "einsum of many": lambda: Of(lambda m, x: torch.einsum("ia,ao,oc,ni->nc", m.a, m.b, m.c, x), (9, 3), (3, 7), (7, 3)),
    "tensordot": lambda: Of(lambda m, x: torch.tensordot(_three(x), m.a, dims=([1, 2], [2, 0])), (3, 7, 3)),
    "inner": lambda: Of(lambda m, x: torch.inner(x, m.a), (5, 9)),
    "cdist": lambda: Of(lambda m, x: torch.exp(-torch.cdist(x, m.a)), (37, 9)),
    "gru": lambda: Of(lambda m, x: m.a(_three(x))[0][:, -1], nn.GRU(3, 5, batch_first=True)),
    "rnn": lambda: Of(lambda m, x: m.a(_three(x))[0][:, -1], nn.RNN(3, 5, 2, batch_first=True, bidirectional=True)),
    "lstm with a projection": lambda: Of(lambda m, x: m.a(_three(x))[0][:, -1], nn.LSTM(3, 5, batch_first=True, proj_size=3)),
    "gru cell": lambda: Of(lambda m, x: m.a(_three(x)[:, 1], m.a(_three(x)[:, 0])), nn.GRUCell(3, 5)),
}


@pytest.mark.parametrize("n", [9, 40])
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_place(name: str, n: int) -> None:
    check_places(CASES[name], n, traced=True)
