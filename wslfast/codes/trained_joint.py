"""A joint code with a trained part: a small network that says which answers matter.

The directions of :class:`JointCodec` are those along which the original probably differs and *answers differently*. The squared error of
raw outputs counts an image far from every boundary between classes as much as one on a boundary. Here a network of a few hundred
numbers, one for all models, sees what the first part of a code decodes to answer at an image, and says how much each class counts
there. It is trained by gradient over training models: the decoded network's answers on other images shall be close to the original's
(Kullback-Leibler divergence of softmax outputs).

Leading directions have no useful gradient, as thousands of singular values are near-ties. So training relaxes them: instead of the
first r directions it keeps of every direction with eigenvalue e the share ``e / (e + t)``, with t such that the shares add up to r.
Before the first step all classes count alike, so what training adds is the difference from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..behavior import batched_behavioral_loss, batched_forward
from ..errors import check_positive, check_seed, require
from ..population import Population
from .joint import Importance, JointCodec, centered
from .layer_inputs import evenly_spread

_FEATURES, _WIDTH = 6, 32
_LARGEST = 8.0  # of the logarithm of an importance
_SOLVED = 96  # images of a model whose Jacobian training holds
_JUDGED = 256  # other images, a step, that the loss is taken on
_BATCH = 4
_LR = 3e-2
_LEAST = 1e-5  # of t, as a share of the largest eigenvalue: what single precision can solve
_CLOSENESS: dict[str, Any] = {"criterion": "distillation", "temperature": 1.0, "reduction": "none"}


class OutputImportance(nn.Module):
    """How much each class counts at each image: ``[n, K] -> [n, K]``, positive, from a network's outputs there. At first all ones."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.hidden = nn.Linear(_FEATURES, _WIDTH)
            self.out, self.straight = nn.Linear(_WIDTH, 1), nn.Linear(_FEATURES, 1)
        for layer in (self.out, self.straight):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, outputs: Tensor) -> Tensor:
        """``[n, K] -> [n, K]``."""
        x = features(outputs)
        value = self.straight(x) + self.out(nn.functional.gelu(self.hidden(x)))
        return (_LARGEST * torch.tanh(value[..., 0] / _LARGEST)).exp()


def features(outputs: Tensor) -> Tensor:
    """``[n, K] -> [n, K, 6]``: log probability, and how far behind the first class, in raw units and in those of the network's outputs; the
    distance between the first two; which is first."""
    top = outputs.topk(min(2, outputs.shape[1]), 1).values
    first, second = top[:, :1], top[:, -1:]
    scale = outputs.std().clamp_min(1e-6)
    behind = first - outputs
    between = (first - second).expand_as(outputs)
    is_first = (behind == 0).to(outputs.dtype)
    parts = (outputs.log_softmax(1), behind / scale, torch.log1p(behind), between / scale, torch.log1p(between), is_first)
    return torch.stack(parts, -1)


class Example(NamedTuple):
    """A training model: what its directions are chosen from, and what they are judged by."""

    outputs: Tensor  # [n, K], of what the first part decodes to
    slopes: Tensor  # [n * K, numbers left open], in units of what is left open
    gram: Tensor  # [n * K, n * K]: slopes times their transpose
    read: Tensor  # [n * K]: slopes times the original less the decoded, in the same units
    weights: Tensor  # [P], decoded by the first part
    left: list[Tensor]


def train_importance(
    codec: JointCodec,
    population: Population,
    images: Tensor,
    *,
    steps: int = 100,
    models: int = 64,
    lr: float = _LR,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> OutputImportance:
    """An :class:`OutputImportance` for the directions of ``codec``, trained over models of ``population``.

    Args:
        codec: a joint code fitted to the population; its first part and its size are used, not its directions.
        population: training models.
        images: training images ``[n, *input_shape]``, at least 8: a part says what directions there are, the others judge.
        steps: of Adam, each on four models; 0: all classes count alike.
        models: training models that are used, evenly spaced.
        lr: first rate, which falls along a cosine to zero.
        seed: of the network, of images and of batches.
        progress: told the step and its loss (a share of the loss before any correction).

    Returns:
        The network, where the population's weights are.

    Raises:
        WslfastError: too few images, a network that is no classifier, or numbers out of range.
    """
    require(len(codec.architecture.output_shape) == 1, f"codec: expected models with outputs [n, K], got {codec.architecture.output_shape}")
    require(len(images) >= 8, f"images: expected at least 8, got {len(images)}")
    require(type(steps) is int and steps >= 0, f"steps: expected an integer >= 0, got {steps!r}")
    check_positive("models", models)
    require(0 < lr < math.inf, f"lr: expected a positive number, got {lr!r}")
    generator = torch.Generator().manual_seed(check_seed(seed))
    images = images.to(population.weights.device)
    order = torch.randperm(len(images), generator=generator)
    solved = order[: min(_SOLVED, len(images) // 2)]
    judged = images[order[len(solved) :]]
    chosen = population.weights[evenly_spread(len(population), models)].float()
    network = OutputImportance(seed).to(chosen.device)
    if steps == 0:
        return network
    examples = examples_of(codec, chosen, images[solved])
    with torch.no_grad():
        targets = batched_forward(chosen, judged, codec.architecture)
    adam = torch.optim.Adam(network.parameters(), lr)
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        batch = torch.randperm(len(examples), generator=generator)[:_BATCH].tolist()
        rows = torch.randperm(len(judged), generator=generator)[:_JUDGED]
        adam.zero_grad()
        total = 0.0
        for index in batch:
            with torch.enable_grad():
                example = examples[index]
                moved = torch.stack([example.weights, example.weights + corrected(codec, example, network)])
                known = targets[index, rows].expand(2, -1, -1)
                values = batched_behavioral_loss(moved, None, judged[rows], codec.architecture, targets=known, **_CLOSENESS)
                loss = (values[1] / values[0].detach().clamp_min(1e-9)) / len(batch)
                loss.backward()
            total += float(loss.detach())
        adam.step()
        cycle.step()
        if progress is not None:
            progress(step + 1, total)
    return network


def corrected(codec: JointCodec, example: Example, importance: Importance) -> Tensor:
    """``[P]``: what the relaxed directions give back of the original's difference from the decoded network. Only matrices of the size of
    all answers depend on the importance, so a step costs as much for a large network as for a small one."""
    n, k = example.outputs.shape
    eye = torch.eye(k, dtype=example.gram.dtype, device=example.gram.device)[:, None].expand(k, n, k)
    roots = centered(eye, importance(example.outputs)).transpose(0, 1)  # [n, K, K]: combinations of an image's answers
    gram = torch.einsum("iab,ibjc,jdc->iajd", roots, example.gram.view(n, k, n, k), roots).reshape(n * k, n * k)
    read = (roots @ example.read.view(n, k, 1)).reshape(n * k, 1)
    threshold = threshold_of(torch.linalg.eigvalsh(gram).clamp_min(0), codec.joint_size)
    system = gram + threshold * torch.eye(n * k, dtype=gram.dtype, device=gram.device)
    found = torch.cholesky_solve(read, torch.linalg.cholesky(system)).view(n, k, 1)
    return codec.unwhitened((roots.mT @ found).flatten() @ example.slopes, example.left)


def threshold_of(eigenvalues: Tensor, count: int) -> Tensor:
    """t so that ``sum e / (e + t)`` is ``count``, or less where too few eigenvalues are larger than nothing; differentiable. Without its
    gradient, to let everything count more would seem to be worth something."""
    e = eigenvalues.detach()
    count = min(count, len(e) // 2)
    low, high = e.max() * _LEAST, e.max() * len(e)
    for _ in range(60):
        middle = (low * high).sqrt()
        many = (e / (e + middle)).sum() > count
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    excess = (eigenvalues / (eigenvalues + high)).sum()
    return high + (excess - excess.detach()) / (e / (e + high).square()).sum()


@torch.no_grad()
def examples_of(codec: JointCodec, weights: Tensor, images: Tensor) -> list[Example]:
    """What :func:`train_importance` needs of each model of ``weights [k, P]``, with slopes on ``images``."""
    first, left = codec.base.left_open(codec.base.encode(weights))
    out = []
    for j, (row, start) in enumerate(zip(weights, first, strict=True)):
        own = [part[j].float() for part in left]
        outputs, layers = codec.jacobian(start, images)
        slopes = codec.whitened(torch.cat([part.flatten(1) for part in layers], 1), own) / len(images) ** 0.5
        read = slopes @ codec.missing(row - start, [part[j] for part in left])
        out.append(Example(outputs, slopes, slopes @ slopes.mT, read, start, own))
    return out
