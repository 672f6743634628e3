"""A finished slide: slide.json, written last, names every result with its size and checksum, and has one of itself."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import shapely

from pipeline import files
from pipeline.config import Export, ExportFormat, require
from pipeline.errors import AnnotationError, RunError, SlideChanged
from pipeline.layout import EXPORTS, RESULTS, SlideFolder
from pipeline.segment import annotations, tables
from pipeline.segment.export import FORMATS, Exported, check_formats
from pipeline.segment.job import Job, Origin, Part
from pipeline.segment.plan import Plan, read_artefacts, read_plan, reported_tissue
from pipeline.segment.record import SlideRecord, is_whole, read_slide_json, remarks
from pipeline.segment.regions import RegionFile
from pipeline.segment.summary import summarise
from pipeline.segment.tables import checked_between_groups
from pipeline.text import one_line
from slides.errors import NightslideError, ScaleUnknown
from slides.slide import Slide, open_slide


def finish_slide(job: Job, record: SlideRecord) -> SlideRecord:
    """Write slide.json: provenance, record and summary. Returns the record with its area of tissue and its remarks."""
    plan = read_plan(job.folder, job.digest)
    tissue = reported_tissue(read_artefacts(job.folder, plan), job.settings)
    record = dataclasses.replace(record, tissue_mm2=round(tissue.area_mm2, 4))
    with checked_between_groups(job.check_lease):
        summary = summarise(job.folder.nuclei, plan._replace(tissue=tissue))
    record = dataclasses.replace(record, remarks=remarks(record, summary, plan.notes))
    # as the file was when it was planned: of one that has changed since, the next run asks whether that matters
    source_bytes, source_mtime_ns = plan.file
    content = {
        "digest": job.digest,
        "overwrite": job.overwrite,
        "regions": job.regions and job.regions.to_json(),
        "source": job.source.name,
        "source_path": job.original.place if job.original else str(job.source),
        "source_bytes": source_bytes,
        "source_mtime_ns": source_mtime_ns,
        "source_etag": job.original.etag if job.original else "",
        "source_parts": [part._asdict() for part in plan.parts or ()],
        "quick_hash": plan.quick_hash,
        "vendor": plan.vendor,
        "size": plan.size,
        "bounds": plan.bounds,
        "um_per_px": plan.scale[:2],
        "has_icc": plan.has_icc,
        "stain": plan.normalisation.source.to_json(),
        "stain_target": plan.normalisation.target.to_json(),
        "stain_trial_scores": plan.trial_scores,
        "files": _describe(job.folder, job.settings.export),
        "record": record.to_json(),
        "summary": summary,
    }
    job.check_lease()
    files.write_json(job.folder.slide_json, files.with_checksum(content))
    return record


def is_unchanged(origin: Origin, content: Mapping[str, Any]) -> bool:
    """Whether a slide's own file has the size and date that a slide.json records; where it has no date, the tag."""
    if (origin.bytes, origin.mtime_ns) != (content.get("source_bytes"), content.get("source_mtime_ns")):
        return False
    return bool(origin.mtime_ns) or origin.etag == content.get("source_etag", origin.etag)


def known_parts(content: Mapping[str, Any]) -> tuple[Part, ...]:
    """The slide's other files, as a slide.json records them; none in one of an earlier version."""
    return tuple(Part(*(part[name] for name in Part._fields)) for part in content.get("source_parts", ()))


def are_unchanged(now: Mapping[str, Part], then: Iterable[Part]) -> bool:
    """Whether a slide's other files are there, with the sizes and dates that they had. now: by their names.

    Raises SlideChanged for one of another size: it has other content, which the quick hash of a slide need not show.
    """
    for part in then:
        if part.name in now and (size := now[part.name].bytes) != part.bytes:
            raise SlideChanged(
                f"{part.name}, a file of the slide, has changed since it was done ({size:,} bytes, was "
                f"{part.bytes:,}): put it back, or give --overwrite"
            )
    return all(part.name in now and now[part.name].mtime_ns == part.mtime_ns for part in then)


def check_same_file(slide: Slide, quick_hash: str, file: str, advice: str) -> None:
    """Raise SlideChanged where a slide is another file than the one whose quick hash was recorded.

    file, advice: for the message: which file it should be, such as "the file that these results are of"; what to do
    """
    if slide.quick_hash != quick_hash:
        raise SlideChanged(
            f"{slide.path.name} is not {file} ({slide.quick_hash[:12]}, was {quick_hash[:12]}): {advice}"
        )


def check_same_source(source: Path, content: Mapping[str, Any]) -> None:
    """Raise SlideChanged where a slide, which is opened, is another than the one in a slide.json."""
    with open_slide(source, mpp=1.0) as slide:
        of_results = "the file that these results are of"
        check_same_file(slide, content["quick_hash"], of_results, "put it back, or give --overwrite")


def own_mpp(job: Job) -> float | None:
    """The scale of a slide, which is opened, um per px at level 0; None where none is known. Raises SlideError."""
    try:
        with job.open() as slide:
            return slide.scale.mean
    except ScaleUnknown:
        return None


def difference(job: Job, content: Mapping[str, Any]) -> str:
    """Why the digest in a slide.json is not that of the job: other regions, or else other settings, in words."""
    then, now = RegionFile.from_json(content.get("regions")), job.regions
    if (then and then[1:]) == (now and now[1:]):  # wherever they lie
        return f"settings ({content['digest']}, these are {job.digest})"
    was, is_ = (str(regions.path) if regions else "none" for regions in (then, now))
    return f"regions ({was if was != is_ else f'other content of {was}'}, now {is_})"


# --------------------------------------------------------------------------------------- files of results


def check_exports(source: Path, name: str, plan: Plan, export: Export) -> None:
    """Raise, before inference, where a wanted format cannot be written. name: of the slide in its run."""
    check_formats(export.formats)
    export = _with_source(export, source)
    for check in filter(None, (FORMATS[wanted].check for wanted in export.formats)):
        check(name, plan.size, plan.bounds, export)


def write_exports(folder: SlideFolder, export: Export, source: Path | None = None) -> dict[str, Exported]:
    """The files for other tools, from the folder's nuclei.parquet, by the names of their formats.

    source: the slide, where it is known.
    """
    check_formats(export.formats)
    export = _with_source(export, source)
    return {name: FORMATS[name].write(folder.nuclei, folder.export(name), export) for name in export.formats}


def _with_source(export: Export, source: Path | None) -> Export:
    """The settings with the slide as the image that DICOM annotations refer to, unless they name others.

    Raises ConfigError where they name a file, which would be taken for every slide of its size.
    """
    place = export.dicom_reference
    need = "need the folder with SLIDE.dcm of every slide"
    require(not os.path.isfile(place), f"dicom-reference={place} is a file: {need}")
    if export.dicom_reference or source is None:
        return export
    return dataclasses.replace(export, dicom_reference=str(source))


def stale_exports(folder: SlideFolder, export: Export) -> tuple[ExportFormat, ...]:
    """Names of the wanted formats whose files are missing, of another size than was written, or of other options."""
    known = (read_slide_json(folder) or {}).get("files", {})
    return tuple(
        name
        for name in export.formats
        if known.get(EXPORTS[name], {}).get("options") != _options(name, export)
        or _damage(folder.export(name), known[EXPORTS[name]], thorough=False)
    )


def refresh_exports(folder: SlideFolder, export: Export) -> tuple[ExportFormat, ...]:
    """Make what is stale of a finished slide's exports again, from nuclei.parquet, as `rewrite_exports`.

    Returns the names of the formats.
    """
    stale = stale_exports(folder, export)
    for name in stale:  # one by one: what is made is noted, should the next one fail
        rewrite_exports(folder, dataclasses.replace(export, formats=(name,)))
    return stale


def rewrite_exports(folder: SlideFolder, export: Export) -> dict[str, Exported]:
    """Make exports of a finished slide, there or not, and note them in slide.json.

    Its lease is ours, and `tables.checked_between_groups` lasts, with a check of that. What a killed export left
    half-written goes first, as it takes space.
    Raises RunError where nuclei.parquet is not as it was written: its exports would be noted as whole.
    The outlines of tissue and artefacts get the origin of QuPath's file, over which they are shown, whichever export is
    made; where the slide has none, that of the other exports with a choice of origin.
    """
    check_as_written(folder, folder.nuclei)
    remove_half_written(folder)
    content = read_slide_json(folder)
    exported = write_exports(folder, export, Path(content["source_path"]) if content is not None else None)
    if content is not None:
        tables.check_now()
        placed = _placed(folder, _crop_of_outlines(export, content))
        made = _describe(folder, export, (*placed, *(EXPORTS[name] for name in export.formats)))
        content = {**content, "files": {**content["files"], **made}}
        tables.check_now()  # who was suspended until now would describe what another run has made
        files.write_json(folder.slide_json, files.with_checksum(content))
    return exported


def remove_half_written(folder: SlideFolder) -> None:
    """Remove what killed writers left beside the results of a slide, whose lease is ours."""
    for leftover in folder.half_written():
        files.remove(leftover)


def _crop_of_outlines(export: Export, content: Mapping[str, Any]) -> bool | None:
    """Where the outlines of tissue and artefacts are to start, once `export` is made: see `rewrite_exports`.

    content: of slide.json, before the exports are noted in it
    Returns True for the corner of the slide's bounds, False for that of the whole slide, None for where they are.
    """
    if "qupath" not in export.formats:
        crop: bool | None = content["files"].get(EXPORTS["qupath"], {}).get("options", {}).get("crop")
        if crop is not None:
            return crop
    return export.crop if any("crop" in FORMATS[name].options for name in export.formats) else None


def _placed(folder: SlideFolder, crop: bool | None) -> list[str]:
    """The files of outlines that were given another origin; none where `crop` is None."""
    if crop is None:
        return []
    bounds, placed = tables.read_provenance(folder.nuclei).bounds, []
    for path in (folder.tissue_annotation, folder.artefact_annotations):
        with contextlib.suppress(AnnotationError):  # it is missing or damaged, which `nightslide verify` says
            if annotations.place(path, bounds, crop):
                placed.append(path.name)
    return placed


def unnoted_exports(folder: SlideFolder) -> str:
    """Why slide.json does not note the exports that `rewrite_exports` makes, and the remedy; empty where it does."""
    if read_slide_json(folder) is not None or not folder.slide_json.exists():
        return ""
    return f"{folder.slide_json} is damaged, so it does not note the exports: {remedy(folder.slide_json)}"


def damaged_results(folder: SlideFolder, content: Mapping[str, Any], *, thorough: bool) -> Iterator[str]:
    """What is wrong with the results of a finished slide, a line each, with the remedy.

    content: of its slide.json.
    thorough: every file by its checksum, which reads every byte; else only the size of nuclei.parquet, as all
    others can be made again from it.
    """
    if not is_whole(content):
        yield f"{folder.slide_json.name} is damaged: {remedy(folder.slide_json)}"
        return
    known = content["files"]
    for name in known if thorough else {folder.nuclei.name} & known.keys():
        if problem := _damage(folder.path / name, known[name], thorough=thorough):
            yield f"{name} {problem}: {remedy(folder.path / name)}"


def missing_results(folder: SlideFolder) -> tuple[str, ...]:
    """The results of a finished slide that are not there and that no run makes again, a line each, with the remedy."""
    known = (read_slide_json(folder) or {}).get("files", {})
    lost = (folder.path / name for name in known if name not in EXPORTS.values())
    return tuple(f"{path.name} is missing: {remedy(path)}" for path in lost if not path.exists())


def check_as_written(folder: SlideFolder, *results: Path) -> None:
    """Raise RunError where one of these results of a slide is there, and is not what slide.json says of it.

    All of it is read. Of a slide without a slide.json that is whole, nothing is known.
    """
    known = (read_slide_json(folder) or {}).get("files", {})
    for path in results:
        if path.name in known and path.exists() and (problem := _damage(path, known[path.name], thorough=True)):
            raise RunError(f"{path.name} {problem}: {remedy(path)}")


def _damage(file: Path, known: Mapping[str, Any], *, thorough: bool) -> str:
    """How a file differs from what is known of it; empty where it does not."""
    try:
        if not file.exists():
            return "is missing"
        if (size := files.size_bytes(file)) != known["bytes"]:
            return f"has {size:,} bytes, was written with {known['bytes']:,}"
        if thorough and files.sha256(file) != known["sha256"]:
            return "has other content than was written"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return ""


def remedy(file: Path) -> str:
    """What to do about a file or folder of a finished slide that is damaged or missing."""
    made = next((name for name, export in EXPORTS.items() if export == file.name), None)
    if made is None:
        return "put the file back, or run the slide again with --overwrite"
    again = f"the same run command makes it again, or nightslide export --formats {made} where that made it"
    return f"{'delete it, and ' * file.exists()}{again}"


UNUSABLE = (NightslideError, OSError, KeyError, ValueError, pa.ArrowException, shapely.errors.ShapelyError)
"What is raised where a table cannot be used: by us, by the system, and by whichever library meets the damage."


def cause(error: Exception, table: Path) -> str:
    """Why a table could not be used, and the remedy; what is neither said by us nor by the system is damage."""
    if isinstance(error, FileNotFoundError) and not os.path.exists(table):
        return f"it is missing: {remedy(table)}"
    if isinstance(error, OSError) and error.errno is not None:
        return files.refusal(error) or one_line(error)
    if isinstance(error, NightslideError):
        return one_line(error)
    return f"it is damaged ({one_line(error)}): {remedy(table)}"


def _describe(folder: SlideFolder, export: Export, names: tuple[str, ...] = RESULTS) -> dict[str, Any]:
    """Size and checksum of every result that is there, and the options of those that are exports."""
    about: dict[str, Any] = {}
    made = {EXPORTS[name]: name for name in export.formats}
    for name in names:
        path = folder.path / name
        if path.exists() and (name not in EXPORTS.values() or name in made):
            about[name] = {"bytes": files.size_bytes(path), "sha256": files.sha256(path)}
            if name in made:
                about[name]["options"] = _options(made[name], export)
    return about


def _options(name: ExportFormat, export: Export) -> dict[str, Any]:
    """What of the settings decides the content of an export."""
    return {option: getattr(export, option) for option in FORMATS[name].options}
