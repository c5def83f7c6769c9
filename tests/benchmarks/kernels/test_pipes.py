"""The static model of an SM: clocks of a made-up listing by hand, and the tables of docs/kernels.md against a fresh compilation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import pipes
from wslfast.kernels.triton.schedule import schedule

ROOT = Path(__file__).parents[3]

LISTING = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   STS.128 [R1], R4 ;
        /*0030*/                   LDSM.16.M88.4 R8, [R1] ;
        /*0040*/                   HGMMA.64x32x16.F32 R24, gdesc[UR8], R24 ;
        /*0050*/              @!P0 BRA 0x30 ;
        /*0060*/                   NOP ;
        /*0070*/                   STG.E [R2], R24 ;
        /*0080*/               @P1 BRA 0x10 ;
        /*0090*/                   EXIT ;
"""


def test_clocks_of_a_listing() -> None:
    """Outside the loops nothing counts; the inner loop (0x30 to 0x50) counts three times."""
    found = pipes.tile_clocks(LISTING, inner=3, warps=4)
    outer = {"issue": 1 + 1 + 1 + 1, "memory": 16 + 16 + 4}  # LDG, STS; STG; BRA
    inner = {"issue": 3, "memory": 16, "products": 64 * 32 * 16}
    assert found.issue == outer["issue"] + 3 * inner["issue"]
    assert found.memory == outer["memory"] + 3 * inner["memory"]
    assert found.products == 3 * inner["products"]
    assert found.tensor == found.products / 2048


def test_the_older_instruction_is_slower_and_a_listing_without_products_is_nothing() -> None:
    line = "        /*0010*/ HMMA.16816.F32 R4, R8, R12, R4 ;\n        /*0020*/ @P0 BRA 0x10 ;\n"
    assert pipes.tile_clocks(line).tensor == pytest.approx(2048 * 4 / 2048 / 0.62)
    assert pipes.tile_clocks("        /*0010*/ LDG.E R4, [R2] ;\n") == pipes.Clocks()


def test_traffic_and_programs() -> None:
    from kernel_cases import cnn3

    first, second = schedule(cnn3().layers, (3, 32, 32)).stages[:2]
    positions = 14 * 14
    assert pipes.query_traffic(first, "forward", "fp16") == positions * 16 * (2 + 1)  # outputs and positions of the maxima
    assert pipes.query_traffic(second, "dx", "tf32") == 36 * 32 * (4 + 1) + 2 * positions * 16 * 4
    assert pipes.programs_per_sm(128, 32 * 1024) == 4
    assert pipes.programs_per_sm(64, 64 * 1024) == 3
    assert pipes.nanoseconds(pipes.Clocks(issue=224.4), 0.0) == (pytest.approx(1.0), "issue")
    assert pipes.nanoseconds(pipes.Clocks(), 3000.0) == (pytest.approx(1.0), "memory")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_is_what_the_compiler_gives(tmp_path: Path) -> None:
    """Tables equal to the digit (with the same Triton), and no whole step above 2.5 times the products it needs."""
    triton = pytest.importorskip("triton")
    page = ROOT / "docs" / "kernels.md"
    copy = tmp_path / "kernels.md"
    copy.write_text(page.read_text())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.kernels.predict", "--write", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    if triton.__version__.startswith("3.9"):
        assert copy.read_text() == page.read_text()
    ratios = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|$", copy.read_text(), re.MULTILINE)
    assert len(ratios) == 9
    assert all(float(value) <= 2.5 for pair in ratios for value in pair), ratios
