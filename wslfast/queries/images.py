"""Images that show nothing: noise, noise with the spectrum of photographs, pen strokes. Drawn from a seed, no data needed.

All are drawn as a zoo's images are given to its networks: every channel with mean 0 and standard deviation 1 over the set, but
for ``uniform``, which is the published code's U[0, 1) as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

_BLOCK = 64  # images drawn at a time: strokes hold [block, points, H, W]
_STROKES, _POINTS = 4, 20  # curves of an image at most, and spots of the pen along each
_uniform, _normal = (
    partial(made, dtype=torch.float32, device="cpu") for made in (torch.rand, torch.randn)
)  # whatever torch's defaults are


def draw(kind: str, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """``[n, *shape]`` float32 images of one of ``KINDS`` from a generator on the CPU. A flat shape is drawn as a square, or a line."""
    if kind == "uniform":
        return _uniform(n, *shape, generator=generator)
    channels, height, width = _raster(shape)
    images = KINDS[kind](n, channels, height, width, generator)
    return _standard(images).reshape(n, *shape)


def _raster(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 3:
        return shape  # type: ignore[return-value]
    features = math.prod(shape)
    side = math.isqrt(features)
    return (1, side, side) if side * side == features else (1, 1, features)


def _standard(images: Tensor) -> Tensor:
    std, mean = torch.std_mean(images, (0, 2, 3), correction=0, keepdim=True)
    return (images - mean) / torch.where(std > 0, std, 1.0)


def _noise(n: int, c: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    return _normal(n, c, h, w, generator=generator)


def _smooth(n: int, c: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    """Noise of amplitude spectrum 1 / f^a; photographs have a near 1 (Field 1987), each image here its own a in [0.5, 2]."""
    spectrum = torch.fft.rfft2(_normal(n, c, h, w, generator=generator))
    exponent = 0.5 + 1.5 * _uniform(n, 1, 1, 1, generator=generator)
    images = torch.fft.irfft2(spectrum * frequencies(h, w) ** -exponent, s=(h, w))
    std = images.std((1, 2, 3), correction=0, keepdim=True)
    contrast = 0.5 + _uniform(n, 1, 1, 1, generator=generator)
    return _colored(images / torch.where(std > 0, std, 1.0) * contrast, generator)


def frequencies(h: int, w: int) -> Tensor:
    """Length ``[h, w // 2 + 1]`` of every frequency of ``rfft2``, in cycles an image; the constant counts as the lowest."""
    f = (
        torch.fft.fftfreq(h, 1 / h, dtype=torch.float32).square().unsqueeze(1) + torch.fft.rfftfreq(w, 1 / w, dtype=torch.float32).square()
    ).sqrt()
    return f.clamp_min(1.0)


def _strokes(n: int, c: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    """One to four quadratic curves a image, drawn with a soft pen, in one ink on one ground."""
    blocks = []
    for start in range(0, n, _BLOCK):
        blocks.append(_pen(min(_BLOCK, n - start), h, w, generator))
    ink, ground = _normal(n, c, 1, 1, generator=generator), _normal(n, c, 1, 1, generator=generator)
    if c == 1:  # one polarity, as digits on black have
        ink, ground = 1 + 0.2 * ink, 0.1 * ground
    return ground + (ink - ground) * torch.cat(blocks)


def _pen(n: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    """Coverage ``[n, 1, h, w]`` in [0, 1]."""
    ends = 0.1 + 0.8 * _uniform(n, _STROKES, 3, 2, generator=generator)
    drawn = _uniform(n, _STROKES, generator=generator) < 0.6
    drawn[:, 0] = True
    t = torch.linspace(0, 1, _POINTS, dtype=torch.float32)
    basis = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])  # [3, points]
    path = torch.einsum("nsjd,jp->nspd", ends, basis) * torch.tensor([h, w], dtype=torch.float32)  # [n, strokes, points, 2]
    pen = min(h, w) * (0.03 + 0.05 * _uniform(n, 1, 1, 1, generator=generator))
    # a pen's spot is a product over axes
    rows = torch.exp(-(((path[..., 0].unsqueeze(-1) - torch.arange(h) - 0.5) / pen) ** 2) / 2)
    columns = torch.exp(-(((path[..., 1].unsqueeze(-1) - torch.arange(w) - 0.5) / pen) ** 2) / 2)
    spots = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).amax(2)  # [n, strokes, h, w]
    return (spots * drawn[:, :, None, None]).amax(1, keepdim=True)


def _blend(n: int, c: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    """Strokes over smooth noise, each image with its own share of both."""
    share = _uniform(n, 1, 1, 1, generator=generator)
    a, b = _standard(_strokes(n, c, h, w, generator)), _standard(_smooth(n, c, h, w, generator))
    return share.sqrt() * a + (1 - share).sqrt() * b


def _colored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Channels of an image mixed at random: those of photographs are alike."""
    n, c = images.shape[:2]
    if c == 1:
        return images
    common = _uniform(n, 1, 1, 1, generator=generator)
    return common * images.mean(1, keepdim=True) * c**0.5 + (1 - common) * images


KINDS: dict[str, Callable[[int, int, int, int, torch.Generator], Tensor]] = {
    "noise": _noise, "smooth": _smooth, "strokes": _strokes, "blend": _blend,
}  # fmt: skip
