"""Paint the crops that a training is given into one picture, to see whether they look like tissue.

    python workflows/experiments/crops.py --data DIR --mpp MPP --out crops.png [--first N] [--plain] [settings of train]

24 crops in rows of six, as the network is given them, with the outlines of the nuclei to be learnt. With the settings
of a recipe they are its crops: number N is the first of step N / --batch.
"""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import App, Parameter
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.config import Architecture
from pipeline.files import committed, refuse_folder
from slides.errors import NightslideError
from training.cli import Datasets, Flat, Network, Scales, Splits
from training.config import Training
from training.data.crops import Crop, Crops
from training.data.datasets import read_datasets
from training.fit import split_held_out

ROWS, COLUMNS, GAP_PX = 4, 6, 4
OUTLINE = (255, 230, 0)  # visible on pink and on purple

app = App(help=__doc__, help_format="plaintext")


def painted(crop: Crop, *, plain: bool) -> NDArray[np.uint8]:
    """The crop's pixels (S, S, 3), with the nuclei's outlines along their inner edge unless `plain`."""
    pixels: NDArray[np.uint8] = crop.image.permute(1, 2, 0).numpy().copy()
    numbers = () if plain else range(1, 1 + len(crop.boxes))
    for mask in (crop.nuclei.numpy() == number for number in numbers):
        pixels[mask & ~ndimage.binary_erosion(mask)] = OUTLINE
    return pixels


@app.default
def paint(
    *,
    data: Datasets,
    out: Path,
    split: Splits = (),
    mpp: Scales = (),
    first: int = 0,
    plain: Annotated[bool, Parameter(negative="")] = False,
    training: Annotated[Training, Flat] = Training(),
    architecture: Annotated[Architecture, Network] = Architecture(),
) -> int:
    """Paint crops; --data, --split, --mpp and the settings as they are given to `train`.

    Parameters
    ----------
    out
        The picture, a PNG.
    first
        Number of the first crop.
    plain
        Without outlines.
    """
    refuse_folder(out)
    datasets = [
        d._replace(images=tuple(split_held_out(d.images, training.hold_out, training.seed)[0]))
        for d in read_datasets(data, split, mpp)
    ]
    side = round(training.crop_px * architecture.upscale)
    crops = Crops(datasets, side, architecture.mpp / architecture.upscale, training)
    step = side + GAP_PX
    sheet = Image.new("RGB", (COLUMNS * step - GAP_PX, ROWS * step - GAP_PX), (255, 255, 255))
    for place in range(ROWS * COLUMNS):
        row, column = divmod(place, COLUMNS)
        sheet.paste(Image.fromarray(painted(crops[first + place], plain=plain)), (column * step, row * step))
    with committed(out) as part:
        sheet.save(part, "PNG")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(app())
    except NightslideError as error:
        print(f"crops: {error}", file=sys.stderr)
        sys.exit(2)
