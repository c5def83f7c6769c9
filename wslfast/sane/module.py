"""The published training module: autoencoder, objective, optimiser, and one step of training or testing.

:func:`train_step` and :func:`test_step` are also what the patched route puts into the published class: they compute the same,
and leave out the two encodings of the reconstruction that only a cycle term would read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture import Architecture
from ..errors import require
from .autoencoder import AE
from .losses import GammaContrastReconLoss
from .semantics import Choice, Semantics, resolve
from .state import load_model, save_model

Parts = dict[str, Tensor]
OPTIMISERS = ("adamw", "adam", "sgd")


def train_step(self: Any, x_i: Tensor, m_i: Tensor, p_i: Tensor, x_j: Tensor, m_j: Tensor, p_j: Tensor) -> Parts:
    """One optimiser step on two views: tokens and mask ``[k, T, D]``, positions ``[k, T, 3]``; returns the criterion's parts."""
    self.optimizer.zero_grad(set_to_none=True)
    parts = _objective(self, x_i, m_i, p_i, x_j, m_j, p_j)
    loss = parts["loss/loss"]
    scaler = getattr(self, "scaler", None)
    (loss if scaler is None else scaler.scale(loss)).backward()
    if self.clip_grads is not None:
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        self.clip_grads()
    if scaler is None:
        self.optimizer.step()
    else:
        scaler.step(self.optimizer)
        scaler.update()
    if self.scheduler is not None:
        self.scheduler.step()
    return parts


@torch.no_grad()
def test_step(self: Any, x_i: Tensor, m_i: Tensor, p_i: Tensor, x_j: Tensor, m_j: Tensor, p_j: Tensor) -> Parts:
    """The criterion's parts on two views, without a step."""
    return _objective(self, x_i, m_i, p_i, x_j, m_j, p_j)


test_step.__test__ = False  # type: ignore[attr-defined]  # pytest takes its name for a test


def _objective(self: Any, x_i: Tensor, m_i: Tensor, p_i: Tensor, x_j: Tensor, m_j: Tensor, p_j: Tensor) -> Parts:
    criterion = getattr(self.criterion, "module", self.criterion)  # DistributedDataParallel keeps it one level down
    cycle = getattr(criterion, "lambda_", 1.0) > 0
    with torch.autocast("cuda", dtype=torch.float16, enabled=x_i.is_cuda):
        z_i, y_i, zp_i = self.forward(x_i, p_i)
        h_i = self.forward_encoder(y_i, p_i) if cycle else z_i
        z_j, y_j, zp_j = self.forward(x_j, p_j)
        h_j = self.forward_encoder(y_j, p_j) if cycle else z_j
        both = [torch.cat(pair) for pair in ((y_i, y_j), (x_i, x_j), (m_i, m_j), (p_i, p_j))]
        if not getattr(criterion, "_paper", True):  # the package SANE's, which sees neither positions nor latents
            return self.criterion(z_i=zp_i, z_j=zp_j, **dict(zip("ytm", both)))
        z = torch.cat([z_i, z_j]) if cycle else None
        z_hat = torch.cat([h_i, h_j]) if cycle else None
        return self.criterion(z_i=zp_i, z_j=zp_j, **dict(zip("ytmp", both)), z=z, z_hat=z_hat)


def _as_it_comes(*batch: Any) -> Any:
    return batch if len(batch) != 1 else batch[0]


def contrast_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What both packages' objectives take from a config."""
    return {
        "gamma": config.get("training::gamma", 0.5),
        "reduction": config.get("training::reduction", "mean"),
        "batch_size": config.get("trainset::batchsize", 64),
        "temperature": config.get("training::temperature", 0.1),
        "contrast": config.get("training::contrast", "simclr"),
        "z_var_penalty": config.get("training::z_var_penalty", 0.0),
    }


class AEModule(nn.Module):
    """The published ``AEModule`` from its config keys.

    Args:
        config: keys of :class:`~wslfast.sane.autoencoder.AE`, and ``seed`` (42), ``device`` ("cpu"), ``model::compile``,
            ``training::{gamma, reduction, temperature, contrast, z_var_penalty, beta, loss_distillation,
            temperature_distillation, queryset_distillation, queryset_dump, n_queries_distillation, lambda}``,
            ``training::precision`` ("full" or "amp"), ``training::gradient_clipping`` (None, "norm", "value"),
            ``training::gradient_clipp_value`` (5), ``trainset::batchsize``, ``optim::{optimizer, lr, wd, momentum, scheduler}``.
        reference_checkpoint, reference_params: what network the zoo is; needed for ``training::beta`` < 1.
        architecture, semantics, flags: see :class:`~wslfast.sane.behavior.DistillationLoss`.

    Attributes:
        model, criterion, optimizer, scheduler, device, reset_optimizer. Only the autoencoder has parameters.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        reference_checkpoint: Any = None,
        reference_params: Any = None,
        *,
        architecture: Architecture | None = None,
        semantics: Choice = "published",
        **flags: bool,
    ) -> None:
        super().__init__()
        chosen = resolve(semantics, flags)
        self.config = config
        require(not config.get("distributed", False), "distributed: expected False (one process), got a distributed run")
        torch.manual_seed(config.get("seed", 42))
        self.device = torch.device(config.get("device", "cpu"))
        model: Any = AE(config, semantics=chosen)
        if config.get("model::compile", False):
            model = torch.compile(model)
        self.model: Any = model
        self.criterion: nn.Module = self._criterion(config, reference_checkpoint, reference_params, architecture, chosen)
        self.to(self.device)
        self.model.eval()
        self.reset_optimizer = False
        self.set_optimizer(config)
        if config.get("training::precision", "full") == "amp":
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")
        self.set_clipping(config)
        self.set_scheduler(config)
        self.set_transforms()

    def _criterion(
        self,
        config: Mapping[str, Any],
        reference_checkpoint: Any,
        reference_params: Any,
        architecture: Architecture | None,
        chosen: Semantics,
    ) -> nn.Module:
        named = reference_checkpoint is not None or reference_params is not None or architecture is not None
        require(
            named or config.get("training::beta", 0.1) >= 1,
            "reference_params: expected the zoo's params, for the behavior loss; training::beta = 1 goes without, and scripts of the "
            "package SANE take wslfast.sane.package_sane.AEModule",
        )
        return GammaContrastReconLoss(
            **contrast_settings(config),
            beta=config.get("training::beta", 0.1),
            loss_distillation=config.get("training::loss_distillation", "l2"),
            temperature_distillation=config.get("training::temperature_distillation", 2.0),
            queryset_distillation=config.get("training::queryset_distillation", "random"),
            queryset_dump=config.get("training::queryset_dump"),
            n_queries_distillation=config.get("training::n_queries_distillation", 64),
            reference_checkpoint=reference_checkpoint,
            reference_params=reference_params,
            lambda_=config.get("training::lambda", 0.0),
            architecture=architecture,
            semantics=chosen,
        )

    # -- settings ------------------------------------------------------------------------------------------------------

    def set_optimizer(self, config: Mapping[str, Any]) -> None:
        """A new optimiser; AdamW decays parameters of two or more axes alone."""
        kind, lr, wd = config.get("optim::optimizer", "adamw"), config.get("optim::lr", 3e-4), config.get("optim::wd", 3e-5)
        require(kind in OPTIMISERS, f"optim::optimizer: expected one of {list(OPTIMISERS)}, got {kind!r}")
        parameters = [p for p in self.parameters() if p.requires_grad]
        if kind == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr, config.get("optim::momentum", 0.9), weight_decay=wd)
        elif kind == "adam":
            self.optimizer = torch.optim.Adam(parameters, lr, weight_decay=wd)
        else:
            decay = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": wd}
            self.optimizer = torch.optim.AdamW([decay, {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}], lr)

    def set_scheduler(self, config: Mapping[str, Any]) -> None:
        """No schedule, or ``"OneCycleLR"`` over epochs_train * steps_per_epoch * test_epochs steps."""
        kind = config.get("optim::scheduler")
        require(kind in (None, "OneCycleLR"), f"optim::scheduler: expected None or 'OneCycleLR', got {kind!r}")
        self.scheduler: Any = None
        if kind is not None:
            steps = config.get("training::epochs_train", 150) * config["training::steps_per_epoch"] * config.get("training::test_epochs", 1)
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, config["optim::lr"], total_steps=steps)

    def set_clipping(self, config: Mapping[str, Any]) -> None:
        """Clip gradients by norm, by value, or not; ``"none"`` and the like are no clipping, as in the published code."""
        kind = config.get("training::gradient_clipping")
        off = kind is None or (isinstance(kind, str) and kind.lower() in ("none", "off", ""))
        known = off or kind in ("norm", "value")
        require(known, f"training::gradient_clipping: expected None, 'none', 'norm' or 'value', got {kind!r}")
        self.clipping_value = config.get("training::gradient_clipp_value", 5)
        clip: Any = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}.get(str(kind))
        self.clip_grads: Any = None if clip is None else lambda: clip(self.parameters(), self.clipping_value)

    def set_transforms(self, transforms_train: Any = None, transforms_test: Any = None, transforms_downstream: Any = None) -> None:
        """What turns a batch of the loader into two views ``(x_i, m_i, p_i, x_j, m_j, p_j)``; None: the batch holds them."""
        # no module stands for "none": once a module holds one under a name, it takes no function there
        self.transforms_train = transforms_train if transforms_train is not None else _as_it_comes
        self.transforms_test = transforms_test if transforms_test is not None else _as_it_comes
        self.transforms_downstream = transforms_downstream if transforms_downstream is not None else _as_it_comes

    # -- the autoencoder -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and positions to latents, reconstruction and projection."""
        return self.model(x, p)

    def forward_encoder(self, x: Tensor, p: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[k, T, D] -> [k, T, latent]``."""
        return self.model.forward_encoder(x, p, mask)

    def forward_decoder(self, z: Tensor, p: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[k, T, latent] -> [k, T, D]``."""
        return self.model.forward_decoder(z, p, mask)

    def forward_embeddings(self, x: Tensor, p: Tensor) -> Tensor:
        """``[k, T, D] -> [k, latent]``; float16 tokens are widened."""
        return self.model.forward_embeddings(x.float() if x.dtype == torch.float16 else x, p)

    # -- steps and epochs ----------------------------------------------------------------------------------------------

    train_step = train_step
    test_step = test_step

    def train_epoch(self, trainloader: Any, epoch: int = 0, show_progress: bool = False) -> dict[str, float]:
        """A step on every batch of the loader; the means of the criterion's parts over models."""
        self.model.train()
        try:
            return self._epoch(trainloader, self.transforms_train, self.train_step)
        finally:
            self.model.eval()

    def test_epoch(self, testloader: Any, epoch: int = 0, show_progress: bool = False) -> dict[str, float]:
        """The means of the criterion's parts over models, without steps."""
        self.model.eval()
        return self._epoch(testloader, self.transforms_test, self.test_step)

    def _epoch(self, loader: Any, transforms: Any, step: Any) -> dict[str, float]:
        totals: Parts = {}
        count = 0
        for batch in loader:
            x_i, m_i, p_i, x_j, m_j, p_j = transforms(*(t.to(self.device) for t in batch))
            for name, value in step(x_i, m_i, p_i, x_j, m_j, p_j).items():
                # added up on the device: reading each number would wait for it
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().to(self.device, torch.float64) * len(x_i)
            count += len(x_i)
        require(count > 0, "loader: expected at least one batch, got none")
        return {name: float(total) / count for name, total in totals.items()}

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_model(self, experiment_dir: str | Path) -> None:
        """Write ``state.pt`` as the published code does: model, optimizer and, where there is one, scheduler."""
        save_model(self, experiment_dir)

    def load_model(self, experiment_dir: str | Path) -> None:
        """Read ``state.pt`` of the published code or of this class; nothing in it is run."""
        load_model(self, experiment_dir)
