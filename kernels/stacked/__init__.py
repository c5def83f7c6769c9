"""The stacked wing: any graph, M models in one plain torch call an operation, torch's autograd. Any device, any dtype."""

from . import folded_chain
from .engine import differentiable, forward, group_shape, loss_and_gradient, plain, sizes
from .training import training_step

__all__ = ["differentiable", "folded_chain", "forward", "group_shape", "loss_and_gradient", "plain", "sizes", "training_step"]
