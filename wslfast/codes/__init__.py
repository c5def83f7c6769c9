"""Codes: maps from weights to latents and back, in closed form (:mod:`linear`, :mod:`adaptive`) or trained (:mod:`autoencoder`)."""

from __future__ import annotations

from .. import submodules_of

__getattr__ = submodules_of(__name__)
