"""Wrong arguments of the library call: one error that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from behavior_cases import NETS, case
from small_networks import SMALL
from torch import nn

from wslfast.architecture import Architecture
from wslfast.behavior import batched_behavioral_loss, batched_forward
from wslfast.errors import WslfastError
from wslfast.population import Population, unstack
from wslfast.testing import as_module
from wslfast.tokens import TokenLayout

ROWS, ORIGINAL, QUERIES = case(SMALL)
P = SMALL.num_weights
TARGETS = torch.zeros(4, 5, 3)
GOOD: dict[str, Any] = {"reconstructed": ROWS, "original": ORIGINAL, "queries": QUERIES, "architecture": SMALL}
PARTS = unstack(ROWS, SMALL)
TOKENS = TokenLayout(SMALL).tokenize(ROWS).tokens

# id: (what changes in a good call, the argument the message begins with, what came)
LOSS_ERRORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "rows-none": ({"reconstructed": None}, "reconstructed", "None"),
    "rows-list": ({"reconstructed": [[0.0]]}, "reconstructed", "list"),
    "rows-numpy": ({"reconstructed": ROWS.numpy()}, "reconstructed", "ndarray"),
    "rows-module": ({"reconstructed": nn.Linear(2, 2)}, "reconstructed", "Linear"),
    "rows-int": ({"reconstructed": ROWS.long()}, "reconstructed", "int64"),
    "rows-bool": ({"reconstructed": ROWS > 0}, "reconstructed", "bool"),
    "rows-complex": ({"reconstructed": ROWS.to(torch.complex64)}, "reconstructed", "complex64"),
    "rows-one-model": ({"reconstructed": ROWS[0]}, "reconstructed", f"[{P}]"),
    "rows-scalar": ({"reconstructed": torch.tensor(1.0)}, "reconstructed", "[]"),
    "rows-narrow": ({"reconstructed": ROWS[:, :-1]}, "reconstructed", f"[4, {P - 1}]"),
    "rows-wide": ({"reconstructed": torch.zeros(4, P + 1)}, "reconstructed", f"[4, {P + 1}]"),
    "rows-four-axes": ({"reconstructed": torch.zeros(1, 1, 1, P)}, "reconstructed", f"[1, 1, 1, {P}]"),
    "rows-zero-models": ({"reconstructed": ROWS[:0], "original": ORIGINAL[:0]}, "reconstructed", f"[0, {P}]"),
    "rows-transposed": ({"reconstructed": ROWS.t()}, "reconstructed", f"[{P}, 4]"),
    "tokens-count": ({"reconstructed": TOKENS[:, :-1]}, "reconstructed", str(list(TOKENS[:, :-1].shape))),
    "tokens-size": ({"reconstructed": TOKENS[:, :, :-1]}, "reconstructed", str(list(TOKENS[:, :, :-1].shape))),
    "tokens-empty": ({"reconstructed": torch.zeros(4, 5, 0)}, "reconstructed", "[4, 5, 0]"),
    "tokens-int": ({"reconstructed": TOKENS.int()}, "reconstructed", "int32"),
    "tokens-transposed": ({"reconstructed": TOKENS.mT}, "reconstructed", str(list(TOKENS.mT.shape))),
    "tokens-of-none": ({"reconstructed": TOKENS[:0]}, "reconstructed", "[0,"),
    "tokens-huge": ({"reconstructed": torch.zeros(1).expand(1, 1, 10**9)}, "reconstructed", "[1, 1, 1000000000]"),
    "dict-empty": ({"reconstructed": {}}, "reconstructed", "'a.weight' is missing"),
    "dict-missing": ({"reconstructed": {k: v for k, v in PARTS.items() if k != "i.bias"}}, "reconstructed", "'i.bias' is missing"),
    "dict-unknown": ({"reconstructed": {**PARTS, "z.weight": ROWS}}, "reconstructed", "['z.weight']"),
    "dict-shape": ({"reconstructed": {**PARTS, "i.bias": torch.zeros(4, 2)}}, "reconstructed", "[4, 2]"),
    "dict-one-model": ({"reconstructed": {k: v[0] for k, v in PARTS.items()}}, "reconstructed", "[5, 2, 3, 3]"),
    "dict-ragged": ({"reconstructed": {**PARTS, "i.bias": torch.zeros(3, 3)}}, "reconstructed", "[3, 4]"),
    "dict-of-lists": ({"reconstructed": {**PARTS, "i.bias": [0.0]}}, "reconstructed", "list"),
    "dict-of-int": ({"reconstructed": {k: v.int() for k, v in PARTS.items()}}, "reconstructed", "int32"),
    "dict-zero": ({"reconstructed": {k: v[:0] for k, v in PARTS.items()}}, "reconstructed", "[0,"),
    "population-other": ({"reconstructed": Population(NETS["cnn"], torch.zeros(4, NETS["cnn"].num_weights))}, "reconstructed", "'cnn'"),
    "original-other": ({"original": Population(NETS["cnn"], torch.zeros(4, NETS["cnn"].num_weights))}, "original", "'cnn'"),
    "original-none": ({"original": None}, "original", "both are None"),
    "original-models": ({"original": ORIGINAL[:3]}, "original", "3"),
    "original-narrow": ({"original": ORIGINAL[:, 1:]}, "original", f"[4, {P - 1}]"),
    "original-int": ({"original": ORIGINAL.int()}, "original", "int32"),
    "original-list": ({"original": [ORIGINAL]}, "original", "list"),
    "original-outputs": ({"original": TARGETS}, "original", "[4, 5, 3]"),
    "original-device": ({"original": ORIGINAL.to("meta")}, "original", "meta"),
    "original-zero": ({"original": ORIGINAL[:0]}, "original", f"[0, {P}]"),
    "both": ({"targets": TARGETS}, "original", "targets= is given"),
    "targets-queries": ({"original": None, "targets": torch.zeros(4, 6, 3)}, "targets", "[4, 6, 3]"),
    "targets-models": ({"original": None, "targets": torch.zeros(3, 5, 3)}, "targets", "[3, 5, 3]"),
    "targets-classes": ({"original": None, "targets": torch.zeros(4, 5, 10)}, "targets", "[4, 5, 10]"),
    "targets-broadcast": ({"original": None, "targets": torch.zeros(1, 5, 3)}, "targets", "[1, 5, 3]"),
    "targets-labels": ({"original": None, "targets": torch.zeros(4, 5).long()}, "targets", "[4, 5] int64"),
    "targets-int": ({"original": None, "targets": TARGETS.long()}, "targets", "int64"),
    "targets-list": ({"original": None, "targets": [1.0]}, "targets", "list"),
    "targets-device": ({"original": None, "targets": TARGETS.to("meta")}, "targets", "meta"),
    "queries-none": ({"queries": None}, "queries", "None"),
    "queries-list": ({"queries": [QUERIES]}, "queries", "list"),
    "queries-zero": ({"queries": QUERIES[:0]}, "queries", "[0, 2, 7, 9]"),
    "queries-one": ({"queries": QUERIES[0]}, "queries", "[2, 7, 9]"),
    "queries-channels": ({"queries": torch.zeros(5, 3, 7, 9)}, "queries", "[5, 3, 7, 9]"),
    "queries-transposed": ({"queries": QUERIES.mT}, "queries", "[5, 2, 9, 7]"),
    "queries-nhwc": ({"queries": QUERIES.permute(0, 2, 3, 1)}, "queries", "[5, 7, 9, 2]"),
    "queries-flat": ({"queries": QUERIES.flatten(1)}, "queries", "[5, 126]"),
    "queries-per-model": ({"queries": QUERIES.expand(3, -1, -1, -1, -1)}, "queries", "[3, 5, 2, 7, 9]"),
    "queries-uint8": ({"queries": (QUERIES * 255).to(torch.uint8)}, "queries", "uint8"),
    "queries-int": ({"queries": QUERIES.long()}, "queries", "int64"),
    "queries-complex": ({"queries": QUERIES.to(torch.complex64)}, "queries", "complex64"),
    "queries-device": ({"queries": QUERIES.to("meta")}, "queries", "meta"),
    "reconstructed-meta": ({"reconstructed": ORIGINAL.to("meta")}, "reconstructed", "meta"),
    "reconstructed-sparse": ({"reconstructed": ORIGINAL.to_sparse()}, "reconstructed", "sparse_coo"),
    "original-sparse": ({"original": ORIGINAL.to_sparse()}, "original", "sparse_coo"),
    "queries-sparse": ({"queries": QUERIES.to_sparse()}, "queries", "sparse_coo"),
    "targets-sparse": ({"original": None, "targets": TARGETS.to_sparse()}, "targets", "sparse_coo"),
    "architecture-none": ({"architecture": None}, "architecture", "None"),
    "architecture-name": ({"architecture": "cnn3"}, "architecture", "'cnn3'"),
    "architecture-module": ({"architecture": as_module(SMALL)}, "architecture", "_Chain"),
    "architecture-class": ({"architecture": Architecture}, "architecture", "type"),
    "criterion-unknown": ({"criterion": "l2"}, "criterion", "'l2'"),
    "criterion-none": ({"criterion": None}, "criterion", "None"),
    "criterion-list": ({"criterion": ["mse"]}, "criterion", "['mse']"),
    "criterion-function": ({"criterion": F.mse_loss}, "criterion", "mse_loss"),
    "temperature-zero": ({"temperature": 0}, "temperature", "0"),
    "temperature-negative": ({"temperature": -1.0}, "temperature", "-1.0"),
    "temperature-nan": ({"temperature": float("nan")}, "temperature", "nan"),
    "temperature-inf": ({"temperature": float("inf")}, "temperature", "inf"),
    "temperature-text": ({"temperature": "2"}, "temperature", "'2'"),
    "temperature-bool": ({"temperature": True}, "temperature", "True"),
    "temperature-tensor": ({"temperature": torch.tensor(2.0)}, "temperature", "tensor"),
    "reduction-unknown": ({"reduction": "batchmean"}, "reduction", "'batchmean'"),
    "reduction-none": ({"reduction": None}, "reduction", "None"),
    "policy-unknown": ({"nan_policy": "ignore"}, "nan_policy", "'ignore'"),
    "policy-none": ({"nan_policy": None}, "nan_policy", "None"),
    "backend-unknown": ({"backend": "cuda"}, "backend", "'cuda'"),
    "backend-none": ({"backend": None}, "backend", "None"),
    "backend-triton": ({"backend": "triton"}, "backend", "cpu"),
}


FORWARD_ERRORS = {
    name: ({"weights" if key == "reconstructed" else key: value for key, value in changes.items() if key != "original"}, argument, came)
    for name, (changes, argument, came) in LOSS_ERRORS.items()
    if argument in ("reconstructed", "queries", "architecture", "backend")
}


def _complains(call: Callable[[], object], argument: str, came: str) -> None:
    with pytest.raises(WslfastError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is WslfastError
    assert caught.value.__cause__ is None  # one error, not a chain of them
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert message.startswith(argument), message
    assert came in message
    assert "expected" in message or "missing" in message or "unknown" in message or "differ" in message or "cannot run" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(("changes", "argument", "came"), LOSS_ERRORS.values(), ids=LOSS_ERRORS)
def test_bad_arguments_of_the_loss(changes: dict[str, Any], argument: str, came: str) -> None:
    _complains(lambda: batched_behavioral_loss(**{**GOOD, **changes}), argument, came)


@pytest.mark.parametrize(("changes", "argument", "came"), FORWARD_ERRORS.values(), ids=FORWARD_ERRORS)
def test_bad_arguments_of_the_forward(changes: dict[str, Any], argument: str, came: str) -> None:
    good = {"weights": ROWS, "queries": QUERIES, "architecture": SMALL}
    _complains(lambda: batched_forward(**{**good, **changes}), "weights" if argument == "reconstructed" else argument, came)


def test_the_good_call_is_good() -> None:
    assert batched_behavioral_loss(**GOOD).isfinite()
    assert len(LOSS_ERRORS) >= 60
