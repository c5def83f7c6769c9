"""A small package with the published signatures, written for these tests: what the patched route finds in place of the real one.

Its classes do what the published ones do that matters to patching: they name themselves (``super(AE, self)``, static methods by
class name), import by name, and build each other. Values are its own, so that a test can tell who answered.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

PAPER = {
    "models/def_loss.py": """
        import torch
        from torch import nn
        from {package}.datasets.dataset_auxiliaries import tokens_to_checkpoint, tokens_to_recipe


        class MaskedReconLoss(nn.Module):
            def __init__(self, reduction):
                super(MaskedReconLoss, self).__init__()
                self.scale = None

            def forward(self, output, target, mask, _):
                loss = ((mask * output - target) ** 2).mean()
                self.scale = self.scale or loss.item()
                return {{"loss_recon": loss / self.scale, "loss_structure": loss, "loss_behaviour": torch.tensor(0.0), "rsq": torch.tensor(0.0)}}


        class DistillationLoss(nn.Module):
            def __init__(self, reference_checkpoint, reference_params, queryset="random", dump=None, n_queries=64, loss='l2', reduction="mean", temperature=2.0):
                super(DistillationLoss, self).__init__()
                self.kind = reference_params["model::type"]
                self.criterion = lambda x: DistillationLoss.__size(x)

            def forward(self, output, target, _, pos):
                loss = DistillationLoss.elementwise(output) + self.criterion(target)
                return {{"loss_recon": loss, "loss_structure": loss, "loss_behaviour": loss}}

            @staticmethod
            def elementwise(x):
                return x.sum()

            @staticmethod
            def __size(x):
                return x.numel()


        class ReconDistillationLoss(nn.Module):
            def __init__(self, reference_checkpoint, reference_params, beta=0.1, reduction='mean', queryset="random", dump=None, n_queries=64, loss='l2', temperature=2.0):
                super().__init__()
                self.recon_loss = MaskedReconLoss(reduction)
                self.distillation_loss = DistillationLoss(reference_checkpoint, reference_params)

            def forward(self, output, target, mask, pos):
                return self.distillation_loss(output, target, mask, pos)


        class NT_Xent(nn.Module):
            def __init__(self, batch_size, temperature):
                super(NT_Xent, self).__init__()

            def forward(self, z_i, z_j):
                return z_i.sum()


        class NT_Xent_pos(nn.Module):
            def __init__(self, batch_size, temperature):
                super(NT_Xent_pos, self).__init__()

            def forward(self, z_i, z_j):
                return z_i.sum()


        class GammaContrastReconLoss(nn.Module):
            def __init__(self, gamma: float, reduction: str, batch_size: int, temperature: float, contrast="simclr", z_var_penalty: float = 0.0,
                         z_norm_penalty: float = 0.0, beta: float = 0.1, loss_distillation: str = "l2", temperature_distillation: float = 2.0,
                         queryset_distillation: str = "random", queryset_dump: str = None, n_queries_distillation: int = 64,
                         reference_checkpoint=None, reference_params=None, lambda_: float = 0.0) -> None:
                super(GammaContrastReconLoss, self).__init__()
                self.lambda_ = lambda_
                self.loss_contrast = NT_Xent(batch_size, temperature)
                self.loss_recon = ReconDistillationLoss(reference_checkpoint, reference_params, beta)

            def forward(self, z_i, z_j, y, t, m, p, z, z_hat):
                return {{"loss/loss": self.loss_recon(y, t, m, p)["loss_recon"]}}
    """,
    "models/def_AE.py": """
        from torch import nn


        class AE(nn.Module):
            def __init__(self, config):
                super(AE, self).__init__()
                self.config = config

            def forward(self, x, p, mask=None):
                return x, x, x

            def forward_encoder(self, x, p, mask=None):
                return x

            def forward_decoder(self, z, p, mask=None):
                return z

            def forward_embeddings(self, x, p):
                return x
    """,
    "models/def_AE_module.py": """
        import torch
        from torch import nn
        from .def_AE import AE
        from .def_loss import GammaContrastReconLoss


        class AEModule(nn.Module):
            def __init__(self, config, reference_checkpoint=None, reference_params=None):
                super(AEModule, self).__init__()
                self.model = AE(config)
                self.criterion = GammaContrastReconLoss(
                    config.get("training::gamma", 0.5), "mean", config["trainset::batchsize"], 0.1, beta=config.get("training::beta", 0.1),
                    reference_checkpoint=reference_checkpoint, reference_params=reference_params, n_queries_distillation=5)
                self.optimizer = torch.optim.AdamW(self.parameters(), 1e-3) if list(self.parameters()) else None
                self.scheduler = self.clip_grads = None

            def forward(self, x, p):
                return self.model(x, p)

            def forward_encoder(self, x, p, mask=None):
                return self.model.forward_encoder(x, p, mask)

            def train_step(self, x_i, m_i, p_i, x_j, m_j, p_j):
                return {{"loss/loss": torch.tensor(-1.0)}}

            def test_step(self, x_i, m_i, p_i, x_j, m_j, p_j):
                return {{"loss/loss": torch.tensor(-1.0)}}

            def save_model(self, experiment_dir):
                return "theirs"

            def load_model(self, experiment_dir):
                return "theirs"
    """,
    "datasets/dataset_auxiliaries.py": """
        def tokenize_checkpoint(checkpoint, tokensize: int, return_mask: bool = True, ignore_bn=False):
            return "theirs"


        def tokens_to_recipe(pos, reference_checkpoint, ignore_bn=False):
            return "theirs"


        def tokens_to_checkpoint(tokens, pos, reference_checkpoint, ignore_bn=False, recipe=None):
            return "theirs"
    """,
    "git_re_basin/git_re_basin.py": """
        def apply_permutation(ps, perm, params):
            return "theirs"
    """,
}
SANE = {
    "models/def_loss.py": """
        from torch import nn


        class MaskedReconLoss(nn.Module):
            def __init__(self, reduction):
                super(MaskedReconLoss, self).__init__()

            def forward(self, output, target, mask):
                return "theirs"


        class NT_Xent(nn.Module):
            def __init__(self, batch_size, temperature):
                super(NT_Xent, self).__init__()

            def forward(self, z_i, z_j):
                return "theirs"


        class NT_Xent_pos(NT_Xent):
            pass


        class GammaContrastReconLoss(nn.Module):
            def __init__(self, gamma: float, reduction: str, batch_size: int, temperature: float, contrast="simclr", z_var_penalty: float = 0.0, z_norm_penalty: float = 0.0) -> None:
                super(GammaContrastReconLoss, self).__init__()

            def forward(self, z_i, z_j, y, t, m):
                return "theirs"
    """,
    "models/def_AE.py": PAPER["models/def_AE.py"],
    "datasets/dataset_auxiliaries.py": """
        def tokenize_checkpoint(checkpoint, tokensize: int, return_mask: bool = True, ignore_bn=False):
            return "theirs"


        def tokens_to_checkpoint(tokens, pos, reference_checkpoint, ignore_bn=False):
            return "theirs"
    """,
}


def write(folder: Path, package: str, files: dict[str, str], **changes: tuple[str, str]) -> None:
    """Lay the package out under ``folder``; ``changes`` replaces one text by another wherever it stands (signature drift)."""
    for path, text in files.items():
        target = folder / package / path
        for parent in (folder / package, target.parent):
            parent.mkdir(parents=True, exist_ok=True)
            (parent / "__init__.py").touch()
        text = textwrap.dedent(text).format(package=package)
        for old, new in changes.values():
            text = text.replace(old, new)
        target.write_text(text)


def forget(*packages: str) -> None:
    """Drop the packages, and a script that used them, from the loaded modules."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (*packages, "a_users_script"):
            del sys.modules[name]
