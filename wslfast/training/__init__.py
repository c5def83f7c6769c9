"""Training a weight autoencoder: configuration, the loop, checkpoints."""

from .checkpoint import Run, load_run
from .config import TrainConfig
from .loop import train

__all__ = ["Run", "TrainConfig", "load_run", "train"]
