"""How sure a difference between two trained runs is on the networks at hand: 95 % intervals from resampled test networks.

    python examples/ablations/intervals.py RUN_A RUN_B [RUN_C ...] --zoo runs/digits-600/zoo

Each run is compared with the first, on the same models. Checkpoints of one network are drawn together, as they resemble each other. The
interval says what other test networks of this zoo would give, not what another seed of training would.
"""

from __future__ import annotations

import argparse

import torch

from wslfast.measure.evaluation import compare_models, reconstruct
from wslfast.study.loaded_zoo import LoadedZoo, Protocol
from wslfast.training import load_run

METRICS = ("accuracy_change", "agreement", "agreement_others", "agreement_margin", "identified", "explained_variance")
RESAMPLES = 4000


def per_network(run: str, zoo: LoadedZoo) -> dict[str, torch.Tensor]:
    """Each metric's mean over the checkpoints of every test network, ``[networks]``."""
    with torch.no_grad():
        rebuilt = reconstruct(load_run(run).autoencoder, zoo.test.weights)
        values = compare_models(zoo.test, rebuilt, zoo.data.test_images, zoo.data.test_labels).metrics()
    names = zoo.test.properties["model"]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    rows = torch.tensor([place[name] for name in names])
    counts = torch.bincount(rows).double()
    return {m: torch.zeros(len(place), dtype=torch.float64).index_add_(0, rows, values[m].double()) / counts for m in METRICS}


def interval(values: torch.Tensor, drawn: torch.Tensor) -> str:
    """Mean and its central 95 % over resamples."""
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{float(values.mean()):+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    """Print each run's figures, and its differences from the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished runs; the first is what the others are compared with")
    parser.add_argument("--zoo", required=True, help="folder of the zoo")
    given = parser.parse_args()
    zoo = LoadedZoo(given.zoo, Protocol.whole())
    found = {run: per_network(run, zoo) for run in given.runs}
    first = found[given.runs[0]]
    networks = len(next(iter(first.values())))
    drawn = torch.randint(networks, (RESAMPLES, networks), generator=torch.Generator().manual_seed(0))
    print(f"{networks} test networks")
    for run, values in found.items():
        print(run)
        for metric in METRICS:
            change = "" if values is first else f"   less the first {interval(values[metric] - first[metric], drawn)}"
            print(f"  {metric:20}{interval(values[metric], drawn)}{change}")


if __name__ == "__main__":
    main()
