"""The trainer: one loop, read top to bottom.

Each step draws models and queries, makes permuted views, encodes and decodes them, and descends
``gamma L_C + (1 - gamma) (beta L_S + (1 - beta) L_B)``, each term divided by an explicit normaliser (arXiv 2503.17138 with
gamma 0.05, beta 0.1). Everything that a step depends on is in the checkpoint, so a resumed run continues to the bit on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import losses
from .._files import write_text
from ..autoencoder import Autoencoder
from ..behavior import batched_behavioral_loss
from ..codec import LinearCodec
from ..errors import WslfastError, check_device, require
from ..permutation import random_views
from ..population import Population
from ..profiling import region
from ..queries import QueryPool, TargetCache
from ..tokens import TokenLayout
from ..zoo import dataset_of, load_zoo
from .checkpoint import Run, checkpoint_path, load_checkpoint, load_run, save_checkpoint
from .config import TrainConfig
from .records import OnRecord, Recorder, RunLog

logger = logging.getLogger("wslfast")

# what may differ between a run and its resumption; everything else would change the trajectory
_FREE = {"out", "zoo", "steps", "log_every", "checkpoint_every", "device"}


class Trainer:
    """Everything a step needs, resident on the device; :meth:`step` takes one."""

    def __init__(self, config: TrainConfig, population: Population, images: Tensor, sizes: dict[str, Any] | None = None) -> None:
        self.config, self.device = config, torch.device(config.device)
        self.architecture = population.architecture
        self.population = population.to(self.device)
        self.weights = self.population.weights
        self.batch = min(config.batch_size, len(population))
        self.two_views = config.gamma > 0
        self.layout = TokenLayout(self.architecture, config.token_size)
        self.step_index = 0

        root = torch.Generator().manual_seed(config.seed)
        seeds = torch.randint(2**62, (3,), generator=root).tolist()
        self.order = torch.Generator().manual_seed(seeds[0])
        self.views = torch.Generator(self.device).manual_seed(seeds[1])
        self.draws = torch.Generator().manual_seed(seeds[2])
        pooled = torch.randperm(len(images), generator=root)[: min(config.query_pool, len(images))]
        self.pool = QueryPool(images[pooled], self.device)
        require(config.queries <= len(self.pool), f"queries: expected at most {len(self.pool)} (the query pool), got {config.queries}")
        self.cache = TargetCache(self.population, self.pool) if config.uses_behavior else None
        self.permutation, self.position = self._shuffle(), 0

        if sizes is None:
            self.model = self._new_autoencoder().to(self.device)
        else:
            self.model = Autoencoder.from_config(self.layout, sizes).to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=config.lr, total_steps=config.steps, pct_start=0.3
        ) if config.schedule == "onecycle" else None  # fmt: skip
        self.normalizers = losses.Normalizers.from_data(
            self.population, self.cache, batch_size=self.batch, criterion=config.criterion, temperature=config.distillation_temperature
        )

    def _new_autoencoder(self) -> Autoencoder:
        config = self.config
        sizes: dict[str, Any] = {
            "d_model": config.d_model, "heads": config.heads, "layers": config.layers, "projection": config.projection,
            "dropout": config.dropout,
        }  # fmt: skip
        if config.start == "random":
            return Autoencoder(self.layout, latent=config.latent, **sizes)
        codec = LinearCodec(
            self.population, latent=config.share, metric=config.metric, views=config.start_views, token_size=config.token_size,
            queries=self.pool.images[:512] if config.metric == "activation" else None, seed=config.seed,
        )  # fmt: skip
        logger.info("linear start: %d latent numbers for %d parameters", codec.latent_size, self.architecture.num_weights)
        return Autoencoder(self.layout, start="linear", codec=codec, **sizes)

    def _shuffle(self) -> Tensor:
        return torch.randperm(len(self.weights), generator=self.order)

    def next_rows(self) -> Tensor:
        """Zoo rows of the next batch: every model once an epoch, the incomplete last batch dropped."""
        if self.position + self.batch > len(self.permutation):
            self.permutation, self.position = self._shuffle(), 0
        rows = self.permutation[self.position : self.position + self.batch]
        self.position += self.batch
        return rows.to(self.device)

    def losses(self, rows: Tensor, queries: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on zoo rows ``[b]`` and pool images ``[n]``, and its parts (still on the device)."""
        config = self.config
        originals = self.weights[rows]
        with region("views"):
            views = [originals] * (2 if self.two_views else 1)
            if config.views:
                views = [random_views(v, self.architecture, self.views) for v in views]
        with region("tokenise"):
            tokens, mask, _ = self.layout.tokenize(torch.cat(views))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            with region("encode"):
                latents = self.model.encode(tokens)
                projections = self.model.project(latents) if self.two_views else None
            with region("decode"):
                reconstructed = self.model.decode(latents)
        reconstructed = reconstructed.float()
        contrastive = structural = behavioral = None
        counts: dict[str, Tensor] = {}
        if projections is not None:
            a, b = projections.float().chunk(2)
            contrastive = losses.nt_xent(a, b, config.contrast_temperature)
        if config.uses_structure:
            structural = losses.structural_loss(reconstructed, tokens, mask)
        if self.cache is not None:
            with region("detokenise"):
                weights = self.layout.detokenize(reconstructed)
            # every view of a model is the same function: one row of targets serves them all
            targets = self.cache.targets(rows, queries).repeat(len(views), 1, 1)
            with _matmul_precision(config.behavior_precision, self.device):
                values = batched_behavioral_loss(
                    weights, None, self.pool[queries], self.architecture, targets=targets, criterion=config.criterion,
                    temperature=config.distillation_temperature, reduction="none", nan_policy="omit",
                )  # fmt: skip
            # the mean over the models kept, without asking the device how many those are
            kept = values.isfinite()
            behavioral = torch.where(kept, values, torch.zeros_like(values)).sum() / kept.sum().clamp_min(1)
            counts["skipped_models"] = (~kept).sum()
        total, parts = losses.compose(contrastive, structural, behavioral, self.normalizers, config.gamma, config.beta)
        return total, {**parts, **counts}

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the loss parts as device tensors (reading one synchronises)."""
        rows, queries = self.next_rows(), self.pool.draw(self.config.queries, self.draws)
        total, parts = self.losses(rows, queries)
        with region("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
        with region("optimise"):
            if self.config.clip is not None:
                parts["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
        self.step_index += 1
        return parts

    def state(self) -> dict[str, Any]:
        """Everything the rest of the run depends on."""
        rng = {"order": self.order, "views": self.views, "draws": self.draws}
        state = {"torch": torch.get_rng_state(), **{name: g.get_state() for name, g in rng.items()}}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "step": self.step_index,
            "config": self.config.to_dict(),
            "architecture": self.architecture.to_dict(),
            "model": self.model.state_dict(),
            "autoencoder": self.model.config(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "normalizers": self.normalizers.to_dict(),
            "rng": state,
            "sampler": {"permutation": self.permutation, "position": self.position},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`. Raises WslfastError if the checkpoint's config would take another path."""
        saved = TrainConfig.from_dict(state["config"])
        fixed = _FREE - ({"steps"} if self.config.schedule == "onecycle" else set())
        changed = [n for n, v in self.config.to_dict().items() if n not in fixed and getattr(saved, n) != v]
        pairs = [f"{n} = {getattr(self.config, n)!r} (was {getattr(saved, n)!r})" for n in changed]
        require(not changed, f"cannot resume with another config: {', '.join(pairs)}")
        require(state["architecture"] == self.architecture.to_dict(), "cannot resume: the zoo has another architecture than the checkpoint")
        require(
            len(state["sampler"]["permutation"]) == len(self.weights),
            f"cannot resume: the zoo has {len(self.weights)} training rows, the checkpoint saw {len(state['sampler']['permutation'])}",
        )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.normalizers = losses.Normalizers.from_dict(state["normalizers"])
        torch.set_rng_state(state["rng"]["torch"].cpu())
        for name, generator in (("order", self.order), ("views", self.views), ("draws", self.draws)):
            generator.set_state(state["rng"][name].cpu())
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)
        self.permutation, self.position = state["sampler"]["permutation"].cpu(), int(state["sampler"]["position"])
        self.step_index = int(state["step"])


def train(
    config: TrainConfig, *, resume: bool = False, profiled: bool = False, on_record: OnRecord | None = None,
    population: Population | None = None, images: Tensor | None = None,
) -> Run:  # fmt: skip
    """Train an autoencoder on a zoo; returns the trained run.

    Args:
        config: what to do. ``config.zoo`` is read unless ``population`` is given; ``config.out`` receives ``config.toml``,
            ``log.jsonl`` (one record a line) and ``checkpoint/state.pt``.
        resume: continue from ``config.out``'s checkpoint: bit-exact on a CPU. Starts afresh where there is none, and leaves a
            finished run as it is.
        profiled: record 20 steps: ``profile/trace.json``, ``profile/phases.json`` and a table in the log.
        on_record: called with every record as it is logged.
        population: training models, instead of the zoo's ``train`` split (needed, with the architecture they carry, for zoos
            of networks that are not plain layer lists).
        images: ``[N, *input_shape]`` query images, instead of the training images of the zoo's data set.

    Raises:
        WslfastError: bad config, unreadable zoo, a folder that already holds a run (without ``resume``), a loss that is not
            finite.
    """
    require(bool(config.out), "out: expected a folder for the run")
    require(bool(config.zoo) or population is not None, "zoo: expected the folder of a zoo")
    out = Path(config.out)
    saved = load_checkpoint(out) if resume and checkpoint_path(out).exists() else None
    require(resume or not checkpoint_path(out).exists(), f"{out} already holds a run; resume it, or choose another folder")
    device = check_device(config.device)
    if saved is not None and saved["step"] >= config.steps:
        logger.info("%s is finished (%d steps); nothing to do", out, saved["step"])
        return load_run(out, device=config.device, architecture=None if population is None else population.architecture)
    if population is None:
        population = load_zoo(config.zoo, "train")
    if images is None:
        images = dataset_of(config.zoo, population.architecture).train_images
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the caller's random state is not touched
        torch.manual_seed(config.seed)
        trainer = Trainer(config, population, images, None if saved is None else saved["autoencoder"])
        if saved is not None:
            trainer.restore(saved)
            logger.info("resumed at step %d", trainer.step_index)
        write_text(out / "config.toml", config.to_toml())
        if trainer.cache is not None:
            logger.info("targets: %d forward passes of originals, computed once", trainer.cache.computed)
        recorder = Recorder(out / "profile", config.device) if profiled else None
        with RunLog(out / "log.jsonl", trainer.step_index, on_record) as log:
            try:
                _run(trainer, out, log, recorder)
            finally:
                if recorder is not None:
                    recorder.close()
    if trainer.cache is not None:
        logger.info("targets: the cache replaced %d forward passes of originals", trainer.cache.served)
    return Run(out, trainer.step_index, config, trainer.model.eval())


def _run(trainer: Trainer, out: Path, log: RunLog, recorder: Recorder | None) -> None:
    """The loop."""
    config, since = trainer.config, time.perf_counter()
    trainer.model.train()
    while trainer.step_index < config.steps:
        parts = trainer.step()
        step = trainer.step_index
        last = step == config.steps
        if last or step % config.log_every == 0 or step == 1:
            values = {name: value.item() for name, value in parts.items()}  # synchronises: on log steps only
            if not abs(values["loss"]) < float("inf"):
                raise WslfastError(f"the loss is {values['loss']} at step {step}; the last checkpoint in {out} is from before")
            now = time.perf_counter()
            rate = (step - log.step) * trainer.batch / max(now - since, 1e-9)
            since = now
            log.write({"step": step, **values, "lr": trainer.optimizer.param_groups[0]["lr"], "models_per_s": round(rate, 2)})
        if last or step % config.checkpoint_every == 0:
            save_checkpoint(out, trainer.state())
        if recorder is not None:
            recorder.after_step()


@contextlib.contextmanager
def _matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """torch's float32 matmul precision for the block (a setting of GPUs; on a CPU it is left alone)."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
