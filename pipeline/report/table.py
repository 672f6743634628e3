"""The report's table of slides, a row each; report.js sorts and filters it.

A browser builds the first rows only: ten thousand took it 25 s and 1.5 GB. The others lie in the page as text, of which
report.js shows what is asked for.
"""

import html
from collections.abc import Sequence

import numpy as np

from pipeline.report import charts
from pipeline.report.results import SlideResult, class_shares
from pipeline.segment.record import ARTEFACT_AREAS
from pipeline.segment.stages import STAGES
from pipeline.segment.summary import AREA_EDGES_UM2

_ROWS_AT_ONCE = 200

_SHOWN_UM2 = 150  # areas up to this are drawn in bins of their own, larger ones in the last bin

# Heading of each column, and whether its cells hold a number.
_COLUMNS = {
    "slide": False,
    "status": False,
    "tissue mm²": True,
    "nuclei": True,
    "per mm²": True,
    "median µm²": True,
    "sizes": False,
    "mm² artefacts": True,
    "mm² lost": True,
    "saturated tiles": True,
    "seam ratio": True,
    "seconds": True,
    "warnings": False,
}

_LEGEND = (
    '<p class="soft">mm² lost: tissue that could not be read or computed. Saturated tiles hold more nuclei than are '
    "allowed. Seam ratio: how dense nuclei are near the seams of tiles, compared with the tissue around them; 1 where "
    "none is cut or there twice.</p>"
)


def slide_table(slides: Sequence[SlideResult]) -> str:
    """The table as HTML, a row for each slide in the given order."""
    heads = "".join(
        f'<th scope="col"{" class=number" if number else ""}><button type="button">{name}</button></th>'
        for name, number in _COLUMNS.items()
    )
    choices = {"all": "all", "warned": "with warnings", **{s: s for s in ("failed", "skipped", "pending", "done")}}
    options = "".join(f'<option value="{value}">{words}</option>' for value, words in choices.items())
    keys = " · ".join(f'<span class="key c{n}"></span> {stage.name}' for n, stage in enumerate(STAGES))
    rows = [_row(slide, number) for number, slide in enumerate(slides)]
    at_once, later = "".join(rows[:_ROWS_AT_ONCE]), "".join(rows[_ROWS_AT_ONCE:])
    later = f'<script type="text/plain" id="later">{later}</script>\n' if later else ""
    return (
        f'<section><h2>Slides</h2>\n<div class="controls"><input id="words" type="search" aria-label="filter" '
        f'placeholder="name, cause, warning"><select id="state" aria-label="which slides">{options}</select>'
        f'<span id="shown" class="soft"></span><span class="soft">sizes: 0 to {_SHOWN_UM2} µm² and above · seconds: '
        f"{keys}</span></div>\n"
        f'<div class="scroll"><table id="slides" data-at-once="{_ROWS_AT_ONCE}">\n'
        f"<thead><tr><th></th>{heads}</tr></thead>\n<tbody>\n{at_once}</tbody></table></div>\n"
        f'{later}<p><button id="more" type="button" hidden></button></p>\n{_LEGEND}</section>'
    )


def _row(slide: SlideResult, number: int) -> str:
    """A slide's row; `number` names it for links from the charts."""
    status, name = html.escape(str(slide.row["status"])), html.escape(slide.name)
    picture = f'<img src="{slide.picture}" alt="the nuclei on {name}" loading="lazy">' if slide.picture else ""
    remarks = slide.remarks or [str(cause) for cause in [slide.row.get("cause")] if cause]
    known = slide.number if slide.state == "done" else lambda _: np.nan
    cells = [
        f'<td><a href="{slide.overlay}">{picture}</a>{_density_map(slide)}</td>' if picture else "<td></td>",
        f'<td class="name" data-v="{name}">{linked(slide)}</td>',
        f'<td data-v="{status}"><span class="status {slide.state}">{status}</span></td>',
        _cell(known("tissue_mm2"), ",.2f"),
        _cell(known("nuclei"), ",.0f", _classes(slide)),
        _cell(slide.density, ",.0f"),
        _cell(slide.median_area, ".1f"),
        _sizes(slide),
        _artefacts(slide),
        _cell(known("area_lost_mm2"), ",.3g"),
        _cell(known("saturated_tiles"), ",.0f"),
        _ratio(slide),
        _seconds(slide),
        f'<td class="remarks {"outlier" if slide.remarks else "soft"}" data-v="{len(remarks) or ""}">'
        f"{''.join(f'<p>{html.escape(remark)}</p>' for remark in remarks)}</td>",
    ]
    warned = "yes" if slide.remarks else "no"
    return f'<tr id="slide-{number}" data-state="{slide.state}" data-warned="{warned}">{"".join(cells)}</tr>\n'


def _classes(slide: SlideResult) -> str:
    shares = class_shares(slide.classes)
    return f'<p class="soft">{html.escape(shares)}</p>' if shares else ""


def _density_map(slide: SlideResult) -> str:
    """The density of nuclei as a picture, where it was exported."""
    if not slide.density_map:
        return ""
    title = f"density of nuclei, from none (white) to {slide.densest:,.0f} per mm² (dark)"
    return f'<img class="map" src="{slide.density_map}" alt="{title}" title="{title}" loading="lazy">'


def _cell(value: float, form: str, more: str = "") -> str:
    """A cell with a number and `more` HTML below it; an empty cell for NaN."""
    if not np.isfinite(value):
        return '<td class="number" data-v=""></td>'
    return f'<td class="number" data-v="{value:.12g}">{value:{form}}{more}</td>'


def _artefacts(slide: SlideResult) -> str:
    """The tissue that artefacts cover, and each kind of them; an empty cell where none are known."""
    areas = {kind: slide.number(name) for kind, name in ARTEFACT_AREAS.items()}
    if slide.state != "done" or not sum(areas.values()):
        return _cell(np.nan, "")
    kinds = ", ".join(f"{kind} {area:.2g}" for kind, area in areas.items() if area)
    return _cell(sum(areas.values()), ",.3g", f'<br><span class="soft">{kinds}</span>')


def _sizes(slide: SlideResult) -> str:
    """Histogram of the nuclei's areas; sorted by its width, (third - first quartile) / median."""
    if np.isnan(slide.median_area):
        return '<td data-v=""></td>'
    sizes = slide.summary["area_um2"]
    low, first, middle, third, high = sizes["quantiles"]
    title = f"area, µm²: median {middle:g}, quartiles {first:g} and {third:g}, 5 and 95 % {low:g} and {high:g}"
    shown = AREA_EDGES_UM2.index(_SHOWN_UM2)
    counts = [*sizes["counts"][:shown], sum(sizes["counts"][shown:])]
    return f'<td data-v="{(third - first) / middle:.4g}">{charts.histogram(counts, title)}</td>'


def _ratio(slide: SlideResult) -> str:
    """The slide's own seam check: density near seams to the density around them, and its standard error."""
    seams = slide.summary.get("seams") or {"ratio": None}
    if seams["ratio"] is None:
        return _cell(np.nan, "")
    return _cell(seams["ratio"], ".2f", f'<br><span class="soft">± {seams["standard_error"]:.2f}</span>')


def _seconds(slide: SlideResult) -> str:
    """Seconds of work, and the share of each stage in the work."""
    parts = {stage.name: slide.number(f"seconds_{stage.name}") for stage in STAGES}
    if slide.state != "done":
        return _cell(np.nan, "")
    title = ", ".join(f"{stage} {value:.1f} s" for stage, value in parts.items())
    return _cell(slide.number("seconds_work"), ",.1f", charts.stacked(parts, title))


def linked(slide: SlideResult) -> str:
    """A slide's name as HTML, a link to its folder where there is one."""
    name = html.escape(slide.name)
    return f'<a href="{slide.address}/">{name}</a>' if slide.address else name
