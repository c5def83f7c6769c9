"""How sure a difference between two trained runs is on the networks at hand: 95 % intervals from resampled test networks.

    python examples/ablations/intervals.py RUN_A RUN_B [RUN_C ...] --zoo runs/digits-600/zoo
    python examples/ablations/intervals.py --codes examples/ablations/trained.toml --zoo runs/digits-600/zoo

Each run is compared with the first, on the same models; with --codes, each variant of a file of codes, which are fitted again.
Checkpoints of one network are drawn together, as they resemble each other. The interval says what other test networks of this zoo would
give, not what another seed of training would.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import combinations
from pathlib import Path

import torch

from wslfast import Population
from wslfast.measure.evaluation import compare_models, reconstruct
from wslfast.study.ablation_file import Ablation, settings_of
from wslfast.study.ablations import Cell, Stop
from wslfast.study.closed_form import systems
from wslfast.study.loaded_zoo import LoadedZoo, Protocol, evenly
from wslfast.training import load_run

METRICS = ("accuracy_change", "agreement", "agreement_others", "agreement_margin", "identified", "explained_variance")
RESAMPLES = 4000


def per_network(models: Population, rebuilt: torch.Tensor, zoo: LoadedZoo) -> dict[str, torch.Tensor]:
    """Each metric's mean over the checkpoints of every test network, ``[networks]``."""
    values = compare_models(models, rebuilt, zoo.data.test_images, zoo.data.test_labels).metrics()
    names = models.properties["model"]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    rows = torch.tensor([place[name] for name in names])
    counts = torch.bincount(rows).double()
    return {m: torch.zeros(len(place), dtype=torch.float64).index_add_(0, rows, values[m].double()) / counts for m in METRICS}


def of_codes(file: str, zoo: LoadedZoo, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """The same of every variant of a file of codes, of its first seed."""
    ablation = Ablation.from_toml(file)
    models = evenly(zoo.test, ablation.models or len(zoo.test))
    found = {}
    for variant in ablation.variants:
        system, config = settings_of(ablation, variant, folder, ablation.seeds[0])
        with tempfile.TemporaryDirectory() as place:
            stop = Stop(Path(place), "process", None, 1, config.steps)
            code = systems()[system](Cell(config, zoo.train, stop))
        found[variant] = per_network(models, code.reconstruct(models.weights), zoo)
    return found


def interval(values: torch.Tensor, drawn: torch.Tensor) -> str:
    """Mean and its central 95 % over resamples."""
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{float(values.mean()):+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    """Print each run's figures, and its differences from the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of finished runs; the first is what the others are compared with")
    parser.add_argument("--codes", help="file of an ablation of codes instead, whose first variant the others are compared with")
    parser.add_argument("--zoo", required=True, help="folder of the zoo")
    given = parser.parse_args()
    if bool(given.runs) == bool(given.codes):
        parser.error("runs, or --codes")
    zoo = LoadedZoo(given.zoo, Protocol.whole())
    with torch.no_grad():
        if given.codes:
            found = of_codes(given.codes, zoo, given.zoo)
        else:
            found = {run: per_network(zoo.test, reconstruct(load_run(run).autoencoder, zoo.test.weights), zoo) for run in given.runs}
    first = next(iter(found.values()))
    networks = len(next(iter(first.values())))
    drawn = torch.randint(networks, (RESAMPLES, networks), generator=torch.Generator().manual_seed(0))
    print(f"{networks} test networks")
    for run, values in found.items():
        print(run)
        for metric in METRICS:
            change = "" if values is first else f"   less the first {interval(values[metric] - first[metric], drawn)}"
            print(f"  {metric:20}{interval(values[metric], drawn)}{change}")
    for (one, of_one), (other, of_other) in combinations(list(found.items())[1:], 2):
        print(f"agreement, {other} less {one}: {interval(of_other['agreement'] - of_one['agreement'], drawn)}")


if __name__ == "__main__":
    main()
