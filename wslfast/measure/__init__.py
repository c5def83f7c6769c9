"""What reconstructed models and their latents are good for: fidelity, probes, new models."""

from __future__ import annotations

from .. import submodules_of
from .evaluation import embeddings, evaluate, evaluate_code, linear_baselines, reconstruct
from .generation import generate, generate_each
from .probe import RidgeProbe, behavior_statistics, consensus_of, probe, weight_statistics
from .reconstruction import Reconstruction, compare

__all__ = [
    "Reconstruction",
    "RidgeProbe",
    "behavior_statistics",
    "compare",
    "consensus_of",
    "embeddings",
    "evaluate",
    "evaluate_code",
    "generate",
    "generate_each",
    "linear_baselines",
    "probe",
    "reconstruct",
    "weight_statistics",
]
__getattr__ = submodules_of(__name__)
