"""What is replaced in ``sane`` 2.x: the names, the signatures they must have, and ours in their place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import permutations, rebasin
from . import augmentation, loading, losses, tokenizers

PACKAGE = "sane"
_MARKS = ("orchestrator.py", "data/tokenizers/base.py")  # files by which the package is told from others of its name
_TOKENIZER = "data.tokenizers.base.SANETokenizer"
_AUGMENTATION = "data.checkpoint.checkpoint_augmentation"
_TENSORS = "self, tensors"

# name: (signature, ours). A function of ours is given the published one as ``original=``, for what only that can serve.
TABLE: dict[str, tuple[str, Callable[..., Any]]] = {
    f"{_TOKENIZER}.tokenize": ("self, statedict", tokenizers.tokenize),
    f"{_TOKENIZER}.detokenize": ("self, tokens_input, mask=None, position=None, reference_statedict=None", tokenizers.detokenize),
    f"{_AUGMENTATION}.PermutationAugmentation.forward": ("self, checkpoint", augmentation.permute),
    f"{_AUGMENTATION}.CheckpointAligner.forward": ("self, checkpoint", augmentation.align),
    "utils.git_re_basin.weight_matching": ("ps, params_a, params_b, max_iter=100, init_perm=None", rebasin.weight_matching),
    "utils.git_re_basin.apply_permutation": ("ps, perm, params", permutations.apply_permutation),
    "loss.reconstruction.MSEReconstructionLoss.forward": (_TENSORS, losses.reconstruct),
    "loss.contrastive.NTXentLoss.forward": (_TENSORS, losses.contrast),
    "data.datasets.zoo_dataset.ZooDataset.__getitem__": ("self, index", loading.item),
    "data.checkpoint.checkpoint_filters.WeightMagnitudeCheckpointFilter.__call__": ("self, checkpoint_info", loading.within_magnitude),
    "data.cache.disk_cache.DiskCache._load_from_disk": ("self, cache_path", loading.from_cache),
    "data.datasets.cached_windowed_dataset.CachedWindowedDataset.preload_cache": ("self, checkpoint_indices=None", loading.preload),
}


def is_loaded() -> bool:
    """Whether the package of this name that is loaded is the 2.x one."""
    package = sys.modules.get(PACKAGE)
    folders = [Path(folder) for folder in getattr(package, "__path__", [])]
    return any(all((folder / mark).is_file() for mark in _MARKS) for folder in folders)
