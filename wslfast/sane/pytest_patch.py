"""A pytest plugin that runs a published package's own tests on ours: ``pytest -p wslfast.sane.pytest_patch``.

The patch is on before any test module is imported and stays on to the end; what it replaced is listed below the results.
"""

from __future__ import annotations

from typing import Any

from .patching import Patch, patch

_handles: list[Patch] = []


def pytest_configure(config: Any) -> None:
    """Switches the patch on."""
    if not _handles:
        _handles.append(patch())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Lists what ran in place of the published code."""
    replaced = [row for handle in _handles for row in handle.replaced]
    terminalreporter.write_sep("-", f"wslfast: {len(replaced)} names replaced")
    for row in replaced:
        terminalreporter.write_line(f"{row['package']}: {row['name']}")


def pytest_unconfigure(config: Any) -> None:
    """Puts the originals back."""
    while _handles:
        _handles.pop().undo()
