"""nuclei.parquet -> nuclei.dicom: Microscopy Bulk Simple Annotations, in the pixels of one DICOM image of the slide.

Source: DICOM PS3.3, A.87 (the object) and C.37.1 (its annotations); written by highdicom.
"""

import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import files
from pipeline.config import Export
from pipeline.errors import RunError
from pipeline.files import committed
from pipeline.layout import SlideFolder
from pipeline.segment.export.exported import Exported, Rings, open_rings, shards
from pipeline.segment.tables import STAINS, Provenance, geometry, read_provenance
from slides.dicom import Header, read_header
from slides.geometry import Box, Size

if TYPE_CHECKING:
    from highdicom.ann import AnnotationGroup, Measurements, MicroscopyBulkSimpleAnnotations
    from pydicom import Dataset

_SHARD = 2  # row groups in a file, of 50,000 nuclei at most; writing takes 0.8 GB, and with five of them 1.4 GB

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "nightslide.dicom")

_FRAMES = 0x52009229  # the first tag of the functional groups, of which a tiled image can have a million

# Attributes of patient and study that an image must have, if only empty (type 2); highdicom reads them all.
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)

# Columns that are measurements: code, scheme and meaning of each, and the code of its unit in UCUM. What DICOM has
# no code for has one of our own, in a scheme whose name starts with 99 (PS3.16, 8).
_OWN = "99NIGHTSLIDE"
_CLASS_SCORE = "class_score"  # a measurement where there are several classes
_MEASUREMENTS = {
    "area_um2": ("42798000", "SCT", "Area", "um2"),
    "perimeter_um": ("131191004", "SCT", "Perimeter", "um"),
    "major_axis_um": ("131187009", "SCT", "Major Axis", "um"),
    "minor_axis_um": ("131188004", "SCT", "Minor Axis", "um"),
    "max_diameter_um": ("max_diameter", _OWN, "Max diameter", "um"),
    "min_diameter_um": ("min_diameter", _OWN, "Min diameter", "um"),
    "circularity": ("circularity", _OWN, "Circularity", "1"),
    "solidity": ("solidity", _OWN, "Solidity", "1"),
    "score": ("score", _OWN, "Detection probability", "1"),
    _CLASS_SCORE: (_CLASS_SCORE, _OWN, "Class probability", "1"),
    "votes": ("votes", _OWN, "Votes", "1"),
    **{
        column: (column, _OWN, f"{'Eosin' if stain == 'eosin' else 'Hematoxylin'} OD {statistic or 'mean'}", "1")
        for column, (stain, _, statistic) in zip(STAINS, (name.partition("_") for name in STAINS), strict=True)
    },
}
_UNITS = {"um2": "square micrometer", "um": "micrometer", "1": "no units"}


class Reference(NamedTuple):
    """The image whose pixels the annotations are in."""

    path: Path
    corner: tuple[int, int]  # of its total pixel matrix, slide px (x, y)


def write_dicom(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> a folder of DICOM files of at most 100,000 annotations each; none for a slide without nuclei.

    A file has a group of polygons for each class, in float32 pixels of the reference image, with the measurements of
    the table. Patient, study and specimen are copied from that image. Its identifiers follow from the table and
    the image, and its dates are the image's own: equal tables give equal files.
    Raises RunError as `find_reference` does.
    """
    provenance = read_provenance(nuclei)
    reference = find_reference(SlideFolder(nuclei.parent).name, provenance.size, provenance.bounds, options)
    image = _image(reference.path)
    series = f"{files.file_sha256(nuclei)} {image.SOPInstanceUID}"
    written = dropped = 0
    with committed(out) as partial:
        partial.mkdir()
        for number, rows in enumerate(shards(nuclei, _SHARD), 1):
            rings = open_rings(geometry(rows), lambda xy: (xy - reference.corner).astype(np.float32))
            area = np.diff(rings.starts) >= 3
            if area.any():
                groups = list(_groups(rows, rings, area, provenance, f"{series} {number}"))
                annotations = _annotations(image, groups, provenance, series, number)
                annotations.save_as(partial / f"nuclei-{number:05d}.dcm")
            written, dropped = written + int(area.sum()), dropped + int((~area).sum())
    return Exported(written, dropped=dropped)


# ----------------------------------------------------------------------------------------------- reference


def find_reference(name: str, size: Size, bounds: Box, options: Export) -> Reference:
    """The one DICOM image of the slide at full resolution: of the whole slide, or of its bounds.

    name: of the slide in its run; size and bounds: of the slide, in slide px.
    options.dicom_reference: the slide itself, or a folder with a file `name`.dcm or a folder `name`. Of a/case7
    the last part alone does not do: b/case7 may be another patient's.
    Raises RunError where there is no such image, or more than one.
    """
    given = Path(options.dicom_reference)
    images = list(_levels(name, given)) if options.dicom_reference else []
    if not images:
        raise RunError(
            f"DICOM annotations refer to a DICOM image of {name}, and {_place(options.dicom_reference)}: give "
            f"--export.dicom-reference DIR with one as DIR/{name}.dcm or in DIR/{name}/, or leave out dicom"
        )
    corners = {size: (0, 0), bounds.size: bounds.corner}
    fitting = [Reference(path, corners[stated]) for path, stated in images if stated in corners]
    if len(fitting) != 1:
        sizes = ", ".join(sorted({f"{width} x {height}" for _, (width, height) in images}))
        raise RunError(
            f"{name} has {len(fitting)} DICOM images of its size, {size.width} x {size.height} px, in {given} (there "
            f"are {sizes}): need exactly one, at full resolution and in one piece"
        )
    return fitting[0]


def _place(given: str) -> str:
    """What is wrong with the place where there is no image."""
    if not given:
        return "its slide is not known"
    place = Path(given)
    return f"{given} {'holds none' if place.is_dir() else 'is none' if place.exists() else 'is not there'}"


def _levels(name: str, given: Path) -> Iterator[tuple[Path, Size]]:
    """The levels of the DICOM slides that are meant, with the sizes of their total pixel matrices."""
    if (given / name).is_dir():
        series, candidates = None, sorted(path for path in (given / name).rglob("*") if path.is_file())
    else:
        file = given / f"{name}.dcm" if given.is_dir() else given
        header = _header(file) if file.is_file() else None
        if header is None:
            return
        series, candidates = header.series, sorted(path for path in file.parent.iterdir() if path.is_file())
    for path in candidates:
        header = _header(path)
        if header is not None and header.is_level and series in (None, header.series):
            image = _image(path)
            yield path, Size(int(image.TotalPixelMatrixColumns), int(image.TotalPixelMatrixRows))


def _header(path: Path) -> Header | None:
    with path.open("rb") as file:
        return read_header(file, path)


def _image(path: Path) -> "Dataset":
    """The attributes of an image without its frames; those that may be empty are there. Raises RunError."""
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_partial

    try:
        with path.open("rb") as file:
            image = read_partial(file, stop_when=lambda tag, *_: tag >= _FRAMES)
    except (InvalidDicomError, EOFError, ValueError) as error:
        raise RunError(f"{path} is not a readable DICOM file ({error}): copy it again") from error
    needed = ("SOPInstanceUID", "StudyInstanceUID", "TotalPixelMatrixColumns", "TotalPixelMatrixRows")
    if missing := [attribute for attribute in needed if not image.get(attribute)]:
        raise RunError(f"{path} lacks {', '.join(missing)}: need a DICOM image of a whole slide")
    for attribute in _MAY_BE_EMPTY:
        if attribute not in image:
            setattr(image, attribute, "")
    image.FrameOfReferenceUID = image.get("FrameOfReferenceUID", "")  # highdicom compares it, and does not write it
    return image


# --------------------------------------------------------------------------------------------- annotations


def _annotations(
    image: "Dataset", groups: list["AnnotationGroup"], provenance: Provenance, series: str, number: int
) -> "MicroscopyBulkSimpleAnnotations":
    """One file of a series. series: what its identifiers are derived from; number: of the file, from 1."""
    from highdicom.ann import MicroscopyBulkSimpleAnnotations
    from pydicom.valuerep import DA, TM

    date, time = (image.get(f"Content{kind}") or image.get(f"Study{kind}") for kind in ("Date", "Time"))
    annotations = MicroscopyBulkSimpleAnnotations(
        source_images=[image],
        annotation_coordinate_type="2D",
        annotation_groups=groups,
        series_instance_uid=_uid(series),
        series_number=1,
        sop_instance_uid=_uid(f"{series} {number}"),
        instance_number=number,
        manufacturer="Nightslide",
        manufacturer_model_name="Nightslide",
        software_versions=metadata.version("nightslide"),
        device_serial_number=provenance.digest,
        content_label="NUCLEI",
        content_description="Nuclei segmented by Nightslide",
        content_date=DA(date or "19000101"),
        content_time=TM(time or "000000"),
        specific_character_set="ISO_IR 192",
    )
    # the time of writing, which highdicom adds, would make every file another
    del annotations.InstanceCreationDate, annotations.InstanceCreationTime
    del annotations.ContributingEquipmentSequence[-1].ContributionDateTime  # of highdicom itself
    return annotations


def _groups(
    rows: pa.Table, rings: Rings, area: np.ndarray, provenance: Provenance, series: str
) -> Iterator["AnnotationGroup"]:
    """A group for each class that is there. area: bool (N,), the rows whose outlines have three vertices or more."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.ann import AnnotationGroup
    from highdicom.color import CIELabColor
    from pydicom.sr.codedict import codes

    number = 0
    for name, colour in sorted(provenance.colours.items()):
        chosen = np.flatnonzero(area & pc.equal(rows["class"], name).to_numpy())
        if not len(chosen):
            continue
        number += 1
        yield AnnotationGroup(
            number=number,
            uid=_uid(f"{series} {name}"),
            label=_long_string(name),
            annotated_property_category=codes.SCT.AnatomicalStructure,
            annotated_property_type=codes.SCT.Nucleus,
            graphic_type="POLYGON",
            graphic_data=[rings.vertices[rings.starts[i] : rings.starts[i + 1]] for i in chosen],
            algorithm_type="AUTOMATIC",
            algorithm_identification=AlgorithmIdentificationSequence(
                name="Nightslide",
                family=codes.DCM.ArtificialIntelligence,
                version=metadata.version("nightslide"),
            ),
            measurements=list(_measurements(rows.take(pa.array(chosen)), several_classes=len(provenance.colours) > 1)),
            display_color=CIELabColor.from_rgb(*colour),
        )


def _measurements(rows: pa.Table, *, several_classes: bool) -> Iterator["Measurements"]:
    """Of every row; a number that is not finite is left out, and a measurement without any number."""
    from highdicom.ann import Measurements
    from highdicom.sr import CodedConcept

    for column, (code, scheme, meaning, unit) in _MEASUREMENTS.items():
        values = rows[column].to_numpy().astype(np.float32)
        finite = np.isfinite(values)
        if finite.any() and (several_classes or column != _CLASS_SCORE):
            yield Measurements(
                name=CodedConcept(code, scheme, meaning),
                values=np.where(finite, values, np.nan),
                unit=CodedConcept(unit, "UCUM", _UNITS[unit]),
            )


def _long_string(text: str) -> str:
    """Text as a value of DICOM's LO: at most 64 characters, no backslash (PS3.5, 6.2)."""
    return text.replace("\\", "/")[:64]


def _uid(name: str) -> str:
    """An identifier that follows from `name` (PS3.5, B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, name).int}"
