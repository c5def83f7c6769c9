"""The trainer: what one step is.

Each step draws models and queries, makes permuted views, encodes and decodes them, and descends
``gamma L_C + (1 - gamma) (beta L_S + (1 - beta) L_B)``, each term divided by an explicit normaliser (arXiv 2503.17138 with
gamma 0.05, beta 0.1); beta may be 1 for a share of the steps before behavior sets in. Everything that a step depends on is in the
checkpoint, so a resumed run continues to the bit on a CPU.
Under torchrun each process takes its share of every batch (``engine/ranks.py``).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import losses
from ..architecture import Architecture
from ..behavior import batched_behavioral_loss, batched_forward
from ..codes.activation_metric import ActivationMetric
from ..codes.autoencoder import Autoencoder
from ..codes.linear import LinearCodec
from ..engine import cuda_graph, verdicts
from ..engine.precision import matmul_precision_of
from ..engine.ranks import ALONE, World
from ..errors import require
from ..permutation import kept_channels, permute, random_permutations
from ..population import Population
from ..profiling import region
from ..queries import QueryPool, TargetCache
from ..queries.pool import sent
from ..tokens import TokenLayout
from ..zoo import MappedZoo
from .config import TrainConfig
from .descent import cycle, descend, optimizer_of, settled
from .models import TrainingModels

logger = logging.getLogger("wslfast")

_ALL, _WINDOW = 2048, 512  # tokens that attend all to all, and windows of more than those
_BLOCK = 1024  # models whose targets are computed at once
_CHEAP = 1 << 20  # targets, a model and an image each: computed once without a thought
_PAYS = 4  # targets computed for one looked up; a zoo that a run sees a small part of is not run whole ahead of it

# what may differ between a run and its resumption; everything else would change the trajectory
_FREE = {"out", "zoo", "steps", "log_every", "checkpoint_every", "device", "cuda_graph", "memory_gb", "skip_bad"}


class Trainer:
    """Everything a step needs, resident on the device; :meth:`step` takes one.

    Args:
        config: what to do.
        models: the training models.
        images: ``[N, *input_shape]``, from which the query pool is drawn.
        sizes: of an autoencoder that :meth:`restore` will fill; by default a new one is initialised.
        world: this process among those of the run.
        device: by default ``config.device``.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: Union[Population, MappedZoo],
        images: Tensor,
        sizes: dict[str, Any] | None = None,
        world: World = ALONE,
        device: torch.device | None = None,
    ) -> None:
        self.device = torch.device(config.device) if device is None else device
        self.config, self.world = settled(config, self.device), world
        self.architecture = models.architecture
        limit = config.memory_gb / 2 * 1e9
        self.models = TrainingModels(models, self.device, limit)
        self.batch = min(config.batch_size, len(models))
        world.share(self.batch)
        self.two_views = config.gamma > 0
        self.layout = TokenLayout(self.architecture, config.token_size)
        self.step_index = 0
        self.kernels: dict[tuple[str, str, str], verdicts.Decision] = {}  # what the run holds to, see engine/verdicts.py
        self.recorder = cuda_graph.Recorder() if config.cuda_graph else None
        if config.views and world.writes:
            kept = kept_channels(self.architecture)
            for why in dict.fromkeys(kept.values()):
                names = [name for name, own in kept.items() if own == why]
                few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                logger.info("views: outputs of %s keep their order: %s", few, why)

        root = torch.Generator().manual_seed(config.seed)
        seeds = torch.randint(2**62, (3,), generator=root).tolist()
        self.order = torch.Generator().manual_seed(seeds[0])
        self.views = torch.Generator(self.device).manual_seed(seeds[1])
        self.draws = torch.Generator().manual_seed(seeds[2])
        pooled = torch.randperm(len(images), generator=root)[: min(config.query_pool, len(images))]
        self.pool = QueryPool(images[pooled], self.device)
        # a grid of 8x8 points has not the 256 of a setting that nobody chose
        self.queries = min(config.queries, len(self.pool)) if config.queries == TrainConfig.queries else config.queries
        require(self.queries <= len(self.pool), f"queries: expected at most {len(self.pool)} (the query pool), got {config.queries}")
        if self.queries < config.queries and world.writes:
            logger.info("queries: all %d that there are at every step", self.queries)
        sample = self.models.sample(config.seed)
        self.cache = self._targets_of_all(limit) if config.uses_behavior else None
        self.permutation, self.position = self.models.shuffle(self.order), 0
        self.metric: ActivationMetric | None = None
        if "activation" in (config.structure_metric, config.coordinates):
            self.metric = ActivationMetric(
                sample, self.pool.images, self.layout, unit=config.structure_unit, views=config.start_views, seed=config.seed
            )

        if sizes is None:
            self.model = self._new_autoencoder(sample).to(self.device, torch.float32)
        else:
            self.model = Autoencoder.from_config(self.layout, sizes).to(self.device, torch.float32)
        self.optimizer = optimizer_of(self.model, config, self.device)
        self.schedule = cycle(config, self.optimizer)
        whole = len(sample) == len(models) and self.cache is not None
        known = self.cache if whole or not config.uses_behavior else TargetCache(sample, self.pool)
        self.normalizers = losses.Normalizers.from_data(
            sample, known, batch_size=self.batch, criterion=config.criterion, temperature=config.distillation_temperature
        )
        self.responses = self.metric if config.structure_metric == "activation" else None
        if self.responses is not None:
            self.normalizers = replace(self.normalizers, structural=self.responses.spread)
        self.layer_units = losses.layer_units(sample, self.layout) if config.structure_unit == "layer" else None
        # DistributedDataParallel hooks a module's forward: here the whole objective. The projection head is idle without a contrast.
        self.objective: nn.Module = _Objective(self)
        if world.size > 1:
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=not self.two_views)

    def _targets_of_all(self, limit: float) -> TargetCache | None:
        """All originals' outputs on the whole pool, or None where they take too much memory, or more time than they save."""
        models, pool, config = self.models, self.pool, self.config
        pairs = len(models) * len(pool)
        why = ""
        if 4.0 * pairs * self.architecture.num_classes > limit:
            why = "exceed memory_gb / 2"
        elif pairs > max(_CHEAP, _PAYS * config.steps * self.batch * self.queries):
            why = f"are more than {config.steps} steps look up"
        if why:
            if self.world.writes:
                logger.info("targets: computed at every step; those of %d models on %d images %s", len(models), len(pool), why)
            return None
        return TargetCache.of_blocks(self.architecture, lambda rows: models.blocks(_BLOCK, rows), len(models), pool, world=self.world)

    def _new_autoencoder(self, sample: Population) -> Autoencoder:
        config = self.config
        sizes: dict[str, Any] = {
            "d_model": config.d_model,
            "heads": config.heads,
            "layers": config.layers,
            "projection": config.projection,
            "dropout": config.dropout,
            "window": self._window(),
        }
        if config.coordinates == "activation" and self.metric is not None:
            sizes["coordinates"] = self.metric.coordinates(sample)
        if config.start == "random":
            return Autoencoder(self.layout, latent=config.latent, **sizes)
        codec = LinearCodec(
            sample,
            latent=config.share,
            metric=config.metric,
            views=config.start_views,
            token_size=config.token_size,
            queries=self.pool.images[:512] if config.metric == "activation" else None,
            seed=config.seed,
        )
        logger.info("%s start: %d latent numbers for %d parameters", config.start, codec.latent_size, self.architecture.num_weights)
        return Autoencoder(self.layout, start=config.start, codec=codec, **sizes)

    def _window(self) -> int:
        """Tokens that attend to each other; attention takes time by the square of that."""
        tokens, window = self.layout.num_tokens, self.config.window
        if window == 0 and tokens > _ALL:
            window = _WINDOW
            if self.world.writes:
                logger.info("window: %d tokens attend in windows of %d (--window %d: all at once, slower)", tokens, window, tokens)
        return window

    def next_rows(self) -> Tensor:
        """Zoo rows of the next batch, of all processes: every model once an epoch, the incomplete last batch dropped."""
        if self.position + self.batch > len(self.permutation):
            self.permutation, self.position = self.models.shuffle(self.order), 0
        rows = self.permutation[self.position : self.position + self.batch]
        self.position += self.batch
        return rows

    def losses(self, rows: Tensor, queries: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on zoo rows ``[b]`` (of which this process takes its share) and pool images ``[n]``, and its parts (on the
        device). The gradient averaged over processes is that of all rows; so are the parts, but for ``skipped_models``, a sum."""
        config, world, beta = self.config, self.world, self.config.beta_at(self.step_index)
        mine = world.share(len(rows))
        originals = self.models.rows(rows[mine])
        with region("views"):
            views = [originals] * (2 if self.two_views else 1)
            if config.views:  # drawn for all rows, so that a run does not depend on how many processes share them
                views = [self._view(v, len(rows), mine) for v in views]
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
            if config.gather_negatives:
                contrastive = world.summed(losses.nt_xent(world.gather(a), world.gather(b), config.contrast_temperature))
            else:
                contrastive = losses.nt_xent(a, b, config.contrast_temperature)
        if beta > 0 and config.uses_structure:
            if self.responses is not None:
                structural = self.responses.loss(reconstructed, tokens)
            else:
                structural = losses.structural_loss(reconstructed, tokens, mask, self.layer_units)
        if beta < 1 and config.uses_behavior:
            with region("detokenise"):
                weights = self.layout.detokenize(reconstructed)
            if config.views and config.permutations == "random":
                targets = self._outputs(torch.cat(views), queries)
            else:  # every view of a model is the same function: one row of targets serves them all
                targets = torch.cat([self._targets(rows[mine], originals, queries)] * len(views))
            with behavior_precision(config, self.device):
                if config.behavior_of == "deviations":
                    targets = self._moved(weights, targets, queries)
                with cuda_graph.recording(self.recorder):
                    values = batched_behavioral_loss(
                        weights,
                        None,
                        self.pool[queries],
                        self.architecture,
                        targets=targets,
                        criterion=config.criterion,
                        temperature=config.distillation_temperature,
                        reduction="none",
                        nan_policy="omit",
                    )
            # the mean over the models kept, without asking the device how many those are
            kept = values.isfinite()
            of_all = world.total(kept.sum()).clamp_min(1) / world.size
            behavioral = torch.where(kept, values, torch.zeros_like(values)).sum() / of_all
            counts["skipped_models"] = (~kept).sum()
        total, parts = losses.compose(contrastive, structural, behavioral, self.normalizers, config.gamma, beta)
        return total, {**parts, **counts}

    def _targets(self, rows: Tensor, originals: Tensor, queries: Tensor) -> Tensor:
        """Outputs ``[b, n, K]`` of zoo rows: looked up where they are cached."""
        if self.cache is not None:
            return self.cache.targets(sent(rows, self.device), queries)
        return self._outputs(originals, queries)

    def _outputs(self, weights: Tensor, queries: Tensor) -> Tensor:
        with torch.no_grad(), region("targets"):
            return batched_forward(weights, self.pool[queries], self.architecture).float()

    def _moved(self, weights: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Targets plus the batch's mean error, so that a model's error is its deviation from the mean one. That the mean is held costs no
        gradient: deviations from it add up to zero."""
        error = self._outputs(weights, queries) - targets
        finite = error.isfinite().flatten(1).all(1)
        total = self.world.total(error.masked_fill(~finite.view(-1, *[1] * (error.ndim - 1)), 0).sum(0))
        return targets + total / self.world.total(finite.sum()).clamp_min(1)

    def _view(self, originals: Tensor, batch: int, mine: slice) -> Tensor:
        """One view of each of this process' models, out of permutations drawn for the whole batch."""
        draw = random_permutations(self.architecture, batch, self.views, self.device)
        inputs = random_permutations(self.architecture, batch, self.views, self.device) if self.config.permutations == "random" else draw
        return permute(originals, self.architecture, tuple(p[mine] for p in draw), tuple(p[mine] for p in inputs))

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the loss parts as device tensors (reading one synchronises)."""
        rows, queries = self.next_rows(), self.pool.draw(self.queries, self.draws)
        if self.world.size > 1 and self.config.dropout > 0:  # one stream a process and step: a resumed run draws the same
            seed_generators(((self.config.seed * 1_000_003 + self.step_index) * 65_537 + self.world.rank) % (1 << 63), self.device)
        total, parts = self.objective(rows, queries)
        descend(total, parts, self.model, self.optimizer, self.schedule, self.config.clip)
        self.step_index += 1
        return parts

    def release(self) -> None:
        """Let go of the process group: one that outlives the interpreter's shutdown aborts the process now and then. And of the memory that
        recorded calls hold."""
        self.objective, self.recorder = self.model, None

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
            "sampler": {
                "permutation": self.permutation,
                "position": self.position,
                "models": self.models.fingerprint(),
                "queries": self.pool.fingerprint(),
            },
            "kernels": [[*key, verdicts.to_dict(decision)] for key, decision in self.kernels.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`. Raises WslfastError if the checkpoint's config would take another path."""
        check_resumed(self.config, state)
        same = self.architecture.graph is None or Architecture.from_dict(state["architecture"]).same_network(self.architecture)
        require(same, "cannot resume: the zoo has another architecture than the checkpoint")
        require(
            len(state["sampler"]["permutation"]) == len(self.models),
            f"cannot resume: the zoo has {len(self.models)} training rows, the checkpoint saw {len(state['sampler']['permutation'])}",
        )
        self.model.load_state_dict(state["model"])
        self.step_index = int(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.normalizers = losses.Normalizers.from_dict(state["normalizers"])
        torch.set_rng_state(state["rng"]["torch"].cpu())
        self.restore_draws(state["rng"], state["sampler"])

    def restore_draws(self, rng: Mapping[str, Tensor], sampler: Mapping[str, Any]) -> None:
        """The states of the generators, and the place in the epoch. Raises WslfastError where models or images are others."""
        known = sampler.get("models")  # checkpoints of earlier versions have none
        others = "cannot resume: the zoo has other training models than the checkpoint saw; start a new run (another --out)"
        require(known is None or known == self.models.fingerprint(), others)
        seen, here = sampler.get("queries"), self.pool.fingerprint()
        same = seen is None or (seen.shape == here.shape and torch.allclose(seen.cpu(), here, 1e-3, 1e-4, equal_nan=True))
        require(
            same, "cannot resume: the query images are others than the checkpoint saw; hand in the same, or start a new run (another out)"
        )
        for name, generator in (("order", self.order), ("views", self.views), ("draws", self.draws)):
            generator.set_state(rng[name].cpu())
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)
        self.permutation, self.position = sampler["permutation"].cpu(), int(sampler["position"])


def check_resumed(config: TrainConfig, state: Mapping[str, Any]) -> None:
    """Raise WslfastError if a checkpoint's config would take another path than this one."""
    saved = TrainConfig.from_dict(state["config"])
    paced = config.schedule == "onecycle" or config.scheduled  # what happens at a step depends on how many there are
    fixed = _FREE - ({"steps"} if paced else set())
    changed = [n for n, v in config.to_dict().items() if n not in fixed and getattr(saved, n) != v]
    pairs = [f"{n} = {getattr(config, n)!r} (was {getattr(saved, n)!r})" for n in changed]
    require(not changed, f"cannot resume with another config: {', '.join(pairs)}")


class _Objective(nn.Module):
    """:meth:`Trainer.losses` as a module's forward, holding the autoencoder."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.model = trainer.model
        self._losses = trainer.losses

    def forward(self, rows: Tensor, queries: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._losses(rows, queries)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators that a run on the device draws from: the CPU's and, on a GPU, that one's. (``torch.manual_seed`` seeds those
    of all GPUs, on which the caller may be drawing.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def behavior_precision(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The setting in which the behavioral loss is computed."""
    if config.behavior_precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return matmul_precision_of(config.behavior_precision) if device.type == "cuda" else contextlib.nullcontext()
