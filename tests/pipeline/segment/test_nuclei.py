"""What the nuclei of a slide look like in every export."""

import itertools

import numpy as np
import pytest

from pipeline.segment.nuclei import COLOURS

# of linear RGB, after Machado, Oliveira and Fernandes 2009, at full severity
SEEN = {
    "all colours": np.eye(3),
    "without red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "without green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
CLEAR = 40  # CIELAB; of the colours before, two were 15 apart


@pytest.mark.parametrize("seen", SEEN)
def test_the_classes_that_are_shipped_differ_for_everyone(seen: str) -> None:
    """One man in twelve cannot tell red from green."""
    lab = cielab(np.array(COLOURS[:4]), SEEN[seen])
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > CLEAR


def cielab(rgb: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """sRGB (N, 3), 0 to 255 -> L*, a*, b* under D65, (N, 3), of what is seen of it."""
    shares = rgb / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4) @ seen.T
    primaries = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear.clip(0, 1) @ primaries.T / primaries.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
