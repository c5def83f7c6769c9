"""A server that trains in forked children and kills them: ``killing.py FOLDER KILLS SEED`` prints a JSON object of counts.

torch is imported once; every child is a process of its own that trains (or resumes) one run. Half of them are killed by SIGKILL after
a random time, wherever they are; the other half kill themselves inside a checkpoint's write, at a random byte of the
file or just before or after it is flushed or renamed. After each death the checkpoint has to be readable and, to the bit, the state that an uninterrupted
run has at the same step.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matrix import digest
from training_runs import ARCH, config

from wslfast import Population, train
from wslfast.training import loop
from wslfast.training.checkpoint import checkpoint_path, load_checkpoint

STEPS = 24


def _state(state: dict[str, Any]) -> str:
    return digest({key: value for key, value in sorted(state.items()) if key not in ("config", "schema")})


def _train(out: Path, every: int, log_every: int) -> None:
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = config(out, steps=STEPS, checkpoint_every=every, log_every=log_every, dropout=0.1)
    train(settings, population=population, images=images, resume=True)


def _child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _reference(folder: Path) -> dict[int, str]:
    """Digests of the state at every step of a run that nobody kills."""
    file = folder / "digests.json"

    def work() -> None:
        seen: dict[int, str] = {}
        save = loop.save_checkpoint

        def noting(out: Path, state: dict[str, Any]) -> None:
            seen[state["step"]] = _state(state)
            save(out, state)

        loop.save_checkpoint = noting
        _train(folder / "whole", 1, 3)
        file.write_text(json.dumps(seen))

    assert _wait(_child(work)) == 0
    return {int(step): value for step, value in json.loads(file.read_text()).items()}


class _Dying:
    """A file that kills its process when so many bytes have been written."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self._left = file, left

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) >= self._left:
            self._file.write(view[: self._left])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= len(view)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Dying:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _die_writing(rng: random.Random) -> Callable[[], None]:
    """Patches that end the process inside the write of a checkpoint: at a byte, or around fsync or rename."""
    writes, place, share = rng.randint(1, 3), rng.choice(("byte", "byte", "fsync", "before", "after")), rng.random()
    seen = 0

    def mine(path: object) -> bool:
        """Whether this is the write to die in."""
        nonlocal seen
        seen += "state.pt" in str(path)
        return seen == writes and "state.pt" in str(path)

    def patch() -> None:
        opened, replace, fsync = builtins.open, os.replace, os.fsync

        def opening(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            file = opened(path, mode, *rest, **options)
            if mode == "wb" and mine(path) and place == "byte":
                return _Dying(file, 1 + int(share * 250_000))
            return file

        def replacing(source: Any, target: Any) -> None:
            now = seen == writes and "state.pt" in str(target)
            if now and place == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if now and place == "after":
                os.kill(os.getpid(), signal.SIGKILL)

        def syncing(descriptor: int) -> None:
            if seen == writes and place == "fsync":
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        builtins.open, os.replace, os.fsync = opening, replacing, syncing  # type: ignore[assignment]

    return patch


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    if not torch.cuda.is_available():  # what is imported at a first step is imported once; on a CPU autograd starts no threads
        _train(folder / "warm", STEPS, STEPS)
    expected = _reference(folder)
    counts = {
        "kills": 0,
        "in a write": 0,
        "at a random moment": 0,
        "before the first checkpoint": 0,
        "unreadable": 0,
        "not equal": 0,
        "runs": 0,
    }
    lines = (folder / "whole" / "log.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k != "models_per_s"} for line in lines]
    started = time.perf_counter()
    assert _wait(_child(lambda: _train(folder / "timing", 2, 3))) == 0
    whole = time.perf_counter() - started
    problems: list[str] = []
    while counts["kills"] < kills:
        out = folder / f"run{counts['runs']}"
        counts["runs"] += 1
        done = False
        while not done:
            inside = rng.random() < 0.5
            patch = _die_writing(rng) if inside else None

            def work(patch: Callable[[], None] | None = patch, out: Path = out) -> None:
                if patch is not None:
                    patch()
                _train(out, 2, 3)

            pid = _child(work)
            if not inside:
                time.sleep(rng.random() * whole)
                os.kill(pid, signal.SIGKILL)
            code = _wait(pid)
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"a child ended with {code}")
            done = code == 0
            if not done:
                counts["kills"] += 1
                counts["in a write" if inside else "at a random moment"] += 1
            if not checkpoint_path(out).exists():
                counts["before the first checkpoint"] += 1
                continue
            try:
                state = load_checkpoint(out)
            except ValueError as error:
                counts["unreadable"] += 1
                problems.append(str(error))
                break
            if _state(state) != expected[state["step"]]:
                counts["not equal"] += 1
                problems.append(f"{out} step {state['step']}")
            done = done or counts["kills"] >= kills
        else:
            if _wait(_child(lambda out=out: _train(out, 2, 3))) != 0:  # the last resumption runs to the end
                raise SystemExit("a run could not be finished")
            written = [
                {k: v for k, v in json.loads(line).items() if k != "models_per_s"} for line in (out / "log.jsonl").read_text().splitlines()
            ]
            if _state(load_checkpoint(out)) != expected[STEPS] or written != log:
                counts["not equal"] += 1
                problems.append(f"{out} finished differently")
            if sorted(os.listdir(out / "checkpoint")) != ["state.pt"] or sorted(os.listdir(out)) != [
                "checkpoint",
                "config.toml",
                "log.jsonl",
            ]:
                problems.append(f"{out} has strays: {os.listdir(out / 'checkpoint')} {os.listdir(out)}")
    return {**counts, "problems": problems}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
