"""Regions cost nothing while off; on, their own times add up to the whole."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from tolerances import FP64

from wslfast import WslfastError, profiling


def _spend(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_off_is_one_shared_object_and_allocates_nothing() -> None:
    assert not profiling.enabled()
    assert profiling.region("encode") is profiling.region("decode")
    names = ["encode", "decode"]

    def loop() -> None:
        for _ in range(1000):
            for name in names:
                with profiling.region(name):
                    pass

    loop()
    tracemalloc.start()
    try:
        loop()
        here = [t for t in tracemalloc.take_snapshot().traces if any(f.filename == profiling.__file__ for f in t.traceback)]
    finally:
        tracemalloc.stop()
    assert not here


def test_shares_sum_to_one_and_regions_own_their_time() -> None:
    with profiling.profile() as p:
        assert profiling.enabled()
        for _ in range(2):
            with profiling.region("outer"):
                _spend(0.02)
                with profiling.region("inner"):
                    _spend(0.05)
                with profiling.region("inner"):
                    _spend(0.01)
        _spend(0.02)
    assert not profiling.enabled()
    rows = {r["phase"]: r for r in p.rows()}
    assert set(rows) == {"outer", "inner", "(outside any region)"}
    assert sum(r["share"] for r in rows.values()) == pytest.approx(1.0, abs=FP64)
    assert rows["outer"]["calls"] == 2
    assert rows["inner"]["calls"] == 4
    # lower bounds hold on a busy machine; an upper one does not
    assert p.seconds["outer"] >= 0.04
    assert p.seconds["inner"] >= 0.12
    assert p.total >= p.seconds["outer"] + p.seconds["inner"] + 0.02
    assert rows["inner"]["ms"] == pytest.approx(1e3 * p.seconds["inner"] / 4)
    assert p.rows()[0]["phase"] == "inner"  # most expensive first


def test_own_time_excludes_regions_inside_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(clock)))
    p = profiling.Profile()
    with profiling._region("a", p), profiling._region("b", p), profiling._region("c", p):
        pass
    elapsed = sum(p.seconds.values())
    assert all(seconds > 0 for seconds in p.seconds.values())
    assert elapsed <= next(clock)  # own times of nested regions never count the same moment twice
    assert p.calls == {"a": 1, "b": 1, "c": 1}


def test_exception_inside_a_region() -> None:
    with profiling.profile() as p:
        with pytest.raises(KeyError), profiling.region("outer"), profiling.region("inner"):
            raise KeyError
        with profiling.region("outer"):
            pass
    assert p.calls == {"outer": 2, "inner": 1}
    assert not profiling.enabled()


def test_exception_inside_the_profile_turns_it_off(tmp_path: Path) -> None:
    with pytest.raises(KeyError), profiling.profile(tmp_path, trace=False):
        raise KeyError
    assert not profiling.enabled()
    with profiling.profile() as p:
        pass
    assert [r["phase"] for r in p.rows()] == ["(outside any region)"]
    assert p.rows()[0]["share"] == pytest.approx(1.0)


def test_twice_is_refused() -> None:
    with profiling.profile(), pytest.raises(WslfastError, match=r"^profile: expected one at a time"), profiling.profile():
        pass
    assert not profiling.enabled()


def test_a_folder_that_cannot_be_made_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WslfastError, match="cannot be made"), profiling.profile(tmp_path / "file" / "profile"):
        raise AssertionError
    assert not profiling.enabled()


def test_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with profiling.profile(out) as p, profiling.region("tokenise"):
        _spend(0.001)
    rows = json.loads((out / "phases.json").read_text())
    assert rows == p.rows()
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert any(e.get("name") == "tokenise" for e in events)


def test_no_trace_on_request(tmp_path: Path) -> None:
    with profiling.profile(tmp_path, trace=False), profiling.region("encode"):
        pass
    assert [f.name for f in tmp_path.iterdir()] == ["phases.json"]


def test_table_has_a_line_per_row() -> None:
    with profiling.profile() as p:
        with profiling.region("encode"):
            pass
        with profiling.region("decode"):
            pass
    lines = p.table().splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_empty_profile_has_a_table() -> None:
    assert profiling.Profile().rows()[0]["share"] == 0.0
