"""One helper for torch's two ways to set the precision of products: the older raises where the newer was used."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from wslfast.engine import precision
from wslfast.engine.precision import at_precision, kernel_precision, matmul_precision, matmul_precision_of


@pytest.mark.parametrize(("setting", "kernels"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")])
def test_the_older_setting(setting: str, kernels: str) -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision_of(setting):
        assert matmul_precision() == setting
        assert kernel_precision() == kernels
    assert torch.get_float32_matmul_precision() == before


NEWER = """
    import torch
    from wslfast.engine.precision import kernel_precision, matmul_precision, matmul_precision_of
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        raise SystemExit("no newer setting")
    for setting, expected in (("tf32", "high"), ("ieee", "highest")):
        torch.backends.cuda.matmul.fp32_precision = setting
        assert matmul_precision() == expected, (setting, matmul_precision())
        assert kernel_precision() == {"high": "tf32", "highest": "tf32x3"}[expected]
        for inside in ("high", "highest"):
            with matmul_precision_of(inside):
                assert matmul_precision() == inside, (setting, inside)
            assert torch.backends.cuda.matmul.fp32_precision == setting
        assert matmul_precision() == expected
    from wslfast.cli import main
    main(["info"])
"""


def test_the_newer_setting() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(NEWER)], capture_output=True, text=True, timeout=240, check=False)
    if "no newer setting" in done.stderr:
        pytest.skip("this torch has none")
    assert done.returncode == 0, done.stderr[-2000:]


def test_where_the_older_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("PyTorch is checking whether allow_tf32_new is enabled for cuBlas matmul, ...")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    matmul = type("matmul", (), {"fp32_precision": "tf32"})()
    monkeypatch.setattr(precision.torch.backends.cuda, "matmul", matmul)
    assert matmul_precision() == "high"
    with matmul_precision_of("highest"):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


def test_an_unknown_one() -> None:
    with pytest.raises(ValueError, match="expected one of"), at_precision("fp8"):
        pass
