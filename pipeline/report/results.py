"""The results of a run, slide by slide: read from the slides' folders, and compared with each other."""

import base64
import csv
import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageOps

from pipeline.layout import DENSITY, RunFolder
from pipeline.segment.attempts import Attempt
from pipeline.segment.pictures import UNREADABLE, reduced
from pipeline.segment.polygons import Floats
from pipeline.segment.record import OF_OTHER_SETTINGS, read_record, read_slide_json
from pipeline.segment.summary import AREA_EDGES_UM2, QUANTILES, SEAM_EDGES_PX, VERSION
from pipeline.text import from_csv_cell

# An outlier has a robust z score beyond OUTLIER_Z, among FEWEST_SLIDES slides or more.
OUTLIER_Z, FEWEST_SLIDES = 3.5, 8

_LEAST, _MOST = -1e300, 1e300  # of numbers in a summary: a damaged one may hold those that no float does

_PICTURE_PX, _QUALITY = (180, 130), 60

# Colours of densities, from none to the highest: white to dark violet, in even steps of lightness.
_HEAT = ((255, 255, 255), (252, 197, 142), (241, 96, 93), (158, 47, 127), (45, 17, 86))


@dataclass(frozen=True)
class SlideResult:
    """A row of the ledger, with what was read from the slide's folder."""

    row: Mapping[str, Any]
    address: str = ""
    "Address of its folder, a URL relative to the run's folder; empty where there is none."
    overlay: str = ""
    "Address of its overlay; empty where there is no folder."
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    "Of `pipeline.segment.summary`; empty where there is none."
    attempts: tuple[Attempt, ...] = ()
    "When it was worked on."
    picture: str = ""
    "Its overlay, small, as a data URL; empty where there is none."
    density_map: str = ""
    "The density of its nuclei as a picture, a data URL; empty where it was not exported."
    densest: float = 0.0
    "Nuclei per mm2 where that picture is darkest, in a whole square."
    regions: tuple[Mapping[str, str], ...] = ()
    "Rows of its regions.csv; empty where there is none."
    remarks: tuple[str, ...] = ()
    "Warnings about the slide, and why it is an outlier."
    outlier: bool = False
    "Whether its nuclei are unlike those of the other slides."

    @property
    def name(self) -> str:
        return str(self.row["slide"])

    @property
    def state(self) -> str:
        """done, failed, skipped or pending."""
        status = str(self.row["status"])
        return "done" if status.startswith("done") else status if status in ("failed", "skipped") else "pending"

    @property
    def density(self) -> float:
        """Nuclei per mm2 of tissue; NaN where that is not known."""
        area = self.number("tissue_mm2")
        return self.number("nuclei") / area if self.state == "done" and area else np.nan

    @property
    def classes(self) -> Mapping[str, int]:
        """How many of its nuclei are of each class; empty where that is not known."""
        return {str(name): int(count) for name, count in self.summary.get("classes", {}).items()}

    @property
    def median_area(self) -> float:
        """Of its nuclei, in um2; NaN where that is not known."""
        quantiles = self.summary["area_um2"]["quantiles"] if self.summary else []
        return float(quantiles[len(quantiles) // 2]) if quantiles else np.nan

    def number(self, name: str) -> float:
        """A number of the row; 0 where it has none."""
        return float(self.row.get(name) or 0)


def class_shares(classes: Mapping[str, int]) -> str:
    """The classes with their shares, the most frequent first; empty where all nuclei are of one."""
    total = sum(classes.values())
    ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count / total:.1%}" for name, count in ordered) if len(ordered) > 1 else ""


def read_results(run: RunFolder, rows: Sequence[Mapping[str, Any]]) -> list[SlideResult]:
    """The results of the slides of a ledger, in its order, from their folders.

    Whatever is missing there, or cannot be read, is left out.
    """
    return _compared([_read(run, row) for row in rows])


def _read(run: RunFolder, row: Mapping[str, Any]) -> SlideResult:
    """One slide, before it is compared with the others."""
    folder, name = run.slide(str(row["slide"])), str(row["slide"])
    # quoted bytes keep names that are not UTF-8, and a colon does not become a URL's scheme
    there = run.holds(name) and os.path.isdir(folder.path)
    address = quote(os.fsencode(name), safe="/") if there else ""
    overlay = f"{address}/{folder.overlay.name}" if address else ""
    slide = SlideResult(row, address, overlay, remarks=tuple(filter(None, [str(row.get("remarks") or "")])))
    if slide.state != "done" or not there:
        return slide
    content = read_slide_json(folder) or {}
    record, summary = read_record(content, name) if content else None, content.get("summary") or {}
    try:
        known = _is_legible(summary)
    except (KeyError, TypeError, ValueError, AttributeError):  # of a version that had another one, or none
        known = False
    asked = [f"not done again: {row['cause']}"] if row.get("cause") else []
    asked += [OF_OTHER_SETTINGS] if str(row.get("remarks") or "").startswith(OF_OTHER_SETTINGS) else []
    return dataclasses.replace(
        slide,
        summary=summary if known else {},
        remarks=(*asked, *record.remarks) if record else slide.remarks,
        attempts=record.attempts if record else (),
        picture=_small(folder.overlay),
        regions=_regions(folder.regions),
        **_density(folder.export("density") / DENSITY[0]),
    )


def _is_legible(summary: Mapping[str, Any]) -> bool:
    """Whether a summary is of this version, and has what the report reads of it: finite numbers, as many as it draws.

    Raises AttributeError, KeyError or TypeError for some that are not.
    """
    if summary.get("version") != VERSION:
        return False
    area, seams = summary["area_um2"], summary["seams"]
    quantiles = area["quantiles"] or QUANTILES  # none where there is no nucleus
    ratio = [value for value in (seams["ratio"], seams["standard_error"]) if value is not None]
    lists = (quantiles, area["counts"], seams["observed"], seams["expected"], ratio)
    lengths = (len(QUANTILES), len(AREA_EDGES_UM2), len(SEAM_EDGES_PX), len(SEAM_EDGES_PX), 2 if ratio else 0)
    numbers = itertools.chain(*lists, summary.get("classes", {}).values())
    return tuple(map(len, lists)) == lengths and all(_LEAST < number < _MOST for number in numbers)


def _small(overlay: Path) -> str:
    small = reduced(overlay, _PICTURE_PX)
    return "" if small is None else _data_url(small, "jpeg", quality=_QUALITY, optimize=True)


def _density(picture: Path) -> dict[str, Any]:
    """The first channel of density.ome.tif in colour, and its largest value; nothing where it cannot be read.

    Squares at the right and lower border may be cut off to slivers, whose densities say nothing: they do not count.
    """
    try:
        with Image.open(picture) as image:
            density = np.nan_to_num(np.asarray(image, np.float32))
    except UNREADABLE:
        return {}
    top = float(density[: max(1, len(density) - 1), : max(1, density.shape[1] - 1)].max(initial=0.0))
    steps = np.linspace(0, top or 1.0, len(_HEAT))
    colours = np.stack([np.interp(density, steps, channel) for channel in np.transpose(_HEAT)], -1)
    small = ImageOps.contain(Image.fromarray(colours.astype(np.uint8)), _PICTURE_PX, Image.Resampling.BOX)
    return {"density_map": _data_url(small, "png", optimize=True), "densest": top}


def _data_url(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _regions(table: Path) -> tuple[Mapping[str, str], ...]:
    try:
        with table.open(newline="", encoding="utf-8") as file:
            return tuple({k: from_csv_cell(v) for k, v in row.items() if k and v} for row in csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return ()


# ------------------------------------------------------------------------------------------------ outliers


def robust_z(values: Sequence[float] | Floats) -> Floats:
    """How far each value lies from the others: 0.6745 * (x - median) / MAD (Iglewicz and Hoaglin, 1993).

    NaN, for what is not known, stays NaN. All are NaN where fewer than eight are known, or where half of them or more
    are equal, as there is no measure then. Beyond 3.5 either way a value is an outlier.
    Law: shifting or scaling all values changes nothing but, with a negative scale, the sign.
    """
    x = np.asarray(values, np.float64)
    known = x[np.isfinite(x)]
    if len(known) < FEWEST_SLIDES:
        return np.full(len(x), np.nan)
    middle = np.median(known)
    deviation = np.median(np.abs(known - middle))
    if deviation <= 1e-12 * abs(middle):
        return np.full(len(x), np.nan)
    return np.asarray(0.6745 * (x - middle) / deviation)


def _compared(slides: Sequence[SlideResult]) -> list[SlideResult]:
    """The slides with remarks on the outliers among them, in density (by its logarithm) or median area of nuclei."""
    # a slide without nuclei has a remark of its own, and no logarithm
    densities = np.array([s.density or np.nan for s in slides], np.float64)
    areas = np.array([s.median_area for s in slides], np.float64)
    dense = "{} nuclei than usual: {:,.0f} per mm², the run's median is {:,.0f}"
    large = "{} nuclei than usual: {:.1f} µm² at the median, the run's is {:.1f}"
    density = _outlier_remarks(densities, np.log(densities), lambda z: "fewer" if z < 0 else "more", dense)
    size = _outlier_remarks(areas, areas, lambda z: "smaller" if z < 0 else "larger", large)
    compared = []
    for slide, *outlier_remarks in zip(slides, density, size, strict=True):
        unusual = [words for words in outlier_remarks if words]
        compared.append(dataclasses.replace(slide, remarks=(*slide.remarks, *unusual), outlier=bool(unusual)))
    return compared


def _outlier_remarks(values: Floats, scaled: Floats, sense: Callable[[float], str], words: str) -> list[str]:
    """A remark for each value: empty for those that are no outliers."""
    z = robust_z(scaled)
    return [
        f"{words.format(sense(score), value, np.nanmedian(values))} (robust z {score:.1f})"
        if abs(score) > OUTLIER_Z
        else ""
        for value, score in zip(values, z, strict=True)
    ]
