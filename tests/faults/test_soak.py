"""Ten thousand steps: the process does not grow."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from matrix import FULL, many, reached
from training_runs import ARCH, config

from wslfast import Population
from wslfast.training.trainer import Trainer


def _resident() -> int:
    """Bytes of memory that the process holds now."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) << 10


@pytest.mark.skipif(not FULL, reason="make faults")
def test_ten_thousand_steps_hold_no_more_memory(tmp_path: Path) -> None:
    steps = many(0, 10_000)
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    settings = config(tmp_path, steps=steps, d_model=8, heads=1, latent=4, queries=4, batch_size=4, dropout=0.1)
    trainer = Trainer(settings, population, torch.randn(48, 1, 8, 8))
    for _ in range(500):  # allocators and caches settle
        trainer.step()
    before = _resident()
    while trainer.step_index < steps:
        trainer.step()
    after = _resident()
    assert after < 1.01 * before, f"{before:,} bytes after 500 steps, {after:,} after {steps}"
    reached("soak", "steps", steps, 10_000)
    reached("soak", "growth of resident memory, %", f"{100 * (after / before - 1):.2f}", "< 1")
