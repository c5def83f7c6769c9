"""Drop-in for published weight-space code: the packages ``SANE``, ``shrp`` (arXiv 2503.17138) and ``mzsane``, fast, with their semantics.

``sane`` 2.x, the rewrite of 2026, has its own place: :mod:`wslfast.sane.v2`.

Two routes. Change an import (``from wslfast.sane import GammaContrastReconLoss``), or leave the script as it is::

    with wslfast.sane.patched():
        ...

Everything defaults to ``semantics="published"``; ``"corrected"`` is the core's, and single departures have flags
(:class:`Semantics`, docs/published.md).
"""

from __future__ import annotations

from .. import submodules_of
from .autoencoder import AE
from .behavior import DistillationLoss, ReconDistillationLoss
from .checkpoints import (
    printProgressBar,
    test_checkpoint_for_nan,
    test_checkpoint_with_threshold,
    tokenize_checkpoint,
    tokens_to_checkpoint,
    tokens_to_recipe,
)
from .losses import GammaContrastReconLoss, NT_Xent, NT_Xent_pos
from .module import AEModule
from .patching import Patch, patch, patched, replaced
from .permutations import (
    MiniAlexNet_permutation_spec,
    PermutationSpec,
    apply_permutation,
    get_permuted_param,
    mlp_permutation_spec,
    permutation_spec_from_axes_to_perm,
    permutation_spec_of,
    permute_model_vector,
    precompute_permutations,
    resnet18_permutation_spec,
    resnet34_permutation_spec,
    resnet50_permutation_spec,
    resnet101_permutation_spec,
    resnet152_permutation_spec,
    zoo_cnn_large_permutation_spec,
    zoo_cnn_permutation_spec,
    zoo_lenet_permutation_spec,
)
from .probe import DownstreamTaskLearner
from .rebasin import weight_matching
from .sampling import generate_z_samples, sample_latents, sample_models
from .semantics import Semantics
from .state import load_state
from .structure import MaskedReconLoss

__all__ = [
    "AE",
    "AEModule",
    "DistillationLoss",
    "DownstreamTaskLearner",
    "GammaContrastReconLoss",
    "MaskedReconLoss",
    "MiniAlexNet_permutation_spec",
    "NT_Xent",
    "NT_Xent_pos",
    "Patch",
    "PermutationSpec",
    "ReconDistillationLoss",
    "Semantics",
    "apply_permutation",
    "generate_z_samples",
    "get_permuted_param",
    "load_state",
    "mlp_permutation_spec",
    "patch",
    "patched",
    "permutation_spec_from_axes_to_perm",
    "permutation_spec_of",
    "permute_model_vector",
    "precompute_permutations",
    "printProgressBar",
    "replaced",
    "resnet18_permutation_spec",
    "resnet34_permutation_spec",
    "resnet50_permutation_spec",
    "resnet101_permutation_spec",
    "resnet152_permutation_spec",
    "sample_latents",
    "sample_models",
    "test_checkpoint_for_nan",
    "test_checkpoint_with_threshold",
    "tokenize_checkpoint",
    "tokens_to_checkpoint",
    "tokens_to_recipe",
    "weight_matching",
    "zoo_cnn_large_permutation_spec",
    "zoo_cnn_permutation_spec",
    "zoo_lenet_permutation_spec",
]  # fmt: skip
__getattr__ = submodules_of(__name__)
