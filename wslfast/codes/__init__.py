"""Codes: maps from weights to latents and back, in closed form (:mod:`linear`, :mod:`adaptive`) or trained (:mod:`autoencoder`)."""

from __future__ import annotations

from ..lazy import submodules

__getattr__ = submodules(__name__)
