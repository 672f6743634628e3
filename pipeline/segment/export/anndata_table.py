"""nuclei.parquet -> a table of AnnData: the file nuclei.h5ad, or a group of nuclei.spatialdata.zarr.

The layout on disk is AnnData's version 0.1.0, in which a file of HDF5 and a Zarr store differ only in how an array is
made. It is written here, and not by anndata, so that memory holds no more than a row group.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import DTypeLike

from pipeline.config import Export
from pipeline.files import committed
from pipeline.segment import arrow
from pipeline.segment.export.exported import Exported
from pipeline.segment.tables import NUCLEI, Provenance, iter_nuclei, read_provenance

CHUNK = 50_000
"Rows of a chunk: those of a row group of nuclei.parquet, so that a chunk is written once."

_MEASUREMENTS = [field.name for field in NUCLEI if field.type == pa.float32() and "score" not in field.name]
_PLACE = ("id", "geometry", "centroid_x", "centroid_y")
_OBSERVED = [name for name in NUCLEI.names if name not in (*_PLACE, *_MEASUREMENTS)]


@dataclass(frozen=True)
class Group:
    """A group of a Zarr store or of a file of HDF5, with the attributes by which AnnData knows what is in it."""

    stored: Any
    create: Callable[[Any, str, tuple[int, ...], DTypeLike], Any]
    "Makes an array in a group: its name, shape and type (`str` for text). It holds zeros until it is written."

    def describe(self, encoding: str, version: str, **attributes: Any) -> None:
        self.stored.attrs.update({"encoding-type": encoding, "encoding-version": version, **attributes})

    def group(self, name: str, encoding: str = "dict", version: str = "0.1.0", **attributes: Any) -> "Group":
        made = Group(self.stored.create_group(name), self.create)
        made.describe(encoding, version, **attributes)
        return made

    def frame(self, name: str, columns: list[str]) -> "Group":
        """A data frame; its index is the array `_index`."""
        return self.group(name, "dataframe", "0.2.0", **{"_index": "_index", "column-order": columns})

    def array(self, name: str, shape: tuple[int, ...], kind: DTypeLike) -> Any:
        made = self.create(self.stored, name, shape, kind)
        encoding = "array" if kind is not str else "string-array" if shape else "string"
        made.attrs.update({"encoding-type": encoding, "encoding-version": "0.2.0"})
        return made

    def write(self, name: str, values: Any) -> None:
        """A whole array of numbers, a list of texts, or one text."""
        numbers = isinstance(values, np.ndarray)
        content = np.asarray(values, None if numbers else object)
        self.array(name, content.shape, content.dtype if numbers else str)[...] = content


@dataclass(frozen=True)
class _Column:
    """A column of `obs` that is filled from the table, some rows at a time."""

    name: str
    array: Any
    categories: list[str] | None = None
    "Of a column of text, whose array holds their numbers, -1 for none."

    def fill(self, here: slice, rows: pa.Table) -> None:
        values = rows[self.name]
        if self.categories is not None:
            values = arrow.index(values, self.categories).fill_null(-1)
        self.array[here] = values.to_numpy()


def write_h5ad(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> a file that `anndata.read_h5ad` opens, with the content of `write_table`."""
    import h5py

    def create(group: Any, name: str, shape: tuple[int, ...], kind: DTypeLike) -> Any:
        stored = h5py.string_dtype() if kind is str else kind
        if not shape or 0 in shape:  # HDF5 compresses neither single values nor nothing
            return group.create_dataset(name, shape, stored)
        chunks = (min(CHUNK, shape[0]), *shape[1:])
        return group.create_dataset(name, shape, stored, chunks=chunks, compression="gzip", compression_opts=1)

    with committed(out) as partial, _told_late(partial) as handle, h5py.File(handle, "w") as file:
        return Exported(write_table(Group(file, create), nuclei))


class _Handle(io.FileIO):
    """A file that is written without errors; `error`: the first one that the system gave."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        left = memoryview(content)
        try:
            while left and self.error is None:  # a disk that becomes full takes a part
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return 0


@contextlib.contextmanager
def _told_late(path: Path) -> Iterator[_Handle]:
    """A file for HDF5, which after a write that failed can end the process: the OSError is raised at the end."""
    with _Handle(path, "w+") as handle:
        try:
            yield handle
        finally:
            if handle.error is not None:  # else of HDF5, which finds zeros where nothing was written
                raise handle.error


def write_table(root: Group, nuclei: Path) -> int:
    """Write the nuclei as a table of AnnData into an empty group. Returns their number N.

    X: float32 (N, M), the measurements, named in `var`; NaN where there is none
    obs: by the nucleus's id: `class` and `artefact`, categories, the classes in their order; `score`, `votes`,
    `class_score`; for spatialdata the columns that `annotation` names
    obsm/spatial: float64 (N, 2), centroids x y, slide px, from the corner of the whole slide
    uns: `class_colors`, as scanpy reads them; `spatialdata_attrs`; `nightslide`, where the nuclei come from
    """
    provenance, total = read_provenance(nuclei), int(pq.read_metadata(nuclei).num_rows)
    root.describe("anndata", "0.1.0")
    for name in ("layers", "obsp", "varm", "varp"):
        root.group(name)
    root.frame("var", []).write("_index", _MEASUREMENTS)
    _write_uns(root.group("uns"), provenance, total)
    columns = _make_obs(root, nuclei, provenance, total)
    x = root.array("X", (total, len(_MEASUREMENTS)), np.float32)
    spatial = root.group("obsm").array("spatial", (total, 2), np.float64)
    first = 0
    for rows in iter_nuclei(nuclei, [name for name in NUCLEI.names if name != "geometry"]):
        here = slice(first, first + rows.num_rows)
        x[here] = np.stack([rows[name] for name in _MEASUREMENTS], axis=1)
        spatial[here] = np.stack([rows["centroid_x"], rows["centroid_y"]], axis=1)
        for column in columns:
            column.fill(here, rows)
        first += rows.num_rows
    return total


def annotation(total: int) -> dict[str, str]:
    """What a table of so many rows annotates, in spatialdata's words: a row each of the shapes called `region`.

    region_key, instance_key: the columns of `obs` with the name of the shapes, and the number of the shape, 1 to N.
    Nothing is annotated by no rows, as spatialdata knows no empty shapes.
    """
    return {"region": "nuclei", "region_key": "region", "instance_key": "instance_id"} if total else {}


def _make_obs(root: Group, nuclei: Path, provenance: Provenance, total: int) -> list[_Column]:
    """Make the data frame of the nuclei. Returns the columns that are still to be filled."""
    obs = root.frame("obs", [*_OBSERVED, "region", "instance_id"])
    obs.write("instance_id", np.arange(1, total + 1))
    _make_categories(obs, "region", ["nuclei"], total)  # all zeros: the first category
    columns = [_Column("id", obs.array("_index", (total,), str))]
    for name in _OBSERVED:
        kind = NUCLEI.field(name).type
        if pa.types.is_string(kind):
            categories = list(provenance.colours) if name == "class" else _distinct(nuclei, name)
            columns.append(_Column(name, _make_categories(obs, name, categories, total), categories))
        else:
            columns.append(_Column(name, obs.array(name, (total,), kind.to_pandas_dtype())))
    return columns


def _make_categories(obs: Group, name: str, categories: list[str], total: int) -> Any:
    """Make a column of categories. Returns the array of their numbers."""
    column = obs.group(name, "categorical", "0.2.0", ordered=False)
    column.write("categories", categories)
    return column.array("codes", (total,), np.int16)


def _distinct(nuclei: Path, name: str) -> list[str]:
    """The texts in a column, sorted."""
    parts = [rows[name].unique() for rows in iter_nuclei(nuclei, [name])]
    return sorted({text for part in parts for text in part.to_pylist() if text is not None})


def _write_uns(uns: Group, provenance: Provenance, total: int) -> None:
    uns.write("class_colors", [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in provenance.colours.values()])
    if total:
        attributes = uns.group("spatialdata_attrs")
        for name, value in annotation(total).items():
            attributes.write(name, value)
    origin = uns.group("nightslide")
    origin.write("slide", provenance.slide)
    origin.write("digest", provenance.digest)
    origin.write("um_per_px", np.array(provenance.um_per_px))
    origin.write("size", np.array(provenance.size))
    origin.write("bounds", np.array(provenance.bounds))
