"""Runs a published script on ours: ``python -m wslfast.sane run.py ARGUMENTS``. The script stays as it is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .patching import patched


def main() -> None:
    """Runs the script that is named, with the patch on and the rest of the arguments as its own."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m wslfast.sane SCRIPT.py [ARGUMENTS]\n\nRuns a published script (shrp, SANE, mzsane, sane 2.x) on ours.")
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"python -m wslfast.sane: {script}: no such file")
    del sys.argv[0]
    sys.path[0] = str(script.resolve().parent)  # as Python sets it for a script
    with patched():
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
