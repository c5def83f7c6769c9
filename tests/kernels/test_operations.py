"""Every operation of the table alone, between two layers of its own, against a float64 loop over the module that calls it."""

from __future__ import annotations

import warnings

import layer_cases  # noqa: F401  (adds its cases)
import pytest
from graph_oracle import check_everything, check_record
from operation_cases import CASES, Alone, Case

from wslfast.architecture import Architecture
from wslfast.kernels.operations import TABLE
from wslfast.kernels.stacked.forms import FORMS

FRONTS = {"m": "models", "c": "channels", "s": "shared"}
_first = {case.operation: i for i, case in reversed(list(enumerate(CASES)))}
PARAMETERS = [
    pytest.param(case, front, id=f"{case.operation}-{FRONTS[front]}-{i}", marks=[] if _first[case.operation] == i and j == 0 else [pytest.mark.slow])
    for i, case in enumerate(CASES)
    for j, front in enumerate(case.fronts)
]  # fmt: skip


def traced(case: Case, front: str) -> tuple[Alone, Architecture]:
    module = Alone(case, front)
    arch = Architecture.from_module(module, case.shape)
    assert arch.graph is not None, arch.reason
    return module, arch


@pytest.mark.parametrize(("case", "front"), PARAMETERS)
def test_operation(case: Case, front: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")  # vmap without a batching rule is a loop that calls itself fast
        module, arch = traced(case, front)
        assert arch.graph is not None
        if case.operation in TABLE:
            assert case.operation in {node.operation for node in arch.graph.nodes}
        check_everything(module, arch)
    check_record(module, arch)


def test_no_entry_is_untried() -> None:
    """Case by case: each names the entry that it is of, and test_operation holds it to that."""
    tried = {case.operation for case in CASES}
    assert set(TABLE) - tried == set()
    assert {entry.form for entry in TABLE.values()} == set(FORMS)
