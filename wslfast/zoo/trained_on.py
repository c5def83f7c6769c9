"""What a zoo's models were trained on: recorded when a zoo is made, found again when it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..architecture import Architecture
from ..errors import WslfastError, describe, logger, require
from ..files import sha256_of, write_arrays
from .catalogue import NAMES
from .coordinates import is_grid
from .datasets import Dataset, load_dataset
from .manifest import SPLITS
from .reading import read_manifest

NETWORKS = {"cnn": Architecture.cnn, "cnn2": Architecture.cnn2, "cnn3": Architecture.cnn3, "lenet5": Architecture.lenet5}
IMAGES = "images.npz"  # in a zoo's folder: images that are in no other file


@dataclass(frozen=True)
class Images:
    """A zoo's images as its manifest records them.

    Attributes:
        record: ``provenance["dataset"]``.
        data: images that no file holds; None where one does.
    """

    record: dict[str, Any]
    data: Dataset | None = None

    def keep(self, folder: Path) -> dict[str, Any]:
        """The record, when images that no file holds have been put into the zoo's folder."""
        if self.data is None:
            return self.record
        arrays: dict[str, Any] = {}
        for split in SPLITS:
            images, labels = self.data.split(split)
            arrays |= {f"{split}_images": images.cpu().numpy(), f"{split}_labels": labels.cpu().numpy()}
        write_arrays(folder / IMAGES, arrays)
        return {**self.record, "sha256": sha256_of(folder / IMAGES)}


def described(
    dataset: str | Path | Dataset,
    architectures: Sequence[Architecture],
    standardise: bool,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    grey: bool = False,
    **further: Any,
) -> Images:
    """The record of a data set that models of these architectures were trained on; ``further`` entries are added to it.

    Args:
        standardise, mean, std, grey: what was done to its images, as :func:`load_dataset` has it; of a :class:`Dataset` nothing is.

    Raises WslfastError for images that cannot be read or do not fit, and more classes than a network has outputs.
    """
    data = dataset
    done: dict[str, Any] = {"standardise": standardise, "mean": mean, "std": std, "grey": grey, "unlabelled": True}
    for architecture in architectures:
        if not isinstance(dataset, Dataset):
            data = load_dataset(dataset, architecture.input_shape, **done)
            if data.classes == architecture.num_classes + 1 and min(int(data.split(split)[1].min()) for split in SPLITS) == 1:
                done["first_label"] = 1  # as the network cannot have been trained on its owner's labels as they are
                logger.info("wslfast: %s: labels go from 1 to %d, and are counted from 0 here", data.name, data.classes - 1)
                data = load_dataset(dataset, architecture.input_shape, **done)
        assert isinstance(data, Dataset)
        came = tuple(data.train_images.shape[1:])
        fits = came == architecture.input_shape
        wanted = f"expected images {list(architecture.input_shape)} for {architecture.name!r}"
        require(fits, f"data set {data.name!r}: {wanted}, got {list(came)}")
        most = architecture.num_classes
        what = f"data set {data.name!r}: {data.classes} classes, and architecture {architecture.name!r} has {most} outputs"
        remedy = f"labels go up to {data.classes - 1}; where they are no classes, leave them out of the file"
        require(data.classes <= most, f"{what} ({remedy})")
    assert isinstance(data, Dataset)
    record = {"name": data.name, "classes": data.classes, **data.provenance, **further}
    if record["name"] in NAMES or is_grid(data.name) or "sha256" in record:
        return Images(record)
    known = {key: value for key, value in record.items() if key in ("mean", "std", "sizes")}
    saw = {"standardised": record.get("standardise")} if "standardise" in record else {}
    return Images({"name": IMAGES, "called": data.name, "classes": data.classes, **known, **saw, "seed": 0, "standardise": False}, data)


def dataset_of(zoo: str | Path, architecture: Architecture) -> Dataset:
    """The data set that a zoo's manifest names, in the architecture's shape, split and standardised as it was for the zoo.

    A manifest that does not say whether images were standardised is of a version that always did.

    Raises:
        WslfastError: the manifest names none, or the file has moved or is not the one the zoo was trained on.
    """
    provenance = read_manifest(zoo).provenance
    record: Any = provenance.get("dataset")
    require(
        isinstance(record, Mapping) and isinstance(record.get("name"), str) and type(record.get("seed", 0)) is int,
        f"zoo {zoo}: its manifest does not say which data set it was trained on; store the zoo with its data set (zoo import --dataset, "
        "save_zoo(dataset=)); to train alone, query images without any will do (--query-set noise, images=)",
    )
    fitted = record.get("signals") == "own"
    require(not fitted, f"zoo {zoo}: its models are fitted to signals of their own ({record['name']!r}); there is no data set to read")
    named = record["name"] in NAMES or is_grid(record["name"])
    source = record["name"] if named else _file(Path(zoo), record)
    if not named:
        moved = "put the file into the zoo's folder, or beside it"
        require(Path(source).exists(), f"zoo {zoo}: its data set {record['name']!r} was {source}, which is not there; {moved}")
    root = record.get("root")
    if root is not None and not Path(str(root)).is_dir():
        root = None  # from another machine: perhaps the files are in the usual places
    standardise = record.get("standardise", True)
    require(type(standardise) is bool, f"zoo {zoo}: its manifest says standardise {describe(standardise)}; expected true or false")
    given = {name: record[name] for name in ("mean", "std") if record.get("given") is True and isinstance(record.get(name), list)}
    given |= {"grey": record.get("grey") is True, "unlabelled": record.get("labels") == "none"}
    given |= {"first_label": 1} if record.get("first_label") == 1 else {}
    seed = record.get("seed", 0)
    try:
        data = load_dataset(str(source), architecture.input_shape, seed=seed, root=root, standardise=standardise, **given)
    except WslfastError as error:
        raise WslfastError(f"zoo {zoo}: the data set it was trained on cannot be read: {error}") from None
    recorded, digest = record.get("sha256"), data.provenance.get("sha256")
    what = f"data set {source!r} is not what" if record["name"] in NAMES else f"{source} is not the file"
    require(recorded == digest, f"zoo {zoo}: {what} it was trained on (its SHA-256 differs)")
    kept = {key: record[key] for key in ("peak",) if isinstance(record.get(key), (int, float))}
    return replace(data, name=str(record.get("called", data.name)), provenance={**data.provenance, **kept})


def _file(zoo: Path, record: Mapping[str, Any]) -> Path:
    """The data set's file: beside the zoo or in its folder, so that both can move together, else where it was."""
    name = Path(str(record["name"])).name
    candidates = [place for place in (zoo / name, zoo.resolve().parent / name) if place.is_file()]
    was = Path(str(record.get("path", name)))
    if candidates and was.is_file():  # another file of that name may lie beside the zoo
        candidates = [place for place in candidates if place.samefile(was) or sha256_of(place) == record.get("sha256")]
    return candidates[0] if candidates else was


def dataset_record(zoo: str | Path) -> dict[str, Any]:
    """What a zoo's manifest says of its data set, for another zoo's: with the place of its file. Empty where it says nothing."""
    record: Any = read_manifest(zoo).provenance.get("dataset")
    if not isinstance(record, Mapping) or not isinstance(record.get("name"), str):
        return {}
    entry = dict(record)
    if "sha256" in entry and entry["name"] not in NAMES:
        entry["path"] = str(_file(Path(zoo), entry).resolve())
    return entry


def network(name: str, channels: int | None = None, *, dropout: float = 0.0) -> Architecture:
    """A published network by name, with ``channels`` input channels (default: the published number)."""
    require(name in NETWORKS, f"architecture: expected one of {sorted(NETWORKS)}, got {name!r}")
    return NETWORKS[name](dropout=dropout) if channels is None else NETWORKS[name](channels, dropout=dropout)
