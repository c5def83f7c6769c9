"""Neuroevolution on a supervised task: the fitness of a whole population ``[popsize, P]`` in one call.

EvoTorch's SupervisedNE (pip install evotorch) fills one network after another; its flat order of parameters is ours. The search here is a
plain evolution strategy in ten lines, as any with ask and tell would do. Run: python examples/neighbours/neuroevolution.py
"""

import torch
from side_by_side import turns
from torch import Tensor, nn

import wslfast


def network() -> nn.Module:
    """A classifier of 8x8 digits."""
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


ARCH = wslfast.Architecture.from_module(network(), input_shape=(64,))


@torch.no_grad()
def losses(population: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy ``[popsize]`` of every member."""
    outputs = wslfast.batched_forward(population, images, ARCH)  # [popsize, n, 10]
    return nn.functional.cross_entropy(outputs.mT, labels.expand(len(population), -1), reduction="none").mean(1)


def evotorch_problem(images: Tensor, labels: Tensor) -> object:
    """The same task as EvoTorch has it, one minibatch of all images."""
    from evotorch.neuroevolution import SupervisedNE

    data = torch.utils.data.TensorDataset(images, labels)
    return SupervisedNE(data, network, nn.CrossEntropyLoss(), minibatch_size=len(images))


def evolve(images: Tensor, labels: Tensor, popsize: int = 128, generations: int = 60, sigma: float = 0.05, lr: float = 0.1) -> Tensor:
    """An evolution strategy with mirrored noise and ranks; returns the centre ``[P]``."""
    torch.manual_seed(0)
    centre = torch.nn.utils.parameters_to_vector(network().parameters()).detach()
    optimizer = torch.optim.Adam([centre.requires_grad_()], lr=lr)
    for _ in range(generations):
        noise = torch.randn(popsize // 2, len(centre))
        fitness = -losses((centre + sigma * torch.cat([noise, -noise])).detach(), images, labels)
        ranks = fitness.argsort().argsort() / (popsize - 1) - 0.5
        centre.grad = -(ranks[: popsize // 2] - ranks[popsize // 2 :]) @ noise / (popsize * sigma)
        optimizer.step()
    return centre.detach()


if __name__ == "__main__":
    from sklearn.datasets import load_digits

    images, labels = torch.tensor(load_digits().data / 16).float(), torch.tensor(load_digits().target)
    best = evolve(images[:1000], labels[:1000])
    right = wslfast.batched_forward(best[None], images[1000:], ARCH)[0].argmax(-1) == labels[1000:]
    print(f"accuracy on digits that were not seen: {right.float().mean():.3f}")
    problem = evotorch_problem(images[:1000], labels[:1000])
    batch = problem.generate_batch(128)
    print("fitness of 128 members:", turns(lambda: losses(batch.values, images[:1000], labels[:1000]), lambda: problem.evaluate(batch)))
