"""Query images: pools that stay on the device with the originals' outputs on them, sets made without any data, and files of them."""

from .pool import QueryPool, TargetCache
from .stored import load_queries, save_queries
from .synthetic import SYNTHETIC, distil, synthetic_queries

__all__ = ["SYNTHETIC", "QueryPool", "TargetCache", "distil", "load_queries", "save_queries", "synthetic_queries"]
