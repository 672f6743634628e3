"""Logs of a training: losses.csv, scores.csv, curves.png, and pictures of the detections in held-out images."""

import csv
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.config import Detector, Settings, side_step
from pipeline.files import committed
from pipeline.model import fuse, views
from pipeline.model.detector import Limits, NucleusDetector
from pipeline.model.device import autocast, choose_precision
from pipeline.segment.polygons import from_masks, solid
from slides.partial import replace
from training.data.sample import Sample
from training.measures import Detections, Scores, mean, score
from training.pictures import draw

HELD_OUT_PX = 512  # side, in work pixels, of the part of a held-out image that is scored
LOSSES_FILE, SCORES_FILE, CURVES_FILE = "losses.csv", "scores.csv", "curves.png"
LOG_EVERY = 20  # steps to a row of losses; the last row may be of fewer
SHOWN = ("pq", "aji", "dice", "precision", "recall")


class HeldOutCrop(NamedTuple):
    """The middle of a held-out image at the working scale."""

    name: str
    image: NDArray[np.uint8]  # (h, w, 3)
    labels: NDArray[np.int32]  # (h, w)


def held_out_crop(dataset: str, sample: Sample, mpp: float) -> HeldOutCrop:
    """At most HELD_OUT_PX square, from the middle of the image; its name is fit for a file."""
    labelled = sample.read()
    height, width = (max(1, round(n * sample.mpp / mpp)) for n in labelled.labels.shape)
    image = Image.fromarray(labelled.image).resize((width, height), Image.Resampling.BICUBIC)
    labels = Image.fromarray(labelled.labels).resize((width, height), Image.Resampling.NEAREST)
    top, left = max(0, height - HELD_OUT_PX) // 2, max(0, width - HELD_OUT_PX) // 2
    window = (slice(top, top + HELD_OUT_PX), slice(left, left + HELD_OUT_PX))
    return HeldOutCrop(
        re.sub(r"[^\w.-]", "_", f"{dataset}-{sample.id}"), np.asarray(image)[window], np.asarray(labels)[window]
    )


def detect_crop(model: NucleusDetector, crop: HeldOutCrop, settings: Settings) -> NDArray[np.int32]:
    """Detections in a held-out crop, as `run` would give them with one view: a label map (h, w)."""
    height, width = crop.labels.shape
    step = side_step(model.architecture.upscale)
    size = math.ceil(height / step) * step, math.ceil(width / step) * step
    padded = np.full((*size, 3), 255, np.uint8)
    padded[:height, :width] = crop.image
    device = next(model.parameters()).device
    limits = Limits.of_patch(settings.detector, size, model.architecture.mpp)
    pixels = torch.from_numpy(padded).to(device).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode(), autocast(device, choose_precision("auto", device)):
        (instances,) = fuse.infer(model, pixels, views.choose_views(1), limits, settings.tiling.margin)
    outlines = solid(
        from_masks(instances.mask_probs.float().cpu().numpy(), instances.boxes.float().cpu().numpy(), level=0.5)
    )
    scores = instances.scores.double().cpu().numpy()
    return Detections(outlines, scores, instances.class_index.cpu().numpy() + 1).paint((height, width))


def score_held_out(model: NucleusDetector, crops: Sequence[HeldOutCrop], pictures: Path) -> Scores:
    """Mean scores over held-out crops, at the thresholds of a run, and a picture of each."""
    scores, settings = [], Settings(detector=Detector(score=model.architecture.score))
    pictures.mkdir(exist_ok=True)
    for crop in crops:
        detected = detect_crop(model, crop, settings)
        scores.append(score(crop.labels, detected, model.architecture.mpp))
        draw(crop.image, crop.labels, detected, pictures / f"{crop.name}.png")
    return mean(scores)


class Log:
    """Writes losses and scores to CSV files, and reports them in a line each."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.out, self.say = out, say
        self.sums: dict[str, Tensor] = {}  # on the device, which so is waited for once a row and not once a number
        self.count, self.since = 0, time.monotonic()

    def add(self, losses: Mapping[str, Tensor], norm: Tensor) -> None:
        """Take the losses of a step, and the norm of its gradients, into the next row."""
        for name, value in {**losses, "norm": norm}.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self.count += 1

    def losses(self, step: int, steps: int, skipped: int) -> None:
        """Write a row: the means over the steps since the last one. steps: of the schedule, 0 for one of minutes."""
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        seconds = (time.monotonic() - self.since) / self.count
        append_row(self.out / LOSSES_FILE, {"step": step, **means, "skipped": skipped, "seconds": seconds})
        left = f", {(steps - step) * seconds / 60:.0f} min left" if steps else ""
        self.say(
            f"step {step}{f'/{steps}' if steps else ''}  "
            + "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in means.items())
            + f"  skipped {skipped}  {seconds:.2f} s{left}"
        )
        self.sums, self.count, self.since = {}, 0, time.monotonic()

    def last_scored(self) -> int:
        """The step of the last row of scores; 0 where there is none."""
        rows = _rows(self.out / SCORES_FILE)
        return int(rows[-1]["step"]) if rows else 0

    def scores(self, step: int, scores: Scores) -> None:
        shown = {name: getattr(scores, name) for name in SHOWN}
        append_row(self.out / SCORES_FILE, {"step": step, **shown})
        self.say(f"step {step}  held out: " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))
        curves(self.out)
        self.since = time.monotonic()  # the time of scoring does not count


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row to a CSV file. Rows of later steps, of a training that stopped between checkpoints, are dropped.

    A table that cannot be read is kept beside the new one, as NAME.damaged.
    """
    known = _rows(path)
    if not known and path.exists():
        replace(path, path.with_name(f"{path.name}.damaged"))
    rows = [r for r in known if int(r["step"]) < row["step"]]
    with committed(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(rows)
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it is missing or damaged: one that a spreadsheet saved with semicolons, say, may
    not end a training.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # some save it with a byte order mark
            rows = list(csv.DictReader(file, strict=True))
        for row in rows:
            int(row["step"])
            sum(map(float, row.values()))
    except (FileNotFoundError, ValueError, KeyError, TypeError, csv.Error):
        return []
    return rows


def curves(out: Path) -> None:
    """curves.png from the two tables: losses above, held-out scores below. Nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # it comes with nightslide[train]; a training goes on without pictures
        return
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, path, leave_out in zip(
        figure.subplots(2, 1),
        (out / LOSSES_FILE, out / SCORES_FILE),
        ({"step", "norm", "skipped", "seconds"}, {"step"}),
        strict=True,
    ):
        rows = _rows(path)
        for name in [n for n in (rows[0] if rows else {}) if n not in leave_out]:
            axes.plot([int(r["step"]) for r in rows], [float(r[name]) for r in rows], label=name.removeprefix("loss_"))
        axes.set_xlabel("step")
        axes.set_title(path.stem)
        axes.grid(alpha=0.3)
        if rows:
            axes.legend(ncols=3, fontsize="small")
    with committed(out / CURVES_FILE) as part:
        figure.savefig(part, format="png", dpi=110)
