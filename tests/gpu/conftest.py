"""The GPU tests in several processes, each with its share, every result written the moment it is there (``benchmarks/gpu_gate.py``).

WSLFAST_SHARD=1/4 takes the second of four shares, the published networks' tests first. WSLFAST_JOURNAL names a file with a JSON line when
a test begins and when it ends. After an error of the device, which every later test of the process would meet again, the process ends;
another one goes on after what the journal holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

LOST = 75  # exit status: the device was lost, start again
_DEVICE = ("CUDA error", "Triton Error [CUDA]", "device-side assert", "AcceleratorError")
_CORE = ("cnn3", "lenet5", "cnn28")


def _journal() -> Path | None:
    name = os.environ.get("WSLFAST_JOURNAL")
    return Path(name) if name else None


def _write(**entry: Any) -> None:
    path = _journal()
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    share = os.environ.get("WSLFAST_SHARD")
    if not share:
        return
    items[:] = [item for item in items if "gpu" in item.keywords]
    mine, of = map(int, share.split("/"))
    path = _journal()
    begun = {json.loads(line)["test"] for line in path.read_text().splitlines()} if path is not None and path.exists() else set()
    ordered = sorted(items, key=lambda item: not any(name in item.nodeid for name in _CORE))
    items[:] = [item for item in ordered[mine::of] if item.nodeid not in begun]
    for item in items:
        _write(test="", waiting=item.nodeid)


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="begun")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    text = report.longreprtext if report.outcome == "failed" else ""
    _write(test=report.nodeid, outcome=report.outcome, when=report.when, why=text[-4000:])
    if any(mark in text for mark in _DEVICE) and "out of memory" not in text:
        pytest.exit("the device was lost", returncode=LOST)
