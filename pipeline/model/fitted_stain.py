"""The stain of a slide, or of the template that slides are normalised to, in plain numbers.

`stain_fit` fits both, and `stain` moves images from the one to the other. Nothing here loads torch: every process of a
run reads stains.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pipeline.config import StainMethod
from pipeline.errors import StainError, WeightsError
from pipeline.model.weights import read_notes

Numbers = Mapping[str, tuple[float, ...]]

METHODS = get_args(StainMethod)


@dataclass(frozen=True)
class FittedStain:
    """The stain of a slide, as one method describes it. Plain numbers: it goes to JSON and to other processes."""

    method: str
    numbers: Numbers = field(hash=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> "FittedStain":
        """The stain that `to_json` gave, also read back from JSON text. Raises StainError for anything else.

        Law: FittedStain.from_json(json.loads(json.dumps(s.to_json()))) == s.
        """
        if not isinstance(content, Mapping) or set(content) != {"method", "numbers"}:
            raise StainError(f"{content!r} is not a stain: need a table of 'method' and 'numbers'; fit it again")
        method = content["method"]
        check_method(method)
        try:
            numbers = {str(name): tuple(map(float, values)) for name, values in content["numbers"].items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise StainError(f"{content['numbers']!r} are not named numbers ({error}): fit the stain again") from error
        needed = _lengths(method, numbers)
        lengths = {name: len(values) for name, values in numbers.items()}
        if lengths != needed or not all(math.isfinite(v) for values in numbers.values() for v in values):
            raise StainError(f"{numbers} is no {method} stain: need finite {needed}; fit it again")
        return cls(method, numbers)


class Normalisation(NamedTuple):
    """How the images of one slide are normalised: from its own stain to a template's, both fitted by one method."""

    source: FittedStain
    target: FittedStain

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source.to_json(), "target": self.target.to_json()}

    @classmethod
    def from_json(cls, content: Any) -> "Normalisation":
        """The normalisation that `to_json` gave. Raises StainError for anything else."""
        if not isinstance(content, Mapping) or set(content) != {"source", "target"}:
            raise StainError(f"{content!r} is no normalisation: need a table of 'source' and 'target'; fit it again")
        return cls(FittedStain.from_json(content["source"]), FittedStain.from_json(content["target"]))


def check_method(method: Any) -> None:
    """Raise StainError unless there is such a method."""
    if method not in METHODS:
        raise StainError(f"stain method {method!r}: need one of {', '.join(METHODS)}")


def _lengths(method: str, numbers: Numbers) -> Mapping[str, int]:
    """How many numbers of each name a stain of this method has; for dcgmm by the clusters that `numbers` has."""
    if method == "none":
        return {}
    if method == "reinhard":
        return {"white": 3, "mean": 3, "deviation": 3}
    if method == "macenko":
        return {"white": 3, "haematoxylin": 3, "eosin": 3, "strength": 2}
    clusters = max(1, len(numbers.get("share", ())))
    return {"white": 3, "density": 1, "share": clusters, "mean": 3 * clusters, "deviation": 3 * clusters}


def read_template(weights: Path) -> FittedStain:
    """The stain that a dcgmm weights file carries to normalise to. Raises WeightsError where it has none."""
    try:
        template = FittedStain.from_json(json.loads(read_notes(weights)["template"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(f"{weights} names no template: need a file written by 'nightslide fit-stain'") from error
    if template.method != "dcgmm":
        raise WeightsError(
            f"{weights} has a template of {template.method}: need one of dcgmm, in a file written by "
            f"'nightslide fit-stain'"
        )
    return template


# The typical image: each of the 16 training images of Kumar et al. (2017) fitted alone, as slides are, and of
# every number the median, on white glass. Pooled they would give a target of wider colours than any slide has.
# tests/pipeline/model/test_stain.py computes them again. That of dcgmm lies in the file of its network.
_WHITE = (1.0, 1.0, 1.0)
TEMPLATE: Mapping[str, FittedStain] = {
    "none": FittedStain("none", {}),
    "reinhard": FittedStain(
        "reinhard",
        {
            "white": _WHITE,
            "mean": (-0.402455, -0.042939, 0.019648),
            "deviation": (0.215014, 0.038536, 0.007366),
        },
    ),
    "macenko": FittedStain(
        "macenko",
        {
            "white": _WHITE,
            "haematoxylin": (0.524088, 0.75056, 0.399982),
            "eosin": (0.106448, 0.829973, 0.540738),
            "strength": (2.274557, 0.942092),
        },
    ),
}

UNCHANGED = Normalisation(TEMPLATE["none"], TEMPLATE["none"])
"That of a slide which is not normalised."
