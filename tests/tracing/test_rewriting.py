"""Calls that become others of the table: what is written into zeros, short transforms, complex numbers in pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_oracle import check_everything, check_record
from torch import Tensor, nn

from wslfast.architecture import Architecture


class Own(nn.Module):
    """A function of ``[n, 4, 6]``, between a factor and a sum."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.factor = run, nn.Parameter(torch.linspace(0.4, 1.6, 24).view(4, 6))
        with torch.no_grad():
            self.behind = nn.Parameter(torch.linspace(-1, 1, run(torch.ones(2, 4, 6)).flatten(1).shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x * self.factor).flatten(1) * self.behind


def _written(
    shape: tuple[int, ...], *writes: tuple[object, Callable[[Tensor], Tensor]], dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """Zeros into which parts of x are written, one after another."""

    def run(x: Tensor) -> Tensor:
        made = torch.zeros(len(x), *shape, dtype=x.dtype if dtype is None else dtype)
        for place, value in writes:
            made[place] = value(x)
        return made.to(x.dtype) * 1.5

    return run


every = slice(None)
# what is written, and how many paddings and other writes are in the graph
WRITES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int]]] = {
    "the beginning": (_written((4, 8), ((every, every, slice(None, 6)), lambda x: x)), (1, 0)),
    "the middle": (_written((4, 8), ((every, slice(1, 3), slice(1, 7)), lambda x: x[:, 1:3])), (2, 0)),
    "the end": (_written((4, 8), ((every, every, slice(-6, None)), lambda x: x)), (1, 0)),
    "beyond the end": (_written((4, 5), ((every, every, slice(2, 99)), lambda x: x[..., :3])), (1, 0)),
    "every other": (_written((4, 12), ((every, every, slice(None, None, 2)), lambda x: x)), (0, 1)),
    "nothing": (_written((4, 6), ((every, every, slice(3, 3)), lambda x: x[..., :0])), (0, 0)),
    "all": (_written((4, 6), ((every, every, slice(None)), lambda x: x)), (0, 0)),
    "one row": (_written((5, 6), ((every, 2), lambda x: x[:, 1])), (0, 1)),
    "a number for all": (_written((4, 8), ((every, every, slice(2, 5)), lambda x: x[..., :1])), (1, 0)),
    "twice, apart": (_written((4, 12), ((every, every, slice(0, 6)), lambda x: x), ((every, every, slice(6, 12)), torch.sin)), (1, 1)),
    "twice, one over the other": (_written((4, 8), ((every, every, slice(0, 6)), lambda x: x), ((every, every, slice(2, 8)), torch.sin)), (1, 1)),
    "whole numbers": (_written((4, 8), ((every, every, slice(1, 7)), lambda x: 3 * x), dtype=torch.int64), (1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_into_zeros_lies_between_zeros(name: str) -> None:
    run, (padded, written) = WRITES[name]
    module = Own(run)
    architecture = Architecture.from_module(module, (4, 6))
    assert architecture.graph is not None, architecture.reason
    used = [node.operation for node in architecture.graph.nodes]
    assert used.count("constant_pad_nd") == padded
    assert sum(operation in ("slice_scatter", "select_scatter") for operation in used) == written
    check_everything(module, architecture)
    check_record(module, architecture)


def test_what_is_written_behind_a_norm() -> None:
    """Whose statistics nobody reads, in the spelling that writes in place have."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv1d(4, 3, 3, padding=1), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            made = torch.zeros_like(y)
            made[:, :, 1:] = y[:, :, :-1]
            return made

    module = Shifted().eval()
    architecture = Architecture.from_module(module, (4, 6))
    assert architecture.graph is not None, architecture.reason
    check_everything(module, architecture)


def _spectrum(x: Tensor) -> Tensor:
    made = torch.zeros_like(torch.fft.rfft(x))
    made[..., :2] = torch.fft.rfft(x)[..., :2] * (1 - 0.5j)
    made[..., -1:] = x[..., :1]  # real numbers into complex ones
    return torch.view_as_real(made)


def _adjoint(x: Tensor) -> Tensor:
    z = torch.complex(x, x.sin())
    return torch.view_as_real(z.mH @ z)


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "a spectrum": _spectrum,
    "adjoint": _adjoint,
    "conversion": lambda x: (x.to(torch.complex64 if x.dtype == torch.float32 else torch.complex128) * 1j).imag,
    "a number": lambda x: (x * (0.5 + 2j)).abs() + (2j - x).angle() + (x / 1j).imag,
    "ones": lambda x: (torch.ones(len(x), 4, 6, dtype=torch.fft.fft(x).dtype) * x).real,
    "short transforms": lambda x: torch.stft(x.flatten(1), 8, 4, window=torch.bartlett_window(8).to(x.dtype), return_complex=True).abs(),
    "with a short window": lambda x: (
        torch.stft(x.flatten(1), 8, 3, 5, torch.ones(5).to(x.dtype), normalized=True, return_complex=True).real
    ),
    "windows that slide": lambda x: x.unfold(1, 2, 1).unfold(2, 3, 2).amax(-1),
    "padded by a mode": lambda x: torch.view_as_real(F.pad(torch.complex(x, -x), (1, 2))),
}


@pytest.mark.filterwarnings("ignore:.*window was not provided")
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name: str) -> None:
    module = Own(COMPLEX[name])
    architecture = Architecture.from_module(module, (4, 6))
    assert architecture.graph is not None, architecture.reason
    check_everything(module, architecture)
    check_record(module, architecture)


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_bags_of_rows(mode: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(9, 5, mode="sum" if mode == "weighted" else mode), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            words = (x.abs() * 6).long().clamp(0, 8)
            return self.head(self.table(words, per_sample_weights=x.cos()) if mode == "weighted" else self.table(words))

    module = Words()
    architecture = Architecture.from_module(module, (7,))
    assert architecture.graph is not None, architecture.reason
    check_everything(module, architecture)
    check_record(module, architecture)


def test_imaginary_parts_are_not_left_out_silently() -> None:
    architecture = Architecture.from_module(Own(lambda x: torch.fft.fft(x).to(x.dtype)), (4, 6))
    assert architecture.graph is None
    assert "leaves out imaginary parts" in str(architecture.reason)


def test_what_is_written_in_place_is_trained_as_well() -> None:
    """Training mode is followed by itself, and is held against the module, too."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            made = torch.zeros(len(x), 8)
            made[:, 1:7] = F.dropout(self.first(x), 0.5, self.training)
            return self.last(made)

    graph = Architecture.from_module(Written().eval(), (6,)).graph
    assert graph is not None
    assert not graph.training.refused
