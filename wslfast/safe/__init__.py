"""Reading files of ``torch.save`` and pickles without running anything in them."""

from .inert import InertFile, StoredTensor, exactly
from .state import load_plain

__all__ = ["InertFile", "StoredTensor", "exactly", "load_plain"]
