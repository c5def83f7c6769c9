"""The loop: steps, log, checkpoints, resumption."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from .. import engine
from ..engine import device_errors, verdicts
from ..engine.ranks import World, joined
from ..errors import WslfastError, describe, require
from ..files import check_folder, remove_leftovers, write_text
from ..kernels.default_device import on_the_cpu
from ..population import Population
from ..proof import ensure, standing
from ..queries import load_queries, save_queries
from ..zoo import MappedZoo
from ..zoo.mapped import mapped_parts
from .checkpoint import Run, checkpoint_path, load_checkpoint, load_run, save_checkpoint
from .config import TrainConfig
from .descent import has_bf16, settled
from .hooks import LogTo, hook_of
from .mixed import MixedTrainer
from .progress import Interrupted, finishing_steps, shown
from .query_sets import query_images, set_names
from .records import OnRecord, Record, Recorder, RunLog
from .trainer import Trainer, behavior_precision, check_resumed, seed_generators

logger = logging.getLogger("wslfast")


@on_the_cpu
def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    profiled: bool = False,
    on_record: OnRecord | None = None,
    population: Union[Population, MappedZoo, None] = None,
    images: Tensor | None = None,
    stop: Callable[[int], bool] | None = None,
    log_to: LogTo = None,
    progress: bool = False,
) -> Run:
    """Train an autoencoder on a zoo; returns the trained run.

    Under torchrun (``torchrun --nproc-per-node N -m wslfast train ...``) every process takes its share of each batch; the run
    is the same up to the order of summation, and goes on with any number of processes.

    Args:
        config: what to do. ``config.zoo`` is read unless ``population`` is given; ``config.out`` receives ``config.toml``,
            ``log.jsonl`` (one record a line) and ``checkpoint/state.pt``.
        resume: continue from ``config.out``'s checkpoint: bit-exact on a CPU. Starts afresh where there is none, and leaves a
            finished run as it is.
        profiled: record 20 steps: ``profile/trace.json``, ``profile/phases.json`` and a table in the log.
        on_record: called with every record as it is logged.
        population: training models, in memory or on disk, instead of the zoo's ``train`` split (needed, with the architecture
            they carry, for zoos of networks that are not plain layer lists).
        images: ``[N, *input_shape]`` query images, instead of those of ``config.query_set``.
        stop: asked after every step, with its number, whether to stop there: the run is then as if killed after a checkpoint. Under
            torchrun it has to answer alike in all processes.
        log_to: ``"tensorboard"`` writes every record and the phases of 20 steps into ``config.out/tensorboard``; or an object with the
            three methods of :class:`~wslfast.training.hooks.LogHook`, for any other service (docs/logging.md).
        progress: show a bar (where there is no terminal, a line now and then).

    Ctrl-C lets the step at hand finish, writes a checkpoint and raises :class:`~wslfast.training.progress.Interrupted`, a
    KeyboardInterrupt; a second one stops at once.

    Raises:
        WslfastError: bad config, unreadable zoo, a folder that already holds a run (without ``resume``), other models or query images than
            before (with it), a loss or weights that are not finite (the last checkpoint stays), or another process that has gone.
    """
    require(isinstance(config, TrainConfig), lambda: f"config: expected a TrainConfig, got {describe(config)}")
    known = population is None or isinstance(population, (Population, MappedZoo))
    require(known, lambda: f"population: expected a Population or a MappedZoo, got {describe(population)}")
    require(bool(config.out), "out: expected a folder for the run")
    require(bool(config.zoo) or population is not None, "zoo: expected the folder of a zoo")
    out = Path(config.out)
    check_folder(out, "run")
    if progress:
        with shown(None, config.steps) as bar:

            def both(record: Record) -> None:
                bar(record)
                if on_record is not None:
                    on_record(record)

            settings = {"population": population, "images": images, "stop": stop, "log_to": log_to}
            return train(config, resume=resume, profiled=profiled, on_record=both, **settings)  # type: ignore[arg-type]
    with joined(config.device) as (world, device), engine.using(config.backend):
        saved = load_checkpoint(out) if resume and checkpoint_path(out).exists() else None
        require(resume or not checkpoint_path(out).exists(), f"{out} already holds a run; resume it, or choose another folder")
        config = settled(config, device, saved)
        if saved is not None and saved["step"] >= config.steps:
            check_resumed(replace(config, steps=TrainConfig.from_dict(saved["config"]).steps), saved)  # fewer steps are no other path here
            logger.info("%s is finished (%d steps); nothing to do", out, saved["step"])
            return load_run(out, device=device, architecture=None if population is None else population.architecture)
        parts = mapped_parts(config.zoo, "train", skip_bad=config.skip_bad) if population is None else {}
        if population is None and len(parts) == 1:
            (population,) = parts.values()
        mixed = population is None
        sets = {n: images if images is not None else _queries(config, p, saved is not None, world, n) for n, p in parts.items() if mixed}
        if population is not None and images is None:
            images = _queries(config, population, saved is not None, world)
        require(not mixed or world.size == 1, "a zoo of several architectures is trained on by one process")
        kernels = _kernels(config, population, device, saved) if population is not None else {}
        state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])  # the caller's random state is not touched
        with verdicts.holding(kernels), device_errors.watched(), state:
            seed_generators(config.seed, device)
            trainer: Union[Trainer, MixedTrainer]
            if population is None:
                trainer = MixedTrainer(config, parts, sets, saved, device)
            else:
                assert images is not None
                trainer = Trainer(config, population, images, None if saved is None else saved["autoencoder"], world, device)
                trainer.kernels = kernels
            if saved is not None:
                try:
                    trainer.restore(saved)
                except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # a state that no trainer wrote
                    raise WslfastError(f"checkpoint {checkpoint_path(out)} cannot be resumed: {error}") from error
            _announce(trainer, saved is not None)
            if world.writes:
                remove_leftovers(checkpoint_path(out), out / "config.toml", out / "log.jsonl")
                write_text(out / "config.toml", config.to_toml())
            hook = hook_of(log_to, out, trainer.step_index) if world.writes else None
            wanted = world.writes and (profiled or hook is not None)
            recorder = Recorder(out / "profile", str(device), hook, profiled) if wanted else None
            path = out / "log.jsonl" if world.writes else None
            with RunLog(path, trainer.step_index, on_record, hook) as log, finishing_steps() as pressed:
                try:
                    _run(trainer, out, log, recorder, stop, pressed)
                finally:
                    trainer.release()
                    if recorder is not None:
                        recorder.close()
        if isinstance(trainer, MixedTrainer):
            every = {name: part.model.eval() for name, part in trainer.parts.items()}
            return Run(out, trainer.step_index, config, next(iter(every.values())), every)
        if trainer.cache is not None and world.writes:
            logger.info("targets: the cache replaced %d forward passes of originals", trainer.cache.served)
        return Run(out, trainer.step_index, config, trainer.model.eval())


def _queries(config: TrainConfig, source: Union[Population, MappedZoo], resumed: bool, world: World, label: str = "") -> Tensor:
    """The run's query set (of one architecture's, by its label). Images made from the zoo's models are kept beside the run: they are not
    made twice."""
    made = "optimised" in set_names(config.query_set)
    require(not made or world.size == 1, "query_set: optimised sets are made by one process; make a file of one: wslfast queries")
    kept = Path(config.out) / (f"queries-{re.sub('[^A-Za-z0-9]+', '-', label)}.npz" if label else "queries.npz")
    if made and resumed and kept.exists():
        return load_queries(kept, source.architecture)
    images = query_images(config.query_set, config.zoo, source, n=config.query_pool, seed=config.seed)
    if made:
        save_queries(kept, images)
    return images


def _kernels(
    config: TrainConfig, models: Union[Population, MappedZoo], device: torch.device, saved: dict[str, Any] | None
) -> dict[tuple[str, str, str], verdicts.Decision]:
    """Whether the run's losses and targets are computed by the kernels: what its checkpoint says, so that a run keeps its path unless they
    failed here since, else what this machine has proved, or proves now."""
    if saved is not None and saved.get("kernels"):
        kept = {(str(g), str(p), str(f)): verdicts.decision_from(record) for g, p, f, record in saved["kernels"]}
        return standing(models.architecture, device, kept)
    if not config.uses_behavior:
        return {}
    k = min(config.batch_size, len(models)) * (2 if config.gamma > 0 else 1)
    loss = {"highest": "tf32x3", "bf16": "bf16"}.get(config.behavior_precision, "tf32")
    return ensure(models.architecture, device, [("loss", loss), ("forward", None)], k, config.queries)


def _announce(trainer: Union[Trainer, MixedTrainer], resumed: bool) -> None:
    """What a reader of the log wants to know before the first step."""
    if not trainer.world.writes:
        return
    if resumed:
        logger.info("resumed at step %d", trainer.step_index)
    if isinstance(trainer, MixedTrainer):
        counts = ", ".join(f"{name} {len(part.models)}" for name, part in trainer.parts.items())
        logger.info("one autoencoder over %d architectures, a batch of one of them a step; models: %s", len(trainer.parts), counts)
    config = trainer.config
    if trainer.device.type == "cpu":
        known = has_bf16(trainer.device)
        if known and config.precision == "fp32" and config.layers > 0:
            logger.info("this CPU computes in bf16: with precision bf16 a step takes 2/3 to 3/4 of the time (docs/notes/cpu.md)")
        slow = [name for name in ("precision", "behavior_precision") if getattr(config, name) == "bf16"]
        if slow and not known:
            logger.warning("this CPU has no bf16 products and imitates them: %s = bf16 makes a step many times as slow", " and ".join(slow))
    if isinstance(trainer, MixedTrainer):
        return
    backend = trainer.config.backend
    with behavior_precision(config, trainer.device):
        path = engine.choose(trainer.architecture, trainer.device.type, torch.float32, backend, config.behavior_precision == "bf16")
    logger.info("backend %s: path %s, %s", backend, path.name, path.reason)
    if trainer.world.size > 1:
        logger.info("%d processes, %d models each a step", trainer.world.size, trainer.batch // trainer.world.size)
    if not trainer.models.resident:
        logger.info("zoo: %d models stay on disk and are read a window of shards at a time", len(trainer.models))
    if trainer.cache is not None:
        logger.info("targets: %d forward passes of originals, computed once", trainer.cache.computed)


def _run(
    trainer: Union[Trainer, MixedTrainer],
    out: Path,
    log: RunLog,
    recorder: Recorder | None,
    stop: Callable[[int], bool] | None,
    pressed: Callable[[], bool],
) -> None:
    """The loop; ``pressed`` says whether somebody pressed Ctrl-C."""
    config, since = trainer.config, time.perf_counter()
    trainer.model.train()
    last = trainer.step_index >= config.steps
    while not last:
        rate = trainer.optimizer.param_groups[0]["lr"]
        parts = trainer.step()
        step = trainer.step_index
        stopped = stop is not None and stop(step)  # asked at the last step, too: it may keep count
        last = stopped or step == config.steps
        if last or step % config.log_every == 0 or step == 1:
            values = _values(parts, trainer.world)  # synchronises: on log steps only
            if not abs(values["loss"]) < float("inf"):
                raise WslfastError(f"the loss is {values['loss']} at step {step}; {_left(out)}")
            now = time.perf_counter()
            speed = (step - log.step) * trainer.batch / max(now - since, 1e-9)
            since = now
            log.write({"step": step, **values, "lr": rate, "models_per_s": round(speed, 2)})
        if last or step % config.checkpoint_every == 0:
            _save(trainer, out)
        if recorder is not None:
            recorder.after_step()
        if pressed() and step < config.steps:
            _save(trainer, out)
            raise Interrupted(
                f"interrupted at step {step} of {config.steps}, which is saved in {out}; the run goes on with --resume (resume=True)"
            )


def _save(trainer: Union[Trainer, MixedTrainer], out: Path) -> None:
    """Write a checkpoint over the one before, if there is something to go on from: a loss that is finite may have a gradient that is not.
    All processes of a run have the same weights, and see it alike."""
    weights = trainer.model.state_dict()
    bad = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        what = f"{len(bad)} of {len(weights)} tensors of the autoencoder are not finite after step {trainer.step_index} ({bad[0]})"
        raise WslfastError(f"{what}; {_left(out)}")
    if trainer.world.writes:
        save_checkpoint(out, trainer.state())


def _left(out: Path) -> str:
    kept = checkpoint_path(out).exists()
    return f"the last checkpoint in {out} is from before" if kept else f"there is no checkpoint in {out} yet"


def _values(parts: dict[str, Tensor], world: World) -> dict[str, float]:
    """A step's parts as numbers: means over processes, and the sum of those that count."""
    table = world.total(torch.stack([value.double() for value in parts.values()])).tolist()
    return {name: v if name == "skipped_models" else v / world.size for name, v in zip(parts, table, strict=True)}
