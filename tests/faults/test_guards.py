"""The guards' own check: each text is in the tree once, and (slow) a guard that is taken out fails its test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import guards


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda g: g.what)
def test_a_guard_is_where_it_is_said_to_be(guard: guards.Guard) -> None:
    assert (guards.ROOT / guard.file).read_text().count(guard.text) == 1
    file, _, name = guard.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (guards.ROOT / file).read_text() or not name
    assert Path(file).parts[0] == "tests"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 4, 9, 12])
def test_without_it_its_test_fails(number: int) -> None:
    assert guards.check(guards.GUARDS[number])["fails"]
