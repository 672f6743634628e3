"""Which views are worth their time: any choice of the eight, scored at several thresholds.

    python workflows/experiments/views.py --data DIR --split train --mpp 0.25 --weights nuclei \\
        --stain none --choice 0 --choice 0,1 --choice 0,1,2,3 --score 0.6 --score 0.7

A choice is of numbers of `pipeline.model.views`, 0 the patch as it is; `nightslide run --views 2` takes 0,1. The
images must not be ones that the weights were trained on. Prints a markdown table of image means.
"""

import dataclasses
import sys
from typing import Annotated, Literal, cast
from unittest import mock

from choose import Several, grid
from cyclopts import App

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.model import views
from slides.errors import NightslideError
from training.cli import Datasets, EvaluationExecution, Flat, Scales, Splits
from training.data.datasets import requested_sets
from training.evaluate import EvaluationSet, gather, whole_images

app = App(help=__doc__, help_format="plaintext")
ALL = views.choose_views(8)


def parse(choice: str) -> tuple[views.View, ...]:
    """The views of a choice such as "0,4". Raises ConfigError."""
    numbers = [int(number) for number in choice.split(",") if number.isdecimal()]
    if len(numbers) not in (1, 2, 4, 8) or len(set(numbers)) != choice.count(",") + 1 or max(numbers) >= len(ALL):
        raise ConfigError(f"choice={choice}: need 1, 2, 4 or 8 different numbers, 0 to {len(ALL) - 1}")
    return tuple(ALL[number] for number in numbers)


@app.default
def compare(
    *,
    data: Datasets,
    split: Splits = (),
    mpp: Scales = (),
    choice: Annotated[tuple[str, ...], Several] = ("0", "0,1", "0,1,2,3", "0,1,2,3,4,5,6,7"),
    score: Annotated[tuple[float, ...], Several] = (0.6, 0.7),
    settings: Annotated[Settings, Flat] = Settings(),
    execution: Annotated[EvaluationExecution, Flat] = EvaluationExecution(),
) -> int:
    """Score choices of views."""
    if execution.cluster or execution.scheduler or execution.scheduler_file or settings.stain.method == "auto":
        raise ConfigError(
            "--cluster, --scheduler and --stain auto know of no other views: need --stain none, and no cluster"
        )
    chosen = {c: parse(c) for c in choice}
    sets = [gather([s.data], s.splits, [s.mpp] if s.mpp else []) for s in requested_sets(data, split, mpp)]
    images = EvaluationSet(tuple(image for one in sets for image in one.images), ())
    print("| views | " + " | ".join(f"AJI at {at:g} | PQ at {at:g}" for at in score) + " |")
    print("|---" * (1 + 2 * len(score)) + "|", flush=True)
    for name, some in chosen.items():
        count = cast(Literal[1, 2, 4, 8], len(some))
        detector = dataclasses.replace(settings.detector, views=count)
        with mock.patch.object(views, "choose_views", {count: some}.__getitem__):
            scores = grid(images, whole_images(dataclasses.replace(settings, detector=detector)), score, execution)
        print(f"| {name} | " + " | ".join(f"{s.aji:.3f} | {s.pq:.3f}" for s in scores) + " |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(app())
    except NightslideError as error:
        print(f"views: {error}", file=sys.stderr)
        sys.exit(2)
