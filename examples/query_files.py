"""Query files of images that a digits zoo has never seen: letters (similar, but different) and photographs (out of distribution).

Run: python examples/query_files.py runs      then: wslfast ablate examples/ablations/other_images.toml --out runs/ablations
Needs matplotlib (for its fonts) and scikit-image (for its photographs).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from skimage import color, data

from wslfast.queries import save_queries

SIZE, COUNT = 28, 1200
FONTS = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")


def letters(rng: np.random.Generator) -> np.ndarray:
    """White capital letters on black, in three fonts, moved, turned and blurred to the sharpness of 8x8 digits."""
    faces = [ImageFont.truetype(font_manager.findfont(name), 22) for name in FONTS]
    images = []
    for _ in range(COUNT):
        page = Image.new("L", (SIZE, SIZE))
        letter, face = chr(ord("A") + rng.integers(26)), faces[rng.integers(len(faces))]
        ImageDraw.Draw(page).text(tuple(SIZE / 2 + rng.uniform(-2, 2, 2)), letter, fill=255, font=face, anchor="mm")
        page = page.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR).resize((8, 8), Image.Resampling.BOX)
        images.append(np.asarray(page.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
    return np.stack(images)


def photographs(rng: np.random.Generator) -> np.ndarray:
    """Grey patches of photographs at several scales."""
    sources = [data.camera(), *(color.rgb2gray(photo()) * 255 for photo in (data.astronaut, data.coffee, data.chelsea, data.rocket))]
    images = []
    for _ in range(COUNT):
        photo, side = sources[rng.integers(len(sources))], int(rng.integers(SIZE, 4 * SIZE))
        top, left = (rng.integers(s - side) for s in photo.shape)
        patch = Image.fromarray(photo[top : top + side, left : left + side].astype(np.float32))
        images.append(np.asarray(patch.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return np.stack(images)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="where the two files go (default: runs)")
folder = parser.parse_args().folder
for name, draw in (("letters", letters), ("photographs", photographs)):
    images = torch.from_numpy(draw(np.random.default_rng(0)).astype(np.float32)).unsqueeze(1)
    save_queries(folder / f"{name}.npz", (images - images.mean()) / images.std())
    print(folder / f"{name}.npz")
