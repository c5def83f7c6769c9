"""Codes: maps from weights to latents and back, in closed form (:mod:`linear`, :mod:`adaptive`) or trained (:mod:`autoencoder`)."""
