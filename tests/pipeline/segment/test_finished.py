"""Exports of a finished slide that are made again, and the outlines beside them."""

import json
from pathlib import Path

import numpy as np

from nuclei_tables import PROVENANCE, blobs, write
from pipeline import files
from pipeline.config import Export
from pipeline.layout import SlideFolder
from pipeline.segment.annotations import origin, write_tissue
from pipeline.segment.finished import damaged_results, rewrite_exports
from slides.geometry import Affine, Frame, Size
from slides.tissue import TissueMap


def finished(path: Path) -> SlideFolder:
    """A slide with bounds, nuclei and tissue, all of which slide.json describes."""
    folder = SlideFolder(path)
    write(folder.nuclei, blobs(3))
    bounds = PROVENANCE.bounds
    assert bounds[:2] != (0, 0)
    frame = Frame(Size(8, 8), 1.0, Affine(bounds.width / 8, bounds.height / 8, bounds.x0, bounds.y0))
    write_tissue(folder.tissue_annotation, "s", TissueMap(np.eye(8) > 0, frame, frame), bounds, crop=True)
    about = {
        file.name: {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
        for file in (folder.nuclei, folder.tissue_annotation)
    }
    content = {
        "digest": "d",
        "record": {"slide": "", "status": "done"},
        "quick_hash": "q",
        "source_path": "/x.svs",
        "files": about,
    }
    files.write_json(folder.slide_json, files.with_checksum(content))
    return folder


def damage(folder: SlideFolder) -> list[str]:
    return list(damaged_results(folder, files.read_json(folder.slide_json) or {}, thorough=True))


def test_outlines_have_the_origin_of_the_exports(tmp_path: Path) -> None:
    """QuPath shows both over one image; and slide.json knows the files that were moved."""
    folder, bounds = finished(tmp_path), PROVENANCE.bounds
    whole = folder.tissue_annotation.read_bytes()
    for crop, expected in ((False, (0, 0)), (False, (0, 0)), (True, (bounds.x0, bounds.y0))):
        rewrite_exports(folder, Export(formats=("csv",), crop=crop))
        assert origin(folder.tissue_annotation, bounds) == expected
        assert damage(folder) == []
    assert folder.tissue_annotation.read_bytes() == whole


def test_outlines_stay_with_the_file_of_qupath(tmp_path: Path) -> None:
    """QuPath shows the tissue over the nuclei of that file: exports for other programs leave it where they are."""
    folder, bounds = finished(tmp_path), PROVENANCE.bounds
    rewrite_exports(folder, Export(formats=("spatialdata",), crop=False))
    assert origin(folder.tissue_annotation, bounds) == bounds[:2], "spatialdata has no choice of origin"
    for crop, expected in ((False, (0, 0)), (True, bounds[:2])):
        rewrite_exports(folder, Export(formats=("qupath",), crop=crop))
        for others in (("csv",), ("spatialdata",), ("csv", "spatialdata")):
            rewrite_exports(folder, Export(formats=others, crop=not crop))
            assert origin(folder.tissue_annotation, bounds) == expected
        assert damage(folder) == []


def test_damaged_outlines_stop_no_export(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    folder.tissue_annotation.write_text(json.dumps({"features": [{}]}))
    rewrite_exports(folder, Export(formats=("csv",), crop=False))
    assert folder.export("csv").exists()
    assert [line.partition(" ")[0] for line in damage(folder)] == ["tissue.geojson"]
