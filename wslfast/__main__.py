"""``python -m wslfast``."""

from .cli import main

main()
