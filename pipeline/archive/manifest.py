"""run.json: the settings and files that the results in a folder are made with. Others are refused there."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.config import STRIDES, Architecture, Settings, Tiling, side_step
from pipeline.errors import RunError
from pipeline.layout import LEASE, RunFolder
from pipeline.model.load import stain_files
from pipeline.model.weights import content_sha256, detector_architecture, find_weights, read_notes
from pipeline.segment.job import Manifest
from pipeline.segment.slide_stain import template_stain

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


def resolve(settings: Settings) -> Manifest:
    """The manifest of settings. Raises WeightsError, RunError, StainError where they cannot work."""
    weights = find_weights(settings.detector.weights)
    _check_fit(settings.tiling, detector_architecture(weights), weights.name)
    stain = stain_files(settings.stain)
    settings = dataclasses.replace(
        settings,
        detector=dataclasses.replace(settings.detector, weights=str(weights)),
        stain=dataclasses.replace(
            settings.stain,
            weights=str(stain.get("weights", settings.stain.weights)),
            template=str(stain.get("template", "")),
        ),
    )
    # a template that shows no stain is refused before anything is started
    template_stain(settings.stain, settings.tissue, settings.tiling.mpp)
    sha256 = {name: content_sha256(path) for name, path in stain.items()}
    return Manifest(settings, content_sha256(weights), sha256)


def _check_fit(tiling: Tiling, architecture: Architecture, weights: str) -> None:
    if abs(tiling.mpp / architecture.mpp - 1) > 0.1:
        raise RunError(
            f"tiling.mpp={tiling.mpp}, but {weights} was trained at {architecture.mpp} um per pixel: "
            f"need the same within a tenth; leave --tiling.mpp out, or choose other --weights"
        )
    step = math.lcm(side_step(), side_step(architecture.upscale))
    if tiling.tile % step:
        raise RunError(
            f"tiling.tile={tiling.tile} enlarged by {architecture.upscale:g} for {weights} is no multiple of "
            f"{STRIDES[-1]} px: need a multiple of {step}, such as {max(1, round(tiling.tile / step)) * step}"
        )


def check_worker(run_json: Path, theirs: Mapping[str, str]) -> None:
    """To be run in a worker. Raises RunError unless it sees the run's folder and has the same versions."""
    if not run_json.exists():
        raise RunError(f"does not see {run_json}: workers need the same file system, at the same place")
    differing = [f"{name} {here}, not {theirs[name]}" for name, here in versions().items() if here != theirs[name]]
    if differing:
        raise RunError(f"has {', '.join(differing)}: need the same everywhere, or the results differ")


# ------------------------------------------------------------------------------------------------ run.json


def open_run(run: RunFolder, manifest: Manifest, overwrite: bool) -> tuple[str, ...]:
    """Write run.json, or make sure that the folder's is of the same settings. Returns warnings.

    A folder in which no slide was finished takes any settings. Raises RunError for a folder that cannot be written,
    and for one that holds results of other settings.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        if overwrite or not run.run_json.exists():
            _write(run.run_json, manifest, keep_first=not overwrite)
        before = _read(run.run_json)
        if before["digest"] != manifest.digest and not _has_results(run):
            _write(run.run_json, manifest, keep_first=False)
            before = _read(run.run_json)
    except OSError as error:
        raise RunError(
            f"--out {run.path} cannot be written ({error.strerror or error}): need a folder that can, "
            f"with room for the results"
        ) from error
    if before["digest"] != manifest.digest:
        raise RunError(
            f"{run.path} holds results of other settings ({before['digest']}, these are {manifest.digest}): "
            f"{_differences(before, manifest)}. Choose another --out, or give --overwrite"
        )
    then, now = before.get("versions", {}), versions()
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        return (f"versions changed since this run was started ({', '.join(changed)}): single nuclei may differ",)
    return ()


def _write(path: Path, manifest: Manifest, *, keep_first: bool) -> None:
    """Commit run.json. keep_first: of two runs that start in one folder at once, the first one's stays."""
    weights = Path(manifest.settings.detector.weights)
    content = {
        "digest": manifest.digest,
        "settings": asdict(manifest.settings),
        "weights_sha256": manifest.weights_sha256,
        "stain_sha256": manifest.stain_sha256,
        "weights_notes": {k: v for k, v in read_notes(weights).items() if k != "architecture"},
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    with files.committed(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        if keep_first:
            try:
                os.link(partial, path)
            except FileExistsError:
                partial.write_bytes(path.read_bytes())
            except OSError:
                pass  # a file system without links


def _has_results(run: RunFolder) -> bool:
    """Whether a slide was finished in this folder, or is being done by another run."""
    return bool(run.finished()) or any(run.path.rglob(LEASE))


def _read(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    needed = ("digest", "settings", "weights_sha256")
    if content is None or not set(needed) <= content.keys():
        cause = "it holds no JSON object" if content is None else f"it lacks one of {', '.join(needed)}"
        raise RunError(
            f"{path} is damaged ({cause}): delete it, and the same settings as before continue; finished slides of "
            f"other settings are never overwritten unless you give --overwrite"
        )
    return content


def _differences(before: Mapping[str, Any], manifest: Manifest) -> str:
    now, then = asdict(manifest.settings), before["settings"]
    changed = [
        f"{table}.{key} was {then.get(table, {}).get(key)!r}, is {value!r}"
        for table, values in now.items()
        for key, value in values.items()
        if json.loads(json.dumps(value)) != then.get(table, {}).get(key)
    ]
    if before["weights_sha256"] != manifest.weights_sha256:
        changed.append("the weights file has other content")
    for name, sha256 in manifest.stain_sha256.items():
        if before.get("stain_sha256", {}).get(name) not in (None, sha256):
            changed.append(f"the file of stain.{name} has other content")
    return "; ".join(changed) or "the version of the work format changed"
