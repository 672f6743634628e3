"""The outcome of a slide: what its stages did, and the warnings about it, worded once.

The ledger, the terminal and the report all show `SlideRecord.remarks`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline import files
from pipeline.layout import SlideFolder
from pipeline.segment.attempts import Attempt
from pipeline.text import counted
from slides.artefacts import KINDS

PLAUSIBLE_AREA_UM2 = (8.0, 150.0)  # of a slide's median nucleus; outside, the scale is probably wrong

NO_TISSUE = "no tissue was found: --tissue.everywhere takes the whole slide, of whatever colour"

OF_OTHER_SETTINGS = "done with other settings than the folder's: run it again with --overwrite"
"A remark of the ledger's row alone: slide.json does not know what its folder is of by now."

ARTEFACT_AREAS = {kind: f"{kind.replace(' ', '_')}_mm2" for kind in KINDS}
"Which of `Counts` holds the area of a kind of artefact."

LOOK = "look at overlay.jpg; "
"Part of a remark. Where nobody can look, as the results are not kept, it is left out."

_ARTEFACT_SHARE = 0.05  # of the tissue: less is usual

_TOUCHING_SHARE = 0.001  # of the nuclei: a few at the edges are clumps, more are a margin that is too small


_MORE_WORKERS = "add CPU workers (--workers)"

WAITS = {
    "tile": ("waiting for tiles", _MORE_WORKERS),
    "outline": ("waiting for outlines", _MORE_WORKERS),
    "plan": ("waiting for slides to be planned", _MORE_WORKERS),
    "disk": ("reading the patches or writing the instances", "put --out on a faster disk"),
    "window": ("waiting as --window was reached", "raise --window"),
}
"Why a detector had nothing to compute: words, and the remedy where it is a GPU."

DETECTING = ("stain", "detect")
"The stages in which a detector computes."

_LEAST_WAIT = 0.01  # of the detectors' time that is mentioned


@dataclass(frozen=True)
class Counts:
    """What was counted over the tiles or the nuclei of a slide. Counts of parts add up."""

    nuclei: int = 0
    area_lost_mm2: float = 0.0  # of the cores: unreadable, or no memory
    saturated_tiles: int = 0  # that reached their cap even after they were split
    split_tiles: int = 0  # detected in quarters, as the device lacked the memory for the whole
    touching_nuclei: int = 0  # that reach the edge of what their tile read, inside the slide
    seam_duplicates: int = 0  # left out at seams: duplicates, and what no other tile confirmed
    flagged_nuclei: int = 0  # whose centroid lies in an artefact
    pen_mm2: float = 0.0  # of the tissue, skipped or not, that each kind of artefact covers
    fold_mm2: float = 0.0
    bubble_mm2: float = 0.0
    coverslip_edge_mm2: float = 0.0
    blur_mm2: float = 0.0
    skipped_mm2: float = 0.0  # of the tissue, left out for artefacts
    skipped_tiles: int = 0  # not processed, as artefacts cover all of their tissue
    export_repaired: int = 0  # outlines that needed more than rounding to be valid, over all formats
    export_dropped: int = 0  # outlines of which nothing was left at the precision of the export

    @property
    def artefact_mm2(self) -> dict[str, float]:
        """The tissue that artefacts cover, by their kind; only kinds that are there."""
        areas = {kind: getattr(self, name) for kind, name in ARTEFACT_AREAS.items()}
        return {kind: area for kind, area in areas.items() if area}

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class StageRecord:
    """What stages did for a block or a slide, in a few numbers. Records add up.

    seconds: processing time of each stage, by its name, without waiting.
    computed_on: kinds of device and precisions that detected, as `device.computes_on`; they decide the last bits.
    waited: seconds that detectors had nothing to compute until they got these blocks, by the cause, of `WAITS`.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Counts = Counts()
    computed_on: tuple[str, ...] = ()
    waited: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "StageRecord") -> "StageRecord":
        seconds, waited = _sum(self.seconds, other.seconds), _sum(self.waited, other.waited)
        computed_on = tuple(sorted({*self.computed_on, *other.computed_on}))
        return StageRecord(seconds, self.counts + other.counts, computed_on, waited)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `to_json` gave, also of another version: counts that are not known are left out.

        Raises AttributeError, TypeError or ValueError for values of other types, OverflowError for a number too large.
        """
        seconds, waited = (
            {name: float(value) for name, value in content.get(kind, {}).items()} for kind in ("seconds", "waited")
        )
        counts = Counts(**_plain_values(Counts, content.get("counts", {})))
        return cls(seconds, counts, tuple(map(str, content.get("computed_on", ()))), waited)


def _plain_values(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The text and the numbers of a dataclass that are in `content`, of the types of their fields."""
    plain = {f.name: f.type for f in dataclasses.fields(kind) if f.type in (str, int, float)}
    return {name: type_(content[name]) for name, type_ in plain.items() if name in content}


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The sums by name."""
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in dict.fromkeys((*one, *other))}


@dataclass(frozen=True)
class SlideRecord:
    """A slide's row in the ledger."""

    slide: str
    status: str  # done, done before, done otherwise, skipped, failed, unfinished, interrupted, locked, waiting
    cause: str = ""
    mpp: float = 0.0
    mpp_source: str = ""
    tissue_mm2: float = 0.0
    tiles: int = 0
    stain: str = ""  # the method by which it was normalised
    work: StageRecord = StageRecord()
    attempts: tuple[Attempt, ...] = ()  # of a slide that was worked on; the last one ended it
    remarks: tuple[str, ...] = ()  # warnings about the slide

    @property
    def done(self) -> bool:
        return self.status.startswith("done")

    @property
    def nuclei(self) -> int:
        return self.work.counts.nuclei

    @property
    def elapsed_seconds(self) -> float:
        """From start to end of all attempts, waiting included."""
        return round(sum((until - since for since, until in self.attempts), 0.0), 3)

    @property
    def work_seconds(self) -> float:
        """Processing time, over all stages and workers."""
        return sum(self.work.seconds.values(), 0.0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `to_json` gave, also of another version: what is not known is left out.

        Raises AttributeError, TypeError or ValueError for values of other types, OverflowError for a number too large:
        the ledger and the report have this slide beside all others, and may not meet them later.
        """
        values = _plain_values(cls, content)
        values["work"] = StageRecord.from_json(content.get("work", {}))
        values["remarks"] = tuple(map(str, content.get("remarks", ())))
        values["attempts"] = tuple((float(since), float(until)) for since, until in content.get("attempts", ()))
        return cls(**values)


def read_record(content: Mapping[str, Any], name: str) -> SlideRecord:
    """The record in a slide.json; name: of the slide now, as its folder may have been renamed since.

    Raises AttributeError, KeyError, TypeError, ValueError or OverflowError where it is none.
    """
    return dataclasses.replace(SlideRecord.from_json(content["record"]), slide=name)


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether a slide.json is as `finished` wrote it, and holds what others read of it and of every file."""
    known, regions, parts = content.get("files"), content.get("regions"), content.get("source_parts", [])
    try:
        read_record(content, "")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return (
        files.fits_checksum(content)
        and _holds(content, {"digest": str, "quick_hash": str})
        and isinstance(parts, list)
        and all(_holds(part, {"name": str, "bytes": int, "mtime_ns": int, "etag": str}) for part in parts)
        and (regions is None or _holds(regions, {"path": str, "crop": bool, "sha256": str}))
        and isinstance(known, dict)
        and all(_holds(about, {"bytes": int, "sha256": str}) for about in known.values())
    )


def read_slide_json(folder: SlideFolder) -> dict[str, Any] | None:
    """The content of slide.json; None where it is missing or damaged.

    A damaged one is not to be written again: it would get a new checksum, which would fit the damage.
    """
    content = files.read_json(folder.slide_json)
    return content if content is not None and is_whole(content) else None


def _holds(value: Any, kinds: Mapping[str, type]) -> bool:
    """Whether a value of JSON is an object with these fields, each of its kind."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def device_use(work: StageRecord) -> str:
    """How busy the detectors were, and why they were not; empty where none has worked.

    `the detector computed 88% of the time, and was idle 12%: waiting for tiles; add CPU workers (--workers)`
    """
    computed = sum(work.seconds.get(name, 0.0) for name in DETECTING)
    idle = {name: max(0.0, work.waited.get(name, 0.0)) for name in WAITS}
    total = computed + sum(idle.values())
    if not computed:
        return ""
    line = f"the detector computed {computed / total:.0%} of the time"
    causes = sorted((name for name in WAITS if idle[name] >= _LEAST_WAIT * total), key=lambda name: -idle[name])
    if not causes:
        return line
    shares = [f"{idle[name] / total:.0%} " if len(causes) > 1 else "" for name in causes]
    said = ", ".join(share + WAITS[name][0] for share, name in zip(shares, causes, strict=True))
    # a processor that detects lacks no other workers: it does their work as well
    remedy = "" if any(kind.startswith("cpu") for kind in work.computed_on) else f"; {WAITS[causes[0]][1]}"
    return f"{line}, and was idle {sum(idle.values()) / total:.0%}: {said}{remedy}"


def remarks(record: SlideRecord, summary: Mapping[str, Any], notes: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The warnings about a finished slide: what was lost, skipped, overridden, or looks wrong.

    summary: of `pipeline.segment.summary`; notes: of the plan, which come first.
    """
    counts, said = record.work.counts, list(notes)
    if record.tissue_mm2 and not counts.nuclei:
        said.append(f"no nuclei were found: {LOOK}is it stained with H&E, and is the scale right?")
    if counts.area_lost_mm2:
        said.append(
            f"{counts.area_lost_mm2:.3g} mm² of tiles, glass included, have no result: unreadable, or the device had "
            f"no memory; the density of nuclei is of all tissue, so it is too low"
        )
    if artefacts := _artefacts(record):
        said.append(artefacts)
    if counts.saturated_tiles:
        said.append(
            f"{counted(counts.saturated_tiles, 'tile holds', 'tiles hold')} more nuclei than allowed: "
            f"raise --detector.instances-per-mm2, and --detector.proposals-per-mm2 to more than three times as many"
        )
    if counts.split_tiles:
        said.append(
            f"{counted(counts.split_tiles, 'tile was', 'tiles were')} done in quarters for want of device memory: "
            f"lower --tiling.tile"
        )
    if counts.touching_nuclei > _TOUCHING_SHARE * counts.nuclei:
        said.append(
            f"{counted(counts.touching_nuclei, 'nucleus reaches', 'nuclei reach')} the edge of what a tile read, and "
            f"may be cut: raise --tiling.margin"
        )
    quantiles = summary.get("area_um2", {}).get("quantiles") or [None]
    median = quantiles[len(quantiles) // 2]
    low, high = PLAUSIBLE_AREA_UM2
    if median is not None and not low <= median <= high:
        said.append(
            f"the median nucleus has {median:.3g} µm², usual are {low:g} to {high:g}: check the scale "
            f"({record.mpp:g} µm/px from {record.mpp_source})"
        )
    seams = summary.get("seams", {})
    if seams.get("suspicious"):
        said.append(
            f"seam check failed: density near seams is {seams['ratio']:.2f} ± {seams['standard_error']:.2f} of the "
            f"surroundings; above 1: duplicates; below: losses, raise --tiling.margin"
        )
    if counts.export_dropped:
        said.append(
            f"{counted(counts.export_dropped, 'nucleus is', 'nuclei are')} outside the slide, or too small for the "
            f"exports: left out there"
        )
    if len(record.work.computed_on) > 1:
        said.append(f"computed on {' and '.join(record.work.computed_on)}: single nuclei may differ between them")
    return tuple(said)


def _artefacts(record: SlideRecord) -> str:
    """The remark on artefacts that were skipped, or that cover much of the tissue; else empty."""
    counts = record.work.counts
    covered = sum(counts.artefact_mm2.values())
    kinds = ", ".join(f"{kind} {area:.2g}" for kind, area in counts.artefact_mm2.items())
    if counts.skipped_mm2:
        tiles = counted(counts.skipped_tiles, "tile")
        return f"{counts.skipped_mm2:.2g} mm² of tissue, {tiles}, were skipped: {kinds} mm²"
    if covered > _ARTEFACT_SHARE * record.tissue_mm2:
        share = covered / record.tissue_mm2
        return (
            f"artefacts cover {share:.0%} of the tissue ({kinds} mm²); nuclei there ({counts.flagged_nuclei:,}) have "
            f"their kind in the column artefact: --artefacts skip leaves them out"
        )
    return ""
