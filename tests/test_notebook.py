"""The notebook runs from top to bottom on a CPU, shows progress without ipywidgets, and its objects show themselves as tables."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import wslfast
from wslfast import Architecture, Population, WslfastError
from wslfast.measure.evaluation import Figures
from wslfast.page import Inline
from wslfast.zoo.progress import bar, notebook_handle

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("nbclient", "ipykernel")), reason="nbclient and ipykernel are not installed"
)
def test_the_notebook_runs_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    spec = tmp_path / "JUPYTER_DATA_DIR" / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (spec / "kernel.json").write_text(json.dumps(kernel))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    shown = [o.data.get("text/html", "") for o in outputs if "data" in o]
    assert sum("<table>" in html for html in shown) >= 4  # two populations, a run, figures
    assert any("srcdoc" in html and "On digits" in html for html in shown)
    (progress,) = [o for o in outputs if "zoo: " in o.get("data", {}).get("text/plain", "")]
    assert "0 s left" in progress.data["text/plain"]
    said = " ".join(o.text for o in outputs if o.output_type == "stream")
    assert "ipywidgets" not in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_cells_run_in_plain_python(tmp_path: Path) -> None:
    """Where Jupyter is not installed: the same cells, one after another, from an empty folder."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(cells("code")))
    environment = {**os.environ, "PYTHONPATH": str(NOTEBOOK.parents[1])}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_notebook_is_stored_without_outputs() -> None:
    """What it prints depends on the machine, and a page inside would be most of the file."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
    assert NOTEBOOK.stat().st_size < 20_000
    for source in cells("code"):
        compile(source, str(NOTEBOOK), "exec")


def population(k: int) -> Population:
    arch = Architecture.mlp(4, (3,), 2)
    return Population(
        arch,
        arch.initial_weights(["normal"] * k, range(k)),
        {"name": tuple(f"<b>{j}" for j in range(k)), "test_acc": (None,) + (0.5,) * (k - 1)},
    )


def test_a_population_shows_its_first_models() -> None:
    html = population(20)._repr_html_()
    assert "20 models of &#x27;mlp&#x27;, 23 weights each" in html
    assert html.count("<tr>") == 1 + 8 + 1
    assert "… 12 more" in html
    assert "&lt;b&gt;0" in html
    assert "<td>–</td>" in html
    assert "more" not in population(3)._repr_html_()


def test_figures_are_a_dictionary_that_shows_itself() -> None:
    figures = Figures({"run": {"agreement": 0.71234, "n_models": 9}, "linear": {"agreement": None}})
    assert json.loads(json.dumps(figures)) == {"run": {"agreement": 0.71234, "n_models": 9}, "linear": {"agreement": None}}
    html = figures._repr_html_()
    assert "<td>run</td><td>0.712</td>" in html
    assert "means over 9 models" in html


def test_a_page_in_a_frame(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<p class="x">50 %</p>')
    html = Inline(tmp_path)._repr_html_()
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;50 %&lt;/p&gt;"' in html
    assert "sandbox" in html  # nothing in it runs
    assert repr(Inline(tmp_path)) == f"Inline('{tmp_path}/report.html')"
    with pytest.raises(WslfastError, match="cannot be shown"):
        Inline(tmp_path / "none.html")


def test_progress_in_a_notebook_is_one_line_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for IPython: one display, updated; rich, which would ask for ipywidgets, is not used."""
    lines: list[str] = []
    handle = types.SimpleNamespace(update=lambda data, raw: lines.append(data["text/plain"]))
    shell = type("ZMQInteractiveShell", (), {})()
    display = types.ModuleType("IPython.display")
    display.display = lambda data, raw, display_id: handle  # type: ignore[attr-defined]
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython, ipython.display = (lambda: shell), display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with bar(True, 25) as advance:
        for step in range(25):
            advance(1 + step // 10, 3, torch.tensor([1.0, float("nan"), 3.0]))
    assert [line.partition(" steps")[0][-5:] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "epoch 3 of 3, median loss 1.000, 0 s left" in lines[-1]
    monkeypatch.setattr(ipython, "get_ipython", lambda: None)
    assert notebook_handle() is None


def test_outside_of_a_notebook_nothing_is_displayed() -> None:
    assert notebook_handle() is None
    assert wslfast.Population is Population
