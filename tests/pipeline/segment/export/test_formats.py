"""Every format: equal tables give equal bytes, and its counts read as a sentence."""

import dataclasses
import os
import re
import sys
import typing
from pathlib import Path

import psutil
import pytest

import dicom_files
from nuclei_tables import PROVENANCE, blobs, write
from pipeline import files
from pipeline.config import Export
from pipeline.errors import ConfigError
from pipeline.layout import EXPORTS, SlideFolder
from pipeline.segment.export import FORMATS, Exported
from pipeline.segment.finished import write_exports


def test_every_format_that_can_be_chosen_is_there():
    (choices, _) = typing.get_args(typing.get_type_hints(Export)["formats"])
    assert set(typing.get_args(choices)) == set(FORMATS) == set(EXPORTS)


def test_the_same_table_gives_the_same_bytes(tmp_path):
    nuclei = write(tmp_path / "nuclei.parquet", blobs(20))
    image = dicom_files.complete(dicom_files.write(tmp_path / "slide.dcm", "1.2.3"), PROVENANCE.size)
    for name, made in FORMATS.items():
        twice = []
        for attempt in ("first", "second"):
            (tmp_path / attempt).mkdir(exist_ok=True)
            made.write(nuclei, tmp_path / attempt / EXPORTS[name], Export(dicom_reference=str(image)))
            twice.append(files.sha256(tmp_path / attempt / EXPORTS[name]))
        assert twice[0] == twice[1], name


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere open files are not known, or renaming them fails")
def test_no_file_is_open_when_it_is_renamed(tmp_path, monkeypatch):
    """Windows renames no file, and no folder with a file, that is open."""
    renamed, open_then = list[str](), list[str]()

    def replace(partial, path, replace=os.replace):
        renamed.append(Path(path).name)
        open_then.extend(file.path for file in psutil.Process().open_files() if file.path.startswith(str(partial)))
        replace(partial, path)

    monkeypatch.setattr(os, "replace", replace)
    nuclei = write(tmp_path / "nuclei.parquet", blobs(20))
    image = dicom_files.complete(dicom_files.write(tmp_path / "slide.dcm", "1.2.3"), PROVENANCE.size)
    for name, made in FORMATS.items():
        made.write(nuclei, tmp_path / EXPORTS[name], Export(dicom_reference=str(image)))
    assert {"nuclei.parquet", *EXPORTS.values()} <= set(renamed)
    assert not open_then


def test_the_options_of_a_format_are_settings():
    settings = {field.name for field in dataclasses.fields(Export)}
    assert all({*made.options} <= settings - {"formats"} for made in FORMATS.values())


def test_the_chosen_formats_are_written_beside_the_table(tmp_path):
    write(tmp_path / "nuclei.parquet", blobs(20))
    written = write_exports(SlideFolder(tmp_path), Export(formats=("csv", "qupath")))
    assert written == {"csv": Exported(20), "qupath": Exported(20)}
    assert {path.name for path in tmp_path.iterdir()} == {"nuclei.parquet", "nuclei.csv", "nuclei.geojson.zip"}


def test_a_format_whose_package_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "h5ad", FORMATS["h5ad"]._replace(package="no_such_package"))
    write(tmp_path / "nuclei.parquet", blobs(1))
    message = 'format h5ad needs the package no_such_package, which is not installed: pip install "nightslide[anndata]"'
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_exports(SlideFolder(tmp_path), Export(formats=("csv", "h5ad")))
    assert [path.name for path in tmp_path.iterdir()] == ["nuclei.parquet"]


def test_the_counts_read_as_a_sentence():
    assert str(Exported(1, 1, 1)) == "1 nucleus (1 outline repaired, 1 dropped)"
    assert str(Exported(2418, 3, 0)) == f"{Exported(2418, 3, 0)}" == "2,418 nuclei (3 outlines repaired, 0 dropped)"
