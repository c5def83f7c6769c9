"""Guards, each taken out of a copy of the tree: the test that watches it has to fail. ``guards.py [--only N] [--json FILE]``

A guard is a text that has to be there exactly once; what replaces it leaves the rest of the library as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Guard(NamedTuple):
    """What is guarded, where, the text that is taken out, what stands there then, and the test that has to fail."""

    what: str
    file: str
    text: str
    without: str
    test: str


GUARDS = (
    Guard(
        "a checkpoint's digest is compared", "wslfast/training/checkpoint.py",
        'require(file.read() == _SEAL + digest, "its SHA-256 is not the one it was written with")', "pass",
        "tests/faults/test_bit_flips.py::test_no_flipped_bit_of_a_checkpoint_is_silent",
    ),
    Guard(
        "a shard's digest is compared", "wslfast/zoo/shards.py", "    if verify:\n        digest = hashlib", "    if False:\n        digest = hashlib",
        "tests/faults/test_bit_flips.py::test_no_flipped_bit_of_a_zoo_is_silent[data]",
    ),
    Guard(
        "the manifest's checksum is compared", "wslfast/zoo/manifest.py",
        'require(claimed == manifest.checksum(), f"{where}: checksum: the manifest was changed after it was written, or is damaged")', "pass",
        "tests/faults/test_bit_flips.py::test_no_flipped_bit_of_a_zoo_is_silent[manifest]",
    ),
    Guard(
        "files are renamed into place", "wslfast/files.py", "        write(temporary)\n", "        write(path)\n        write(temporary)\n",
        "tests/faults/test_kill.py::test_a_killed_run_resumes_to_the_bit",
    ),
    Guard(
        "an unfinished file is removed", "wslfast/files.py", "    finally:\n        with contextlib.suppress(OSError):\n            temporary.unlink()\n", "",
        "tests/faults/test_refused_writes.py",
    ),
    Guard(
        "a name in a temporary file's place is not followed", "wslfast/files.py", "        temporary.unlink(missing_ok=True)  #", "        #",
        "tests/faults/test_refused_writes.py::test_a_link_in_the_temporary_files_place_is_not_followed",
    ),
    Guard(
        "what a file calls is not called", "wslfast/safe/inert.py", "        return Stub(what.kind, arguments)\n",
        '        home, _, name = what.kind.rpartition(".")\n        return getattr(__import__(home), name)(*arguments)\n',
        "tests/faults/test_hostile.py::test_no_payload_runs_at_any_door[archive]",
    ),
    Guard(
        "a state is no larger than its file when written out", "wslfast/safe/state.py",
        'require(count <= self._size, "it holds more values than the file has bytes")', "pass",
        "tests/faults/test_fuzz.py::test_what_would_not_end_when_written_out_is_refused",
    ),
    Guard(
        "rows of skipped shards leave the table", "wslfast/zoo/shards.py", "tuple(compress(column, kept))", "tuple(column[: kept.count(True)])",
        "tests/faults/test_bad_shards.py::test_bad_shards_are_named_or_counted[missing]",
    ),
    Guard(
        "memory that runs out halves the chunk", "wslfast/engine/chunks.py", "            if not is_shortage(error):\n", "            if True:\n",
        "tests/faults/test_memory.py::test_memory_that_runs_out_once_anywhere",
    ),
    Guard(
        "kernels that cannot be built are replaced", "wslfast/engine/triton_path.py", '    if "triton" in raised_by or type(error).__module__.partition(".")[0] == "triton" or system or "C compiler" in text:\n', "    if False:\n",
        "tests/faults/test_backends.py::test_kernels_that_cannot_be_built_are_replaced_with_one_warning",
    ),
    Guard(
        "a diverged model's gradient is zeroed", "wslfast/operators.py", '    if slopes is not None and nan_policy == "omit":\n        slopes', "    if False:\n        slopes",
        "tests/faults/test_determinism.py::test_broken_models_among_64_touch_nobody_else[nan]",
    ),
    Guard(
        "a replay is held against the call", "kernels/cpu/recording.py", 'return recording if same else "its replay gives other bits"', "return recording",
        "tests/kernels/cpu/test_replay.py::test_a_recording_that_misses_an_operator_is_not_used",
    ),
)  # fmt: skip


def check(guard: Guard) -> dict[str, object]:
    """Take the guard out of a copy and run its test there."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", ".*_cache", "*.egg-info")
        )
        file = tree / guard.file
        source = file.read_text()
        if source.count(guard.text) != 1:
            raise SystemExit(f"{guard.what}: expected its text once in {guard.file}, found it {source.count(guard.text)} times")
        file.write_text(source.replace(guard.text, guard.without))
        (tree / "wslfast" / "kernels").symlink_to(tree / "kernels")  # an editable install would lead to the kernels that it was made of
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WSLFAST_FAULTS")}
        environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", guard.test]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, env=environment, timeout=900)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode != 1 or not failed:  # 1 is pytest's "tests failed"; anything else has told nothing
        print(done.stdout[-3000:], done.stderr[-2000:], file=sys.stderr)
    return {"guard": guard.what, "file": guard.file, "test": guard.test, "fails": done.returncode == 1 and bool(failed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of guards, from 0")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    chosen = [GUARDS[i] for i in arguments.only] if arguments.only else list(GUARDS)
    results = []
    for guard in chosen:
        results.append(check(guard))
        print(f"{'fails without it' if results[-1]['fails'] else 'STILL PASSES'}: {guard.what} ({guard.test})", flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        known = {r["guard"]: r for r in [*(json.loads(arguments.json.read_text()) if arguments.json.exists() else []), *results]}
        results = [known[guard.what] for guard in GUARDS if guard.what in known]
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    raise SystemExit(0 if all(r["fails"] for r in results) else 1)


if __name__ == "__main__":
    main()
