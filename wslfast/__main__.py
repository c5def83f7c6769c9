"""``python -m wslfast``, and what the command ``wslfast`` runs."""

from __future__ import annotations

import sys


def main() -> None:
    """The shell (:func:`wslfast.cli.main`). Loading torch takes seconds: Ctrl-C meanwhile is one line, as it is later."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("wslfast: interrupted; nothing was begun", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
