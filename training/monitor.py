"""What a training shows of itself: losses.csv, scores.csv, curves.png, and held-out crops with what is found."""

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

from pipeline.config import Settings, side_step
from pipeline.files import committed
from pipeline.model import fuse, views
from pipeline.model.detector import Limits, NucleusDetector
from pipeline.model.device import choose_precision
from pipeline.segment.polygons import polygons, solid
from training.data.datasets import Annotated
from training.measures import Detections, Scores, mean, score
from training.pictures import draw

HELD_PX = 512  # side, in work pixels, of the crop of a held-out image that is looked at
SHOWN = ("pq", "aji", "dice", "precision", "recall")


class Held(NamedTuple):
    """The middle of a held-out image at the working scale."""

    name: str
    image: NDArray[np.uint8]  # (h, w, 3)
    labels: NDArray[np.int32]  # (h, w)


def hold(dataset: str, annotated: Annotated, mpp: float) -> Held:
    """At most HELD_PX square, from the middle of the image; named after both, as a file can be."""
    pixels = annotated.read()
    height, width = (round(n * annotated.mpp / mpp) for n in pixels.labels.shape)
    image = Image.fromarray(pixels.image).resize((width, height), Image.Resampling.BICUBIC)
    labels = Image.fromarray(pixels.labels).resize((width, height), Image.Resampling.NEAREST)
    top, left = max(0, height - HELD_PX) // 2, max(0, width - HELD_PX) // 2
    window = (slice(top, top + HELD_PX), slice(left, left + HELD_PX))
    return Held(
        re.sub(r"[^\w.-]", "_", f"{dataset}-{annotated.id}"), np.asarray(image)[window], np.asarray(labels)[window]
    )


def look(model: NucleusDetector, held: Held, settings: Settings) -> NDArray[np.int32]:
    """What the detector finds in a held-out crop, as the stream would in one view: a label map (h, w)."""
    height, width = held.labels.shape
    step = side_step(model.architecture.upscale)
    side = math.ceil(max(height, width) / step) * step
    padded = np.full((side, side, 3), 255, np.uint8)
    padded[:height, :width] = held.image
    device = next(model.parameters()).device
    limits = Limits.of_patch(settings.detector, side, model.architecture.mpp)
    pixels = torch.from_numpy(padded).to(device).permute(2, 0, 1)[None].float() / 255
    precision = choose_precision("auto", device)
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        (found,) = fuse.infer(model, pixels, views.views(1), limits, settings.tiling.margin)
    outlines = solid(polygons(found.mask_probs.float().cpu().numpy(), found.boxes.float().cpu().numpy(), level=0.5))
    scores = found.scores.double().cpu().numpy()
    return Detections(outlines, scores, found.class_index.cpu().numpy() + 1).paint((height, width))


def check(model: NucleusDetector, crops: Sequence[Held], pictures: Path) -> Scores:
    """Mean scores over held-out crops, at the default thresholds, and a picture of each."""
    settings, scores = Settings(), []
    pictures.mkdir(exist_ok=True)
    for held in crops:
        found = look(model, held, settings)
        scores.append(score(held.labels, found, model.architecture.mpp))
        draw(held.image, held.labels, found, pictures / f"{held.name}.png")
    return mean(scores)


class Log:
    """A row of losses now and then, and a line for who watches."""

    def __init__(self, out: Path, say: Callable[[str], None], every: int = 20) -> None:
        self.out, self.say, self.every = out, say, every
        self.sums: dict[str, float] = {}
        self.count, self.since = 0, time.monotonic()

    def losses(self, step: int, steps: int, losses: Mapping[str, Tensor], norm: Tensor, skipped: int) -> None:
        """Means of the losses since the last row."""
        for name, value in {**losses, "norm": norm}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.count += 1
        if step % self.every:
            return
        means = {name: total / self.count for name, total in self.sums.items()}
        seconds = (time.monotonic() - self.since) / self.count
        _append(self.out / "losses.csv", {"step": step, **means, "skipped": skipped, "seconds": seconds})
        left = (steps - step) * seconds / 60
        self.say(
            f"step {step}/{steps}  "
            + "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in means.items())
            + f"  skipped {skipped}  {seconds:.2f} s, {left:.0f} min left"
        )
        self.sums, self.count, self.since = {}, 0, time.monotonic()

    def scores(self, step: int, scores: Scores) -> None:
        shown = {name: getattr(scores, name) for name in SHOWN}
        _append(self.out / "scores.csv", {"step": step, **shown})
        self.say(f"step {step}  held out: " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))
        curves(self.out)
        self.since = time.monotonic()  # looking is not training


def _append(path: Path, row: Mapping[str, float]) -> None:
    """Rows after the step were written by a training that was stopped between checkpoints: they are dropped."""
    rows = [r for r in _rows(path) if int(r["step"]) < row["step"]]
    with committed(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(rows)
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curves(out: Path) -> None:
    """curves.png from the two tables: losses above, held-out scores below. Nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # it comes with nightslide[train]; a training does not stop for want of a picture
        return
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, path, leave_out in zip(
        figure.subplots(2, 1),
        (out / "losses.csv", out / "scores.csv"),
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
    with committed(out / "curves.png") as part:
        figure.savefig(part, format="png", dpi=110)
