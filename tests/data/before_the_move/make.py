"""How the files of this folder were made: by the code of commit 715e1fb, the last before packages and modules were moved.

    git worktree add ../before 715e1fb
    cd tests/data/before_the_move && PYTHONPATH=../../../../before python make.py

A zoo of 8 networks with 13 parameters on made-up 4 x 4 images, a training run of two steps on it (random start, d_model 4), and the results of
evaluating that run. Everything is as small as it can be: what counts is that today's code reads it. ``expected.json`` holds what the old code read
back from each. The module names below are those of that commit, so today's code cannot run this script.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from wslfast import Architecture, TrainConfig, batched_forward, build_zoo, load_zoo, train
from wslfast.downstream.bench import Protocol
from wslfast.downstream.results import read_results, read_units, write_tables, write_unit
from wslfast.downstream.study import study
from wslfast.kernels.plan import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.training import load_run
from wslfast.zoo import load_dataset

torch.set_num_threads(1)
for old in ("zoo", "run", "results"):
    shutil.rmtree(old, ignore_errors=True)

rng = np.random.default_rng(0)
labels = np.arange(40) % 2
images = rng.integers(0, 100, (40, 4, 4)) + 100 * np.eye(4)[::-1].astype(int) * labels[:, None, None]
np.savez_compressed("images.npz", images=images.astype(np.uint8), labels=labels.astype(np.uint8))

layers = (
    Conv2d("0", 1, 1, (2, 2)), Activation("1", "tanh"), Pool2d("2", "max", (3, 3), (3, 3)), Flatten("3"), Linear("4", 1, 2), Activation("5", "leakyrelu"),
    Linear("6", 2, 2, bias=False),
)  # fmt: skip
architecture = Architecture.from_layers(layers, (1, 4, 4), "tiny")
data = load_dataset("images.npz", architecture.input_shape)
data = replace(data, provenance={**data.provenance, "path": "images.npz"})  # not where it was on the machine that made it
zoo = build_zoo(data, "zoo", architecture=architecture, models=8, epochs=2, keep=(1, 2), batch_size=8, split=(0.5, 0.25, 0.25))

sizes = {"d_model": 4, "heads": 1, "layers": 1, "latent": 2, "projection": 2}
config = TrainConfig("zoo", "run", steps=2, batch_size=2, queries=4, query_pool=8, start="random", log_every=1, **sizes)
train(config)

protocol = Protocol(
    models=4, train_models=8, images=8, samples=2, bandwidths=(0.1,), shares=(), finetune_epochs=1, finetune_images=8, probe_images=4, map_models=4, refine_steps=0
)  # fmt: skip
study("zoo", ["run"], "results", protocol=protocol, zero_layer=False, name="tiny")
units = [unit for unit in read_units(Path("results")) if unit.variant in ("zoo", "run", "linear-77")]
shutil.rmtree("results")  # three of the units and their tables are enough, and the page is drawn from them
for unit in units:
    write_unit(Path("results"), unit)
write_tables(Path("results"), units, {"protocol": asdict(protocol), "quick": False})


def losses(folder: str) -> list[dict[str, float]]:
    """The loss parts that a run's log holds, step by step."""
    records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "models_per_s"} for record in records]


queries = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
rows = load_zoo("zoo")
run = load_run("run")
results = read_results("results")
with torch.no_grad():
    latents = run.autoencoder.encode(run.autoencoder.layout.tokenize(rows.weights).tokens)
shutil.copytree("run", "longer")
train(replace(config, out="longer", steps=3), resume=True)
expected = {
    "zoo": {"weights": rows.weights.sum(1).tolist(), "outputs": batched_forward(rows.weights, queries, rows.architecture)[:, 0].tolist()},
    "run": {"latents": latents.sum((1, 2)).tolist(), "losses": losses("run"), "a third step": losses("longer")[2]},
    "results": {v: results.value("tiny", v, "agreement") for v in results.variants("tiny")},
}  # fmt: skip
shutil.rmtree("longer")
Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
