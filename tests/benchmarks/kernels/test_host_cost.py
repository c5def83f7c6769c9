"""What the launcher spares the host, counted on a stand-in for a GPU whose launches do nothing. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

SCRIPT = """
import json
from benchmarks.kernels.host_cost import counting_launches, functions_called, idle, make_call, measure, through_triton
from kernel_cases import SMALL

call = make_call(SMALL.layers, SMALL.shape, "fp16")
found = {}
with idle() as kept:
    with counting_launches() as seen:
        call()
    found["first"], found["keys"] = len(seen), len(kept)
    with counting_launches() as seen:
        call(), call()
    found["again"], found["keys again"] = len(seen), len(kept)
    with through_triton(), counting_launches() as seen:
        call(), call()
    found["by triton"] = len(seen)
    cost = measure(call, repeats=1)
    found |= {"launches": cost.launches, "short": cost.short_functions, "own": cost.triton_functions}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_call_takes_the_short_way() -> None:
    """One key a launch; from the second call on none of Triton's own launches, and fewer functions in their place."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["first"] == found["keys"] == found["launches"] <= 12
    assert found["again"] == 0
    assert found["keys again"] == found["keys"]
    assert found["by triton"] == 2 * found["launches"]
    assert found["short"] < 0.8 * found["own"]
