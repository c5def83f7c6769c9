"""``wslfast demo``: a zoo of real networks, two autoencoders, the closed-form codes, and the page that compares them.

Both autoencoders start as the same plain linear code of the zoo, at the same latent size, with the same steps and the same
grid of learning rates, each learning rate chosen on validation models; one descends structure alone, the other structure and
behaviour. All figures are from test models, which nothing was chosen on.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .. import __version__
from ..errors import require
from ..files import write_atomically
from ..measure.evaluation import Code, embeddings, evaluate_code, evaluate_codes, latent_numbers, linear_baselines, reconstruct, write_json
from ..measure.reconstruction import Reconstruction, collapse
from ..page.report import Variant, write_report
from ..population import Population, unstack
from ..training import Run, TrainConfig, train
from ..zoo import Dataset, build_zoo, dataset_of, load_zoo

logger = logging.getLogger("wslfast")
BETAS = {"structure": 1.0, "structure+behavior": 0.1}


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take a few minutes on two cores."""

    out: str = "runs/demo"
    """Folder for everything: zoo/, weights/, the runs, metrics.json, report.html."""
    models: int = 120
    """Networks in the zoo."""
    epochs: int = 8
    """Epochs each is trained for; three of them are kept."""
    steps: int = 200
    """Optimiser steps of each autoencoder."""
    queries: int = 128
    """Query images a step."""
    lrs: tuple[float, ...] = (1e-3, 2e-3)
    """Peak learning rates tried for both autoencoders; validation models choose."""
    share: float = 0.55
    """Latent numbers a model, as a share of its parameters (the paper: 0.55)."""
    seed: int = 0
    """Seed of everything."""
    device: str = "cpu"
    """cpu or cuda."""


def demo(config: DemoConfig, *, progress: bool = False, on_stage: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run the demo; returns what it writes to ``metrics.json``.

    Raises:
        WslfastError: the folder already holds a demo, or a package that the page needs is missing.
    """
    say = on_stage or logger.info
    out, began = Path(config.out), time.perf_counter()
    require(not (out / "metrics.json").exists(), f"{out} already holds a demo; remove it, or choose another folder with --out")
    require(len(config.lrs) > 0, "lrs: expected at least one learning rate")
    zoo = out / "zoo"
    if not (zoo / "manifest.json").exists():
        say(f"training a zoo of {config.models} CNNs on digits, all at once")
        build_zoo("digits", zoo, models=config.models, epochs=config.epochs, seed=config.seed, device=config.device, progress=progress)
    splits = {name: load_zoo(zoo, name).to(config.device) for name in ("train", "val", "test")}
    dataset = dataset_of(zoo, splits["train"].architecture)
    zoo_seconds = time.perf_counter() - began

    codes: dict[str, Code] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    notes: dict[str, str] = {}
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
    for name, beta in BETAS.items():
        trials = {}
        for lr in config.lrs:
            say(f"training the autoencoder on {name.replace('+', ' + ')}, lr {lr:g}")
            trials[lr] = _trial(replace(base, out=str(out / "runs" / f"{name}-lr{lr:g}"), beta=beta, lr=lr), splits["val"], dataset)
        best = max(trials, key=lambda lr: trials[lr][1])
        run, score, records = trials[best]
        codes[name], curves[name] = run.autoencoder, records
        notes[name] = f"lr {best:g}, of {', '.join(f'{lr:g}' for lr in config.lrs)} (validation agreement {score:.3f})"
    say("closed-form codes, and the test models")
    codes |= linear_baselines(splits["train"], dataset, latent_numbers(codes["structure"]), seed=config.seed)
    notes |= {
        "linear": "closed form: PCA of each layer; where both autoencoders start",
        "linear-views": "closed form: PCA over all permuted views",
        "linear-metric": "closed form: PCA over all views in the activation metric",
        "adaptive": "closed form: layer by layer in the metric of each model's own activations",
    }

    test, (images, labels) = splits["test"], dataset.split("test")
    results = evaluate_codes(codes, test, images, labels)
    metrics = {name: _figures(result, codes[name], test, notes[name]) for name, result in results.items()}
    seconds = time.perf_counter() - began
    facts = {**_facts(config, splits, dataset), "time": f"{seconds:.0f} s, of which the zoo {zoo_seconds:.0f} s"}
    for name, code in codes.items():
        _save_weights(out / "weights" / f"{name}.safetensors", reconstruct(code, test.weights), test)
    variants = [
        Variant(name, result, curves.get(name), metrics[name]["latent_numbers"], metrics[name]["latent_share"], notes[name])
        for name, result in results.items()
    ]
    latents = embeddings(codes["structure+behavior"], test.weights)  # type: ignore[arg-type]
    write_report(
        out / "report.html",
        title="Structure is not enough, on digits",
        headline=headline(metrics),
        variants=variants,
        latents=latents.cpu(),
        latent_accuracy=test.column("test_acc"),
        latent_groups=[f"epoch {epoch}" for epoch in test.properties["epoch"]],
        facts=facts,
    )
    write_json(out / "metrics.json", {**metrics, "facts": facts})
    return {**metrics, "facts": facts}


def _trial(config: TrainConfig, val: Population, dataset: Dataset) -> tuple[Run, float, list[dict[str, Any]]]:
    """Train once; agreement on validation models and validation images chooses between trials."""
    records: list[dict[str, Any]] = []
    run = train(config, on_record=records.append)
    result = evaluate_code(run.autoencoder, val, *dataset.split("val"))
    return run, float(result.agreement.nanmean()), records


def _figures(result: Reconstruction, code: Code, test: Population, note: str) -> dict[str, Any]:
    numbers = latent_numbers(code)
    return {**result.summary(), "latent_numbers": numbers, "latent_share": numbers / test.architecture.num_weights, "note": note}


def headline(metrics: dict[str, dict[str, Any]]) -> str:
    """The result in one sentence, figures and all, whichever way it came out."""
    s, b = metrics["structure"], metrics["structure+behavior"]
    told = [(name, words) for name in ("structure", "structure+behavior") if (words := collapse(metrics[name].get("agreement_margin")))]
    return (
        f"At the same latent size ({s['latent_share']:.0%} of the parameters) and the same training, reconstructions trained on structure "
        f"alone agree with their originals on {s['agreement']:.1%} of test images and keep {s['accuracy_reconstructed']:.1%} accuracy of "
        f"{s['accuracy_original']:.1%}; with behaviour they agree on {b['agreement']:.1%} and keep {b['accuracy_reconstructed']:.1%}."
        + "".join(f" {name.capitalize()}: {words}." for name, words in told)
    )


def _facts(config: DemoConfig, splits: dict[str, Population], dataset: Dataset) -> dict[str, str]:
    rows = ", ".join(f"{name} {len(p)}" for name, p in splits.items())
    return {
        "zoo": f"{config.models} CNNs of {splits['train'].architecture.num_weights:,} parameters on {dataset.name}; "
        f"rows (models x kept epochs): {rows}",
        "images": f"train {len(dataset.train_images)}, val {len(dataset.val_images)}, test {len(dataset.test_images)}",
        "autoencoders": f"{config.steps} steps each, {config.queries} queries a step, from the same plain linear code",
        "seed": str(config.seed),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads" if config.device == "cpu" else torch.cuda.get_device_name(),
        "versions": f"wslfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _save_weights(path: Path, weights: torch.Tensor, like: Population) -> None:
    """Reconstructed test models by parameter name, ``[k, *shape]`` each."""
    named = {name: value.contiguous().cpu() for name, value in unstack(weights, like.architecture).items()}
    write_atomically(path, lambda temporary: save_file(named, str(temporary)))
