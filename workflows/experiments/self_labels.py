"""Make a dataset of what a run has detected, to train on slides that nobody has annotated (self-training).

    nightslide run SLIDES --out RESULTS --views 8 --detector.score 0.3
    python workflows/experiments/self_labels.py RESULTS --out DATASET [--score 0.7] [--side 768] [--least 15]
    nightslide train --data DATASET --mpp 0.25 --init nuclei ...

Writes squares of the slides at the scale that the run worked at, with label maps. Detections of at least --score are
nuclei. Of the others, which the run has kept, nobody knows what they are: they get pixels from around them, so that
they count neither way. Squares with fewer nuclei than --least are left out, as is what hangs over the slide; of a slide
that is smaller than a square, all of it is one.
"""

import sys
from pathlib import Path

import numpy as np
import shapely
from cyclopts import App
from numpy.typing import NDArray
from PIL import Image
from shapely import STRtree

from pipeline.errors import RunError
from pipeline.files import read_json
from pipeline.layout import RunFolder, SlideFolder
from pipeline.segment.polygons import Polygons, rasterise
from pipeline.segment.record import read_slide_json
from pipeline.segment.tables import geometry, read_nuclei
from slides.errors import NightslideError
from slides.geometry import Box
from slides.slide import open_slide

AROUND_PX = 12  # beside an uncertain detection: its pixels are drawn from there

app = App(help=__doc__, help_format="plaintext")


def label(
    polygons: Polygons, certain: NDArray[np.bool_], pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """The image (h, w, 3) and the label map (h, w) of a square.

    polygons: (N,), px of the square; certain: (N,), which are nuclei; pixels: (h, w, 3)
    """
    shape = (pixels.shape[0], pixels.shape[1])
    labels, image = rasterise(polygons[certain], shape), pixels.copy()
    uncertain = (rasterise(polygons[~certain], shape) > 0) & (labels == 0)
    generator = np.random.default_rng(0)
    for left, top, right, bottom in shapely.bounds(polygons[~certain]).astype(int):
        rows = slice(max(0, top - AROUND_PX), max(0, bottom + AROUND_PX))
        columns = slice(max(0, left - AROUND_PX), max(0, right + AROUND_PX))
        filled = uncertain[rows, columns]
        around = pixels[rows, columns][~filled & (labels[rows, columns] == 0)]
        if len(around):
            image[rows, columns][filled] = generator.choice(around, int(filled.sum()))
    return image, labels.astype(np.uint16)


def write_squares(folder: SlideFolder, name: str, out: Path, mpp: float, side: int, score: float, least: int) -> int:
    """Write the squares of a finished slide; returns their number. Raises RunError, SlideError, OSError."""
    content = read_slide_json(folder)
    if content is None:
        raise RunError(f"{folder.slide_json} is damaged: run the slide again")
    rows = read_nuclei(folder.nuclei, ["geometry", "score"])
    certain, written = rows["score"].to_numpy() >= score, 0
    with open_slide(content["source_path"], mpp=content["um_per_px"][0]) as slide:
        frame = slide.frame(mpp)
        polygons = shapely.transform(geometry(rows), frame.to_slide.invert)
        width, height = min(side, frame.size.width), min(side, frame.size.height)
        tree = STRtree(polygons)
        for y in range(0, frame.size.height - height + 1, height):
            for x in range(0, frame.size.width - width + 1, width):
                box = Box(x, y, x + width, y + height)
                inside = np.sort(tree.query(shapely.box(*box)))
                if certain[inside].sum() < least:
                    continue
                moved = shapely.transform(polygons[inside], lambda xy, origin=(x, y): xy - origin)
                image, labels = label(moved, certain[inside], slide.read(box, frame))
                for kind, picture in (("images", Image.fromarray(image)), ("labels", Image.fromarray(labels))):
                    (out / kind).mkdir(parents=True, exist_ok=True)
                    picture.save(out / kind / f"{name}_{x}_{y}.png")
                written += 1
    return written


@app.default
def self_labels(results: Path, *, out: Path, score: float = 0.7, side: int = 768, least: int = 15) -> int:
    """Write the dataset; prints how many squares each slide has."""
    run = RunFolder(results)
    about = read_json(run.run_json)
    if about is None:
        raise RunError(f"{run.run_json} is missing or damaged: need the results of a run")
    for folder in run.finished():
        name = run.name_of(folder)
        squares = write_squares(
            folder, name.replace("/", "_"), out, about["settings"]["tiling"]["mpp"], side, score, least
        )
        print(f"{name}: {squares}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(app())
    except NightslideError as error:
        print(f"self_labels: {error}", file=sys.stderr)
        sys.exit(2)
