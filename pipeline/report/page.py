"""report.html: the results of every slide of a run, on one page that opens from disk and loads nothing else."""

import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files
from pipeline.layout import RunFolder
from pipeline.report import charts
from pipeline.report.regions import region_table
from pipeline.report.results import FEWEST_SLIDES, OUTLIER_Z, SlideResult, class_shares, read_results
from pipeline.report.table import linked, slide_table
from pipeline.segment.record import ARTEFACT_AREAS, DETECTING, WAITS, StageRecord, device_use
from pipeline.segment.stages import STAGES
from pipeline.segment.summary import NEAR_PX, SEAM_EDGES_PX, seam_verdict
from pipeline.text import duration, shell_command


def write_report(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.html and return its path.

    rows: of the ledger, as dicts, one for each slide. The rest is read from run.json and from the slides' folders;
        whatever is missing there, or cannot be read, is left out of the page.
    The page links to files beside it by relative addresses and loads nothing; all text from outside is escaped.
    """
    slides = read_results(folder, rows)
    slides.sort(key=lambda s: (s.state != "failed", not s.remarks, s.state != "pending"))
    name = html.escape(folder.path.resolve().name)
    run = files.read_json(folder.run_json) or {}
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="soft">Nightslide, written {datetime.now().astimezone():%Y-%m-%d %H:%M}{_main_settings(run)}</p>',
        _viewer(folder),
        _numbers(slides),
        _detector_use(slides),
        _classes(slides),
        _failures(slides),
        f'<section class="plots">{_seams(slides)}{_stages(slides)}{_spread(slides)}</section>',
        slide_table(slides),
        region_table(slides, folder.regions.name),
        _settings(run),
    ]
    path = folder.report
    with files.committed(path) as part:
        # a file name need not be text: what cannot be written becomes a question mark
        part.write_text(_page(name, "\n".join(parts)), encoding="utf-8", errors="replace")
    return path


def _page(title: str, body: str) -> str:
    """The document. Its policy keeps it from loading anything, whatever the text contains."""
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


def _main_settings(run: Mapping[str, Any]) -> str:
    """The settings that matter most, in a line."""
    detector, stain, tiling = (_table(_table(run, "settings"), name) for name in ("detector", "stain", "tiling"))
    chosen = {
        "weights": Path(str(detector.get("weights", ""))).stem,
        "views": detector.get("views"),
        "stain": stain.get("method"),
        "µm/px": tiling.get("mpp"),
        "digest": run.get("digest"),
    }
    return "".join(f" · {name} {html.escape(str(value))}" for name, value in chosen.items() if value)


def _table(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of run.json, which has no checksum; empty where it is none."""
    table = content.get(name)
    return table if isinstance(table, Mapping) else {}


def _viewer(folder: RunFolder) -> str:
    """How to look at the slides with their nuclei: the address changes with every start, so the command is given."""
    command = html.escape(shell_command(["nightslide", "view", folder.path.resolve()]))
    return f'<p class="soft">The slides with their nuclei, in a browser: <code>{command}</code></p>'


def _numbers(slides: Sequence[SlideResult]) -> str:
    """The run in numbers."""
    done = [s for s in slides if s.state == "done"]
    failed, skipped = (sum(s.state == state for s in slides) for state in ("failed", "skipped"))
    area, seconds = sum(s.number("tissue_mm2") for s in done), _busy_seconds(done)
    lost = sum(s.number("area_lost_mm2") for s in done)
    nuclei = sum(s.number("nuclei") for s in done)
    artefacts = sum(s.number(name) for s in done for name in ARTEFACT_AREAS.values())
    figures = [
        (f"{len(done):,}", "slide done" if len(done) == 1 else "slides done", ""),
        (f"{failed:,}", "failed", "bad" if failed else ""),
        (f"{sum(s.state == 'pending' for s in slides):,}", "pending", ""),
        *([(f"{skipped:,}", "skipped", "")] if skipped else []),
        (f"{sum(bool(s.remarks) for s in slides):,}", "with warnings", ""),
        (f"{nuclei:,.0f}", "nuclei", ""),
        (_area(area, 1), "mm² of tissue", ""),
        (f"{nuclei / area:,.0f}" if area else "?", "nuclei per mm²", ""),
        (duration(seconds), "of processing", ""),
        (f"{3600 * area / seconds:,.0f}" if seconds else "?", "mm² per hour", ""),
        *([(_area(artefacts, 2), "mm² under artefacts", "")] if artefacts else []),
        *([(_area(lost, 3), "mm² lost", "bad")] if lost else []),
    ]
    items = (f'<li><b class="{kind}">{value}</b><span>{words}</span></li>' for value, words, kind in figures)
    return f'<ul class="figures">{"".join(items)}</ul>'


def _area(mm2: float, decimals: int) -> str:
    """An area with so many decimals; a small one with two digits, so that it does not read as none."""
    return f"{mm2:.2g}" if 0 < mm2 < 10.0 ** (1 - decimals) else f"{mm2:,.{decimals}f}"


def _classes(slides: Sequence[SlideResult]) -> str:
    """The share of each class in the nuclei of all slides."""
    shares = class_shares(sum((Counter(s.classes) for s in slides), Counter()))
    return f'<p class="soft">Classes of the nuclei: {html.escape(shares)}.</p>' if shares else ""


def _detector_use(slides: Sequence[SlideResult]) -> str:
    """How busy the detectors were, and what they waited for."""
    records = (
        StageRecord(
            {name: s.number(f"seconds_{name}") for name in DETECTING},
            computed_on=(str(s.row.get("computed_on") or ""),),
            waited={name: s.number(f"seconds_idle_{name}") for name in WAITS},
        )
        for s in slides
    )
    use = device_use(sum(records, StageRecord()))
    return f'<p class="soft">On all slides {html.escape(use)}.</p>' if use else ""


def _busy_seconds(done: Iterable[SlideResult]) -> float:
    """Seconds in which at least one slide was worked on: the union of all their attempts.

    So slides that run side by side count once, and the time between two runs does not count.
    """
    busy, until = 0.0, -np.inf
    for started, ended in sorted(attempt for slide in done for attempt in slide.attempts):
        busy += max(0.0, ended - max(started, until))
        until = max(until, ended)
    return busy


def _failures(slides: Sequence[SlideResult]) -> str:
    """Causes of failure, the most frequent first, with their slides.

    Causes that differ only in numbers and in the slide's own name are one.
    """
    groups: dict[str, list[tuple[SlideResult, str]]] = defaultdict(list)
    for slide in slides:
        if slide.state == "failed":
            own = re.escape(slide.name.rsplit("/", 1)[-1])
            cause = re.sub(rf"\S*({own}\.|/{own}\b)\S*", "…", str(slide.row.get("cause") or "unknown cause"))
            groups[re.sub(r"\d+([.,]\d+)*", "#", cause)].append((slide, cause))
    if not groups:
        return ""
    parts = ['<h2 class="bad">Failures</h2>']
    for group in sorted(groups.values(), key=len, reverse=True):
        differ = len({cause for _, cause in group}) > 1
        items = (f"<li>{linked(s)}{html.escape(f': {cause}') if differ else ''}</li>" for s, cause in group)
        parts.append(
            f'<div class="failure"><p><b>{len(group)}</b> · {html.escape(group[0][1])}</p>'
            f'<ul class="{"wide" if differ else "names"}">{"".join(items)}</ul></div>'
        )
    return f"<section>{''.join(parts)}</section>"


def _seams(slides: Sequence[SlideResult]) -> str:
    """The seam check over all slides: a chart and its verdict."""
    audits = [s.summary["seams"] for s in slides if s.summary]
    observed, expected = (np.sum([a[key] for a in audits], axis=0) for key in ("observed", "expected"))
    verdict = seam_verdict(observed, expected) if audits else None
    if verdict is None or verdict.ratio is None:
        return ""
    labels = [str(e) for e in SEAM_EDGES_PX[1:]] + ["more"]
    points = [
        charts.Ratio(label, o / e, e**-0.5) for label, o, e in zip(labels, observed, expected, strict=True) if e > 0
    ]
    passed = '<b class="bad">failed</b>' if verdict.suspicious else '<b class="good">passed</b>'
    plot = charts.ratios(points, SEAM_EDGES_PX.index(NEAR_PX), "distance to the nearest seam, at most, work px")
    return (
        f"<figure><h2>Seams</h2>{plot}<figcaption>Seam check {passed}: the density of nuclei within {NEAR_PX} px of a "
        f"seam is {verdict.ratio:.3f} ± {verdict.standard_error:.3f} of the surroundings. Above 1: duplicates; "
        f"below 1: losses, raise --tiling.margin.</figcaption></figure>"
    )


def _stages(slides: Sequence[SlideResult]) -> str:
    """Seconds of work in each stage, over all slides."""
    seconds = {stage.name: sum(s.number(f"seconds_{stage.name}") for s in slides) for stage in STAGES}
    whole, most = sum(seconds.values()), max(seconds.values())
    if not whole:
        return ""
    lines = (
        f'<tr><td>{stage}</td><td><span class="swatch c{number}" style="width:{100 * value / most:.1f}%"></span></td>'
        f'<td class="number">{duration(value)}</td><td class="number">{value / whole:.1%}</td></tr>'
        for number, (stage, value) in enumerate(seconds.items())
    )
    return (
        f'<figure><h2>Time per stage</h2><table class="stages">{"".join(lines)}</table><figcaption>Work done, summed '
        f"over workers: stages and slides run beside each other.</figcaption></figure>"
    )


def _spread(slides: Sequence[SlideResult]) -> str:
    """Every slide by the density and median area of its nuclei."""
    dots = [
        charts.Dot(s.median_area, s.density, s.name, f"#slide-{number}", s.outlier)
        for number, s in enumerate(slides)
        if s.density > 0 and np.isfinite(s.median_area)
    ]
    if len(dots) < 2:
        return ""
    plot = charts.scatter(dots, "median area of a nucleus, µm²", "nuclei per mm²")
    return (
        f"<figure><h2>Slides</h2>{plot}<figcaption>Marked: outliers in density (by its logarithm) or "
        f"area, with a robust z score (from median and MAD) beyond {OUTLIER_Z}, among {FEWEST_SLIDES} slides or more."
        f"</figcaption></figure>"
    )


# ------------------------------------------------------------------------------------------------ below the table


def _settings(run: Mapping[str, Any]) -> str:
    """Everything in run.json, collapsed."""
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
