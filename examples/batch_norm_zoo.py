"""A zoo of small CNNs with batch norms on digits: ``python examples/batch_norm_zoo.py --out runs/batch-norm/zoo``."""

from __future__ import annotations

import argparse

from torch import nn

import wslfast


def main() -> None:
    """Build it: some minutes of one core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", type=int, default=200)
    given = parser.parse_args()
    network = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(200, 10),
    )  # fmt: skip
    architecture = wslfast.Architecture.from_module(network, (1, 28, 28))
    zoo = wslfast.build_zoo(
        "digits", given.out, architecture=architecture, models=given.models, epochs=6, keep=(2, 4, 6), seed=0, progress=True, resume=True
    )
    print(f"{zoo!r}; test accuracy {zoo.column('test_acc').mean():.3f} +- {zoo.column('test_acc').std():.3f}")


if __name__ == "__main__":
    main()
