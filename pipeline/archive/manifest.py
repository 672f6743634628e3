"""What a run is: its settings, with every file that they name, and their digest; run.json holds a folder to it."""

import dataclasses
import json
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.config import STRIDES, Architecture, Settings, Tiling
from pipeline.errors import RunError
from pipeline.model.load import stain_files
from pipeline.model.weights import detector_architecture, file_sha256, find_weights, read_notes
from pipeline.segment.slide_stain import template_stain

RUN = "run.json"

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
    """Of what the results come from."""
    return {name: metadata.version(name) for name in VERSIONED}


def settle(settings: Settings, out: Path, overwrite: bool) -> tuple[Settings, str]:
    """Settings that name files by their paths, and their digest, which the output folder's run.json then has."""
    weights = find_weights(settings.detector.weights)
    _check_fit(settings.tiling, detector_architecture(weights), weights.name)
    files = stain_files(settings.stain)
    settings = dataclasses.replace(
        settings,
        detector=dataclasses.replace(settings.detector, weights=str(weights)),
        stain=dataclasses.replace(
            settings.stain,
            weights=str(files.get("weights", settings.stain.weights)),
            template=str(files.get("template", "")),
        ),
    )
    # a template from which no stain can be fitted is refused before anything is started
    template_stain(settings.stain, settings.tissue, settings.tiling.mpp)
    stain_sha256 = {name: file_sha256(p) for name, p in files.items()}
    digest = settings.digest(file_sha256(weights), stain_sha256)
    _open_run(out, settings, digest, weights, stain_sha256, overwrite)
    return settings, digest


def _check_fit(tiling: Tiling, architecture: Architecture, weights: str) -> None:
    if abs(tiling.mpp / architecture.mpp - 1) > 0.1:
        raise RunError(
            f"tiling.mpp={tiling.mpp}, but {weights} was trained at {architecture.mpp} um per pixel: "
            f"need the same within a tenth; leave --tiling.mpp out, or choose other --weights"
        )
    # of another side the feature maps are rounded, and the coarsest anchors lie off their pixels
    fitting = [tile for tile in range(64, 4097, 32) if int(tile * architecture.upscale) % STRIDES[-1] == 0]
    if fitting and int(tiling.tile * architecture.upscale) % STRIDES[-1]:
        raise RunError(
            f"tiling.tile={tiling.tile} enlarged by {architecture.upscale:g} for {weights} is no multiple of "
            f"{STRIDES[-1]} px: need another, such as {min(fitting, key=lambda tile: abs(tile - tiling.tile))}"
        )


def check_worker(run: Path, theirs: dict[str, str]) -> None:
    """Raise RunError unless this process, a worker, sees the run's folder and has the same versions."""
    if not run.exists():
        raise RunError(f"does not see {run}: workers need the same file system, at the same place")
    differing = [f"{name} {here}, not {theirs[name]}" for name, here in versions().items() if here != theirs[name]]
    if differing:
        raise RunError(f"has {', '.join(differing)}: need the same everywhere, or the results differ")


def _open_run(
    out: Path, settings: Settings, digest: str, weights: Path, stain_sha256: dict[str, str], overwrite: bool
) -> None:
    """Write run.json, or make sure that the folder's is of the same settings."""
    path = out / RUN
    out.mkdir(parents=True, exist_ok=True)
    if overwrite or not path.exists():
        content = {
            "digest": digest,
            "settings": asdict(settings),
            "weights_sha256": file_sha256(weights),
            "stain_sha256": stain_sha256,
            "weights_notes": {k: v for k, v in read_notes(weights).items() if k != "architecture"},
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": versions(),
        }
        with files.committed(path) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
            if not overwrite:
                _first_come(part, path)
    before = _read(path)
    if before["digest"] != digest:
        raise RunError(
            f"{out} holds a run with other settings ({before['digest']}, this one is {digest}): "
            f"{_differences(before, settings, weights, stain_sha256)}. Choose another --out, or give --overwrite"
        )


def _first_come(part: Path, path: Path) -> None:
    """Of two runs that begin in one folder at once the first has it: `part` becomes what lies at `path`, if any."""
    try:
        os.link(part, path)
    except FileExistsError:
        part.write_bytes(path.read_bytes())
    except OSError:
        pass  # a file system without links


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"digest", "settings", "weights_sha256"} <= content.keys():
            return content
        cause = "it has no digest, settings and weights_sha256"
    except (OSError, ValueError) as error:
        cause = str(error)
    raise RunError(f"{path} is not a run's: {cause}. Choose another --out, or give --overwrite")


def _differences(before: dict[str, Any], settings: Settings, weights: Path, stain_sha256: dict[str, str]) -> str:
    now, then = asdict(settings), before["settings"]
    changed = [
        f"{table}.{key} was {then.get(table, {}).get(key)!r}, is {value!r}"
        for table, values in now.items()
        for key, value in values.items()
        if json.loads(json.dumps(value)) != then.get(table, {}).get(key)
    ]
    if before["weights_sha256"] != file_sha256(weights):
        changed.append("the weights file has other content")
    for name, sha256 in stain_sha256.items():
        if before.get("stain_sha256", {}).get(name) not in (None, sha256):
            changed.append(f"the file of stain.{name} has other content")
    return "; ".join(changed) or "the version changed"
