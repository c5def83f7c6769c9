"""Texture identification: 32x32 colour patches of ten scikit-image photographs; the label is the photograph.

Photographs are cut into cells of 64x64 pixels, and every cell belongs to one split, so no pixel of a test patch occurs in a
training patch. The three grey photographs get a random tint at every patch, as greyness alone would give their label away.
"""

from __future__ import annotations

import numpy as np

from ..errors import WslfastError

PHOTOGRAPHS = (
    "astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket", "brick", "grass", "gravel",
)  # fmt: skip
PATCH, CELL = 32, 64
_COUNTS = {"train": 300, "val": 50, "test": 100}  # patches of each photograph
_SHARES = (0.7, 0.1)  # of the cells, for train and val
_FLAT_CELL, _FLAT_PATCH = 6.0, 2.0  # cells and patches whose grey values (0 to 255) vary less show nothing: a black border, an empty sky
_FROZEN = 20_250_317


def photo_patches(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Patches uint8 ``[N, 32, 32, 3]`` and labels int64 ``[N]`` (the photograph's place in PHOTOGRAPHS) of "train", "val" and "test".

    Args:
        seed: of the cells' split, the places of the patches and the tints; 0 is the frozen set of the published figures.

    Raises:
        WslfastError: scikit-image, or one of its photographs, is missing.
    """
    generator = np.random.default_rng([_FROZEN, seed])
    images: dict[str, list[np.ndarray]] = {split: [] for split in _COUNTS}
    for name in PHOTOGRAPHS:
        photo = _photograph(name)
        grey = photo if photo.ndim == 2 else photo.mean(2)
        cells = generator.permutation(_cells(grey))
        cuts = np.split(cells, [round(_SHARES[0] * len(cells)), round(sum(_SHARES) * len(cells))])
        for (split, count), own in zip(_COUNTS.items(), cuts, strict=True):
            drawn = own[generator.integers(len(own), size=8 * count)] + generator.integers(CELL - PATCH + 1, size=(8 * count, 2))
            corners = [(y, x) for y, x in drawn if grey[y : y + PATCH, x : x + PATCH].std() >= _FLAT_PATCH][:count]
            patches = np.stack([photo[y : y + PATCH, x : x + PATCH] for y, x in corners])
            if grey is photo:
                tints = generator.uniform(0.4, 1.0, (count, 1, 1, 3))
                patches = (patches[..., None] * tints).round().astype(np.uint8)
            images[split].append(patches)
    labels = np.arange(len(PHOTOGRAPHS))
    return {split: (np.concatenate(parts), labels.repeat(_COUNTS[split])) for split, parts in images.items()}


def _photograph(name: str) -> np.ndarray:
    """uint8 ``[H, W, 3]``, or ``[H, W]`` of a grey one."""
    try:
        from skimage import data

        return np.asarray(getattr(data, name)())
    except ImportError:
        raise WslfastError("dataset 'photos' is made of scikit-image's photographs: pip install wslfast[photos]") from None
    except Exception as error:  # a photograph that this version does not bring along would be downloaded
        raise WslfastError(f"dataset 'photos': scikit-image does not hold the photograph {name!r}: {error}") from None


def _cells(grey: np.ndarray) -> np.ndarray:
    """Corners ``[cells, 2]`` of the cells that show something."""
    corners = [(y, x) for y in range(0, grey.shape[0] - CELL + 1, CELL) for x in range(0, grey.shape[1] - CELL + 1, CELL)]
    return np.array([(y, x) for y, x in corners if grey[y : y + CELL, x : x + CELL].std() >= _FLAT_CELL])
