"""Learnt probe images: what a few images that are learnt themselves tell of a network that is asked for its answers to them.

A linear layer predicts test accuracy from how sure a network is of 24 learnt images. Run: python examples/neighbours/probe_images.py
"""

import torch
from side_by_side import turns
from torch import Tensor, nn
from torch.func import functional_call

import wslfast


def network() -> nn.Module:
    """A network of the zoo: a small CNN for 8x8 digits."""
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 10))


ARCH = wslfast.Architecture.from_module(network(), input_shape=(1, 8, 8))


def answers(weights: Tensor, probes: Tensor) -> Tensor:
    """``[k, n, 10]``, with a gradient to the probes ``[n, 1, 8, 8]``."""
    return wslfast.batched_forward(weights, probes, ARCH)


sureness = lambda outputs: outputs.softmax(-1).amax(-1)  # features [k, n]: the largest class probability  # noqa: E731


def answers_one_by_one(states: list[dict[str, Tensor]], probes: Tensor) -> Tensor:
    """The same as a probing code does it: the network run with each state dict."""
    module = network()
    return torch.stack([functional_call(module, state, (probes,)) for state in states])


def learn(weights: Tensor, accuracy: Tensor, probes: int = 24, steps: int = 200) -> tuple[Tensor, nn.Module]:
    """Probe images, and the layer that reads the answers to them, fitted to networks of known accuracy."""
    torch.manual_seed(0)
    images = torch.randn(probes, *ARCH.input_shape, requires_grad=True)
    reader = nn.Linear(probes, 1)
    optimizer = torch.optim.Adam([{"params": [images], "lr": 0.02}, {"params": reader.parameters(), "lr": 0.01}])
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(reader(sureness(answers(weights, images))).squeeze(1), accuracy).backward()
        optimizer.step()
    return images.detach(), reader


if __name__ == "__main__":
    zoo = wslfast.build_zoo("digits", architecture=ARCH, models=90, epochs=3)
    train, test = (zoo[[s == name for s in zoo.properties["split"]]] for name in ("train", "test"))
    target = {split: p.column("test_acc").float() for split, p in (("train", train), ("test", test))}
    images, reader = learn(train.weights, target["train"])
    with torch.no_grad():
        error = (reader(sureness(answers(test.weights, images))).squeeze(1) - target["test"]).square().mean()
    print(f"R2 of test accuracy on {len(test)} checkpoints that were not seen: {1 - float(error / target['test'].var(unbiased=False)):.2f}")
    probes, states = images.requires_grad_(), train.state_dicts()
    ours = lambda: answers(train.weights, probes).square().sum().backward()  # noqa: E731
    theirs = lambda: answers_one_by_one(states, probes).square().sum().backward()  # noqa: E731
    print("answers and their gradient to the probes:", turns(ours, theirs))
