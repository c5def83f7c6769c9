"""Operations of complex numbers, each in a tiny network (``operation_cases.py``): transforms, parts, products and what reads both kinds."""

from __future__ import annotations

import math

import torch
from operation_cases import IMAGE, add
from torch import Tensor


def both(z: Tensor) -> Tensor:
    """Real and imaginary parts along the last axis, which torch's own graph makes real again."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def turned(x: Tensor) -> Tensor:
    """Complex numbers of a real tensor."""
    return torch.complex(x, x.flip(-1).sin())


for _name, _run in {
    "real": lambda x: turned(x).real, "imag": lambda x: turned(x).imag * x, "angle": lambda x: torch.complex(x.abs() + 0.3, x).angle(),
    "conj_physical": lambda x: both(turned(x).conj() * turned(x).exp()), "complex": lambda x: both(torch.complex(x, x.cos())),
    "polar": lambda x: both(torch.polar(x.abs() + 0.1, x)), "view_as_real": lambda x: torch.view_as_real(torch.fft.fft(x))[..., 1],
    "view_as_complex": lambda x: torch.view_as_complex(x.reshape(x.shape[0], 4, 5, 3, 2)).abs(),
    "fft_fft": lambda x: both(torch.fft.fft(x)), "fft_ifft": lambda x: both(torch.fft.ifft(turned(x), dim=2, norm="ortho")),
    "fft_rfft": lambda x: both(torch.fft.rfft(x, n=7, dim=1)), "fft_irfft": lambda x: torch.fft.irfft(turned(x), n=7, norm="forward"),
    "fft_hfft": lambda x: torch.fft.hfft(turned(x), dim=1), "fft_ihfft": lambda x: both(torch.fft.ihfft(x)),
    "fft_fft2": lambda x: torch.fft.fft2(x).real, "fft_ifft2": lambda x: both(torch.fft.ifft2(turned(x), s=(4, 7))),
    "fft_rfft2": lambda x: both(torch.fft.rfft2(x, norm="ortho")), "fft_irfft2": lambda x: torch.fft.irfft2(turned(x), s=(5, 7)),
    "fft_fftn": lambda x: both(torch.fft.fftn(x, dim=(1, 3))), "fft_ifftn": lambda x: both(torch.fft.ifftn(turned(x), s=(3, 5), dim=(-1, 1))),
    "fft_rfftn": lambda x: both(torch.fft.rfftn(x, dim=(1, 2, 3))), "fft_irfftn": lambda x: torch.fft.irfftn(turned(x), dim=(1, 3)),
    "fft_fftshift": lambda x: torch.fft.fftshift(x, dim=(2, 3)).cumsum(-1), "fft_ifftshift": lambda x: both(torch.fft.ifftshift(turned(x), dim=1)),
}.items():  # fmt: skip
    add(_name, _run, IMAGE, fronts="mcs")
for _name, _run in {
    "mul.Tensor": lambda x: both(turned(x) * x), "div.Tensor": lambda x: both(turned(x) / turned(x.cos() + 2)), "abs": lambda x: turned(x).abs(),
    "add.Tensor": lambda x: both(turned(x) + 1j * x), "rsub.Tensor": lambda x: both((2 - 0.5j) - turned(x)), "exp": lambda x: both((1j * x).exp()),
    "pow.Tensor_Scalar": lambda x: both(turned(x) ** 2), "tanh": lambda x: both(torch.tanh(0.3 * turned(x))), "sum.dim_IntList": lambda x: both(turned(x).sum((2, 3))),
    "mean.dim": lambda x: both(turned(x).mean(1)), "cat": lambda x: both(torch.cat((turned(x), turned(x) * 1j), 1)), "where.self": lambda x: both(torch.where(x > 0, turned(x), 1j * x)),
    "transpose.int": lambda x: both(turned(x).mH @ turned(x)), "slice_scatter": lambda x: both(_written(turned(x), turned(x)[:, :2] * 1j)),
    "select_scatter": lambda x: both(_chosen(turned(x), x[:, 0])), "constant_pad_nd": lambda x: both(_held(x)),
    "cumsum": lambda x: both(turned(x).cumsum(2)), "flip": lambda x: both(turned(x).flip(-1)), "new_full": lambda x: both(torch.full((x.shape[0], 4, 5, 6), 0.5 - 1j) * x),
    "zeros_like": lambda x: both(torch.zeros_like(turned(x)) + x), "complex": lambda x: both(x.to(torch.complex64) * turned(x)) if x.dtype == torch.float32 else both(x.to(torch.complex128) * turned(x)),
    "gt.Scalar": lambda x: (turned(x).abs() > 0.7) * x, "permute": lambda x: both(torch.view_as_complex(x.unflatten(1, (2, 2)).permute(0, 1, 3, 4, 2).contiguous())),
}.items():  # fmt: skip
    add(_name, _run, IMAGE, fronts="mcs")


def _written(z: Tensor, part: Tensor) -> Tensor:
    z = z.clone()
    z[:, 1:3] = part
    return z


def _chosen(z: Tensor, part: Tensor) -> Tensor:
    z = z.clone()
    z[:, 2] = part
    return z


def _held(x: Tensor) -> Tensor:
    """As a Fourier neural operator keeps the lowest frequencies of each side."""
    made = torch.zeros(x.shape[0], 4, 5, 4, dtype=torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    made[:, :, 1:3, :3] = torch.fft.rfft2(x)[:, :, :2, :3]
    return made


def _shared(x: Tensor) -> Tensor:
    """Complex numbers that all models share."""
    angles = torch.arange(6) * (math.pi / 5)
    return torch.polar(torch.ones(6), angles).to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)


add("mul.Tensor", lambda x: both(x * _shared(x)), fronts="ms")
add("mul.Tensor", lambda x: both(torch.fft.fft(x) * torch.fft.fftfreq(6).to(x.dtype)), fronts="ms")
add("mul.Tensor", lambda x: both(torch.fft.rfft(x * torch.hann_window(6).to(x.dtype))), fronts="ms")
add("mul.Tensor", lambda x, w: both(turned(x) * torch.view_as_complex(w)), (6,), (6, 2), fronts="ms")
add("einsum", lambda x, w: both(torch.einsum("bi,io->bo", turned(x), torch.view_as_complex(w))), (6,), (6, 5, 2), fronts="ms")
add(
    "einsum",
    lambda x, w: both(torch.einsum("bix,iox->box", torch.fft.rfft(x), torch.view_as_complex(w))),
    (3, 6),
    (3, 5, 4, 2),
    fronts="mcs",
)
add("matmul", lambda x, w: both(turned(x) @ torch.view_as_complex(w)), (6,), (6, 5, 2), fronts="ms")
add("matmul", lambda x, w: both(x.to(turned(x).dtype) @ torch.view_as_complex(w).conj()), (6,), (6, 1, 2), fronts="ms")
add(
    "linear",
    lambda x, w, b: both(torch.nn.functional.linear(turned(x), torch.view_as_complex(w), torch.view_as_complex(b))),
    (6,),
    (3, 6, 2),
    (3, 2),
)
add(
    "conv1d",
    lambda x, w: both(torch.nn.functional.conv1d(turned(x), torch.view_as_complex(w), padding=1)),
    (4, 7),
    (3, 4, 3, 2),
    fronts="mcs",
)
add("conv2d", lambda x, w: both(torch.nn.functional.conv2d(turned(x), torch.view_as_complex(w))), IMAGE, (3, 4, 3, 3, 2), fronts="ms")
add(
    "addmm",
    lambda x, w, b: both(torch.addmm(torch.view_as_complex(b), turned(x), torch.view_as_complex(w))),
    (6,),
    (6, 5, 2),
    (5, 2),
    fronts="ms",
)
add(
    "fft_rfft",
    lambda x: both(torch.stft(x.flatten(1), 8, 4, window=torch.hann_window(8).to(x.dtype), return_complex=True)),
    (4, 10),
    fronts="ms",
)
add("fft_fft", lambda x: both(torch.stft(x, 6, return_complex=True, center=False, onesided=False, normalized=True)), (20,), fronts="ms")
add("unfold", lambda x, w: both(torch.stft(x, 8, 4, win_length=5, window=w, return_complex=True)), (20,), (5,))
add("unfold", lambda x: x.unfold(2, 2, 2).unfold(3, 3, 1).flatten(3), IMAGE, fronts="mcs")
add("linalg_vector_norm", lambda x: torch.linalg.vector_norm(turned(x), dim=1), IMAGE, fronts="mcs")
add("linalg_vector_norm", lambda x: both(torch.nn.functional.normalize(turned(x), dim=-1)), IMAGE, fronts="mcs")
