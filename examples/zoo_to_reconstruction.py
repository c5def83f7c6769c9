"""The whole path in Python: a zoo of real networks, an autoencoder trained with the behavioral loss, how its models behave.

The same as `wslfast demo` in small: about a minute on two cores. Needs the extra `eval` (scikit-learn's digits).
Run: python examples/zoo_to_reconstruction.py [folder]
"""

import argparse
import tempfile
from pathlib import Path

import wslfast

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", type=Path, help="a new folder for zoo and run (default: a temporary one)")
folder = parser.parse_args().folder or Path(tempfile.mkdtemp())

# 1. a zoo: 48 networks trained at once, each with its own initialisation, learning rate, decay and batch order
population = wslfast.build_zoo("digits", folder / "zoo", models=48, epochs=5, seed=0)
print(population)

# 2. an autoencoder over their weights, from the closed-form linear code of the zoo, on structure and behavior
config = wslfast.TrainConfig(zoo=str(folder / "zoo"), out=str(folder / "run"), steps=60, log_every=20, lr=2e-3)
run = wslfast.train(config, on_record=lambda record: print(record["step"], round(record["loss"], 4)))

# 3. held-out models: do the reconstructions behave like their originals, and not like just any good network?
for name, figures in wslfast.evaluate(folder / "run").items():
    print(
        f"{name:14s} accuracy {figures['accuracy_original']:.3f} -> {figures['accuracy_reconstructed']:.3f}   agreement "
        f"{figures['agreement']:.3f} (with others {figures['agreement_others']:.3f})   {figures['latent_numbers']} numbers a model"
    )
