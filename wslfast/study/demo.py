"""``wslfast demo``: a zoo of real networks, two autoencoders, and the page that compares them with every baseline.

Both autoencoders start as the same plain linear code of the zoo, at the same latent size, with the same steps and the same
grid of learning rates, each learning rate chosen on validation models; one descends structure alone, the other structure and
behavior. All figures are from test models, which nothing was chosen on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import require
from ..files import check_folder
from ..measure.evaluation import evaluate_code
from ..training import TrainConfig
from ..zoo import build_zoo, dataset_of, load_zoo, read_manifest
from ..zoo.manifest import MANIFEST
from .study import study
from .trained import trained

logger = logging.getLogger("wslfast")
BETAS = {"structure": 1.0, "structure+behavior": 0.1}


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take a few minutes on two cores."""

    out: str = "runs/demo"
    """Folder for everything: zoo/, runs/, report.html and the tables that it is drawn from."""
    models: int = 120
    """Networks in the zoo."""
    epochs: int = 8
    """Epochs each is trained for; three of them are kept."""
    steps: int = 200
    """Optimiser steps of each autoencoder."""
    queries: int = 128
    """Query images per step."""
    lrs: tuple[float, ...] = (1e-3, 2e-3)
    """Peak learning rates tried for both autoencoders; validation models choose."""
    share: float = 0.55
    """Latent numbers per model, as a share of its parameters (the paper: 0.55)."""
    seed: int = 0
    """Seed of everything."""
    device: str = "cpu"
    """cpu or cuda."""
    log_to: Literal["tensorboard"] | None = None
    """Also write scalars of every run, and the page's pictures and main figures, for TensorBoard (tensorboard --logdir OUT)."""


def demo(config: DemoConfig, *, progress: bool = False, on_stage: Callable[[str], None] | None = None) -> Path:
    """Run the demo, or go on with one that was interrupted; returns its page, which lies beside the tables of an evaluation.

    Raises:
        WslfastError: the folder already holds a finished demo, or runs with other settings, or a package that is needed is missing.
    """
    say = on_stage or logger.info
    out = Path(config.out)
    require(not (out / "report.html").exists(), f"{out} already holds a demo; remove it, or choose another folder with --out")
    check_folder(out, "results")
    require(config.models >= 3, f"models: expected at least 3, one to train on, one to judge by and one to test, got {config.models}")
    require(len(config.lrs) > 0, "lrs: expected at least one learning rate")
    zoo = out / "zoo"
    if not (zoo / MANIFEST).exists():
        say(f"training a zoo of {config.models} CNNs on digits, all at once")
        sizes = {"models": config.models, "epochs": config.epochs, "seed": config.seed}
        build_zoo("digits", zoo, **sizes, device=config.device, progress=progress, resume=True)  # type: ignore[arg-type]
    manifest = read_manifest(zoo)
    made = {"models": len(set(manifest.properties["model"])), **{name: manifest.provenance.get(name) for name in ("epochs", "seed")}}
    for name, value in made.items():
        wanted = getattr(config, name)
        require(value == wanted, f"{zoo} was built with {name} = {value}, not the {wanted} asked for; choose another folder with --out")
    val = load_zoo(zoo, "val").to(config.device)
    images, labels = dataset_of(zoo, val.architecture).split("val")
    base = TrainConfig(
        zoo=str(zoo),
        out="",
        steps=config.steps,
        seed=config.seed,
        device=config.device,
        start="linear",
        metric="plain",
        start_views=False,
        share=config.share,
        queries=config.queries,
        schedule="onecycle",
        log_every=max(1, config.steps // 40),
        checkpoint_every=config.steps,
    )
    runs, chosen = [], []
    for name, beta in BETAS.items():
        trials = {}
        for lr in config.lrs:
            setting = replace(base, out=str(out / "runs" / f"lr{lr:g}" / name), beta=beta, lr=lr)
            run = trained(setting, say, f"training the autoencoder on {name.replace('+', ' + ')}, lr {lr:g}", config.log_to)
            # agreement on validation models and validation images chooses
            trials[lr] = float(evaluate_code(run.autoencoder, val, images, labels).agreement.nanmean()), run.out
        best = max(trials, key=lambda lr: trials[lr][0])
        runs.append(trials[best][1])
        chosen.append(f"{name}: {best:g} (validation agreement {trials[best][0]:.3f})")
    notes = {"learning rates": f"of {', '.join(f'{lr:g}' for lr in config.lrs)}, chosen on validation models: {'; '.join(chosen)}"}
    return study(zoo, runs, out, quick=True, zero_layer=False, device=config.device, notes=notes, on_stage=say, log_to=config.log_to)
