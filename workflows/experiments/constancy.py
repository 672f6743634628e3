"""Colour constancy: how alike nuclei look over organs, laboratories and scanners, by method of normalisation.

    python workflows/experiments/constancy.py --data ../shared/data [--pictures DIR] [--weights stain]

Prints a markdown table: of the normalised median intensity of the annotated nuclei (NMI, Nyul et al. 2000, Bejnordi
et al. 2016: the median over their pixels of the mean of red, green and blue, by its 95th percentile), the standard
deviation and the coefficient of variation over images; set by set, and over all of them. Every image is fitted alone,
as a slide is, and every method normalises to the median of its own fits, so that no method is favoured by its template.
Seconds per mm2 are of normalising, on one thread, at 0.25 um per px; fitting is done once per slide. DATA holds kumar,
tnbc, nuinsseg, consep_train and dsb2018_tissue.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import StainError
from pipeline.model import dcgmm, stain, stain_fit
from pipeline.model.dcgmm import ClusterNet
from pipeline.model.fitted_stain import METHODS, FittedStain, Normalisation
from pipeline.model.weights import find_weights
from slides.errors import NightslideError
from training.data.datasets import read_dataset
from training.data.sample import Sample

MPP = 0.25


class Set(NamedTuple):
    name: str
    mpp: float
    of_a_group: int  # images taken of each organ or patient; 0: all


SETS = (
    Set("kumar", 0.25, 0),
    Set("tnbc", 0.25, 0),
    Set("nuinsseg", 0.16, 2),
    Set("consep_train", 0.25, 0),
    Set("dsb2018_tissue", 0.25, 0),  # its scale is not stated
)


class Measured(NamedTuple):
    nmi: float
    seconds_per_mm2: float
    failed: bool  # no stain could be fitted: the image is not normalised
    picture: Image.Image


def chosen(images: Sequence[Sample], of_a_group: int) -> Iterator[Sample]:
    taken: dict[str, int] = {}
    for sample in images:
        taken[sample.group] = taken.get(sample.group, 0) + 1
        if not of_a_group or taken[sample.group] <= of_a_group:
            yield sample


def at_scale(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Image uint8 (h, w, 3) and nuclei bool (h, w), at 0.25 um per px."""
    labelled = sample.read()
    height, width = (round(n * sample.mpp / MPP) for n in labelled.labels.shape)
    image = Image.fromarray(labelled.image).resize((width, height), Image.Resampling.BICUBIC)
    nuclei = Image.fromarray(labelled.labels > 0).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(nuclei)


def fit(image: NDArray[np.uint8], method: str, network: ClusterNet | None) -> FittedStain | None:
    try:
        return stain_fit.fit(image[None], np.ones((1, *image.shape[:2]), bool), method, network)
    except StainError:
        return None


def median(fits: Sequence[FittedStain | None], method: str) -> FittedStain:
    """Of every number of the stains, on white glass."""
    numbers = [f.numbers for f in fits if f is not None]
    medians = {name: tuple(np.median([n[name] for n in numbers], axis=0).tolist()) for name in numbers[0]}
    return FittedStain(method, medians if method == "none" else {**medians, "white": (1.0, 1.0, 1.0)})


def measure(
    image: NDArray[np.uint8],
    nuclei: NDArray[np.bool_],
    source: FittedStain | None,
    target: FittedStain,
    network: ClusterNet | None,
) -> Measured:
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    normaliser = None if source is None else stain.Normaliser(Normalisation(source, target), network)
    started = time.process_time()  # of the one thread: other work on the machine does not count
    with torch.inference_mode():
        moved = pixels[0] if normaliser is None else normaliser(pixels)[0]
    seconds = time.process_time() - started
    intensity = moved.mean(0).numpy()[nuclei]
    picture = Image.fromarray((moved.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    nmi = float(np.median(intensity) / np.percentile(intensity, 95))
    area_mm2 = image.shape[0] * image.shape[1] * (MPP / 1000) ** 2
    return Measured(nmi, seconds / area_mm2, source is None, picture)


def spread(measured: Sequence[Measured]) -> str:
    values = np.array([m.nmi for m in measured])
    return f"{values.std():.3f} / {values.std() / values.mean():.3f}"


def sheet(rows: Sequence[Sequence[Image.Image]], side: int = 256) -> Image.Image:
    """Pictures in rows (images) and columns (methods), their middles at full size."""
    whole = Image.new("RGB", (side * len(rows[0]), side * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            whole.paste(picture.crop((left, top, left + side, top + side)), (x * side, y * side))
    return whole


def draw(table: Mapping[str, Sequence[Sequence[Measured]]], folder: Path) -> None:
    """A PNG of each set."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, *_) in enumerate(SETS):
        columns = [sets[number] for sets in table.values()]
        shown = np.unique(np.linspace(0, len(columns[0]) - 1, 8).astype(int))
        sheet([[column[i].picture for column in columns] for i in shown]).save(folder / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--weights", default="stain", help="dcgmm's network: a shipped name, or a file")
    parser.add_argument("--pictures", type=Path, help="folder for a PNG of each set: a row an image, a column a method")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    # what is missing is said before any image is read
    clusters = dcgmm.load(find_weights(wanted.weights))
    datasets = [read_dataset(wanted.data / s.name, (), s.mpp) for s in SETS]
    sets = []
    for dataset, of in zip(datasets, SETS, strict=True):
        pairs = [at_scale(a) for a in chosen(dataset.images, of.of_a_group)]
        sets.append([(image, nuclei) for image, nuclei in pairs if nuclei.any()])
    counts = [f"{s.name} ({len(members)})" for s, members in zip(SETS, sets, strict=True)]
    table: dict[str, list[list[Measured]]] = {}
    for method in METHODS:
        network = clusters if method == "dcgmm" else None
        fits = [[fit(image, method, network) for image, _ in members] for members in sets]
        target = median([f for members in fits for f in members], method)
        table[method] = [
            [measure(*pair, source, target, network) for pair, source in zip(members, found, strict=True)]
            for members, found in zip(sets, fits, strict=True)
        ]
    if wanted.pictures:
        draw(table, wanted.pictures)
    print("| NMI: SD / CV | " + " | ".join(counts) + " | all | not fitted | s/mm2 |")
    print("|---" * (len(counts) + 4) + "|")
    for method, measured in table.items():
        everything = [m for members in measured for m in members]
        seconds = np.median([m.seconds_per_mm2 for m in everything])
        cells = [spread(members) for members in (*measured, everything)]
        print(f"| {method} | " + " | ".join(cells) + f" | {sum(m.failed for m in everything)} | {seconds:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"constancy: {error}", file=sys.stderr)
        sys.exit(2)
