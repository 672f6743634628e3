"""The morning's page: what became of every slide, on one page that opens from disk and needs nothing else."""

import html
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files
from pipeline.report import charts
from pipeline.report.results import FEWEST_SLIDES, ODD_Z, SlideResult, read_object, read_results
from pipeline.segment.summary import AREA_EDGES_UM2, NEAR_PX, SEAM_EDGES_PX, seam_verdict

STAGES = ("plan", "tile", "detect", "outline", "stitch", "export")

_SHOWN_UM2 = 150  # the sizes in the table go so far, the last bin further


def write_report(out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write out/report.html and return its path.

    rows: the ledger's, one a slide, as dicts; what else there is to tell is read from run.json and from the slides'
    own folders under `out`. Whatever of that is missing or not legible is left out of the page.
    The page links to files beside it by relative addresses and loads nothing; all text from outside is escaped.
    """
    slides = read_results(out, rows)
    slides.sort(key=lambda s: (s.state != "failed", not s.remarks, s.state != "pending"))
    name = html.escape(out.resolve().name)
    run = read_object(out / "run.json")
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="soft">Nightslide, written {datetime.now().astimezone():%Y-%m-%d %H:%M}{_in_short(run)}</p>',
        _figures(slides),
        _failures(slides),
        f'<section class="plots">{_seams(slides)}{_stages(slides)}{_spread(slides)}</section>',
        _table(slides),
        _settings(run),
    ]
    path = out / "report.html"
    with files.committed(path) as part:
        # a file name need not be text: what cannot be written becomes a question mark
        part.write_text(_page(name, "\n".join(parts)), encoding="utf-8", errors="replace")
    return path


def _page(title: str, body: str) -> str:
    """The document. The policy keeps it from loading anything, whatever its text says."""
    style, script = (
        resources.files("pipeline.report").joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}: Nightslide</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------ above the table


def _in_short(run: Mapping[str, Any]) -> str:
    """The settings that matter, in a line."""
    settings = run.get("settings") or {}
    chosen = {
        "weights": Path(str(settings.get("detector", {}).get("weights", ""))).stem,
        "views": settings.get("detector", {}).get("views"),
        "stain": settings.get("stain", {}).get("method"),
        "µm/px": settings.get("tiling", {}).get("mpp"),
        "digest": run.get("digest"),
    }
    return "".join(f" · {name} {html.escape(str(value))}" for name, value in chosen.items() if value)


def _figures(slides: Sequence[SlideResult]) -> str:
    """The night in numbers."""
    done = [s for s in slides if s.state == "done"]
    failed = sum(s.state == "failed" for s in slides)
    area, seconds = sum(s.number("tissue_mm2") for s in done), _busy_seconds(done)
    lost = sum(s.number("area_lost_mm2") for s in done)
    nuclei = sum(s.number("nuclei") for s in done)
    figures = [
        (f"{len(done):,}", "slides done", ""),
        (f"{failed:,}", "failed", "bad" if failed else ""),
        (f"{sum(s.state == 'pending' for s in slides):,}", "pending", ""),
        (f"{sum(bool(s.remarks) for s in slides):,}", "to look at", ""),
        (f"{nuclei:,.0f}", "nuclei", ""),
        (f"{area:,.1f}", "mm² of tissue", ""),
        (f"{nuclei / area:,.0f}" if area else "?", "nuclei per mm²", ""),
        (f"{seconds / 3600:,.2f}", "hours at work", ""),
        (f"{area / seconds:,.3f}" if seconds else "?", "mm² per second", ""),
        (f"{3600 * area / seconds:,.0f}" if seconds else "?", "mm² per hour", ""),
        *([(f"{lost:,.3f}", "mm² lost", "bad")] if lost else []),
    ]
    items = (f'<li><b class="{kind}">{value}</b><span>{words}</span></li>' for value, words, kind in figures)
    return f'<ul class="figures">{"".join(items)}</ul>'


def _busy_seconds(done: Iterable[SlideResult]) -> float:
    """How long any slide was at work: the union of their times, which ended when slide.json was written.

    So slides side by side count once, and the days between two nights not at all.
    """
    busy, until = 0.0, -np.inf
    for begun, ended in sorted((s.finished - s.number("seconds"), s.finished) for s in done if s.finished):
        busy += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return busy


def _failures(slides: Sequence[SlideResult]) -> str:
    """Causes, the most frequent first, with the slides that they hit.

    Two causes are one where they differ in the slide's own name and in numbers only.
    """
    groups: dict[str, list[tuple[SlideResult, str]]] = defaultdict(list)
    for slide in slides:
        if slide.state == "failed":
            own = re.escape(slide.name.rsplit("/", 1)[-1])
            cause = re.sub(rf"\S*{own}\.\S*", "…", str(slide.row.get("cause") or "no cause is known"))
            groups[re.sub(r"\d+([.,]\d+)*", "#", cause)].append((slide, cause))
    if not groups:
        return ""
    parts = ['<h2 class="bad">Failures</h2>']
    for group in sorted(groups.values(), key=len, reverse=True):
        differ = len({cause for _, cause in group}) > 1
        items = (f"<li>{_linked(s)}{html.escape(f': {cause}') if differ else ''}</li>" for s, cause in group)
        parts.append(
            f'<div class="failure"><p><b>{len(group)}</b> · {html.escape(group[0][1])}</p>'
            f'<ul class="{"wide" if differ else "names"}">{"".join(items)}</ul></div>'
        )
    return f"<section>{''.join(parts)}</section>"


def _linked(slide: SlideResult) -> str:
    """A slide's name, leading to its folder where there is one."""
    name = html.escape(slide.name)
    return f'<a href="{slide.address}/">{name}</a>' if slide.address else name


def _seams(slides: Sequence[SlideResult]) -> str:
    """The audit of the seams over all slides, drawn and said."""
    audits = [s.findings["seams"] for s in slides if s.findings]
    observed, expected = (np.sum([a[key] for a in audits], axis=0) for key in ("observed", "expected"))
    verdict = seam_verdict(observed, expected) if audits else None
    if verdict is None or verdict.ratio is None:
        return ""
    labels = [str(e) for e in SEAM_EDGES_PX[1:]] + ["more"]
    points = [
        charts.Ratio(label, o / e, e**-0.5) for label, o, e in zip(labels, observed, expected, strict=True) if e > 0
    ]
    said = '<b class="bad">not what it should be</b>' if verdict.suspicious else '<b class="good">as it should be</b>'
    plot = charts.ratios(points, SEAM_EDGES_PX.index(NEAR_PX), "distance to the nearest seam, up to so many work px")
    return (
        f"<figure><h2>Seams</h2>{plot}<figcaption>Within {NEAR_PX} px of a seam there are {verdict.ratio:.3f} ± "
        f"{verdict.standard_error:.3f} times as many nuclei as around it: {said}. Flat at 1 is right. More is nuclei "
        f"found twice, or a detector that two tiles asked, unsure of itself; less is nuclei lost: raise "
        f"--tiling.margin.</figcaption></figure>"
    )


def _stages(slides: Sequence[SlideResult]) -> str:
    """Where the time went, over all slides."""
    seconds = {stage: sum(s.number(f"seconds_{stage}") for s in slides) for stage in STAGES}
    whole, most = sum(seconds.values()), max(seconds.values())
    if not whole:
        return ""
    lines = (
        f'<tr><td>{stage}</td><td><span class="swatch c{number}" style="width:{100 * value / most:.1f}%"></span></td>'
        f'<td class="number">{value / 3600:,.3f} h</td><td class="number">{value / whole:.1%}</td></tr>'
        for number, (stage, value) in enumerate(seconds.items())
    )
    return (
        f'<figure><h2>Time per stage</h2><table class="stages">{"".join(lines)}</table><figcaption>Work done, summed '
        f"over workers: stages and slides run beside each other.</figcaption></figure>"
    )


def _spread(slides: Sequence[SlideResult]) -> str:
    """All slides by density and size of nuclei."""
    dots = [
        charts.Dot(s.median_area, s.density, s.name, f"#slide-{number}", s.odd)
        for number, s in enumerate(slides)
        if s.density > 0 and np.isfinite(s.median_area)
    ]
    if len(dots) < 2:
        return ""
    plot = charts.scatter(dots, "median area of a nucleus, µm²", "nuclei per mm²")
    return (
        f"<figure><h2>Slides</h2>{plot}<figcaption>Marked: density or size further than {ODD_Z} from the run's "
        f"median, as a robust z (median and MAD; density by its logarithm), among {FEWEST_SLIDES} slides or more."
        f"</figcaption></figure>"
    )


# ------------------------------------------------------------------------------------------------ the table

# Names, and whether the cells hold a number.
_COLUMNS = {
    "slide": False,
    "status": False,
    "tissue mm²": True,
    "nuclei": True,
    "per mm²": True,
    "median µm²": True,
    "sizes": False,
    "mm² lost": True,
    "saturated tiles": True,
    "seam ratio": True,
    "seconds": True,
    "to look at": False,
}


def _table(slides: Sequence[SlideResult]) -> str:
    """A line a slide: those that failed and those to look at first."""
    heads = "".join(
        f'<th scope="col"{" class=number" if number else ""}><button type="button">{name}</button></th>'
        for name, number in _COLUMNS.items()
    )
    choices = {"all": "all", "look": "to look at", "failed": "failed", "pending": "pending", "done": "done"}
    options = "".join(f'<option value="{value}">{words}</option>' for value, words in choices.items())
    keys = " · ".join(f'<span class="key c{n}"></span> {stage}' for n, stage in enumerate(STAGES))
    return (
        f'<section><h2>Slides</h2>\n<div class="controls"><input id="words" type="search" aria-label="filter" '
        f'placeholder="name, cause, remark"><select id="state" aria-label="which slides">{options}</select>'
        f'<span id="shown" class="soft"></span><span class="soft">sizes: 0 to {_SHOWN_UM2} µm² and above · '
        f"{keys}</span></div>\n"
        f'<table id="slides"><thead><tr><th></th>{heads}</tr></thead>\n<tbody>\n'
        f"{''.join(_line(slide, number) for number, slide in enumerate(slides))}</tbody></table></section>"
    )


def _line(slide: SlideResult, number: int) -> str:
    """A slide's line in the table."""
    status, name = html.escape(str(slide.row["status"])), html.escape(slide.name)
    picture = f'<img src="{slide.picture}" alt="" loading="lazy">' if slide.picture else ""
    remarks = [str(slide.row["cause"])] if slide.row.get("cause") else slide.remarks
    known = slide.number if slide.state == "done" else lambda _: np.nan
    cells = [
        f'<td><a href="{slide.address}/overlay.jpg">{picture}</a></td>' if picture else "<td></td>",
        f'<td class="name" data-v="{name}">{_linked(slide)}</td>',
        f'<td data-v="{status}"><span class="status {slide.state}">{status}</span></td>',
        _cell(known("tissue_mm2"), ",.2f"),
        _cell(known("nuclei"), ",.0f"),
        _cell(slide.density, ",.0f"),
        _cell(slide.median_area, ".1f"),
        _sizes(slide),
        _cell(known("area_lost_mm2"), ",.3g"),
        _cell(known("saturated_tiles"), ",.0f"),
        _ratio(slide),
        _seconds(slide),
        f'<td class="remarks {"odd" if slide.remarks else "soft"}" data-v="{len(remarks) or ""}">'
        f"{''.join(f'<p>{html.escape(remark)}</p>' for remark in remarks)}</td>",
    ]
    look = "yes" if slide.remarks else "no"
    return f'<tr id="slide-{number}" data-state="{slide.state}" data-look="{look}">{"".join(cells)}</tr>\n'


def _cell(value: float, form: str, more: str = "") -> str:
    """A number and what is said below it; an empty cell for NaN."""
    if not np.isfinite(value):
        return '<td class="number" data-v=""></td>'
    return f'<td class="number" data-v="{value:.12g}">{value:{form}}{more}</td>'


def _sizes(slide: SlideResult) -> str:
    """The distribution of its nuclei's areas; sorted by how wide it is, as quartiles to median."""
    if np.isnan(slide.median_area):
        return '<td data-v=""></td>'
    sizes = slide.findings["area_um2"]
    low, first, middle, third, high = sizes["quantiles"]
    title = f"area, µm²: median {middle:g}, half are {first:g} to {third:g}, nine tenths {low:g} to {high:g}"
    shown = AREA_EDGES_UM2.index(_SHOWN_UM2)
    counts = [*sizes["counts"][:shown], sum(sizes["counts"][shown:])]
    return f'<td data-v="{(third - first) / middle:.4g}">{charts.histogram(counts, title)}</td>'


def _ratio(slide: SlideResult) -> str:
    """The slide's own audit."""
    seams = slide.findings.get("seams") or {"ratio": None}
    if seams["ratio"] is None:
        return _cell(np.nan, "")
    return _cell(seams["ratio"], ".2f", f'<br><span class="soft">± {seams["standard_error"]:.2f}</span>')


def _seconds(slide: SlideResult) -> str:
    """From its beginning to its end, and where the work went."""
    parts = {stage: slide.number(f"seconds_{stage}") for stage in STAGES}
    if slide.state != "done":
        return _cell(np.nan, "")
    title = ", ".join(f"{stage} {value:.1f} s" for stage, value in parts.items())
    return _cell(slide.number("seconds"), ",.1f", charts.stacked(parts, title))


# ------------------------------------------------------------------------------------------------ below the table


def _settings(run: Mapping[str, Any]) -> str:
    """Everything that run.json says, folded."""
    if not run:
        return ""
    plain = {name: value for name, value in run.items() if not isinstance(value, Mapping)}
    settings = run.get("settings")
    groups = {
        "run": plain,
        **(settings if isinstance(settings, Mapping) else {}),
        **{name: value for name, value in run.items() if isinstance(value, Mapping) and name != "settings"},
    }
    blocks = (
        f"<div><h3>{html.escape(name)}</h3><table>{''.join(_setting(*pair) for pair in values.items())}</table></div>"
        for name, values in groups.items()
        if isinstance(values, Mapping) and values
    )
    return f'<details><summary>Settings and versions</summary><div class="settings">{"".join(blocks)}</div></details>'


def _setting(name: str, value: Any) -> str:
    return f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(str(value))}</code></td></tr>"
