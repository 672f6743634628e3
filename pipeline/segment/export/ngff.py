"""nuclei.parquet -> nuclei.ome.zarr: label images in OME-NGFF 0.5, for napari and other readers of OME-Zarr.

    /                  the nuclei: uint32, the number of the row in nuclei.parquet, counted from 1; 0 in none
    /0, /1, ...        its levels, each half the size of the one before
    /labels/classes    the classes: uint8, counted from 1 in alphabetical order, with names and colours; the same levels

A group that is a label image itself opens in readers that pass over one with nothing but `labels`. There is no JSON
for each nucleus: its measurements are in the row that its label names.

Source: https://ngff.openmicroscopy.org/0.5 (multiscales, labels)
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import zarr
from numpy.typing import NDArray

from pipeline.config import Export
from pipeline.files import committed
from pipeline.segment import arrow
from pipeline.segment.export.exported import Exported, shown
from pipeline.segment.polygons import Floats, count_within, rasterise
from pipeline.segment.tables import Provenance, geometry, iter_nuclei, read_provenance
from slides.geometry import Box, Size

# A shard of labels is 16 MiB and a chunk 1 MiB; writing holds three or four shards, and two of every level.
_SHARD, _CHUNK = 2048, 512

_VERSION = "0.5"
_OUTLINES = pa.schema([("label", pa.uint32()), ("geometry", pa.binary())])

Labels = NDArray[np.uint32]
Place = tuple[int, int]  # row and column of a shard


def write_ngff(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> two label images over the slide's bounds if `options.crop`, else over the whole slide.

    A pixel belongs to the nucleus that its centre lies in (`polygons.rasterise`), to the first one where they overlap.
    Labels are never averaged: a pixel of a coarser level has the label of the pixel of level 0 whose upper left
    corner is its centre. Positions are those of pixel centres, in micrometres from the centre of the first pixel of
    level 0, as OME-NGFF has them. A nucleus without a pixel of level 0 counts as dropped.
    """
    provenance = read_provenance(nuclei)
    box = shown(provenance, options.crop)
    with committed(out) as partial:
        levels = _create(partial, provenance, box.size)
        scratch = partial / "outlines.arrow"
        outlines = _sort_by_shard(nuclei, box, scratch, sorted(provenance.colours))
        with pa.OSFile(str(scratch)) as file:
            written = _Pyramid(levels, outlines, _rasteriser(file, box)).write()
        scratch.unlink()
    return Exported(written, dropped=len(outlines.class_of) - 1 - written)


# ------------------------------------------------------------------------------------------------ metadata


class _Level(NamedTuple):
    """The arrays of one level, of one size."""

    nuclei: zarr.Array[Any]  # uint32 (h, w)
    classes: zarr.Array[Any]  # uint8 (h, w)


def _create(path: Path, provenance: Provenance, size: Size) -> list[_Level]:
    """The groups and empty arrays of both images; the arrays from the finest to the coarsest."""
    sizes = _level_sizes(size)
    root = zarr.create_group(path, zarr_format=3, attributes=_image("nuclei", len(sizes), provenance, {}))
    labels = root.create_group("labels", attributes={"ome": {"version": _VERSION, "labels": ["classes"]}})
    names = sorted(provenance.colours)
    key = {
        "colors": [{"label-value": i, "rgba": [*provenance.colours[name], 255]} for i, name in enumerate(names, 1)],
        "properties": [{"label-value": i, "class": name} for i, name in enumerate(names, 1)],
    }
    classes = labels.create_group("classes", attributes=_image("classes", len(sizes), provenance, key))
    return [_Level(_array(root, k, s, "uint32"), _array(classes, k, s, "uint8")) for k, s in enumerate(sizes)]


def _level_sizes(size: Size) -> list[Size]:
    """Sizes of the levels: a level ends with the last pixel whose centre is a corner inside level 0."""
    sizes = [size]
    while max(sizes[-1]) > _CHUNK:
        half = 2 ** (len(sizes) - 1)
        width, height = (-(-(side - half) // (2 * half)) for side in size)
        if min(width, height) < 1:
            break
        sizes.append(Size(width, height))
    return sizes


def _array(group: zarr.Group, level: int, size: Size, dtype: str) -> zarr.Array[Any]:
    return group.create_array(
        str(level),
        shape=(size.height, size.width),
        dtype=dtype,
        shards=(_SHARD, _SHARD),
        chunks=(_CHUNK, _CHUNK),
        fill_value=0,
        dimension_names=("y", "x"),
    )


def _image(name: str, levels: int, provenance: Provenance, key: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a label image; key: names and colours of its labels."""
    um_per_px = np.array(provenance.um_per_px[::-1])  # y x
    datasets = []
    for level in range(levels):
        # The pixel of level 0 below and right of the middle of 2 x 2, 4 x 4, ... is the one that is taken.
        taken = 2**level // 2
        transformations: list[dict[str, Any]] = [{"type": "scale", "scale": (um_per_px * 2**level).tolist()}]
        transformations.append({"type": "translation", "translation": (um_per_px * taken).tolist()})
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    image = {"name": name, "axes": axes, "datasets": datasets, "type": "nearest"}
    return {"ome": {"version": _VERSION, "multiscales": [image], "image-label": dict(key)}}


# ---------------------------------------------------------------------------------------- outlines by shard


class _Sorted(NamedTuple):
    """Where the outlines of every shard lie in the scratch file, and the class of every label."""

    batches: Mapping[Place, list[int]]
    class_of: NDArray[np.uint8]  # (nuclei + 1,), 0 for label 0


def _sort_by_shard(nuclei: Path, box: Box, scratch: Path, classes: list[str]) -> _Sorted:
    """Write the outlines to `scratch`, a batch for each shard that those of a row group reach into.

    The table is read once, whatever the order of its rows; a shard has its outlines in that order.
    """
    class_of = np.zeros(pq.read_metadata(nuclei).num_rows + 1, np.uint8)
    batches: dict[Place, list[int]] = defaultdict(list)
    first, written = 1, 0
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, _OUTLINES) as file:
        for rows in iter_nuclei(nuclei, ["geometry", "class"]):
            labels = np.arange(first, first + rows.num_rows, dtype=np.uint32)
            class_of[labels] = arrow.values(arrow.index(rows["class"], classes)) + 1
            encoded = rows["geometry"].combine_chunks()
            row, places = _places(shapely.bounds(geometry(rows)).reshape(-1, 4), box)
            cuts = np.flatnonzero((places[1:] != places[:-1]).any(axis=1)) + 1
            for part in np.split(np.arange(len(row)), cuts) if len(row) else ():
                batches[tuple(places[part[0]].tolist())].append(written)
                here = row[part]
                columns = [arrow.numbers(labels[here]), encoded.take(arrow.numbers(here))]
                file.write_batch(pa.record_batch(columns, schema=_OUTLINES))
                written += 1
            first += rows.num_rows
    return _Sorted(batches, class_of)


def _places(bounds: Floats, box: Box) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which boxes reach into which shards: indices (M,) into `bounds`, and shards (M, 2), row and column; by shard.

    bounds: float64 (N, 4), x0 y0 x1 y1, slide px
    """
    last = [-(-side // _SHARD) - 1 for side in box.size]
    low, high = (np.floor((b - box.corner) / _SHARD).astype(np.int64) for b in (bounds[:, :2], bounds[:, 2:]))
    low, high = np.maximum(low, 0), np.minimum(high, last)
    across, down = np.maximum(high - low + 1, 0).T
    index = np.arange(len(bounds)).repeat(across * down)
    place = count_within(across * down)
    columns, rows = low[index, 0] + place % across[index], low[index, 1] + place // across[index]
    order = np.lexsort((index, columns, rows))
    return index[order], np.stack([rows, columns], axis=1)[order]


Rasterise = Callable[[Place, list[int]], Labels]


def _rasteriser(file: pa.NativeFile, box: Box) -> Rasterise:
    """A function of a shard and of its batches in the scratch file, which gives the labels in this shard."""
    batches = pa.ipc.open_file(file)

    def labels_in(place: Place, numbers: list[int]) -> Labels:
        rows = pa.Table.from_batches([batches.get_batch(number) for number in numbers])
        corner = np.array([box.x0 + place[1] * _SHARD, box.y0 + place[0] * _SHARD])
        outlines = shapely.transform(geometry(rows), lambda xy: xy - corner)
        labels = np.append(np.uint32(0), arrow.values(rows["label"]))
        return labels[rasterise(outlines, (_SHARD, _SHARD))]

    return labels_in


# ------------------------------------------------------------------------------------------------- pyramid


@dataclass
class _Pyramid:
    """All levels, written shard by shard: four shards of a level, then the one of the next level that they make.

    So there are never more than two shards of a level in memory.
    """

    levels: list[_Level]
    outlines: _Sorted
    labels_in: Rasterise

    def __post_init__(self) -> None:
        self._drawn = np.zeros(len(self.outlines.class_of), np.bool_)  # by label: whether a pixel of level 0 has it
        self._occupied = [
            {(row >> level, column >> level) for row, column in self.outlines.batches}
            for level in range(len(self.levels))
        ]

    def write(self) -> int:
        """Write what is not empty. Returns the number of nuclei that have a pixel of level 0."""
        for place in sorted(self._occupied[-1]):
            self._shard(len(self.levels) - 1, place)
        return int(self._drawn[1:].sum())

    def _shard(self, level: int, place: Place) -> Labels | None:
        """Write a shard and what lies below it in finer levels; None where nothing does.

        Returns uint32 (_SHARD, _SHARD): of the pixels of level 0 below, the first of each 2**level by 2**level.
        """
        if place not in self._occupied[level]:
            return None
        if level == 0:
            firsts = taken = self.labels_in(place, self.outlines.batches[place])
        else:
            firsts, taken = self._from_finer(level, place)
        self._store(level, place, taken)
        return firsts

    def _from_finer(self, level: int, place: Place) -> tuple[Labels, Labels]:
        """Of the pixels of level 0 below a shard, the first of each 2**level by 2**level, and that in the middle."""
        firsts, middles = (np.zeros((_SHARD, _SHARD), np.uint32) for _ in range(2))
        half = _SHARD // 2
        for row, column in np.ndindex(2, 2):
            finer = self._shard(level - 1, (2 * place[0] + row, 2 * place[1] + column))
            if finer is not None:
                quarter = np.s_[row * half : (row + 1) * half, column * half : (column + 1) * half]
                firsts[quarter], middles[quarter] = finer[::2, ::2], finer[1::2, 1::2]
        return firsts, middles

    def _store(self, level: int, place: Place, labels: Labels) -> None:
        nuclei, classes = self.levels[level]
        top, left = place[0] * _SHARD, place[1] * _SHARD
        inside = labels[: nuclei.shape[0] - top, : nuclei.shape[1] - left]
        if level == 0:
            self._drawn[inside] = True
        if inside.any():
            where = np.s_[top : top + inside.shape[0], left : left + inside.shape[1]]
            nuclei[where], classes[where] = inside, self.outlines.class_of[inside]
