"""What an evaluation runs on: its sizes, and a zoo that is loaded once for all that is measured on it."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..files import sha256_of
from ..measure.diversity import accuracy, accuracy_of_classes, classes_of, labels_of, outputs_of, sorted_channels
from ..measure.generation import best_rows, val_accuracy
from ..measure.recorded import check_recorded
from ..measure.results import fingerprint
from ..population import Population
from ..zoo import Dataset, dataset_of, load_zoo, read_manifest
from ..zoo.manifest import KIND, MANIFEST, SPLITS

VERSION = 2  # of what is measured; part of every fingerprint


@dataclass(frozen=True)
class Protocol:
    """Sizes of an evaluation; the defaults are the full one."""

    models: int = 720
    """Models of a split at most, evenly spaced (the published test zoo has 720 checkpoints)."""
    train_models: int = 4000
    """Training models at most, for probes, anchors and closed-form codes."""
    images: int = 2000
    """Test images at most."""
    samples: int = 64
    """Generated models a sampler."""
    anchors: float = 0.3
    """Share of the training models to sample around."""
    bandwidths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    """Of the kernel densities."""
    tolerance: float = 0.02
    """Validation accuracy that generated models may lose against the anchors' reconstructions (chooses the bandwidth)."""
    finetune_epochs: int = 5
    """Epochs of fine-tuning of the generated models."""
    finetune_images: int = 4000
    """Training images at most, for the fine-tuning."""
    probe_images: int = 512
    """Images, their labels unused, on which networks answer for the probes of behavior."""
    map_models: int = 600
    """Models on the latent map."""
    shares: tuple[float, ...] = (0.24, 0.4, 0.55, 0.67)
    """Latent sizes, as shares of the parameters, at which the closed-form codes are measured besides those of the runs (no models
    are sampled from these)."""
    refine_steps: int = 300
    """Steps by which latents of closed-form codes are refined at test time (reported apart); 0: none are."""
    refine_images: int = 4096
    """Training images at most, for that."""
    seed: int = 0
    """Seed of samples and resamples."""

    @property
    def sizes(self) -> dict[str, Any]:
        """All of them but those of the refinement, which are in the fingerprints of the units that are refined."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("refine_")}

    @property
    def digest(self) -> str:
        """Digest of the sizes, which tells apart what was measured with others."""
        return fingerprint(VERSION, self.sizes)

    @classmethod
    def quick(cls) -> Protocol:
        """A few minutes on two cores."""
        few = {"models": 90, "train_models": 400, "images": 400, "samples": 24, "map_models": 200}
        return cls(**few, bandwidths=(0.1, 0.3), shares=(), finetune_epochs=2, finetune_images=1000, refine_steps=0)  # type: ignore[arg-type]

    @classmethod
    def whole(cls) -> Protocol:
        """All models and all images."""
        return cls(models=sys.maxsize, train_models=sys.maxsize, images=sys.maxsize)


class LoadedZoo:
    """One zoo, loaded once for all that is measured on it.

    Attributes:
        folder: where it is. name: what tables call it, its data set's name. digest: of its manifest, which holds its shards' digests.
        train, val, test: populations of at most the protocol's sizes; ``val`` is None where there are no such models.
        data: images, those of the test split cut to ``protocol.images``. labelled: whether answers are classes.
        whole: name of the zoo; of one of several architectures, ``name`` is that and the architecture's label.
        facts: what it holds, for the page.
    """

    def __init__(
        self, zoo: str | Path, protocol: Protocol, *, device: str = "cpu", name: str | None = None, architecture: str | None = None
    ) -> None:
        self.folder, self.protocol, self.device = Path(zoo), protocol, device
        manifest = read_manifest(zoo)
        self.digest = sha256_of(self.folder / MANIFEST)
        labels = (None,) * manifest.rows if architecture is None else manifest.properties[KIND]
        rows_of = [split for split, label in zip(manifest.properties["split"], labels, strict=True) if label == architecture]
        splits = set(rows_of)
        require("train" in splits and "test" in splits, f"zoo {zoo}: expected train and test models, got splits {sorted(splits)}")
        self.train = evenly(load_zoo(zoo, "train", architecture=architecture), protocol.train_models).to(device)
        self.test = evenly(load_zoo(zoo, "test", architecture=architecture), protocol.models).to(device)
        self.val = evenly(load_zoo(zoo, "val", architecture=architecture), protocol.models).to(device) if "val" in splits else None
        self.architecture = self.train.architecture
        data = dataset_of(zoo, self.architecture)
        self.labelled = labels_of(data, "test", self.architecture) is not None
        self._test_images = len(data.test_labels)  # before they are cut
        rows = torch.arange(self._test_images)[: protocol.images]
        self.data: Dataset = replace(data, test_images=data.test_images[rows].to(device), test_labels=data.test_labels[rows].to(device))
        self.whole = name or data.name
        self.name = self.whole if architecture is None else f"{self.whole}, {architecture}"
        self.facts = {
            "folder": str(zoo),
            "digest": self.digest[:12],
            "dataset": data.name,
            "architecture": architecture or self.architecture.name,
            "parameters": self.architecture.num_weights,
            "classes": data.classes,
            "image_shape": list(data.test_images.shape[1:]),
            "images": [len(data.train_labels), len(data.val_labels), len(data.test_labels)],
            "images_used": len(rows),
            "checkpoints": {s: rows_of.count(s) for s in SPLITS if s in splits},
            "checkpoints_used": {s: len(p) for s, p in self.splits.items()},
            "models": len({m for m, label in zip(manifest.properties["model"], labels, strict=True) if label == architecture}),
            "made_by": manifest.provenance.get("made_by"),
            "epochs": sorted({e for e in manifest.properties.get("epoch", ()) if e is not None}),
            "seed": manifest.provenance.get("seed"),
        }

    @property
    def splits(self) -> dict[str, Population]:
        return {"train": self.train, "test": self.test} | ({} if self.val is None else {"val": self.val})

    @cached_property
    def targets(self) -> Tensor:
        """Outputs of the test models on the test images; their accuracy is held against the zoo's."""
        outputs = outputs_of(self.test.weights, self.data.test_images, self.architecture)
        if self.labelled:
            check_recorded(self.test, accuracy(outputs, self.data.test_labels), self.data, self.folder, of=self._test_images)
        return outputs

    @cached_property
    def anchors(self) -> Tensor:
        """Rows of the training models to sample around: the best share by validation accuracy, best first."""
        return best_rows(val_accuracy(self.train, self.data), self.protocol.anchors)

    @cached_property
    def train_classes(self) -> Tensor:
        """Classes that the training models choose on the test images."""
        return classes_of(self.train.weights, self.data.test_images, self.architecture)

    @cached_property
    def train_accuracy(self) -> Tensor:
        """Test accuracy of every training model, on the CPU."""
        return accuracy_of_classes(self.train_classes, self.data.test_labels)

    @cached_property
    def train_sorted(self) -> Tensor:
        """Training models' weights with channels in a canonical order."""
        return sorted_channels(self.train.weights, self.architecture)

    def fingerprint(self, *parts: Any) -> str:
        """Digest of the protocol, the zoo, and the other ``parts`` that a unit is computed from."""
        return fingerprint(VERSION, self.protocol.sizes, self.digest, *parts)


def evenly(population: Population, most: int) -> Population:
    """At most so many models, evenly spaced in the zoo's order (so all epochs of some models, or some of all)."""
    k = len(population)
    return population if k <= most else population[((2 * torch.arange(most) + 1) * k // (2 * most)).tolist()]
