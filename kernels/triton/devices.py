"""Which GPUs the kernels are for, and which of two sets of tiles each gets. Pure functions of what a GPU reports; no Triton.

Matrix units come in two kinds. On Hopper and Blackwell's data-centre GPUs (capabilities 9, 10, 11) a warpgroup of four warps multiplies
tiles of 64 rows, operands in shared memory. On Ampere, Ada and Blackwell's desktop GPUs (8, 12) one warp multiplies tiles of 16, operands
in registers: with Hopper's tiles an RTX 50 spills hundreds of bytes a thread, with these next to none.
"""

from __future__ import annotations

WARPGROUP, WARP = "warpgroup", "warp"
OLDEST = 8  # the first capability whose matrix unit these kernels' products reach


def matrix_unit(capability: tuple[int, int]) -> str:
    """``warpgroup`` or ``warp``, of a capability. What nobody has seen yet gets tiles that every GPU can run."""
    return WARPGROUP if capability[0] in (9, 10, 11) else WARP


def refusal(name: str, capability: tuple[int, int], rocm: bool) -> str | None:
    """None if the kernels are for this GPU, else the reason."""
    if rocm:
        return f"{name} is an AMD GPU: the kernels are written and checked for NVIDIA's, and AMD's compiler crashes on some of them"
    if capability[0] < OLDEST:
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}: the kernels need {OLDEST}.0 or newer, as older matrix "
            "units take neither TF32 nor bf16 and Triton no longer supports them"
        )
    return None
