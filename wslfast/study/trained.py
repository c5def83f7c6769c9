"""Runs that a study trains itself: each to its end, and once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..engine.ranks import ALONE, World
from ..errors import WslfastError, require
from ..training import Run, TrainConfig, load_run, train
from ..training.hooks import LogTo
from .loaded_zoo import LoadedZoo

_QUICK = 500  # steps up to which a quick evaluation trains zero-layer autoencoders
NamedRun = tuple[str, Run]


def trained(config: TrainConfig, say: Callable[[str], None], stage: str, log_to: LogTo = None) -> Run:
    """The finished run of these settings: read from ``config.out`` if it is there, else trained, from its checkpoint if there is one.

    Args:
        say: told the ``stage`` before anything is trained.
        log_to: as for :func:`wslfast.train`.

    Raises:
        WslfastError: ``config.out`` holds a run with other settings.
    """
    try:
        run: Run | None = load_run(config.out, device=config.device)
    except WslfastError:
        run = None
    settings = {} if run is None else replace(run.config, out=config.out).to_dict()  # a folder that was moved is the same run
    other = [f"{n} {settings[n]!r}, not {v!r}" for n, v in config.to_dict().items() if settings.get(n, v) != v]
    require(not other, f"{config.out}: holds a run of other settings ({', '.join(other[:3])}); remove it, or choose another folder")
    same = run is not None
    if run is not None and run.finished:
        return run
    say(stage)
    with torch.enable_grad():
        train(config, resume=same, log_to=log_to)
    return load_run(config.out, device=config.device)


def zero_layer_twins(
    runs: Sequence[NamedRun], zoo: LoadedZoo, folder: Path, *, quick: bool, say: Callable[[str], None], world: World = ALONE
) -> Iterator[NamedRun]:
    """Of each variant, its run of the lowest seed once more without transformer blocks: the same settings and steps, trained in
    ``folder`` when its turn comes. Runs without blocks have none, nor, where it is ``quick``, have long ones. Of several processes
    each gives its share of them."""
    lowest = {variant: run for variant, run in sorted(runs, key=lambda pair: -pair[1].config.seed) if run.config.layers > 0}
    long = [variant for variant in lowest if quick and lowest[variant].config.steps > _QUICK]
    if long:
        say(f"no zero-layer autoencoder for {', '.join(long)}: more than {_QUICK} steps, and this is quick")
    for variant in world.dealt(list(dict.fromkeys(variant for variant, _ in runs if variant in lowest and variant not in long))):
        of = lowest[variant].config
        out = folder / f"{zoo.whole}-{variant}-seed{of.seed}"
        config = replace(of, layers=0, zoo=str(zoo.folder), out=str(out), device=zoo.device)
        run = trained(config, say, f"{zoo.whole}: training {variant} without transformer blocks, {of.steps} steps")
        yield variant, run.only(zoo.architecture)
