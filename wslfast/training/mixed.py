"""Training on a zoo of several architectures: one autoencoder over all of them.

Every step takes a batch of one architecture. Architectures take turns, in proportion to their numbers of models. All share one token
size, one latent width and the same transformers. Each has its own positions and mask, linear maps of its layers (if the start has them),
contrastive head, targets, and normalisers of the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..architecture import Architecture
from ..codes.autoencoder import Autoencoder
from ..engine.ranks import ALONE
from ..errors import require
from ..tokens import TokenLayout
from ..zoo import MappedZoo
from .config import TrainConfig
from .descent import cycle, descend, optimizer_of, settled
from .trainer import Trainer, check_resumed

_SHARED = ("tokenizer", "transformer_encoder", "encoder_comp", "detokenizer", "transformer_decoder", "decoder_comp", "pe")


def share(parts: Sequence[Autoencoder]) -> None:
    """Make the transformers, embeddings and token maps of all autoencoders those of the first."""
    for name in _SHARED:
        for part in parts[1:]:
            setattr(part, name, getattr(parts[0], name))


def widened(model: Autoencoder, latent: int, positions: Sequence[int]) -> Autoencoder:
    """The same autoencoder with latents of that width, whose new numbers are masked or unused, and position tables of these sizes."""
    made = Autoencoder.from_config(model.layout, {**model.config(), "latent": latent, "max_positions": list(positions)})
    if model.coordinates is not None and made.coordinates is not None:
        made.coordinates.load_state_dict(model.coordinates.state_dict())
    if model.linear is None or made.linear is None:
        return made
    width = model.latent_mask.shape[1]
    with torch.no_grad():
        made.latent_mask.zero_()[:, :width] = model.latent_mask
        for name, value in model.linear.state_dict().items():
            own = made.linear.state_dict()[name].zero_()
            own[tuple(slice(size) for size in value.shape)] = value
    return made


class MixedTrainer:
    """The trainer for several architectures, in one process; :class:`~.trainer.Trainer` is the one for a single architecture.

    Args:
        config: what to do.
        models: training models by label of the table of architectures.
        images: query images ``[N, *input_shape]`` by label.
        saved: the checkpoint that :meth:`restore` will be given.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: Mapping[str, MappedZoo],
        images: Mapping[str, Tensor],
        saved: Mapping[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.config, self.device, self.world = settled(config, device, saved), device, ALONE
        size = config.token_size or max(TokenLayout(part.architecture).token_size for part in models.values())
        own = replace(config, token_size=size)
        sizes = {} if saved is None else saved["autoencoder"]
        self.parts = {n: Trainer(own, part, images[n], sizes.get(n), ALONE, device) for n, part in models.items()}
        if saved is None:
            built = [part.model for part in self.parts.values()]
            latent = max(model.config()["latent"] for model in built)
            positions = [max(model.config()["max_positions"][i] for model in built) for i in range(3)]
            for part in self.parts.values():
                part.model = widened(part.model, latent, positions).to(device, torch.float32)
        share([part.model for part in self.parts.values()])
        self.model = nn.ModuleList(part.model for part in self.parts.values())
        self.batch = max(part.batch for part in self.parts.values())
        self.optimizer = optimizer_of(self.model, config, device)
        self.step_index = 0
        self.taken = dict.fromkeys(self.parts, 0)
        self.schedule = cycle(config, self.optimizer)

    def _turn(self) -> str:
        """The architecture that is furthest behind its share of the steps."""
        count = sum(len(part.models) for part in self.parts.values())
        behind = {n: (self.step_index + 1) * len(p.models) / count - self.taken[n] for n, p in self.parts.items()}
        return max(behind, key=lambda name: behind[name])

    def step(self) -> dict[str, Tensor]:
        """One optimiser step on models of one architecture; returns the loss parts as device tensors."""
        name = self._turn()
        part = self.parts[name]
        part.step_index = self.step_index
        rows, queries = part.next_rows(), part.pool.draw(part.queries, part.draws)
        total, parts = part.losses(rows, queries)
        descend(total, parts, self.model, self.optimizer, self.schedule, self.config.clip)
        self.step_index += 1
        self.taken[name] += 1
        return parts

    def release(self) -> None:
        """Let go of what recorded calls hold, see :meth:`Trainer.release`."""
        for part in self.parts.values():
            part.release()

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. Entries of a part are under its label, its weights under its number."""
        own = {name: part.state() for name, part in self.parts.items()}
        first = next(iter(own.values()))
        model = {f"{i}.{key}": value for i, part in enumerate(own.values()) for key, value in part["model"].items()}
        return {
            "step": self.step_index,
            "config": self.config.to_dict(),
            "architecture": {"architectures": {name: part["architecture"] for name, part in own.items()}},
            "model": model,
            "autoencoder": {name: part["autoencoder"] for name, part in own.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "normalizers": {name: part["normalizers"] for name, part in own.items()},
            "rng": {"torch": first["rng"]["torch"], **{name: part["rng"] for name, part in own.items()}},
            "sampler": {"taken": self.taken, **{name: part["sampler"] for name, part in own.items()}},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`. Raises WslfastError if the checkpoint's config, or zoo, is another one."""
        check_resumed(self.config, state)
        recorded = state["architecture"].get("architectures", {})
        require(list(recorded) == list(self.parts), f"cannot resume: the zoo has architectures {list(self.parts)}, not {list(recorded)}")
        for i, (name, part) in enumerate(self.parts.items()):
            same = Architecture.from_dict(recorded[name]).same_network(part.architecture)
            require(same, f"cannot resume: architecture {name!r} of the zoo is another one than the checkpoint's")
            rows, seen = len(part.models), len(state["sampler"][name]["permutation"])
            require(rows == seen, f"cannot resume: the zoo has {rows} training rows of {name!r}, the checkpoint saw {seen}")
            part.model.load_state_dict(part_state(state["model"], i))
            part.normalizers = losses.Normalizers.from_dict(state["normalizers"][name])
            part.restore_draws(state["rng"][name], state["sampler"][name])
        torch.set_rng_state(state["rng"]["torch"].cpu())
        self.step_index, self.taken = int(state["step"]), dict(state["sampler"]["taken"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])


def part_state(model: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The weights of one part, by its number, out of the ``model`` of :meth:`MixedTrainer.state`."""
    head = f"{number}."
    return {key.removeprefix(head): value for key, value in model.items() if key.startswith(head)}
