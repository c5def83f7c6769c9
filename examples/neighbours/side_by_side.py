"""Two ways of computing one thing, taking turns: what the examples beside this file print."""

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

_main = sys.modules["__main__"]
if Path(getattr(_main, "__file__", None) or "/").parent == Path(__file__).parent:  # an example is run: its help, and what it lacks
    _parser = argparse.ArgumentParser(description=_main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _parser.parse_args()
    for _name in re.findall(r"pip install ([\w-]+)", _main.__doc__ or ""):
        if importlib.util.find_spec(_name.replace("-", "_")) is None:
            _parser.error(f"this example compares with {_name}, which is not installed: pip install {_name}")


def turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 5) -> str:
    """Median seconds of both, each run once before, in turns so that a busy machine is busy for both."""
    times: tuple[list[float], list[float]] = [], []
    for round_ in range(rounds + 1):
        for seconds, call in zip(times, (ours, theirs), strict=True):
            began = time.perf_counter()
            call()
            if round_:
                seconds.append(time.perf_counter() - began)
    mine, other = (sorted(seconds)[len(seconds) // 2] for seconds in times)
    return f"{1e3 * mine:.1f} ms here, {1e3 * other:.1f} ms one network after another: {other / mine:.1f} times as fast"
