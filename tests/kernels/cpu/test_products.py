"""Products of layers, whichever way round they are computed, against float64 sums written out."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from wslfast.kernels.cpu import products
from wslfast.kernels.cpu.products import product, weight_gradient


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 32, 1, 10),
        (3, 16, 20, 15),
        (3, 15, 20, 15),
        (2, 32, 2, 40),
        (2, 4, 3, 5),
        (1, 48, 33, 16),
        (3, 32, 784, 64),
        (2, 33, 784, 64),
        (2, 7, 512, 100),
    ],
)
def test_both_ways_round(sizes: tuple[int, int, int, int], bias: bool) -> None:
    models, q, features, out = sizes
    generator = torch.Generator().manual_seed(0)
    x, w, b, g = (torch.randn(models, *shape, generator=generator) for shape in ((q, features), (out, features), (out,), (q, out)))
    expected = torch.einsum("mqf,mof->mqo", x.double(), w.double()) + (b.double().unsqueeze(1) if bias else 0)
    made, near = product(x, w, b if bias else None), 1e-5 * max(1.0, features / 64)
    torch.testing.assert_close(made, expected.float(), rtol=1e-5, atol=near)
    assert made.is_contiguous()
    torch.testing.assert_close(weight_gradient(g, x), torch.einsum("mqo,mqf->mof", g.double(), x.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("said", "expected"), [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False), ("", False)])
def test_who_made_the_processor(said: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(said)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.intel.__wrapped__(tmp_path / "cpuinfo") is expected


def test_who_made_the_processor_where_there_is_no_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6 Model 154 Stepping 3, GenuineIntel")
    assert products.intel.__wrapped__(tmp_path / "none")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products.intel.__wrapped__(tmp_path / "none")
