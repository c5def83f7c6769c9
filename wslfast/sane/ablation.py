"""The published training as a system of an ablation: published attention, views, losses and optimiser on a zoo of wslfast's.

The core has no branch for any of it. With ``semantics="corrected"`` the same network takes the same steps with every departure of
docs/published.md put right, so the two differ in those alone.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import require
from ..files import write_tensors
from ..population import unstack
from ..study.ablations import Cell, System, Trained
from ..tokens import TokenLayout
from ..training import TrainConfig
from ..training.query_sets import query_images
from .loss_scale import ScaledLoss
from .module import AEModule
from .permutations import PermutationSpec, permutation_spec_of, permute_model_vector, precompute_permutations
from .semantics import resolve

VIEWS = 20  # permutations drawn once, before training, as published
_LOSSES = {"mse": "l2", "softmax_mse": "l2", "cross_entropy": "cross_entropy", "distillation": "distillation"}
_EVALUATED = 16  # models at a time, as published: where attention runs over the batch, results depend on it


def systems() -> dict[str, System]:
    """What ``semantics = "published"`` and ``"corrected"`` of an ablation ask for."""
    return {name: partial(train_published, semantics=name) for name in ("published", "corrected")}


def train_published(cell: Cell, semantics: str = "published") -> Trained:
    """Train the published module on a cell's models, with its own network, views, losses and optimiser.

    A criterion of ``mse`` or ``softmax_mse`` is the published ``l2``: of probabilities, or, corrected, of outputs. Published rounding to
    float16 is autocast's, which a CPU has not. ``query_pool`` does not apply: queries are drawn from all images.

    Raises:
        WslfastError: a criterion that the published code has not, a linear start, views that are not equivalent, or a network that
            is not a chain of layers.
    """
    config, chosen = cell.config, resolve(semantics, {})
    architecture = cell.zoo.architecture
    require(
        config.criterion in _LOSSES, f"criterion: expected one of {tuple(_LOSSES)} for semantics {semantics!r}, got {config.criterion!r}"
    )
    require(config.start == "random", f"start: expected random for semantics {semantics!r}, got {config.start!r}")
    equivalent = config.views and config.permutations == "equivalent"
    plain = config.structure_metric == config.coordinates == "plain"
    require(plain, f"structure_metric, coordinates: expected plain for semantics {semantics!r}, whose structural loss is of weights")
    require(equivalent, f"views: expected equivalent ones for semantics {semantics!r}, got views={config.views}, {config.permutations}")
    place = TokenLayout(architecture, config.token_size)
    with torch.random.fork_rng(devices=[]):
        images = query_images(config.query_set, config.zoo, cell.zoo, n=config.query_pool, seed=config.seed)
        module = AEModule(_keys(config, place, images), architecture=architecture, semantics=chosen)  # seeds torch
        template = {name: value[0] for name, value in unstack(cell.zoo.weights[:1].cpu(), architecture).items()}
        maps, _ = precompute_permutations(template, VIEWS, _spec(architecture), place.token_size, False, semantics=chosen)
        steps = _Sitting(module, cell, place, [torch.arange(place.num_tokens * place.token_size).view(maps[0].shape), *maps]).run()
    module.eval()
    return Trained(partial(_rebuild, module, place), partial(_embed, module, place), place.num_tokens * config.latent, steps)


def _keys(config: TrainConfig, place: TokenLayout, images: Tensor) -> dict[str, Any]:
    """A run's settings under their published names."""
    return {
        "seed": config.seed,
        "device": config.device,
        "ae:i_dim": place.token_size,
        "ae:d_model": config.d_model,
        "ae:nhead": config.heads,
        "ae:num_layers": config.layers,
        "ae:lat_dim": config.latent,
        "ae:dropout": config.dropout,
        "ae:max_positions": (place.positions.long().amax(0) + 1).tolist(),
        "ae:transformer_type": "pytorch",
        "training::windowsize": place.num_tokens,
        "training::gamma": config.gamma,
        "training::beta": config.beta,
        "training::temperature": config.contrast_temperature,
        "training::loss_distillation": _LOSSES[config.criterion],
        "training::temperature_distillation": config.distillation_temperature,
        "training::queryset_distillation": "data",
        "training::queryset_dump": images,
        "training::n_queries_distillation": min(config.queries, len(images)),
        "trainset::batchsize": config.batch_size,
        "optim::optimizer": "adamw",
        "optim::lr": config.lr,
        "optim::wd": config.weight_decay,
        "optim::scheduler": None if config.schedule == "constant" else "OneCycleLR",
        "training::epochs_train": config.steps,
        "training::steps_per_epoch": 1,
        "training::gradient_clipping": None if config.clip is None else "norm",
        "training::gradient_clipp_value": config.clip,
    }


def _spec(architecture: Architecture) -> PermutationSpec:
    """The permutations of a chain of layers, each hidden layer's channels free."""
    require(architecture.planned, f"architecture {architecture.name!r}: expected a plain chain of layers")
    return permutation_spec_of(architecture)


class _Sitting:
    """The loop: epochs over shuffled models, the incomplete last batch dropped, two of 21 stored views a step."""

    def __init__(self, module: AEModule, cell: Cell, place: TokenLayout, maps: list[Tensor]) -> None:
        self.module, self.config, self.stop = module, cell.config, cell.stop
        self.tokens = place.tokenize(cell.zoo.weights).tokens
        self.mask, self.positions = place.mask.to(self.tokens.device), place.positions.to(self.tokens.device)
        self.maps = torch.stack([m.to(self.tokens.device) for m in maps])
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.batch = min(self.config.batch_size, len(self.tokens))
        self.order, self.at, self.step = torch.randperm(len(self.tokens), generator=self.generator), 0, 0
        self.path = Path(self.config.out) / "checkpoint" / "published.pt"

    def run(self) -> int:
        """Steps taken in all sittings."""
        spent = self.path.exists() and self._restore()
        self.module.model.train()
        while not spent and self.step < self.config.steps:
            self.module.train_step(*self._views())
            self.step += 1
            spent = self.stop(self.step)
            if spent or self.step == self.config.steps or self.step % self.config.checkpoint_every == 0:
                self._save()
        return self.step

    def _views(self) -> list[Tensor]:
        if self.at + self.batch > len(self.order):
            self.order, self.at = torch.randperm(len(self.tokens), generator=self.generator), 0
        rows = self.order[self.at : self.at + self.batch]
        self.at += self.batch
        # a model's 20 permuted views lie in an order of its own behind the canonical one; the whole batch takes two places
        stored = 1 + torch.rand(self.batch, VIEWS, generator=self.generator).argsort(1)
        stored = torch.cat([torch.zeros(self.batch, 1, dtype=torch.long), stored], 1)
        originals, shape = self.tokens[rows.to(self.tokens.device)], (self.batch, -1, -1)
        parts: list[Tensor] = []
        for column in torch.randperm(VIEWS + 1, generator=self.generator)[:2].tolist():
            view = [permute_model_vector(t, 0, len(t), self.maps[int(i)]) for t, i in zip(originals, stored[:, column])]
            parts += [torch.stack(view), self.mask.expand(shape), self.positions.expand(shape)]
        return parts

    def _units(self) -> list[ScaledLoss]:
        return [part for part in self.module.criterion.modules() if isinstance(part, ScaledLoss)]

    def _save(self) -> None:
        scheduler = self.module.scheduler
        state = {
            "step": self.step,
            "at": self.at,
            "order": self.order,
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "scales": [unit.scale for unit in self._units()],
            "model": self.module.model.state_dict(),
            "optimizer": self.module.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
        write_tensors(self.path, state)

    def _restore(self) -> bool:
        """Go on from the checkpoint; whether nothing is left to do."""
        state = torch.load(self.path, weights_only=True)
        self.module.model.load_state_dict(state["model"])
        self.module.optimizer.load_state_dict(state["optimizer"])
        if self.module.scheduler is not None:
            self.module.scheduler.load_state_dict(state["scheduler"])
        self.step, self.at, self.order = state["step"], state["at"], state["order"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        for unit, scale in zip(self._units(), state["scales"], strict=True):
            unit.scale = scale
        return not self.stop.resume(self.step) or self.step >= self.config.steps


@torch.no_grad()
def _rebuild(module: AEModule, place: TokenLayout, weights: Tensor) -> Tensor:
    rows = []
    for part in weights.split(_EVALUATED):
        tokens, _, positions = place.tokenize(part)
        positions = positions.expand(len(part), -1, -1)
        rows.append(place.detokenize(module.forward_decoder(module.forward_encoder(tokens, positions), positions).float()))
    return torch.cat(rows)


@torch.no_grad()
def _embed(module: AEModule, place: TokenLayout, weights: Tensor) -> Tensor:
    parts = [(place.tokenize(part).tokens, len(part)) for part in weights.split(_EVALUATED)]
    return torch.cat([module.forward_embeddings(t, place.positions.to(t.device).expand(n, -1, -1)) for t, n in parts])
