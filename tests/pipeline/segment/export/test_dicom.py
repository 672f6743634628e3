"""DICOM annotations, read back by highdicom and checked by dciodvfy where it is installed."""

import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shapely

import dicom_files
import oracle
from nuclei_tables import PROVENANCE, append, blobs, write
from pipeline.archive import run as archive_run
from pipeline.archive.estimate import estimate_slide
from pipeline.archive.inputs.sources import Source
from pipeline.config import Execution, Export, Settings
from pipeline.errors import ConfigError, RunError
from pipeline.layout import SlideFolder
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import STATISTICS, HostInstances, Patches
from pipeline.segment import tables
from pipeline.segment.export import dicom
from pipeline.segment.export.dicom import Reference, find_reference, write_dicom
from pipeline.segment.export.exported import Exported
from pipeline.segment.finished import rewrite_exports
from slides.geometry import Box
from slides.scale import GivenScale

pytest.importorskip("highdicom", reason="the extra dicom is not installed")

import highdicom


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A DICOM image of the slide of `nuclei_tables`, in full resolution, beside a coarser level of it."""
    (tmp_path / "dicom").mkdir()
    dicom_files.write(tmp_path / "dicom" / "coarse.dcm", "1.2.3", level=1)
    return dicom_files.complete(dicom_files.write(tmp_path / "dicom" / "fine.dcm", "1.2.3"), PROVENANCE.size)


def annotations(folder: Path) -> list[highdicom.ann.MicroscopyBulkSimpleAnnotations]:
    return [highdicom.ann.annread(path) for path in sorted(folder.iterdir())]


def test_the_annotations_read_back_equal(tmp_path: Path, image: Path) -> None:
    nuclei = write(tmp_path / "nuclei.parquet", blobs(40))
    assert write_dicom(nuclei, tmp_path / "ann", Export(dicom_reference=str(image))) == Exported(40)
    (read,) = annotations(tmp_path / "ann")
    assert read.AnnotationCoordinateType == "2D"
    assert read.PixelOriginInterpretation == "VOLUME"
    (referenced,) = read.ReferencedImageSequence
    import pydicom

    source = pydicom.dcmread(image)
    assert referenced.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert (read.StudyInstanceUID, read.ContainerIdentifier) == (source.StudyInstanceUID, "C1")
    assert (read.PatientName, read.PatientID) == ("Grün^Eva", "P1")
    rows = tables.read_nuclei(nuclei)
    groups = read.get_annotation_groups()
    assert [group.label for group in groups] == ["Nucleus", 'odd "name" µ/']
    assert len({group.uid for group in groups}) == 2
    for group, name in zip(groups, sorted(PROVENANCE.colours), strict=True):
        own = rows.filter(np.array(rows["class"].to_pylist()) == name)
        assert group.graphic_type.value == "POLYGON"
        drawn = group.get_graphic_data("2D")
        for ring, outline in zip(drawn, tables.geometry(own), strict=True):
            assert ring.dtype == np.float32
            np.testing.assert_array_equal(ring, shapely.get_coordinates(outline)[:-1].astype(np.float32))
        names, values, units = group.get_measurements()
        assert [n.meaning for n in names][:2] == ["Area", "Perimeter"]
        assert [u.value for u in units][:2] == ["um2", "um"]
        columns = [own[column].to_numpy() for column in dicom._MEASUREMENTS]
        assert len(names) == len({n.meaning for n in names}) == 21
        np.testing.assert_array_equal(values, np.stack(columns, axis=1))


def test_a_file_holds_so_many_and_no_more(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROW_GROUP", 10)
    nuclei = write(tmp_path / "nuclei.parquet", blobs(35))
    assert write_dicom(nuclei, tmp_path / "ann", Export(dicom_reference=str(image))) == Exported(35)
    read = annotations(tmp_path / "ann")
    counts = [sum(group.NumberOfAnnotations for group in file.AnnotationGroupSequence) for file in read]
    assert counts == [20, 15]
    assert [file.InstanceNumber for file in read] == [1, 2]
    assert len({file.SeriesInstanceUID for file in read}) == 1
    assert len({file.SOPInstanceUID for file in read}) == 2


def test_other_tables_have_other_identifiers(tmp_path: Path, image: Path) -> None:
    uids = []
    for seed in (0, 1):
        nuclei = write(tmp_path / f"{seed}.parquet", blobs(3, seed))
        write_dicom(nuclei, tmp_path / f"ann{seed}", Export(dicom_reference=str(image)))
        uids.append(annotations(tmp_path / f"ann{seed}")[0].SOPInstanceUID)
    assert uids[0] != uids[1]


def test_an_image_of_the_bounds_starts_at_their_corner(tmp_path: Path) -> None:
    nuclei = write(tmp_path / "nuclei.parquet", blobs(5))
    image = dicom_files.complete(dicom_files.write(tmp_path / "x.dcm", "1.2.3"), PROVENANCE.bounds.size)
    write_dicom(nuclei, tmp_path / "ann", Export(dicom_reference=str(image)))
    drawn = np.concatenate(
        [ring for g in annotations(tmp_path / "ann")[0].get_annotation_groups() for ring in g.get_graphic_data("2D")]
    )
    outlines = tables.geometry(tables.read_nuclei(nuclei))
    np.testing.assert_allclose(drawn.min(axis=0) + np.array([100, 250]), shapely.total_bounds(outlines)[:2], atol=0.01)


def test_what_float32_cannot_hold_is_counted(tmp_path: Path) -> None:
    """At 100,000 px it has steps of 1/128: vertices that fall together are one, and the last is never the first."""
    square = np.array([[0, 0], [9, 0], [9, 9], [0, 9], [0, 0.001]]) + 100_000
    speck = np.array([[0, 0], [0.001, 0], [0, 0.001]]) + 100_000
    whole = Box(0, 0, 200_000, 200_000)
    provenance = dataclasses.replace(PROVENANCE, size=whole.size, bounds=whole, colours={"Nucleus": (9, 9, 9)})
    image = dicom_files.complete(dicom_files.write(tmp_path / "x.dcm", "1.2.3"), provenance.size)
    nuclei = tmp_path / "nuclei.parquet"
    with tables.NucleiWriter(nuclei, provenance) as writer:
        append(
            writer,
            np.array([shapely.Polygon(square), shapely.Polygon(speck), shapely.Polygon(square[:3] + 20)]),
            class_name=["Nucleus"] * 3,
            score=np.array([np.nan, 0.5, 0.25]),
            votes=np.ones(3, int),
            stains=np.full((3, len(tables.STAINS)), np.nan),
        )
    assert write_dicom(nuclei, tmp_path / "ann", Export(dicom_reference=str(image))) == Exported(2, dropped=1)
    (group,) = annotations(tmp_path / "ann")[0].get_annotation_groups()
    assert [len(ring) for ring in group.get_graphic_data("2D")] == [4, 3]
    names, values, _ = group.get_measurements()
    np.testing.assert_array_equal(values[:, [n.meaning for n in names].index("Detection probability")], [np.nan, 0.25])
    assert "Eosin OD mean" not in [n.meaning for n in names]  # none of them is a number
    assert "Class probability" not in [n.meaning for n in names]  # there is one class


def test_a_slide_without_nuclei_has_no_file(tmp_path: Path, image: Path) -> None:
    nuclei = write(tmp_path / "nuclei.parquet", blobs(0))
    assert write_dicom(nuclei, tmp_path / "ann", Export(dicom_reference=str(image))) == Exported(0)
    assert list((tmp_path / "ann").iterdir()) == []


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of Debian's dicom3tools")
def test_dciodvfy_finds_no_error(tmp_path: Path, image: Path) -> None:
    nuclei = write(tmp_path / "nuclei.parquet", blobs(8))
    write_dicom(nuclei, tmp_path / "ann", Export(dicom_reference=str(image)))
    (file,) = (tmp_path / "ann").iterdir()
    said = subprocess.run(["dciodvfy", "-new", file], capture_output=True, text=True, check=False).stderr
    assert "MicroscopyBulkSimpleAnnotations" in said
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    # its version of 2022 says this whether the attribute is there or not
    assert all(
        "CommonZCoordinateValue(006a,0010)> - Only valid for AnnotationCoordinateType of 3D" in e for e in errors
    )
    assert all("CommonZCoordinateValue" not in group for group in highdicom.ann.annread(file).AnnotationGroupSequence)


# ----------------------------------------------------------------------------------------------- reference


def where(place: Path | str) -> Reference:
    return find_reference("case7", PROVENANCE.size, PROVENANCE.bounds, Export(dicom_reference=str(place)))


def test_the_reference_is_the_full_image_of_the_slide(tmp_path: Path, image: Path) -> None:
    """Whichever of its files is named; or by the slide's name in a folder."""
    another = dicom_files.complete(dicom_files.write(image.with_name("another.dcm"), "1.2.4"), PROVENANCE.size)
    assert where(image) == where(image.with_name("coarse.dcm")) == Reference(image, (0, 0))
    another.unlink()
    (tmp_path / "case7").mkdir()
    image.parent.rename(tmp_path / "case7" / "series")
    assert where(tmp_path) == Reference(tmp_path / "case7" / "series" / "fine.dcm", (0, 0))
    dicom_files.write(tmp_path / "case8.dcm", "1.2.4")
    (tmp_path / "case7").rename(tmp_path / "other")
    (tmp_path / "other" / "series" / "fine.dcm").rename(tmp_path / "case7.dcm")
    assert where(tmp_path) == Reference(tmp_path / "case7.dcm", (0, 0))


def test_a_missing_reference_is_named_with_the_remedy(tmp_path: Path, image: Path) -> None:
    remedy = r"give --export\.dicom-reference DIR with one as DIR/case7\.dcm or in DIR/case7/"
    (tmp_path / "case7.svs").write_bytes(b"II*\0")
    for place, problem in (
        ("", "its slide is not known"),
        (tmp_path / "case7.svs", r"case7\.svs is none"),
        (tmp_path / "gone.svs", r"gone\.svs is not there"),
        (tmp_path, "holds none"),
    ):
        with pytest.raises(RunError, match=rf"a DICOM image of case7, and .*{problem}: {remedy}"):
            where(place)
    with pytest.raises(RunError, match=r"case7 has 0 DICOM images of its size, 6000 x 7000 px, in .*64 x 64"):
        where(dicom_files.write(tmp_path / "small.dcm", "1.2.5", level=1))
    shutil.copy(image, image.with_name("copy.dcm"))
    with pytest.raises(RunError, match="case7 has 2 DICOM images of its size"):
        where(image)


def test_a_copy_belongs_to_one_slide(tmp_path: Path, image: Path) -> None:
    """Slides of one name in several folders have each its own: one patient's is not taken for another's."""
    run, copies = tmp_path / "out", tmp_path / "copies"
    (copies / "b").mkdir(parents=True)
    for name in ("a/case7", "b/case7"):
        (run / name).mkdir(parents=True)
        write(run / name / "nuclei.parquet", blobs(3))
    (run / "run.json").write_text("{}")
    shutil.copy(image, copies / "case7.dcm")
    shutil.copy(image, copies / "b" / "case7.dcm")
    options = Export(("dicom",), dicom_reference=str(copies))
    with pytest.raises(RunError, match=r"with one as DIR/a/case7\.dcm or in DIR/a/case7/"):
        rewrite_exports(SlideFolder(run / "a" / "case7"), options)
    assert rewrite_exports(SlideFolder(run / "b" / "case7"), options) == {"dicom": Exported(3)}
    one = dataclasses.replace(options, dicom_reference=str(image))
    with pytest.raises(ConfigError, match=r"fine\.dcm is a file: need the folder with SLIDE\.dcm of every slide"):
        rewrite_exports(SlideFolder(run / "b" / "case7"), one)


def squares(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """A detector that sees one nucleus in each patch, of 10 x 10 px."""
    box, mask = np.array([[50, 50, 60, 60]], np.float32), np.ones((1, 10, 10), bool)
    one = np.ones(1, np.int64)
    for _ in patches:
        yield HostInstances(
            box,
            mask,
            one.astype(np.float32),
            0 * one,
            one.astype(np.float32),
            one,
            np.zeros((1, 2, len(STATISTICS)), np.float32),
            False,
        )


def test_a_run_refuses_a_slide_without_reference_before_inference(tmp_path: Path) -> None:
    """The others are done, with annotations of the DICOM slide itself; `plan` says it before the run."""
    (tmp_path / "slides").mkdir()
    oracle.paint(tmp_path / "slides" / "case7.png", 0)
    for name, level in (("a", 0), ("b", 1)):
        dicom_files.write(tmp_path / "slides" / f"{name}.dcm", "1.2.3", level=level)
    settings = dataclasses.replace(oracle.chosen(), export=Export(formats=("dicom",)))
    done, refused = archive_run.run(
        [tmp_path / "slides" / "a.dcm", tmp_path / "slides" / "case7.png"],
        tmp_path / "out",
        settings,
        Execution(cluster=False, workers=1),
        mpp=0.25,
        say=lambda line: None,
        detect=squares,
    )
    assert (done.slide, done.status, refused.slide, refused.status) == ("a", "done", "case7", "failed")
    assert "case7.png is none" in refused.cause
    assert "detect" not in refused.work.seconds
    assert not SlideFolder(tmp_path / "out" / "case7").nuclei.exists()
    (read,) = annotations(SlideFolder(tmp_path / "out" / "a").export("dicom"))
    assert read.ReferencedImageSequence[0].ReferencedSOPInstanceUID.startswith("1.2.3.0.")
    (file,) = SlideFolder(tmp_path / "out" / "a").export("dicom").iterdir()
    before = file.read_bytes()
    rewrite_exports(SlideFolder(tmp_path / "out" / "a"), settings.export)  # finds the slide by slide.json
    assert file.read_bytes() == before
    (tmp_path / "named").mkdir()
    with pytest.raises(RunError, match="named holds none"):  # and not where it is told to look elsewhere
        rewrite_exports(
            SlideFolder(tmp_path / "out" / "a"),
            dataclasses.replace(settings.export, dicom_reference=str(tmp_path / "named")),
        )
    source = Source(tmp_path / "slides" / "case7.png", "case7", GivenScale(default_mpp=0.25))
    assert "case7.png is none" in estimate_slide(source, settings, 42.0).problem
