"""A zoo of one's own, from the files that training left: import, train, evaluate, generate. About half a minute on two cores.

Trains 24 small networks with batch norm and a residual first, as their owner would have, and saves what owners save: a state dict each, a
table of accuracies, the images. The shell's way is printed as it goes; from Python, Population.from_modules takes modules as they are.
Run: python examples/own_zoo.py [folder]
"""

import argparse
import csv
import shlex
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from wslfast.cli import main

NETWORK = """
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4 * 36, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.head((x + F.relu(self.inner(x))).flatten(1))
"""

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", type=Path, help="a new folder for everything (default: a temporary one)")
folder = parser.parse_args().folder or Path(tempfile.mkdtemp())
if folder.exists() and any(folder.iterdir()):
    parser.error(f"{folder} is not empty; name a new folder")
(folder / "models").mkdir(parents=True)
(folder / "net.py").write_text(NETWORK)
names: dict = {}
exec(NETWORK, names)

# what its owner has: images, networks trained on them, a table
torch.manual_seed(0)
patterns, arrays = torch.rand(4, 1, 12, 12), {}
for split, n in (("train", 400), ("val", 100), ("test", 200)):
    labels = torch.randint(4, (n,))
    arrays[f"{split}_images"] = (0.3 * patterns[labels] + 0.7 * torch.rand(n, 1, 12, 12)).numpy()
    arrays[f"{split}_labels"] = labels.numpy()
np.savez(folder / "images.npz", **arrays)
images, labels, test, answers = (torch.from_numpy(arrays[k]) for k in ("train_images", "train_labels", "test_images", "test_labels"))
with open(folder / "accuracies.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["file", "test_acc", "lr"])
    for i in range(24):
        net, lr = names["Net"](), 10 ** -(1.5 + i % 4 / 2)
        optimizer = torch.optim.Adam(net.parameters(), lr)
        for batch in torch.randperm(400).repeat(6).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        accuracy = float((net.eval()(test).argmax(1) == answers).float().mean())
        torch.save({"model_state_dict": net.state_dict(), "epoch": 6}, folder / "models" / f"net_{i}.pt")
        table.writerow([f"net_{i}.pt", accuracy, lr])

# the four commands
for command in (
    "zoo import {}/models {}/zoo --network {}/net.py:Net --dataset {}/images.npz --table {}/accuracies.csv",
    "train --zoo {}/zoo --out {}/run --steps 60 --queries 64",
    "evaluate --run {}/run",
    "generate --run {}/run --samples 8 --out {}/new",
):
    words = [word.replace("{}", str(folder)) for word in command.split()]  # a folder's name may have spaces
    print(f"\n$ wslfast {shlex.join(words)}")
    main(words)
