#!/bin/sh
# Reads and writes outside buffers, uninitialised reads, and races in shared memory, on small networks. Needs a GPU and
# compute-sanitizer (with the CUDA toolkit); says so and ends well where there is none. From the repository root: sh tests/gpu/sanitize.sh
set -e
command -v compute-sanitizer > /dev/null || { echo "sanitize: no compute-sanitizer here, nothing was run"; exit 0; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor its own allocation, so that a read past its end is seen
export PYTHONPATH=".:tests/support:${PYTHONPATH:-}"
for tool in memcheck racecheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "${PYTHON:-python3}" - <<'PY'
import torch
from kernel_cases import CASES, cnn3, lenet5, make
from wslfast.kernels.triton import launch as kernels

for case in (cnn3(), lenet5(), CASES["stride_2_and_pool"], CASES["act_then_average"], CASES["gelu_before_max"]):
    weights, queries, targets = (t.cuda() for t in make(case, 3, 5))
    for precision in ("fp16", "tf32"):
        losses, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision)
        assert losses.isfinite().all() and gradient.isfinite().all()
        kernels.forward(weights, queries, case.layers, precision)
        index = torch.randint(0, 5, (3, 4), device="cuda")
        kernels.loss_and_gradient(weights, queries, targets[:, :4], case.layers, "mse", 2.0, precision, index=index)
torch.cuda.synchronize()
PY
done
