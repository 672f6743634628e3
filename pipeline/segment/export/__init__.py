"""nuclei.parquet -> the files of other programs. A format is a module here, an entry of `FORMATS` and of `EXPORTS`.

Tables are read row group by row group, so memory does not grow with the slide; equal tables give equal bytes.
"""

import importlib.util
from collections.abc import Iterable, Mapping

from pipeline.config import ExportFormat, require
from pipeline.segment.export.anndata_table import write_h5ad
from pipeline.segment.export.csv_table import write_csv
from pipeline.segment.export.density import write_density
from pipeline.segment.export.dicom import find_reference, write_dicom
from pipeline.segment.export.dsa import write_dsa
from pipeline.segment.export.exported import Exported, Format
from pipeline.segment.export.ngff import write_ngff
from pipeline.segment.export.qupath import write_qupath
from pipeline.segment.export.spatialdata import write_spatialdata

__all__ = ["FORMATS", "Exported", "check_formats", "write_density", "write_qupath"]

FORMATS: Mapping[ExportFormat, Format] = {
    "qupath": Format(write_qupath, options=("crop", "cells")),
    "csv": Format(write_csv, options=("crop",)),
    "spatialdata": Format(write_spatialdata, options=()),
    "h5ad": Format(write_h5ad, options=(), package="h5py", extra="anndata"),
    "ngff": Format(write_ngff, options=("crop",)),
    "dsa": Format(write_dsa, options=("crop",)),
    "dicom": Format(write_dicom, ("dicom_reference",), "highdicom", "dicom", find_reference),
    "density": Format(write_density, options=("crop", "density_um")),
}
"By name; `pipeline.layout.EXPORTS` names the file or folder of each."


def check_formats(names: Iterable[ExportFormat]) -> None:
    """Raise ConfigError for a format whose package is not installed."""
    for name in names:
        package, extra = FORMATS[name].package, FORMATS[name].extra
        require(
            not package or importlib.util.find_spec(package) is not None,
            f'format {name} needs the package {package}, which is not installed: pip install "nightslide[{extra}]"',
        )
