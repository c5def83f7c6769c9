"""A deep ensemble whose members are trained at once: ``build_zoo`` instead of one training after another.

Its members vote as torchensemble's VotingClassifier lets them: mean class probabilities. Run: python examples/neighbours/ensemble.py
"""

import torch
from side_by_side import turns
from torch import Tensor, nn

import wslfast
from wslfast.zoo import Dataset, load_dataset
from wslfast.zoo.grid import Grid


def network() -> nn.Module:
    """A member: a small CNN for 28x28 images."""
    first = (nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 6, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 10))


ARCH = wslfast.Architecture.from_module(network(), input_shape=(1, 28, 28))


def members(data: Dataset, count: int, epochs: int, lr: float = 2e-3) -> wslfast.Population:
    """Networks of one setting, each with its own seed, trained at once."""
    seeds = Grid(("kaiming_uniform",), (lr,), (0.0,), tuple(range(count)))
    return wslfast.build_zoo(data, architecture=ARCH, models=count, epochs=epochs, keep=(epochs,), grid=seeds)


def vote(population: wslfast.Population, images: Tensor) -> Tensor:
    """Class probabilities ``[n, K]``: the mean over members."""
    return wslfast.batched_forward(population.weights, images, ARCH).softmax(-1).mean(0)


def torchensemble_of(population: wslfast.Population) -> nn.Module:
    """torchensemble's classifier with the same members."""
    from torchensemble import VotingClassifier

    ensemble = VotingClassifier(estimator=network, n_estimators=len(population), cuda=False)
    ensemble.estimators_.extend(network() for _ in range(len(population)))
    for member, state in zip(ensemble.estimators_, population.state_dicts(), strict=True):
        member.load_state_dict(state)
    return ensemble


def train_one(data: Dataset, epochs: int, lr: float = 2e-3) -> None:
    """One member by torch's own means."""
    member = network()
    optimizer = torch.optim.Adam(member.parameters(), lr=lr)
    for rows in (rows for _ in range(epochs) for rows in torch.randperm(len(data.train_labels)).split(32)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(member(data.train_images[rows]), data.train_labels[rows]).backward()
        optimizer.step()


if __name__ == "__main__":
    ensemble = members(digits := load_dataset("digits", ARCH.input_shape), 16, 3)
    right = (vote(ensemble, digits.test_images).argmax(-1) == digits.test_labels).float().mean()
    print(f"accuracy of 16 members: {ensemble.column('test_acc').mean():.3f} on average, {right:.3f} together")
    print("training 16 members for an epoch:", turns(lambda: members(digits, 16, 1), lambda: [train_one(digits, 1) for _ in range(16)], 1))
