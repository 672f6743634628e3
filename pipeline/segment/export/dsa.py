"""nuclei.parquet -> nuclei.dsa: annotations of the Digital Slide Archive (large_image's schema), in JSON.

Text is put together column by column in Arrow, not object by object.
Source: https://girder.github.io/large_image/annotations.html
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Export
from pipeline.files import committed
from pipeline.segment import arrow
from pipeline.segment.export.exported import Exported, Rings, finite, open_rings, origin
from pipeline.segment.tables import NUCLEI, Provenance, geometry, iter_nuclei, read_provenance

_MEASUREMENTS = tuple(f.name for f in NUCLEI if pa.types.is_primitive(f.type) and not f.name.startswith("centroid"))


def write_dsa(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> a folder of annotations of at most 50,000 elements each, to be uploaded to the slide's item.

    An element is a closed polyline with its class as group and label, the colour of the class, and the nucleus' id and
    measurements as `user`, numbers that are not finite left out. Coordinates are slide px with two decimals, from the
    corner of the slide's bounds if `options.crop`, as large_image crops to them.
    """
    provenance = read_provenance(nuclei)
    corner = origin(provenance, options.crop)
    written = dropped = 0
    with committed(out) as partial:
        partial.mkdir()
        for number, rows in enumerate(iter_nuclei(nuclei)):
            rings = open_rings(geometry(rows), lambda xy: np.rint((xy - corner) * 100))
            area = np.diff(rings.starts) >= 3
            elements = _elements(rows, rings, provenance).filter(arrow.numbers(area)).to_pylist()
            head = json.dumps({"name": f"Nuclei {number + 1}", "description": "Nuclei segmented by Nightslide"})
            with (partial / f"nuclei-{number:05d}.json").open("w", encoding="utf-8", newline="\n") as file:
                file.write(head[:-1] + ', "elements": [\n')
                file.writelines(",\n" * (i > 0) + element for i, element in enumerate(elements))
                file.write("\n]}\n")
            written, dropped = written + int(area.sum()), dropped + int((~area).sum())
    return Exported(written, dropped=dropped)


def _elements(rows: pa.Table, rings: Rings, provenance: Provenance) -> pa.ChunkedArray:
    """The element of each row of `NUCLEI`, whose outline is in hundredths of a pixel. string (N,)"""
    looks = {
        name: json.dumps({"group": name, "label": {"value": name}, "lineColor": f"rgb({r}, {g}, {b})"})[1:-1]
        for name, (r, g, b) in sorted(provenance.colours.items())
    }
    look = arrow.text(list(looks.values())).take(arrow.index(rows["class"], list(looks)))
    head = '{"type": "polyline", "closed": true, '
    return arrow.join(head, look, ', "points": [', _points(rings), '], "user": {', _user(rows), "}}", "")


def _points(rings: Rings) -> pa.Array:
    """Vertices of every outline: "[x,y,0],[x,y,0],..." in px. string (N,)"""
    x, y = (pc.cast(arrow.numbers(axis), pa.string()) for axis in (rings.vertices / 100).T)
    vertices = arrow.join("[", x, ",", y, ",0]", "")
    starts = arrow.numbers(rings.starts.astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(starts, vertices), arrow.text([","])[0])


def _user(rows: pa.Table) -> pa.ChunkedArray:
    """ "name": value, ... of every row; a number that is not finite is left out. string (N,)"""
    items = [arrow.join('"id": "', rows["id"], '"', "")]
    for name in _MEASUREMENTS:
        items.append(arrow.join(f'"{name}": ', pc.cast(finite(rows[name]), pa.string()), ""))
    return arrow.join(*items, ", ", null_handling="skip")
