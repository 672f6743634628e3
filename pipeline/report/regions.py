"""The report's table of regions: those that `nightslide measure` has measured."""

import contextlib
import html
from collections.abc import Mapping, Sequence

from pipeline.report.results import SlideResult
from pipeline.report.table import linked

_SHOWN = 500  # rows; the page stays small

# Columns of regions.csv that are shown, with their headings and whether they hold numbers.
_COLUMNS = {
    "region": ("region", False),
    "class": ("class", False),
    "area_mm2": ("mm²", True),
    "tissue_mm2": ("tissue mm²", True),
    "nuclei": ("nuclei", True),
    "nuclei_in_artefacts": ("of these in artefacts", True),
    "per_mm2": ("per mm² of tissue", True),
    "area_um2_median": ("median µm²", True),
}


def region_table(slides: Sequence[SlideResult], address: str) -> str:
    """A section with a row for each region of each slide; empty where none was measured.

    address: of the file with all rows and columns.
    """
    rows = [(slide, row) for slide in slides for row in slide.regions]
    if not rows:
        return ""
    heads = "".join(
        f'<th scope="col"{" class=number" if number else ""}>{words}</th>' for words, number in _COLUMNS.values()
    )
    left_out = f"{len(rows) - _SHOWN:,} more regions, and all" if len(rows) > _SHOWN else "All"
    return (
        f'<section><h2>Regions</h2><div class="scroll"><table><thead><tr><th>slide</th>{heads}</tr></thead>'
        f"<tbody>{''.join(_row(slide, row) for slide, row in rows[:_SHOWN])}</tbody></table></div>"
        f'<p class="soft">{left_out} measurements: <a href="{address}">{address}</a></p></section>'
    )


def _row(slide: SlideResult, row: Mapping[str, str]) -> str:
    cells = (_cell(row.get(name, ""), number) for name, (_, number) in _COLUMNS.items())
    return f"<tr><td>{linked(slide)}</td>{''.join(cells)}</tr>\n"


def _cell(text: str, number: bool) -> str:
    """A value of regions.csv; a number with four digits, if it is one."""
    if not number:
        return f"<td>{html.escape(text)}</td>"
    with contextlib.suppress(ValueError):
        text = f"{int(text):,}" if text.isdigit() else f"{float(text):,.4g}"
    return f'<td class="number">{html.escape(text)}</td>'
