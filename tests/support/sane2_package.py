"""A small package ``sane`` with the names and signatures of 2.x, written for these tests: plain loops, so that it is their oracle, too.

Nothing of the published package is in it. What it computes follows the description of its tokens, losses and files, a number at a time
where that is affordable.
"""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FILES = {
    "orchestrator.py": "",
    "data/tokenizers/base.py": """
        import torch
        from torch import nn


        class SANETokenizer(nn.Module):
            def __init__(self, *, tokensize=230, device="cpu", mode="layer_wise", reference_statedict=None, padding="zero"):
                super().__init__()
                self.tokensize, self.device, self.mode, self.padding = tokensize, device, mode, padding
                self.reference_statedict = reference_statedict

            def tokenize(self, statedict):
                layers = self.slice_by_layers(self.flatten(statedict))
                return layers if self.mode == "layer_wise" else self.slice(layers)

            def detokenize(self, tokens_input, mask=None, position=None, reference_statedict=None):
                return self.rebuild_state_dict(self.unslice(tokens_input, mask, position), reference_statedict)

            def flatten(self, statedict):
                out = []
                for key, weight in statedict.items():
                    if "weight" in key:
                        rows = [list(row.flatten().unbind()) for row in weight.reshape(weight.shape[0], -1)]
                        bias = statedict.get(key.replace("weight", "bias"))
                        for j, row in enumerate(rows):
                            row += [] if bias is None else [bias[j]]
                        out.append(rows)
                return out

            def slice(self, layers):
                return tuple(torch.cat(parts) for parts in zip(*layers))

            def pad(self, w, pad_right):
                if self.padding == "zero":
                    return torch.cat([w, w.new_zeros(*w.shape[:-1], pad_right)], -1)
                if self.padding == "mean":
                    return torch.cat([w, w.mean(-1, keepdim=True).expand(*w.shape[:-1], pad_right)], -1)
                noise = torch.randn(*w.shape[:-1], pad_right)
                return torch.cat([w, noise], -1)

            def _cut(self, rows, layer, first, inside):
                rows = torch.stack([torch.stack(row) for row in rows])
                width, more = rows.shape[1], -rows.shape[1] % self.tokensize
                # the published code pads a dense layer as one row of one dimension
                padded = self.pad(rows if inside else rows[0], more).reshape(-1, self.tokensize)
                mask = torch.cat([torch.ones(len(rows), width), torch.zeros(len(rows), more)], 1).bool().reshape(-1, self.tokensize)
                chunks = len(padded) // len(rows)
                place = [[first + t, layer, t // chunks if inside else t] for t in range(len(padded))]
                return padded, mask, torch.tensor(place, dtype=torch.int32)

            def unslice(self, tokens_input, mask=None, position=None):
                if isinstance(tokens_input, list):
                    return [t[m] for t, m, _ in tokens_input]
                if mask is None or position is None:
                    raise ValueError("mask and position are needed")
                layers = range(int(position[:, 1].max()) + 1)
                return [tokens_input[position[:, 1] == i][mask[position[:, 1] == i]] for i in layers]

            def rebuild_state_dict(self, flattened_weights, reference_statedict=None):
                import copy
                reference = self.reference_statedict if reference_statedict is None else reference_statedict
                if reference is None:
                    raise ValueError("no reference")
                out, parts = copy.deepcopy(reference), list(flattened_weights)
                for key, value in reference.items():
                    if "weight" in key:
                        rows = parts.pop(0).reshape(value.shape[0], -1)
                        bias = key.replace("weight", "bias")
                        if bias in reference:
                            out[bias], rows = rows[:, -1], rows[:, :-1]
                        out[key] = rows.reshape(value.shape)
                return out
    """,
    "data/tokenizers/dense.py": """
        from .base import SANETokenizer


        class DenseTokenizer(SANETokenizer):
            def slice_by_layers(self, flattened_weights):
                out, first = [], 0
                for i, rows in enumerate(flattened_weights):
                    out.append(tuple(self._cut([[v for row in rows for v in row]], i, first, False)))
                    out[-1] = (out[-1][0].float(), *out[-1][1:])
                    first += len(out[-1][0])
                return out
    """,
    "data/tokenizers/sparse.py": """
        from .base import SANETokenizer


        class SparseTokenizer(SANETokenizer):
            def slice_by_layers(self, flattened_weights):
                out, first = [], 0
                for i, rows in enumerate(flattened_weights):
                    out.append(self._cut(rows, i, first, True))
                    first += len(out[-1][0])
                return out
    """,
    "data/tokenizers/__init__.py": """
        from .base import SANETokenizer
        from .dense import DenseTokenizer
        from .sparse import SparseTokenizer
    """,
    "utils/git_re_basin.py": """
        from collections import defaultdict
        from typing import NamedTuple

        import torch
        from scipy.optimize import linear_sum_assignment


        class PermutationSpec(NamedTuple):
            perm_to_axes: dict
            axes_to_perm: dict


        def permutation_spec_from_axes_to_perm(axes_to_perm):
            found = defaultdict(list)
            for key, axes in axes_to_perm.items():
                for axis, p in enumerate(axes):
                    if p is not None:
                        found[p].append((key, axis))
            return PermutationSpec(dict(found), axes_to_perm)


        def zoo_cnn_large_permutation_spec():
            names, axes, before = [0, 4, 8, 13, 16], {}, None
            for i, n in enumerate(names):
                p = f"P{i}" if i < 4 else None
                axes[f"module_list.{n}.weight"], axes[f"module_list.{n}.bias"] = (p, before), (p,)
                before = p
            return permutation_spec_from_axes_to_perm(axes)


        def moved(ps, perm, k, params, except_axis=None):
            w = params[k]
            for axis, p in enumerate(ps.axes_to_perm[k]):
                if p is not None and axis != except_axis:
                    block = w.shape[axis] // len(perm[p])
                    index = [int(i) * block + b for i in perm[p] for b in range(block)]
                    w = torch.stack([w.select(axis, i) for i in index], axis)
            return w


        def apply_permutation(ps, perm, params):
            return {k: moved(ps, perm, k, params) for k in params}


        def weight_matching(ps, params_a, params_b, max_iter=100, init_perm=None):
            sizes = {p: params_a[axes[0][0]].shape[axes[0][1]] for p, axes in ps.perm_to_axes.items()}
            perm = {p: torch.arange(n) for p, n in sizes.items()} if init_perm is None else init_perm
            names = list(perm)
            for _ in range(max_iter):
                better = False
                for place in torch.randperm(len(names)):
                    p = names[place]
                    gain = torch.zeros(sizes[p], sizes[p])
                    for key, axis in ps.perm_to_axes[p]:
                        a, b = params_a[key], moved(ps, perm, key, params_b, except_axis=axis)
                        a, b = (torch.moveaxis(w, axis, 0).reshape(sizes[p], -1) for w in (a, b))
                        gain += a @ b.T
                    columns = linear_sum_assignment(gain.numpy(), maximize=True)[1]
                    old, new = (sum(gain[i, int(j)] for i, j in enumerate(c)) for c in (perm[p], columns))
                    better = better or bool(new > old + 1e-12)
                    perm[p] = torch.Tensor(columns)
                if not better:
                    break
            return perm
    """,
    "data/checkpoint/checkpoint.py": """
        from dataclasses import dataclass
        from typing import Any


        @dataclass
        class Checkpoint:
            model: Any
            metadata: Any = None
            zoo_root_dir: Any = None
    """,
    "data/checkpoint/__init__.py": "from sane.data.checkpoint.checkpoint import Checkpoint\n",
    "data/checkpoint/checkpoint_augmentation.py": """
        import copy

        import torch
        from torch import nn

        from sane.utils.git_re_basin import apply_permutation, weight_matching


        class PermutationAugmentation(nn.Module):
            def __init__(self, permutation_spec, num_permutations):
                super().__init__()
                self.permutation_spec, self.num_permutations = permutation_spec, num_permutations

            def forward(self, checkpoint):
                state = checkpoint.model.state_dict()
                sizes = {p: len(v) for p, v in weight_matching(self.permutation_spec, state, state).items()}
                drawn = [{p: torch.randperm(n).float() for p, n in sizes.items()} for _ in range(self.num_permutations)]
                return [checkpoint, *(_moved(checkpoint, self.permutation_spec, perm) for perm in drawn)]


        class CheckpointAligner(nn.Module):
            def __init__(self, permutation_spec, reference_checkpoint):
                super().__init__()
                self.permutation_spec, self.reference_checkpoint = permutation_spec, reference_checkpoint

            def forward(self, checkpoint):
                a, b = self.reference_checkpoint.model.state_dict(), checkpoint.model.state_dict()
                return [_moved(checkpoint, self.permutation_spec, weight_matching(self.permutation_spec, a, b))]


        def _moved(checkpoint, spec, perm):
            out = copy.deepcopy(checkpoint)
            out.model.load_state_dict(apply_permutation(spec, perm, checkpoint.model.state_dict()))
            return out
    """,
    "data/checkpoint/checkpoint_filters.py": """
        import torch


        class WeightMagnitudeCheckpointFilter:
            def __init__(self, max_absolute_weight=None, drop_nan=True):
                self.max_absolute_weight, self.drop_nan = max_absolute_weight, drop_nan

            def __call__(self, checkpoint_info):
                for value in torch.load(checkpoint_info.state_dict_path, map_location="cpu").values():
                    if self.drop_nan and torch.isnan(value).any():
                        return False
                    if self.max_absolute_weight is not None and value.abs().max() > self.max_absolute_weight:
                        return False
                return True
    """,
    "data/cache/disk_cache.py": """
        import torch


        class DiskCache:
            def _load_from_disk(self, cache_path):
                return torch.load(cache_path, map_location="cpu") if cache_path.exists() else None
    """,
    "data/datasets/zoo_dataset_models.py": """
        import torch
        from torch import nn


        class CNN3(nn.Module):
            def __init__(self, channels_in, o_dim):
                super().__init__()
                parts = []
                for a, b in ((channels_in, 16), (16, 32), (32, 15)):
                    parts += [nn.Conv2d(a, b, 3), nn.MaxPool2d(2, 2), nn.ReLU(), nn.Dropout(0.0)]
                parts += [nn.Flatten(), nn.Linear(60, 20), nn.ReLU(), nn.Dropout(0.0), nn.Linear(20, o_dim)]
                self.module_list = nn.ModuleList(parts)
                for part in self.modules():
                    if isinstance(part, (nn.Conv2d, nn.Linear)):
                        nn.init.kaiming_uniform_(part.weight)
                        nn.init.constant_(part.bias, 0.01)

            def forward(self, x):
                for part in self.module_list:
                    x = part(x)
                return x


        class Small(nn.Module):
            def __init__(self, o_dim):
                super().__init__()
                self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
                self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
                self.fc = nn.Linear(4, o_dim)

            def forward(self, x):
                x = torch.relu(self.bn1(self.conv1(x)))
                x = torch.relu(x + self.bn2(self.conv2(x)))
                return self.fc(x.mean((2, 3)))


        def get_model(config):
            if config["model::type"] == "CNN3":
                return CNN3(config["model::channels_in"], config.get("model::o_dim", 10))
            return Small(config["model::o_dim"])
    """,
    "data/datasets/zoo_dataset.py": """
        import json

        import torch

        from sane.data.checkpoint import Checkpoint
        from sane.data.datasets.zoo_dataset_models import get_model


        def _unwrap_state_dict(state):
            return state.get("model_state_dict", state)


        def _reconcile_model_output_dim(config, state):
            return {**config, "model::o_dim": len(state[list(state)[-1]])}


        class ZooDataset:
            def __init__(self, infos, augmentations=None):
                self.__ckpt_info_list, self.augmentations = infos, augmentations

            def __len__(self):
                return len(self.__ckpt_info_list)

            def __getitem__(self, index):
                info = self.__ckpt_info_list[index]
                with open(info.model_config_path) as file:
                    config = json.load(file)
                with open(info.eval_results_path) as file:
                    results = [json.loads(line) for line in file][info.epoch_idx]
                state = _unwrap_state_dict(torch.load(info.state_dict_path, map_location="cpu"))
                config = _reconcile_model_output_dim(config, state)
                model = get_model(config)
                model.load_state_dict(state)
                checkpoint = Checkpoint(model, metadata={"model_config": config, "eval_results": results})
                return checkpoint if self.augmentations is None else self.augmentations(checkpoint)
    """,
    "data/datasets/cached_windowed_dataset.py": """
        class CachedWindowedDataset:
            def __init__(self, count):
                self._cache_mode, self._cached_checkpoints, self.count, self.saved = "per_window", set(), count, []

            def _save_cache_metadata(self):
                self.saved.append(len(self._cached_checkpoints))

            def _ensure_checkpoint_cached(self, index):
                self._cached_checkpoints.add(index)
                self._save_cache_metadata()

            def preload_cache(self, checkpoint_indices=None):
                for index in range(self.count) if checkpoint_indices is None else checkpoint_indices:
                    self._ensure_checkpoint_cached(index)
    """,
    "loss/loss.py": """
        import torch
        from torch import nn


        class SANELoss(nn.Module):
            def __init__(self, name):
                super().__init__()
                self.name = name if name.startswith("loss_") else "loss_" + name


        class CompositeLoss(SANELoss):
            def __init__(self, name, losses, ratios):
                super().__init__(name)
                self.losses, self.ratios = nn.ModuleList(losses), ratios

            def forward(self, tensors):
                out = {"loss": torch.zeros(1)}
                for loss, ratio in zip(self.losses, self.ratios):
                    part = loss(tensors)
                    out["loss"] = out["loss"] + ratio * part.pop("loss")
                    out.update(part)
                out[self.name] = out["loss"]
                return out
    """,
    "loss/reconstruction.py": """
        import torch
        from sane.loss.loss import SANELoss


        class MSEReconstructionLoss(SANELoss):
            def __init__(self, name="loss_mse_reconstruction", reduction="mean", normalize="token", std_eps=1e-6):
                super().__init__(name)
                self.reduction, self.normalize, self.std_eps = reduction, normalize, std_eps

            def forward(self, tensors):
                if "x_i" in tensors and "x" not in tensors:
                    one, two = (self.forward({k: tensors[f"{k}_{v}"] for k in ("x", "x_hat", "mask", "z")}) for v in "ij")
                    return {k: (one[k] + two[k]) / 2 for k in one}
                x, y = tensors["x"].double(), tensors["x_hat"].double()
                keep = tensors["mask"].bool() if "mask" in tensors else torch.ones_like(x, dtype=torch.bool)
                if x.isnan().any() or y.isnan().any():
                    raise ValueError("NaN")
                scale = torch.ones_like(x)
                if self.normalize == "batch":
                    scale = scale * (x[keep].std() + self.std_eps)
                elif self.normalize:
                    axes = (1, 2) if self.normalize == "window" else (0, 1)
                    counts = keep.sum(axes, keepdim=True).clamp(min=1)
                    mean = x.sum(axes, keepdim=True) / counts
                    scale = scale * ((((x - mean) ** 2 * keep).sum(axes, keepdim=True) / counts).sqrt() + self.std_eps)
                squares = (((y - x) / scale)[keep]) ** 2
                loss = squares.mean() if self.reduction == "mean" else squares.sum() if self.reduction == "sum" else squares
                rsq = 1 - ((y - x)[keep] ** 2).sum() / ((x[keep] - x[keep].mean()) ** 2).sum()
                ratio = keep.sum() / tensors["z"].numel() if "z" in tensors else None
                return {"loss": loss, self.name: loss, self.name + "_rsq": rsq, "mask_ratio": keep.sum() / keep.numel(), "compression_ratio": ratio}
    """,
    "loss/contrastive.py": """
        import torch
        from sane.loss.loss import SANELoss


        class NTXentLoss(SANELoss):
            def __init__(self, name="loss_contrastive", temperature=0.1):
                super().__init__(name)
                self.temperature = temperature

            def forward(self, tensors):
                z = torch.cat([tensors["z_p_i"], tensors["z_p_j"]]).double()
                k, total = len(z) // 2, 0.0
                similar = [[torch.cosine_similarity(a, b, dim=0) / self.temperature for b in z] for a in z]
                for u in range(2 * k):
                    others = torch.stack([similar[u][v] for v in range(2 * k) if v != u])
                    total = total - similar[u][(u + k) % (2 * k)] + others.logsumexp(0)
                return {"loss": total / (2 * k), self.name: total / (2 * k)}
    """,
    "loss/__init__.py": """
        from sane.loss.loss import SANELoss, CompositeLoss
        from sane.loss.reconstruction import MSEReconstructionLoss
        from sane.loss.contrastive import NTXentLoss
    """,
    "trainer/__init__.py": """
        import sane.loss
        from sane.loss import SANELoss


        class SANETrainer:
            def setup(self, config):
                settings = dict(config["loss"])
                kind = getattr(sane.loss, settings.pop("class"))
                assert issubclass(kind, SANELoss)
                self.loss_fn = kind(**settings)


        class SANEContrastiveTrainer(SANETrainer):
            pass
    """,
}
PACKAGES = sorted({str(parent) for path in FILES for parent in Path(path).parents if str(parent) != "."})
CNN3 = {"model::type": "CNN3", "model::channels_in": 3, "model::o_dim": 10, "model::nlin": "relu"}


def lay_out(folder: Path, **changes: tuple[str, str]) -> None:
    """Write the package under ``folder``; ``changes`` replaces one text by another wherever it stands (signature drift)."""
    for path, text in {**{f"{p}/__init__.py": "" for p in (".", *PACKAGES)}, **FILES}.items():
        target = folder / "sane" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        text = textwrap.dedent(text)
        for old, new in changes.values():
            text = text.replace(old, new)
        target.write_text(text)
    importlib.invalidate_caches()


def forget() -> None:
    """Drop the package from the loaded modules."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "sane":
            del sys.modules[name]


def load() -> SimpleNamespace:
    """Every module of the package by the last part of its name."""
    names = [path[:-3].replace("/", ".").removesuffix(".__init__") for path in FILES]
    return SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(f"sane.{name}") for name in names})


@pytest.fixture
def sane2(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The package, imported, and forgotten afterwards."""
    forget()
    folder = tmp_path_factory.mktemp("package")
    lay_out(folder)
    monkeypatch.syspath_prepend(folder)
    yield load()
    forget()


def trial(
    folder: Path, config: dict[str, Any], model: torch.nn.Module, epoch: int = 3, name: str = "NN_tune_trainable_0"
) -> SimpleNamespace:
    """One model of a zoo on disk, and what the package knows about it."""
    home = folder / name
    place = home / f"checkpoint_{epoch:06d}"
    place.mkdir(parents=True, exist_ok=True)
    (home / "params.json").write_text(json.dumps(config))
    (home / "result.json").write_text("".join(json.dumps({"epoch": e, "test_acc": e / 10}) + "\n" for e in range(epoch + 1)))
    torch.save(model.state_dict(), place / "checkpoints")
    return SimpleNamespace(
        epoch_idx=epoch,
        state_dict_path=str(place / "checkpoints"),
        model_config_path=str(home / "params.json"),
        eval_results_path=str(home / "result.json"),
    )
