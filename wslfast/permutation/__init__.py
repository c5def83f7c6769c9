"""Permutations of hidden channels that leave a network's function unchanged: which there are, and views made by them."""

from .views import Permutations, channel_norms, hidden_channels, inverse, kept_channels, permute, random_permutations, random_views

__all__ = [
    "Permutations",
    "channel_norms",
    "hidden_channels",
    "inverse",
    "kept_channels",
    "permute",
    "random_permutations",
    "random_views",
]
