"""A zoo's card: what it holds, as a table in Markdown, and as one picture. Both are made from the manifest alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..zoo import read_manifest
from ..zoo.reading import summarize
from .drawing import INK, SOFT, require_matplotlib, sheet, to_png

PICTURE = "zoo.png"
_SPLITS = {"train": "#0072b2", "val": "#e69f00", "test": "#d55e00"}
_ACCURACIES = {"train_acc": "training images", "val_acc": "validation images", "test_acc": "test images"}
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)  # the Hub's size categories end here
_NAMES = ("1K", "10K", "100K", "1M", "10M")


def zoo_card(zoo: str | Path, repository: str, *, picture: bool = True) -> str:
    """The README of a zoo's repository on the Hub: front matter, picture, table, and how it is read.

    Args:
        zoo: folder of the zoo.
        repository: ``USER/NAME``.
        picture: whether :func:`zoo_picture` lies beside it as ``zoo.png``.
    """
    summary = summarize(zoo)
    name = repository.rpartition("/")[2]
    shown = f"![Test accuracy of the zoo's models]({PICTURE})\n\n" if picture else ""
    networks = summary.get("architecture") or ", ".join(summary.get("architectures", ()))
    return f"""---
pretty_name: {_scalar(name)}
tags:
- weight-space-learning
- model-zoo
- wslfast
size_categories:
- {_size(summary["rows"])}
viewer: false
---

# {_text(name)}

A zoo of {summary["models"]:,} trained neural networks ({_text(networks)}), {summary["rows"]:,} checkpoints in all: a data set for learning
on weights. Each row of `weights` in the safetensors shards is one network; `manifest.json` says what it is and how well it does.

{shown}{_table(_facts(summary))}

{_table(_accuracies(summary))}

```sh
wslfast zoo pull {repository} {name}
```

```python
import wslfast

population = wslfast.load_zoo("{name}", "train")  # population.weights [k, P], population.properties, population.architecture
```

Nothing in these files is code, and reading them runs none: sizes and SHA-256 of every shard are in the manifest and are checked.
"""


def zoo_picture(zoo: str | Path) -> bytes:
    """The zoo as a PNG: test accuracy by split, and over epochs where there are several. Raises WslfastError if matplotlib is missing."""
    require_matplotlib()
    table = read_manifest(zoo).properties
    column = next((name for name in ("test_acc", "val_acc", "train_acc") if any(_known(v) for v in table.get(name, ()))), None)
    epochs = sorted({e for e in table.get("epoch", ()) if type(e) is int})
    recorded: Sequence[Any] = table[column] if column is not None else ()
    with sheet(2.6, 7.4) as (page, _):
        left, right = page.subplots(1, 2)
        for split, color in _SPLITS.items():
            rows = [j for j, own in enumerate(table["split"]) if own == split]
            values = [100 * recorded[j] for j in rows if recorded and _known(recorded[j])]
            if values:
                left.hist(values, bins=list(range(0, 101, 4)), color=color, alpha=0.55, label=f"{split}: {len(rows)} checkpoints")
            means = [
                [100 * recorded[j] for j in rows if table["epoch"][j] == e and _known(recorded[j])] for e in (epochs if recorded else ())
            ]
            points = [(e, sum(own) / len(own)) for e, own in zip(epochs, means) if own]
            if points:
                right.plot(*zip(*points), "o-", color=color, markersize=4, linewidth=1.4, label=split)
        for axes, x, y in (
            (left, f"accuracy on {_ACCURACIES[column]} (%)" if column else "accuracy (%)", "checkpoints"),
            (right, "epoch", "mean accuracy (%)"),
        ):
            axes.set_xlabel(x)
            axes.set_ylabel(y, color=INK)
            axes.grid(axis="y")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7.5)
            else:
                axes.text(0.5, 0.5, "not recorded", ha="center", color=SOFT, transform=axes.transAxes)
        left.set_title("Accuracy of the zoo's models")
        right.set_title("Over training")
        return to_png(page, 150)


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _facts(summary: Mapping[str, Any]) -> list[Sequence[Any]]:
    provenance = summary["provenance"]
    dataset = provenance.get("dataset")
    shape = summary.get("input_shape")
    rows: list[Sequence[Any]] = [("", "")]
    rows.append(("models", f"{summary['models']:,} ({summary['rows']:,} checkpoints)"))
    if "architectures" in summary:
        for name, own in summary["architectures"].items():
            rows.append((f"architecture {name}", f"{own['models']:,} models, {own['weights_per_model']:,} weights"))
    else:
        rows.append(("architecture", f"{summary['architecture']}, {summary['weights_per_model']:,} weights per model"))
    rows += [("input", " x ".join(map(str, shape)))] if isinstance(shape, (list, tuple)) else []
    rows += [("splits, by model", ", ".join(f"{name} {s['models']:,}" for name, s in summary["splits"].items() if s["models"]))]
    rows += [("epochs kept", ", ".join(map(str, summary["epochs"])))] if summary["epochs"] else []
    rows += [("data set", dataset["name"])] if isinstance(dataset, Mapping) and "name" in dataset else []
    rows += [("size", f"{summary['bytes']:,} bytes in {summary['shards']:,} shards")]
    rows += [("properties of each", ", ".join(summary["properties"]))]
    rows += [("made by", f"{provenance['made_by']} {provenance.get('wslfast', '')}".strip())] if "made_by" in provenance else []
    return rows


def _accuracies(summary: Mapping[str, Any]) -> list[Sequence[Any]]:
    names = {**_ACCURACIES, "ggap": "generalisation gap"}
    lines = [(names[name], *(f"{100 * v:.1f}" for v in values)) for name, values in summary["quantiles"].items()]
    return [("accuracy, %", "least", "quartile", "median", "quartile", "greatest"), *lines] if lines else []


def _table(rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    first, *rest = (f"| {' | '.join(_text(cell) for cell in row)} |" for row in rows)
    return "\n".join([first, "|---" * len(rows[0]) + "|", *rest])


def _text(value: Any) -> str:
    """A stranger's words as text: no markup of theirs, one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", re.sub(r"\s+", " ", str(value)))


def _scalar(value: str) -> str:
    """A string as YAML reads it back."""
    return "'" + value.replace("'", "''") + "'"


def _size(rows: int) -> str:
    for i, most in enumerate(_SIZES):
        if rows < most:
            return f"n<{_NAMES[0]}" if i == 0 else f"{_NAMES[i - 1]}<n<{_NAMES[i]}"
    return "n>10M"
