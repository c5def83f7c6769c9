"""The accuracy that was measured beside the one that a zoo records: where they differ, the images are not those the models know."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import require, say_once
from ..population import Population
from ..zoo import Dataset

HALF_A_POINT = 0.005


def check_recorded(population: Population, measured: Tensor, data: Dataset, zoo: str | Path, *, of: int | None = None) -> float | None:
    """The mean absolute difference over models between ``measured`` and the property ``test_acc``; None where nothing is recorded.

    More than half a point is one warning that names the likely causes.

    Args:
        population: the models.
        measured: their accuracy on test images of ``data``, ``[k]``; NaN where undefined.
        data: the images, for what was done to them.
        zoo: folder, for the warning.
        of: how many test images there are, if ``data`` holds fewer: then chance (three standard errors) is allowed for.
    """
    require(len(measured) == len(population), f"measured: expected {len(population)} accuracies, got {len(measured)}")
    column = population.properties.get("test_acc", ())
    pairs = [(m, float(r)) for m, r in zip(measured.tolist(), column) if isinstance(r, (int, float)) and m == m and r == r]
    if not pairs:
        return None
    apart = sum(abs(m - r) for m, r in pairs) / len(pairs)
    few = of is not None and of > len(data.test_labels)
    chance = 3 * (0.25 / len(data.test_labels)) ** 0.5 if few else 0.0
    if apart > HALF_A_POINT + chance:
        own, recorded = (sum(values) / len(pairs) for values in zip(*pairs))
        done = "as they are" if data.provenance.get("standardise") is False else "standardised"
        pair = len(data.provenance.get("sizes", ())) == 3 and data.provenance.get("split") == "drawn"
        drawn = " (its file has one pair images, labels, so that they were drawn here: name train_images, ... test_labels)" if pair else ""
        percent = "; percent where shares are expected" if recorded > 1 else ""
        say_once(
            f"wslfast: zoo {zoo}: {len(pairs)} models are right on {own:.3f} of the test images, their test_acc says {recorded:.3f} (mean "
            f"difference {apart:.3f}). Likely causes: the models saw other pixels (data set {data.name!r} is taken {done} here), other "
            f"test images or labels{drawn}, results of another epoch, another architecture or activation{percent}"
        )
    return apart
