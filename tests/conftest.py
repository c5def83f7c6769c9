"""Shared fixtures: poisoned allocation, deterministic seeds, small populations."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # on a machine that has little more than torch, where tests/gpu runs
    settings = None

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported; with a GPU, kernels are compiled

# The same examples at every run (a failure that comes and goes helps nobody); WSLFAST_FUZZ=1 draws new ones. No example is judged by
# its time: machines are shared. tmp_path is written anew by every example that uses it.
if settings is not None:
    settings.register_profile(
        "wslfast", deadline=None, derandomize="WSLFAST_FUZZ" not in os.environ, print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    settings.load_profile("wslfast")

# Slow tests that continuous integration has no time for (make thorough runs them): every operation in every layout, kernels compiled for
# every target and a page's tables of them, kernels watched for races, many random networks. Single cases of other files are marked there.
THOROUGH = (
    "benchmarks/kernels/test_inspect.py",
    "benchmarks/kernels/test_pipes.py",
    "benchmarks/kernels/test_races.py",
    "kernels/test_operations.py",
    "kernels/test_random_graphs.py",
    "kernels/triton/test_query_gradient.py",
    "permutation/test_groups.py",
    "permutation/test_random_graphs.py",
    "tracing/test_networks.py",
    "test_notebook.py",
)

_EMPTY = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and tensor.numel():
        with torch.no_grad():
            tensor.fill_(float("nan"))
    elif tensor.dtype in (torch.int8, torch.int32, torch.int64) and tensor.numel():
        tensor.fill_(torch.iinfo(tensor.dtype).min // 2)
    return tensor


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty*`` and ``Tensor.new_empty`` return NaN, so an element that nobody wrote fails the test."""
    for name, make in _EMPTY.items():
        monkeypatch.setattr(torch, name, lambda *a, _make=make, **kw: _poison(_make(*a, **kw)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **kw: _poison(new_empty(self, *a, **kw)))


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, also beside a CPU-only torch, where its compiled operators are missing and the import asks for two of them."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        module = importlib.import_module("torchvision")
        module.declared_for_tests = library  # the declarations live as long as this object
        return module


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") is not None and item.path.as_posix().endswith(THOROUGH):
            item.add_marker(pytest.mark.thorough)
    if torch.cuda.is_available() or os.environ.get("WSLFAST_GPU_TESTS") == "interpret":
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
