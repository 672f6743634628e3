"""nuclei.parquet -> density/: the slide in squares, with the density, size and classes of the nuclei in each.

density.ome.tif is a picture with a channel for each quantity and a pixel for each square, density.geojson the same as
tiles for QuPath.
"""

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Export
from pipeline.files import committed
from pipeline.layout import DENSITY
from pipeline.segment import arrow
from pipeline.segment.export.exported import Exported, origin, shown
from pipeline.segment.polygons import Floats
from pipeline.segment.tables import Provenance, iter_nuclei, read_provenance

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "nightslide.density")
_ROUNDING = 1e-6  # of a square
_PER_MM2, _AREA = "Nuclei per mm^2", "Mean area \u00b5m^2"


class _Squares(NamedTuple):
    """The squares of a slide: `corner` is the first one's, slide px; the last ones end at the slide's border."""

    corner: tuple[float, float]
    side: tuple[float, float]  # slide px, x and y
    shape: tuple[int, int]  # rows, columns
    edges_x: Floats  # (columns + 1,), slide px from `corner`
    edges_y: Floats

    def of(self, x: Floats, y: Floats) -> NDArray[np.int64]:
        """The number of the square of each point, row by row; a point beyond the border is of the last square."""
        column, row = (
            np.clip(np.floor((at - corner) / side), 0, count - 1).astype(np.int64)
            for at, corner, side, count in zip((x, y), self.corner, self.side, self.shape[::-1], strict=True)
        )
        return row * self.shape[1] + column


def write_density(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> the folder `out` with density.ome.tif and density.geojson.

    Squares have sides of `options.density_um`, from the corner of the slide's bounds if `options.crop`, else of the
    whole slide. A nucleus counts in the square of its centroid. Channels, float32: nuclei per mm2 of the square, their
    mean area in um2, and the fraction of each class; NaN in a square without nuclei, where the first is 0.
    Tiles are the squares with nuclei, in slide px from the same corner.
    Law: the sum of density times area over all squares is the number of nuclei.
    """
    provenance = read_provenance(nuclei)
    squares = _squares(provenance, options)
    classes = sorted(provenance.colours)
    counts, area_um2 = np.zeros((len(classes), math.prod(squares.shape)), np.int64), np.zeros(math.prod(squares.shape))
    for rows in iter_nuclei(nuclei, ["class", "area_um2", "centroid_x", "centroid_y"]):
        square = squares.of(arrow.values(rows["centroid_x"]), arrow.values(rows["centroid_y"]))
        class_index = arrow.values(arrow.index(rows["class"], classes))
        np.add.at(counts, (class_index, square), 1)
        area_um2 += np.bincount(square, arrow.values(rows["area_um2"]), len(area_um2))
    mm2 = np.outer(np.diff(squares.edges_y), np.diff(squares.edges_x)).ravel() * math.prod(provenance.um_per_px) / 1e6
    total = counts.sum(0)
    some = np.where(total > 0, total, np.nan)
    channels = {_PER_MM2: total / mm2, _AREA: area_um2 / some}
    channels |= {f"{name} fraction": count / some for name, count in zip(classes, counts, strict=True)}
    with committed(out) as partial:
        partial.mkdir()
        _write_picture(partial / DENSITY[0], channels, squares, options.density_um, provenance)
        _write_tiles(partial / DENSITY[1], {"Nuclei": total, **channels}, squares, provenance)
    return Exported(int(total.sum()))


def _squares(provenance: Provenance, options: Export) -> _Squares:
    area = shown(provenance, options.crop)
    side = options.density_um / provenance.um_per_px[0], options.density_um / provenance.um_per_px[1]
    # an extent that is a whole number of squares, but for rounding, has no column of almost no width after them
    columns, rows = (math.ceil(extent / step - _ROUNDING) for extent, step in zip(area.size, side, strict=True))
    edges_x, edges_y = (
        np.append(np.arange(count) * step, extent)
        for count, step, extent in zip((columns, rows), side, area.size, strict=True)
    )
    return _Squares(origin(provenance, options.crop), side, (rows, columns), edges_x, edges_y)


def _write_picture(
    path: Path, channels: Mapping[str, Floats], squares: _Squares, side_um: float, provenance: Provenance
) -> None:
    """OME-TIFF, float32 (channels, rows, columns). Equal content gives equal bytes."""
    import tifffile  # only this format needs it

    metadata = {
        "axes": "CYX",
        "Channel": {"Name": list(channels)},
        "UUID": str(_id(provenance, "picture")),
        **{f"PhysicalSize{axis}": side_um for axis in "XY"},
        **{f"PhysicalSize{axis}Unit": "\u00b5m" for axis in "XY"},
    }
    planes = np.stack(list(channels.values())).reshape(len(channels), *squares.shape).astype(np.float32)
    tifffile.imwrite(
        path,
        planes,
        ome=True,
        metadata=metadata,
        photometric="minisblack",
        compression="zlib",
        resolution=(1e4 / side_um, 1e4 / side_um),
        resolutionunit="CENTIMETER",
    )


def _write_tiles(path: Path, values: Mapping[str, Floats], squares: _Squares, provenance: Provenance) -> None:
    """A FeatureCollection of QuPath's tiles, one a line: the squares that hold nuclei."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","features":[')
        separator = "\n"
        for square in np.flatnonzero(values["Nuclei"]).tolist():
            row, column = divmod(square, squares.shape[1])
            (x0, x1), (y0, y1) = squares.edges_x[column : column + 2], squares.edges_y[row : row + 2]
            ring = [[round(x, 2), round(y, 2)] for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))]
            measurements = {name: float(f"{column_values[square]:.6g}") for name, column_values in values.items()}
            tile = {
                "type": "Feature",
                "id": str(_id(provenance, f"{squares.side} {squares.corner} {square}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "tile", "measurements": measurements},
            }
            file.write(separator + json.dumps(tile, separators=(",", ":")))
            separator = ",\n"
        file.write("\n]}\n")


def _id(provenance: Provenance, what: str) -> uuid.UUID:
    """A UUID of something made of this slide: the same in every export."""
    return uuid.uuid5(_NAMESPACE, f"{provenance.slide} {what}")
