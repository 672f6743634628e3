"""Small DICOM slides that OpenSlide opens: grey, a tile or four."""

import struct
from pathlib import Path

from slides.dicom import WHOLE_SLIDE
from slides.geometry import Size

SIDE, GREY = 64, 128
_UNDEFINED = 0xFFFFFFFF


def element(tag: int, kind: bytes, value: bytes, explicit: bool = True) -> bytes:
    """A data element, little endian; its value is padded to an even length (PS3.5, 7.1)."""
    value += (b"\0" if kind in (b"UI", b"OB") else b" ") * (len(value) % 2)
    return _head(tag, kind, len(value), explicit) + value


def sequence(tag: int, items: list[bytes], *, defined: bool, explicit: bool = True) -> bytes:
    """A sequence whose lengths are given, or replaced by end marks (PS3.5, 7.5)."""
    if defined:
        body = b"".join(_head(0xFFFEE000, b"", len(item), False) + item for item in items)
        return _head(tag, b"SQ", len(body), explicit) + body
    body = b"".join(
        _head(0xFFFEE000, b"", _UNDEFINED, False) + item + _head(0xFFFEE00D, b"", 0, False) for item in items
    )
    return _head(tag, b"SQ", _UNDEFINED, explicit) + body + _head(0xFFFEE0DD, b"", 0, False)


def write(
    path: Path,
    series: str,
    *,
    level: int = 0,
    kind: str = "VOLUME",
    sop_class: str = WHOLE_SLIDE,
    explicit: bool = True,
    before_series: bytes = b"",
) -> Path:
    """An instance of a slide of two levels: level 0 has 2 x 2 tiles at 0.5 um per px, level 1 has one."""
    instance = f"{series}.{level}.{sum(path.name.encode())}"
    across = 1 if level else 2

    def one(tag: int, vr: str, value: str | int | bytes) -> bytes:
        if isinstance(value, int):
            value = struct.pack("<H" if vr == "US" else "<I", value)
        return element(tag, vr.encode(), value.encode() if isinstance(value, str) else value, explicit)

    syntax = "1.2.840.10008.1.2.1" if explicit else "1.2.840.10008.1.2"
    meta = b"".join(
        element(tag, vr, value)
        for tag, vr, value in (
            (0x00020001, b"OB", b"\0\1"),
            (0x00020002, b"UI", sop_class.encode()),
            (0x00020003, b"UI", instance.encode()),
            (0x00020010, b"UI", syntax.encode()),
            (0x00020012, b"UI", b"1.2.3.4"),
        )
    )
    flavour = "NONE" if level == 0 else "RESAMPLED"
    original = "ORIGINAL" if level == 0 else "DERIVED"
    spacing = sequence(
        0x00289110,
        [one(0x00280030, "DS", "0.0005\\0.0005" if level == 0 else "0.001\\0.001")],
        defined=False,
        explicit=explicit,
    )
    content = [
        one(0x00080008, "CS", f"{original}\\PRIMARY\\{kind}\\{flavour}"),
        one(0x00080016, "UI", sop_class),
        one(0x00080018, "UI", instance),
        before_series,
        one(0x0020000D, "UI", "1.2"),
        one(0x0020000E, "UI", series),
        one(0x00209311, "CS", "TILED_FULL"),
        one(0x00280002, "US", 3),
        one(0x00280004, "CS", "RGB"),
        one(0x00280006, "US", 0),
        one(0x00280008, "IS", str(across**2)),
        one(0x00280010, "US", SIDE),
        one(0x00280011, "US", SIDE),
        one(0x00280100, "US", 8),
        one(0x00280101, "US", 8),
        one(0x00280102, "US", 7),
        one(0x00280103, "US", 0),
        one(0x00480006, "UL", across * SIDE),
        one(0x00480007, "UL", across * SIDE),
        sequence(0x52009229, [spacing], defined=True, explicit=explicit),
        one(0x7FE00010, "OB", bytes([GREY]) * (3 * (across * SIDE) ** 2)),
    ]
    length = struct.pack("<I", len(meta))
    path.write_bytes(bytes(128) + b"DICM" + element(0x00020000, b"UL", length) + meta + b"".join(content))
    return path


def complete(path: Path, size: Size) -> Path:
    """Add to an instance of a slide the patient, study and specimen that PS3.3 requires; and give it another size.

    With that, which is not the size of its pixels, OpenSlide does not open it.
    """
    import pydicom

    image = pydicom.dcmread(path)
    image.TotalPixelMatrixColumns, image.TotalPixelMatrixRows = size
    image.SpecificCharacterSet = "ISO_IR 100"
    image.PatientName, image.PatientID = "Gr\u00fcn^Eva", "P1"
    image.PatientBirthDate, image.PatientSex = "19500102", "F"
    image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "20240506", "070809", "S1", "A1"
    image.ContentDate, image.ContentTime = "20240507", "101112"
    image.FrameOfReferenceUID, image.Modality, image.Manufacturer = "1.2.9", "SM", "Scanners"
    image.ContainerIdentifier, image.IssuerOfTheContainerIdentifierSequence = "C1", []
    container, specimen = pydicom.Dataset(), pydicom.Dataset()
    container.CodeValue, container.CodingSchemeDesignator, container.CodeMeaning = "258661006", "SCT", "Slide"
    image.ContainerTypeCodeSequence = [container]
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "C1.1", "1.2.10"
    specimen.IssuerOfTheSpecimenIdentifierSequence, specimen.SpecimenPreparationSequence = [], []
    image.SpecimenDescriptionSequence = [specimen]
    image.save_as(path)
    return path


def _head(tag: int, kind: bytes, length: int, explicit: bool) -> bytes:
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if not explicit:
        return head + struct.pack("<I", length)
    if kind in (b"OB", b"SQ"):
        return head + kind + struct.pack("<HI", 0, length)
    return head + kind + struct.pack("<H", length)
