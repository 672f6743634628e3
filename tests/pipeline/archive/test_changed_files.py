"""Slides of which a file has changed since they were done, or since work on them began."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dicom_files import write
from oracle import chosen
from pipeline import files
from pipeline.archive.inputs.sources import Source
from pipeline.archive.known import BY_SIZE_ALONE, KnownSlides
from pipeline.archive.run import run
from pipeline.config import Execution, Settings
from pipeline.layout import RunFolder, SlideFolder
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches, empty
from pipeline.segment.job import Job, Origin, Part
from pipeline.segment.record import SlideRecord
from pipeline.segment.stages import make_plan
from slides.scale import GivenScale


def dicom(folder: Path) -> tuple[Path, Path]:
    """The files of a slide: of level 0, by which it is opened, and of level 1."""
    folder.mkdir()
    return write(folder / "a.dcm", "1.2.3"), write(folder / "b.dcm", "1.2.3", level=1)


def nothing(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """Stands for the detector."""
    for _ in patches:
        yield empty(28)


def done(slides: Path, out: Path, stage: str = "") -> SlideRecord:
    execution = Execution(cluster=False, workers=1 if not stage else 2, stage=stage)
    (row,) = run(slides, out, chosen(), execution, detect=nothing, say=print)
    return row


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(
    ("change", "status"),
    [("nothing", "done before"), ("date", "done before"), ("removed", "done before"), ("size", "done otherwise")],
)
def test_another_file_of_a_slide_than_its_own_has_changed(
    staged: bool, change: str, status: str, tmp_path: Path
) -> None:
    """By its size it has other content. By its date it may be copied: what is opened is the same slide."""
    own, other = dicom(tmp_path / "slides")
    stage = str(tmp_path / "stage") if staged else ""
    assert done(own.parent, tmp_path / "out", stage).status == "done"
    (about,) = json.loads((tmp_path / "out" / "a" / "slide.json").read_text())["source_parts"]
    stat = other.stat()
    assert about == {"name": "b.dcm", "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "etag": ""}
    if change == "date":
        os.utime(other, (1, 1))
    elif change == "removed":
        other.unlink()
    elif change == "size":
        other.write_bytes(other.read_bytes() + bytes(2))
    row = done(own.parent, tmp_path / "out", stage)
    assert row.status == status
    if status == "done otherwise":
        size = stat.st_size
        assert row.cause == (
            f"b.dcm, a file of the slide, has changed since it was done ({size + 2:,} bytes, was {size:,}): put it "
            f"back, or give --overwrite"
        )


def test_a_data_file_of_a_mirax_slide_is_one_of_its_files(shared: Path, tmp_path: Path) -> None:
    for path in (shared / "slides").glob("mirax-sparse*"):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    job = Job(tmp_path / "mirax-sparse.mrxs", SlideFolder(tmp_path / "out"), chosen(), GivenScale())
    assert [part.name for part in job.origin.parts or ()] == [
        f"mirax-sparse/{name}" for name in ("Data0000.dat", "Index.dat", "Slidedat.ini")
    ]


@pytest.mark.parametrize("field", ["source_parts", "source_etag"])
def test_results_of_an_earlier_version_are_done(field: str, tmp_path: Path) -> None:
    """They do not say what other files the slide had."""
    own, other = dicom(tmp_path / "slides")
    done(own.parent, tmp_path / "out")
    slide_json = tmp_path / "out" / "a" / "slide.json"
    content = json.loads(slide_json.read_text())
    del content[field]
    files.write_json(slide_json, files.with_checksum(content))
    other.write_bytes(other.read_bytes() + bytes(2 if field == "source_parts" else 0))
    assert done(own.parent, tmp_path / "out").status == "done before"


@pytest.mark.parametrize("known", [True, False])
def test_work_on_other_files_is_not_continued(known: bool, tmp_path: Path) -> None:
    """Unless an earlier version began it, which did not note them: it is continued, as that would have done."""
    own, other = dicom(tmp_path / "slides")
    job = Job(own, SlideFolder(tmp_path / "out"), chosen(), GivenScale())
    make_plan(job)
    if not known:
        content = files.read_checked_json(job.folder.plan) or {}
        del content["parts"]
        files.write_checked_json(job.folder.plan, content)
    work = job.folder.instances(0)
    work.touch()
    make_plan(job)
    assert work.exists()
    os.utime(other, (1, 1))
    make_plan(job)
    assert work.exists() == (not known)


class Served(NamedTuple):
    """Stands for a slide at a URL, which may be asked for its size, date and tag."""

    now: Origin

    def origin(self) -> Origin:
        return self.now

    def part(self, name: str) -> Part:
        return {part.name: part for part in self.now.parts or ()}[name]


@pytest.mark.parametrize(
    ("then", "now", "known", "guessed"),
    [
        (Origin("", 5, 7, "x"), Origin("", 5, 7, "y"), True, False),  # uploaded again by parts of another size, say
        (Origin("", 5, 7), Origin("", 5, 8), False, False),
        (Origin("", 5, 0, "x"), Origin("", 5, 0, "x"), True, False),
        (Origin("", 5, 0, "x"), Origin("", 5, 0, "y"), False, False),
        (Origin("", 5, 0), Origin("", 5, 0), True, True),
        (Origin("", 5, 0), Origin("", 6, 0), False, False),
        (Origin("", 5, 7, "", (Part("b", 2, 3),)), Origin("", 5, 7, "", (Part("b", 2, 3),)), True, False),
        (Origin("", 5, 7, "", (Part("b", 2, 3),)), Origin("", 5, 7, "", (Part("b", 2, 4),)), False, False),
    ],
)
def test_a_file_at_a_url_is_the_same_by_its_date_or_else_its_tag(
    then: Origin, now: Origin, known: bool, guessed: bool, tmp_path: Path
) -> None:
    """Where only its content tells, it is to be copied; where nothing could tell, its row says so."""
    out, settings = RunFolder(tmp_path / "out"), Settings()
    folder = out.slide("a")
    folder.path.mkdir(parents=True)
    files.write_json(out.run_json, {"digest": settings.digest})
    content = {
        "digest": settings.digest,
        "regions": None,
        "quick_hash": "",
        "source_bytes": then.bytes,
        "source_mtime_ns": then.mtime_ns,
        "source_etag": then.etag,
        "source_parts": [part._asdict() for part in then.parts or ()],
        "files": {},
        "record": SlideRecord("a", "done").to_json(),
    }
    files.write_json(folder.slide_json, files.with_checksum(content))
    source = Source(tmp_path / "a", "a", GivenScale(), remote=Served(now))  # type: ignore[arg-type]
    record = KnownSlides(out, settings, "").look(source, Job(source.path, folder, settings, source.scale))
    assert (record is not None) == known
    if record is not None:
        assert (record.status, record.remarks) == ("done before", (BY_SIZE_ALONE,) * guessed)


def test_a_copy_records_the_dates_of_what_it_is_a_copy_of(tmp_path: Path) -> None:
    own, other = dicom(tmp_path / "slides")
    for path in (own, other):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    done(own.parent, tmp_path / "out", str(tmp_path / "stage"))
    content = json.loads((tmp_path / "out" / "a" / "slide.json").read_text())
    stamps = [content["source_mtime_ns"], *(part["mtime_ns"] for part in content["source_parts"])]
    assert stamps == [1_700_000_000 * 10**9] * 2
