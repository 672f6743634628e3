"""run.json: the settings and files that the results in a folder are made with. Others are refused there."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import files
from pipeline.archive.lease import may_be_held
from pipeline.config import CONTEXT_PX, STRIDES, UNDIGESTED, Architecture, Settings, Stain, Tiling, grid_step
from pipeline.errors import RunError
from pipeline.layout import LEASE, RunFolder
from pipeline.model.weights import (
    as_weights_state,
    check_content,
    detector_architecture,
    find_weights,
    read_notes,
    same_everywhere,
    stain_architecture,
    stain_files,
)
from pipeline.text import printable

VERSIONED = (
    "nightslide",
    "torch",
    "torchvision",
    "timm",
    "zarr",
    "numpy",
    "shapely",
    "pyarrow",
    "openslide-python",
)


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: metadata.version(name) for name in VERSIONED}


def resolve(settings: Settings) -> Settings:
    """The same settings, with the path and the checksum of every file that they name, and `as_weights_state`.

    Paths are absolute: workers of a cluster may have been started in another folder. Shipped weights keep their name.
    Raises WeightsError, RunError where they cannot work together, and WeightsError for a file whose checksum is not the
    one that the settings state already.
    """
    weights, settings = find_weights(settings.detector.weights), as_weights_state(settings)
    _check_fit(settings.tiling, detector_architecture(weights), weights.name)
    sha256, export = check_content(weights, settings.detector.weights_sha256), settings.export
    own = same_everywhere(settings.detector.weights, weights)
    detector = dataclasses.replace(settings.detector, weights=own, weights_sha256=sha256)
    if export.dicom_reference:
        export = dataclasses.replace(export, dicom_reference=os.path.abspath(export.dicom_reference))
    return dataclasses.replace(settings, detector=detector, stain=_resolved(settings.stain), export=export)


def _resolved(stain: Stain) -> Stain:
    """The stain normalisation with the paths and checksums of the files that it reads."""
    given: dict[str, Any] = {}
    for name, path in stain_files(stain).items():
        if name == "weights":
            stain_architecture(path)  # `plan` normalises nothing, and would not notice weights of another kind
        own = same_everywhere(stain.weights, path) if name == "weights" else str(path)
        given |= {name: own, f"{name}_sha256": check_content(path, getattr(stain, f"{name}_sha256"))}
    return dataclasses.replace(stain, **given)


def _check_fit(tiling: Tiling, architecture: Architecture, weights: str) -> None:
    if abs(tiling.mpp / architecture.mpp - 1) > 0.1:
        raise RunError(
            f"tiling.mpp={tiling.mpp}, but {weights} was trained at {architecture.mpp} um per pixel: "
            f"need the same within a tenth; leave --tiling.mpp out, or choose other --weights"
        )


def check_seams(settings: Settings) -> tuple[str, ...]:
    """What the detector needs so that the same nuclei are detected on both sides of a seam. Returns warnings.

    Where tiles begin at whole steps of its coarsest feature map, a nucleus lies alike on the maps of every tile: the
    tile and the margin are multiples of `grid_step`, else RunError. Within `CONTEXT_PX` of the edge of what a tile
    reads, the result depends on the edge; a smaller margin is the user's choice, for speed.
    """
    tiling, weights = settings.tiling, find_weights(settings.detector.weights)
    upscale = detector_architecture(weights).upscale
    step = grid_step(upscale)
    for name, px in (("tile", tiling.tile), ("margin", tiling.margin)):
        if px % step:
            raise RunError(
                f"tiling.{name}={px} enlarged by {upscale:g} for {weights.name} is no multiple of {STRIDES[-1]} px: "
                f"need a multiple of {step}, such as {-(-px // step) * step}"  # not less: a margin may be needed whole
            )
    needed = math.ceil(CONTEXT_PX / upscale)
    if tiling.margin >= needed:
        return ()
    return (
        f"tiling.margin={tiling.margin}: with less than {needed} px, nuclei near seams depend on the tiling where "
        f"{weights.name} detects them",
    )


def check_worker(theirs: Mapping[str, str], run_json: Path, stage: Path | None) -> None:
    """To be run in a worker. Raises RunError unless it has the run's folders and the same versions.

    stage: the folder of staged slides, if there is one.
    """
    if not os.path.exists(run_json):
        raise RunError(f"does not see {run_json}: workers need the same file system, at the same place")
    try:
        files.now_ns(run_json.parent)
    except OSError as error:
        if error.errno not in files.FULL_DISK:  # which no other worker could write to either
            raise RunError(
                f"cannot write to {run_json.parent} ({error.strerror or error}): workers need the rights of the run"
            ) from error
    if stage is not None and not stage.exists():
        raise RunError(
            f"does not see {stage}: need a --stage folder that all workers share; on machines that share none, start "
            f"the same command on each, without --scheduler"
        )
    differing = [f"{name} {here}, not {theirs[name]}" for name, here in versions().items() if here != theirs[name]]
    if differing:
        raise RunError(f"has {', '.join(differing)}: need the same everywhere, or the results differ")


# ------------------------------------------------------------------------------------------------ run.json


class OpenedRun(NamedTuple):
    """A folder that takes the results of some settings."""

    warnings: tuple[str, ...]
    overwrite: str  # identifies the round of --overwrite that goes on, over interruptions; empty where there is none


def open_run(run: RunFolder, settings: Settings, overwrite: bool) -> OpenedRun:
    """Write run.json, or make sure that the folder's is of the same settings.

    A folder in which no slide was finished takes any settings. Raises RunError for a folder that cannot be written,
    and for one that holds results of other settings.
    """
    try:
        str(run.path).encode()
    except UnicodeEncodeError:
        raise RunError(f"--out {printable(run.path)} is not UTF-8, as tables need it: choose another name") from None
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        files.now_ns(run.path)  # whether anything can be written, where run.json is there already
        if overwrite:
            former = _content(run.run_json) or {}
            going_on = former.get("overwrite") if former.get("digest") == settings.digest else None
            _write(run.run_json, settings, keep_first=False, overwrite=str(going_on or uuid.uuid4().hex))
        elif not run.run_json.exists():
            _write(run.run_json, settings, keep_first=True)
        before = _read(run.run_json)
        if before["digest"] != settings.digest and not _has_results(run):
            _write(run.run_json, settings, keep_first=False)
            before = _read(run.run_json)
    except OSError as error:
        raise RunError(
            f"--out {run.path} cannot be written ({error.strerror or error}): need a folder that can, "
            f"with room for the results"
        ) from error
    if before["digest"] != settings.digest:
        raise RunError(
            f"{run.path} holds results of other settings ({before['digest']}, these are {settings.digest}): "
            f"{_differences(before, settings)}. Choose another --out, or give --overwrite"
        )
    then, now = before.get("versions", {}), versions()
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        warning = f"versions changed since this run was started ({', '.join(changed)}): single nuclei may differ"
    return OpenedRun((warning,) if changed else (), str(before.get("overwrite", "")) if overwrite else "")


def check_run(run: RunFolder, settings: Settings) -> None:
    """Raise RunError where run.json is not of these settings any more: another run was started at the same time."""
    content = files.read_json(run.run_json) or {}
    digest = content.get("digest")
    if files.fits_checksum(content) and digest not in (None, settings.digest):
        raise RunError(
            f"another run was started in {run.path} with other settings ({digest}, these are {settings.digest}): "
            f"give each its own --out"
        )


def end_overwriting(run: RunFolder, overwrite: str) -> None:
    """Note in run.json that this round of --overwrite has done its slides: the next command starts a new one."""
    content = files.read_json(run.run_json) or {}
    if overwrite and content.get("overwrite") == overwrite:
        rest = {name: value for name, value in content.items() if name != "overwrite"}
        files.write_json(run.run_json, files.with_checksum(rest) if files.fits_checksum(content) else rest)


def _write(path: Path, settings: Settings, *, keep_first: bool, overwrite: str = "") -> None:
    """Commit run.json. keep_first: of two runs that start in one folder at once, the first one's stays."""
    weights = find_weights(settings.detector.weights)
    content = {
        "digest": settings.digest,
        "settings": asdict(settings),
        "weights_sha256": settings.detector.weights_sha256,
        "weights_notes": {k: v for k, v in read_notes(weights).items() if k != "architecture"},
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions(),
        **({"overwrite": overwrite} if overwrite else {}),
    }
    with files.committed(path) as partial:
        partial.write_text(json.dumps(files.with_checksum(content), indent=1), encoding="utf-8")
        if keep_first:
            try:
                os.link(partial, path)
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):  # a link to a file that is gone, which ours replaces
                    partial.write_bytes(path.read_bytes())
            except OSError:
                pass  # a file system without links


def _has_results(run: RunFolder) -> bool:
    """Whether a slide was finished in this folder, or may be being done by another run."""
    return bool(run.finished()) or any(may_be_held(lease.parent) for lease in run.path.rglob(LEASE))


def _content(path: Path) -> dict[str, Any] | None:
    """What run.json holds; None where there is none, or no JSON object. Raises RunError where it cannot be read."""
    try:
        return files.read_json_if_there(path)
    except OSError as error:  # the folder can be written all the same
        raise RunError(files.refusal(error) or f"{path} cannot be read ({error.strerror or error})") from error


def _read(path: Path) -> dict[str, Any]:
    """The content of run.json. Raises RunError where it is damaged or cannot be read."""
    content = _content(path)
    if content is None or not _is_whole(content):
        cause = "it holds no JSON object" if content is None else "it is not as it was written"
        raise RunError(
            f"{path} is damaged ({cause}): delete it, and the same settings as before continue; finished slides of "
            f"other settings are never overwritten unless you give --overwrite"
        )
    return content


def _is_whole(content: Mapping[str, Any]) -> bool:
    """Whether run.json is as it was written; of a version without its checksum, whether it has what is read of it."""
    tables = content.get("settings"), content.get("versions", {})
    return (
        files.fits_checksum(content)
        and isinstance(content.get("digest"), str)
        and all(isinstance(table, dict) for table in tables)
        and all(isinstance(table, dict) for table in content["settings"].values())
    )


def _differences(before: Mapping[str, Any], settings: Settings) -> str:
    now, then = asdict(settings), before["settings"]
    changed = []
    for table, values in now.items():
        if table in UNDIGESTED:
            continue
        for key, value in values.items():
            then_value, now_value = then.get(table, {}).get(key), json.loads(json.dumps(value))
            if now_value == then_value:
                continue
            file = key.removesuffix("_sha256")
            same = f"the file of {table}.{file} has other content"
            changed.append(same if file != key else f"{table}.{key} was {then_value!r}, is {now_value!r}")
    return "; ".join(changed) or "the version of the work format changed"
