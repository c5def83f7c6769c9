"""``wslfast doctor``: what this machine runs networks with, and the kernels put to the proof."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..engine import choose, verdicts
from ..engine.precision import kernel_precision, matmul_precision
from ..errors import check_device
from ..proof import LIMIT_S, doctor
from ..zoo import MappedZoo, network
from .console import show


@dataclass(frozen=True)
class Doctor:
    """Test whether the GPU kernels are right, and faster than torch, on this machine. From then on --backend auto follows the result.

    The kernels are compiled, compared with float64 and timed beside torch in another process, in two minutes at most. The result is kept
    for this GPU, driver, torch, Triton and network. Training, zoo building, evaluation and generation do the same by themselves where
    there is no result yet. WSLFAST_KERNELS=auto|on|off overrides it.

    Example: wslfast doctor --zoo runs/zoo --k 128 --n 256
    """

    zoo: str | None = None
    """Folder of a zoo: its network is tested."""
    architecture: Literal["cnn", "cnn2", "cnn3", "lenet5"] = "cnn3"
    """Without a zoo: a published network."""
    k: int | None = None
    """Models of the call that is timed (default: 128, and 1,024)."""
    n: int | None = None
    """Queries of the call that is timed (default: 256)."""
    precision: Literal["tf32", "tf32x3", "fp16", "bf16"] | None = None
    """Precision of the kernels (default: that of torch's settings: tf32x3 unless a program asks for less; the trainer asks for tf32)."""
    device: str = "cuda"
    """cuda or cuda:N."""
    seconds: float = LIMIT_S
    """Time limit for all of it."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        if self.zoo is not None:
            arch = MappedZoo(self.zoo, None).architecture
        else:
            arch = network(self.architecture, 1 if self.architecture in ("cnn", "cnn2") else 3)
        has_gpu = torch.cuda.is_available() and check_device(self.device).type == "cuda"
        lines = doctor(arch, k=self.k, n=self.n, precision=self.precision, device=self.device, limit_s=self.seconds)
        cpu = choose(arch, "cpu", torch.float32)
        values: dict[str, Any] = {
            "network": f"{arch.name}, {arch.num_weights:,} weights",
            "on the CPU": f"{cpu.name}: {cpu.reason}",
            "gpu": torch.cuda.get_device_name(check_device(self.device)) if has_gpu else "none",
            "precision": self.precision or (kernel_precision() if has_gpu else matmul_precision()),
            "WSLFAST_KERNELS": verdicts.setting(),
            "kept in": _folder(),
        }
        show({**values, **lines}, self.json)


def _folder() -> str:
    try:
        return str(verdicts.folder())
    except RuntimeError as error:
        return f"memory alone ({error}); WSLFAST_CACHE names a folder"
