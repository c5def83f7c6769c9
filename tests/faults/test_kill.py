"""SIGKILL at random moments of training, also inside a checkpoint's write: resumption to the bit, no unreadable checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from matrix import many, reached


def test_a_killed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    kills = many(10, 200)
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), str(tmp_path), str(kills), "0"]
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env={**os.environ, **path, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["problems"] == []
    assert counts["kills"] >= kills
    assert counts["unreadable"] == counts["not equal"] == 0
    assert min(counts["in a write"], counts["at a random moment"]) > 0
    reached("kill", "kills followed by a resumption equal to the bit", counts["kills"], 200)
    reached("kill", "of them inside a checkpoint's write", counts["in a write"], "some")
    reached("kill", "unreadable checkpoints", counts["unreadable"], 0)
