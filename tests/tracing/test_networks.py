"""Some fifty networks of the field, traced from their modules: the public calls against a float64 loop over the modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from field_images import IMAGES
from field_sequences import SEQUENCES
from field_spectra import SPECTRA
from field_vectors import VECTORS
from graph_oracle import check_record, close, criterion_value, loop, queries_like, rows_near
from torch import Tensor, nn

import wslfast
from wslfast.architecture import Architecture
from wslfast.kernels import stacked
from wslfast.tracing import prepared

NETWORKS = {**IMAGES, **VECTORS, **SEQUENCES, **SPECTRA}
# of every kind one; the others take as long again and find what they find in the slow tier
QUICK = (
    "zoo_cnn_with_batch_norm",
    "batch_norms_ahead",
    "ResNet",
    "mobilenet",
    "FourierFeatures",
    "LanguageModel",
    "LstmClassifier",
    "signals",
    "LowRank",
)
PARTS = {"VariationalAutoencoder": "reconstruction"}
TOLERANCE = 2e-5  # of float32, relative L2; a gradient may have three times that
K, N = 3, 5


def made(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(3)
    module = make().eval()
    with torch.no_grad():
        module(torch.randn(2, *shape))  # what is lazy has its shape now
    return module


def check_public(module: nn.Module, arch: Architecture, queries: Tensor, weights: Tensor) -> None:
    """Outputs, behavioral losses, and gradients to weights and queries, in float32, against the float64 loop."""
    w, x = weights.clone().requires_grad_(), queries.clone().requires_grad_()
    outputs = loop(module, arch, w, x)
    targets = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = criterion_value(outputs, targets, "mse")
    slopes = torch.autograd.grad(values.sum(), (w, x), allow_unused=True, materialize_grads=True)

    rows, images, wanted = (t.float() for t in (weights, queries, targets))
    with torch.no_grad():
        close(wslfast.batched_forward(rows, images, arch), outputs.detach(), TOLERANCE, "outputs")
    leaves = rows.clone().requires_grad_(), images.clone().requires_grad_()
    reach = wslfast.batched_forward(*leaves, arch)
    found = torch.autograd.grad(criterion_value(reach, wanted, "mse").sum(), leaves, allow_unused=True, materialize_grads=True)
    for a, b, what in zip(found, slopes, ("weights", "queries"), strict=True):
        close(a, b, 3 * TOLERANCE, f"batched_forward: gradient to {what}")
    leaf = rows.clone().requires_grad_()
    loss = wslfast.batched_behavioral_loss(leaf, None, images, arch, targets=wanted, reduction="none")
    close(loss.detach(), values.detach(), TOLERANCE, "losses")
    loss.sum().backward()
    assert leaf.grad is not None
    close(leaf.grad, slopes[0], 3 * TOLERANCE, "batched_behavioral_loss: gradient to weights")
    assert arch.graph is not None
    if arch.planned:  # a plain chain has engines of its own: the stacked one as well
        v, g = stacked.loss_and_gradient(rows, images, wanted, arch.graph, "mse")
        close(v, values.detach(), TOLERANCE, "stacked losses")
        close(g, slopes[0], 3 * TOLERANCE, "stacked gradients")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NETWORKS])
def test_network(name: str) -> None:
    make, shape = NETWORKS[name]
    module = made(make, shape)
    arch = Architecture.from_module(module, shape, output=PARTS.get(name))
    assert arch.graph is not None, arch.reason
    twin = prepared(module, name, shape, PARTS.get(name))  # weights where parametrisations were, one tensor for an answer
    weights = rows_near(twin, arch, K, spread=0.1)
    check_public(twin, arch, queries_like(twin, arch, N), weights)
    check_public(twin, arch, queries_like(twin, arch, K, N), weights)
    if name not in PARTS:
        check_record(module, arch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "vit"])
def test_torchvision(name: str, torchvision: ModuleType) -> None:
    torch.manual_seed(4)
    if name == "vit":
        module, shape = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4), (3, 16, 16)
    else:
        module, shape = getattr(torchvision.models, name)(num_classes=4), (3, 32, 32)
    arch = Architecture.from_module(module.eval(), shape)
    assert arch.graph is not None, arch.reason
    weights = rows_near(module, arch, 2, spread=0.02)
    check_public(module, arch, queries_like(module, arch, 3), weights)
