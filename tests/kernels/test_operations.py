"""Every operation of the table alone, between two layers of its own, against a float64 loop over the module that calls it."""

from __future__ import annotations

import warnings

import complex_cases  # noqa: F401  (adds its cases)
import layer_cases  # noqa: F401
import pytest
from graph_oracle import check, check_everything, check_record, queries_like, rows_near
from operation_cases import CASES, Alone, Case

from wslfast.architecture import Architecture
from wslfast.kernels.operations import TABLE
from wslfast.kernels.stacked.forms import FORMS

FRONTS = {"m": "models", "c": "channels", "s": "shared"}
_first = {case.operation: (i, case) for i, case in reversed(list(enumerate(CASES)))}
FIRST = [pytest.param(case, case.fronts[0], id=f"{name}-{i}") for name, (i, case) in _first.items()]
EVERY = [pytest.param(case, front, id=f"{case.operation}-{FRONTS[front]}-{i}") for i, case in enumerate(CASES) for front in case.fronts]


def traced(case: Case, front: str) -> tuple[Alone, Architecture]:
    module = Alone(case, front)
    arch = Architecture.from_module(module, case.shape)
    assert arch.graph is not None, arch.reason
    return module, arch


@pytest.mark.parametrize(("case", "front"), FIRST)
def test_operation_in_short(case: Case, front: str) -> None:
    """In float32, on shared queries."""
    module, arch = traced(case, front)
    assert arch.graph is not None
    assert case.operation not in TABLE or case.operation in {node.operation for node in arch.graph.nodes}
    check(module, arch, rows_near(module, arch, 3), queries_like(module, arch, 5), (None, 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "front"), EVERY)
def test_operation(case: Case, front: str) -> None:
    """In both types, on shared queries and each model's own, in every layout; and its record."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")  # vmap without a batching rule is a loop that calls itself fast
        module, arch = traced(case, front)
        check_everything(module, arch)
    check_record(module, arch)


def test_no_entry_is_untried() -> None:
    """Case by case: each names the entry that it is of, and test_operation holds it to that."""
    tried = {case.operation for case in CASES}
    assert set(TABLE) - tried == set()
    assert {entry.form for entry in TABLE.values()} == set(FORMS)
