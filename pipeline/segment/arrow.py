"""Arrow arrays from numbers, bytes and text, and back: `pa.array` and `to_numpy` import pandas, a second a process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def numbers(values: NDArray[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Numbers or bools (N,) as an array of `kind`, or of their own type; floats of a coarser kind are rounded."""
    values = np.asarray(values)
    kind = kind or pa.from_numpy_dtype(values.dtype)
    if pa.types.is_boolean(kind):
        stored = np.packbits(values, bitorder="little")
    else:
        stored = np.ascontiguousarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(stored)])


def binary(values: Sequence[bytes] | NDArray[np.object_]) -> pa.Array:
    """Bytes (N,) as an array of pa.binary()."""
    ends = np.zeros(len(values) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=ends[1:])
    return pa.Array.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))])


def text(values: Sequence[str]) -> pa.Array:
    """Strings (N,) as an array of pa.string()."""
    return binary([value.encode() for value in values]).view(pa.string())


def index(column: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    """Which of `names` each text of a column is: int32 (N,), null for none of them."""
    return pc.index_in(column, text(names))


def array(values: Any, kind: pa.DataType) -> pa.Array:
    """Whichever of these `kind` asks for; an Arrow array as it is."""
    if isinstance(values, pa.Array):
        return values
    if pa.types.is_string(kind):
        return text(values)
    return binary(values) if pa.types.is_binary(kind) else numbers(values, kind)


def join(*parts: pa.Array | pa.ChunkedArray | str, **options: Any) -> Any:
    """`pc.binary_join_element_wise`, without pandas for a string. string (N,), the last part between the others"""
    return pc.binary_join_element_wise(*(text([p])[0] if isinstance(p, str) else p for p in parts), **options)


def no_rows(schema: pa.Schema) -> pa.Table:
    """A table without rows: `schema.empty_table`, without pandas."""
    return pa.Table.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array: `combine_chunks`, without pandas where it has no chunk."""
    return column.combine_chunks() if column.num_chunks else pa.nulls(0, column.type)


def values(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers without nulls as a numpy array (N,)."""
    return np.from_dlpack(whole(column))


def filled(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which texts of a column are there, and not empty: bool (N,)."""
    return values(pc.fill_null(pc.binary_length(column), numbers(np.zeros(1, np.int32))[0])) > 0
