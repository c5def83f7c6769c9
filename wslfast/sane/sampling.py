"""The published sampler: a kernel density around the latents of anchor models, decoded to state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import check_positive, check_seed, describe, require
from .checkpoints import tokenize_checkpoint, tokens_to_checkpoint

MODES = ("individual", "token", "joint")
BANDWIDTH = 0.2
_SEED = 42  # the published sampler starts every density from it


def sample_latents(
    anchor_z: Tensor,
    repetitions: int,
    mode: str = "individual",
    *,
    bandwidth: float = BANDWIDTH,
    generator: np.random.Generator | None = None,
) -> Tensor:
    """Draws from a Gaussian kernel density fitted to anchors.

    Args:
        anchor_z: ``[M, T, latent]``.
        repetitions: how many.
        mode: ``"individual"`` (a density a number), ``"token"`` (one per token) or ``"joint"`` (one per model).
        bandwidth: standard deviation of the kernel.
        generator: None draws as published: every density starts from the same seed, so that densities that should be
            independent pick the same anchor and, number by number, the same noise. A generator makes them independent.

    Returns:
        ``[repetitions, T, latent]`` float32 (``"joint"``: float64, as published).
    """
    require(mode in MODES, f"mode: expected one of {list(MODES)}, got {mode!r}")
    fits = isinstance(anchor_z, Tensor) and anchor_z.ndim == 3 and len(anchor_z) > 0
    require(fits, f"anchor_z: expected latents [M, T, latent] with M >= 1, got {describe(anchor_z)}")
    check_positive("repetitions", repetitions)
    m, t, latent = anchor_z.shape
    groups, width = {"individual": (t * latent, 1), "token": (t, latent), "joint": (1, t * latent)}[mode]
    anchors = anchor_z.detach().cpu().double().reshape(m, groups, width).numpy()
    if generator is None:
        # the draws of sklearn's KernelDensity.sample(random_state=42), the same for every density
        state = np.random.RandomState(_SEED)
        chosen = np.floor(state.uniform(0, 1, size=repetitions) * m).astype(np.int64)
        out = anchors[chosen] + bandwidth * state.normal(size=(repetitions, 1, width))
    else:
        chosen = generator.integers(m, size=(repetitions, groups))
        out = anchors[chosen, np.arange(groups)] + bandwidth * generator.normal(size=(repetitions, groups, width))
    z = torch.from_numpy(np.ascontiguousarray(out)).reshape(repetitions, t, latent)
    return z if mode == "joint" else z.float()


def sample_models(
    ae_model: Any,
    checkpoint_ref: Mapping[str, Tensor],
    repetitions: int,
    anchor_z: Tensor,
    anchor_pos: Tensor,
    anchor_w_shape: Sequence[int],
    mode: str = "individual",
    batch_size: int = 0,
    return_new_anchor: bool = True,
    reset_classifier: bool = False,
    halo: bool = False,
    halo_wse: int = 156,
    halo_hs: int = 64,
    *,
    bandwidth: float = BANDWIDTH,
    generator: np.random.Generator | None = None,
) -> Any:
    """New models from the latents of anchors.

    Args:
        ae_model: anything with ``forward_decoder(z [k, T, latent], p [k, T, 3]) -> tokens [k, T, D]``, such as ``AEModule`` or ``AE``.
            It is given latents in the dtype and on the device of its ``decoder_comp`` or, where it has none, of its first parameter.
        checkpoint_ref: a state dict of the network that is wanted.
        repetitions: how many.
        anchor_z: latents ``[M, T, latent]`` of the anchors.
        anchor_pos: positions ``[T, 3]`` of one of them.
        anchor_w_shape: ``[M, T, D]``, the shape of the anchors' tokens.
        mode, bandwidth, generator: see :func:`sample_latents`.
        batch_size: latents (with ``halo``, windows of them) decoded at a time; 0: as many as there are anchors.
        return_new_anchor: whether latents, positions and the shape of the new tokens are returned as well.
        reset_classifier: draw the last layer anew (and pad or cut tokens where the wanted network's length differs).
        halo, halo_wse, halo_hs: decode windows of ``halo_wse`` tokens with ``halo_hs`` tokens of context on either side.

    Returns:
        A list of state dicts, or ``(list, latents, positions, shape)``.

    Raises:
        WslfastError: latents, mode or sizes that do not fit, or a wanted network of another number of tokens without ``reset_classifier``.
    """
    z = sample_latents(anchor_z, repetitions, mode, bandwidth=bandwidth, generator=generator)
    require(len(anchor_w_shape) >= 2, f"anchor_w_shape: expected the shape of the anchors' tokens [M, T, D], got {list(anchor_w_shape)}")
    t, d = anchor_w_shape[-2:]
    require(z.shape[1] == t, f"anchor_z: expected latents [M, {t}, latent], as anchor_w_shape says, got {describe(anchor_z)}")
    placed = isinstance(anchor_pos, Tensor) and anchor_pos.ndim == 2 and len(anchor_pos) == t
    require(placed, f"anchor_pos: expected positions [{t}, 3] of one anchor, got {describe(anchor_pos)}")
    pos = anchor_pos.to(torch.int)
    wanted, _, positions = tokenize_checkpoint(checkpoint_ref, d)
    same = len(wanted) == t
    require(
        same or reset_classifier, f"checkpoint_ref: expected a network of {t} tokens (or reset_classifier=True), got {len(wanted)} tokens"
    )
    windows = _windows(t, halo_wse, halo_hs) if halo else [(0, t, 0, t)]
    decoder = _example(getattr(ae_model, "model", ae_model))
    # a model's windows follow each other, as published: where attention is over the batch, its composition matters
    pieces = torch.stack([z[:, low:high] for low, high, _, _ in windows], 1).flatten(0, 1)
    places = torch.stack([pos[low:high] for low, high, _, _ in windows]).repeat(repetitions, 1, 1)
    count = batch_size or len(anchor_z)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16, enabled=decoder.is_cuda):
        batches = zip(pieces.split(count), places.split(count))
        parts = [ae_model.forward_decoder(piece.to(decoder), place.to(decoder.device)).float().cpu() for piece, place in batches]
    made = torch.cat(parts).unflatten(0, (repetitions, len(windows)))
    tokens = torch.cat([made[:, i, first - low : last - low] for i, (low, _, first, last) in enumerate(windows)], 1)
    decoded = tokens if same else _fit(tokens, len(wanted))
    out = [tokens_to_checkpoint(row, positions, checkpoint_ref) for row in decoded]
    if reset_classifier:
        for checkpoint in out:
            _reset_classifier(checkpoint)
    return (out, z, pos, torch.Size([repetitions, t, d])) if return_new_anchor else out


def generate_z_samples(anchors: Any, samples: int | None = None, bandwidth: float = 0.002, seed: int = _SEED) -> Any:
    """Latents ``[samples, n]`` near anchors ``[M, n]`` (as many as anchors by default): a joint Gaussian kernel density.

    The published notebooks call a function of this name that was never published; the bandwidth is that of the sampler in the
    same repository. Returns a float64 numpy array.

    Raises:
        WslfastError: anchors of another shape, or no positive number of samples.
    """
    try:
        values = np.asarray(anchors.detach().cpu() if isinstance(anchors, Tensor) else anchors, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    require(values.ndim == 2 and len(values) > 0, f"anchors: expected numbers [M, n] with M >= 1, got {describe(anchors)}")
    generator = np.random.default_rng(check_seed(seed))
    count = len(values) if samples is None else samples
    check_positive("samples", count)
    return values[generator.integers(len(values), size=count)] + bandwidth * generator.normal(size=(count, values.shape[1]))


def _example(model: Any) -> Tensor:
    """A tensor of the kind that a model's decoder computes with."""
    comp = getattr(model, "decoder_comp", None)
    parameters: Iterator[Tensor] = iter(getattr(model, "parameters", tuple)())
    return comp.weight if comp is not None else next(parameters, torch.empty(0))  # type: ignore[no-any-return]


def _windows(t: int, size: int, halo: int) -> list[tuple[int, int, int, int]]:
    """(low, high, first, last): tokens low:high are decoded for the sake of first:last; all but the ends have a halo on both sides."""
    full = size + 2 * halo
    require(0 <= halo < size, f"halo_hs: expected less than halo_wse={size}, got {halo}")
    require(full <= t, f"halo_wse + 2 * halo_hs: expected at most {t} tokens, got {full}")
    out = []
    for first in range(0, t, size):
        last = min(first + size, t)
        low = 0 if first == 0 else t - full if last == t else first - halo
        out.append((low, low + full, first, last))
        fits = low >= 0 and low + full <= t
        require(fits, f"halo_wse, halo_hs: a window of {full} tokens around token {first} does not fit into {t} tokens")
    return out


def _fit(tokens: Tensor, length: int) -> Tensor:
    """Tokens ``[k, T, D]`` cut or padded with zeros to ``length``."""
    return nn.functional.pad(tokens, (0, 0, 0, max(0, length - tokens.shape[1])))[:, :length]


def _reset_classifier(checkpoint: dict[str, Tensor]) -> None:
    """Draw the last weight (and its bias) anew, as a fresh ``nn.Linear``."""
    name = [key for key in checkpoint if "weight" in key][-1]
    out, width = checkpoint[name].shape
    layer = nn.Linear(width, out)
    checkpoint[name] = layer.weight.detach()
    bias = name.replace("weight", "bias")
    if bias in checkpoint:
        assert layer.bias is not None
        checkpoint[bias] = layer.bias.detach()
