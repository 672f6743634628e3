"""Charts of the report: SVG to embed in the page, coloured by the page's style sheet.

Numbers come in, one string comes out; whatever is not a number is escaped here.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 40


class Ratio(NamedTuple):
    """Observed to expected, with its standard error."""

    label: str  # what it is of
    ratio: float
    error: float


class Dot(NamedTuple):
    """A slide in a plot of two measures."""

    x: float
    y: float
    title: str
    link: str
    outlier: bool


def histogram(counts: Sequence[int], title: str) -> str:
    """A distribution, its highest bin as high as the picture."""
    top = max(counts, default=0) or 1
    steps = "".join(f"V{24 - 23 * n / top:.1f}h2" for n in counts)
    width = 2 * len(counts)
    return (
        f'<svg class="spark" viewBox="0 0 {width} 25" role="img" preserveAspectRatio="none">'
        f'<title>{html.escape(title)}</title><path d="M0 24{steps}V24z"/></svg>'
    )


def stacked(parts: Mapping[str, float], title: str) -> str:
    """Shares of a whole side by side, in the page's colours `c0`, `c1` and so on. Nothing where all are zero."""
    whole = sum(parts.values())
    if whole <= 0:
        return ""
    rectangles, at = [], 0.0
    for number, value in enumerate(parts.values()):
        wide = 100 * value / whole
        rectangles.append(f'<rect class="c{number}" x="{at:.2f}" width="{wide:.2f}" height="8"/>')
        at += wide
    return (
        f'<svg class="stack" viewBox="0 0 100 8" role="img" preserveAspectRatio="none">'
        f"<title>{html.escape(title)}</title>{''.join(rectangles)}</svg>"
    )


def ratios(points: Sequence[Ratio], marked: int, axis: str) -> str:
    """Ratios from left to right with their errors, against the line at 1.

    marked: how many of the first stand on a shaded ground; axis: what the labels below are.
    """
    low, high = _spread([0.9, 1.1, *(p.ratio - p.error for p in points), *(p.ratio + p.error for p in points)])
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    x = _scale(-0.5, len(points) - 0.5, _LEFT, _WIDTH - _RIGHT)
    one = y(1.0)
    parts = [
        f'<rect class="ground" x="{x(-0.5):.1f}" y="{_TOP}" width="{x(marked - 0.5) - x(-0.5):.1f}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM}"/>',
        *(_tick_y(y(v), f"{v:g}") for v in _ticks(low, high)),
        f'<path class="one" d="M{_LEFT} {one:.1f}H{_WIDTH - _RIGHT}"/>',
    ]
    for number, p in enumerate(points):
        at = x(number)
        parts.append(
            f'<g><title>{html.escape(p.label)} px: {p.ratio:.3f} ± {p.error:.3f}</title><path class="error" '
            f'd="M{at:.1f} {y(p.ratio - p.error):.1f}V{y(p.ratio + p.error):.1f}"/>'
            f'<circle class="dot" cx="{at:.1f}" cy="{y(p.ratio):.1f}" r="3.5"/></g>'
        )
        if number % 4 == 0 or number == len(points) - 1:
            parts.append(_tick_x(at, p.label))
    return _framed(parts, axis, "observed / expected")


def scatter(dots: Sequence[Dot], across: str, up: str) -> str:
    """Slides by two measures, the second, above 0, on a logarithmic scale; outliers stand out. Each is a link."""
    left, right = _spread([d.x for d in dots])
    low, high = _spread([math.log10(d.y) for d in dots])
    x, y = _scale(left, right, _LEFT, _WIDTH - _RIGHT), _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [_tick_x(x(v), f"{v:g}") for v in _ticks(left, right)]
    decades = (round(m * 10.0**p, 6) for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5))
    marks = [v for v in decades if low <= math.log10(v) <= high]
    if len(marks) < 2:  # slides that are much alike may lie between two of them
        marks = _ticks(10.0**low, 10.0**high)
    parts += [_tick_y(y(math.log10(v)), f"{v:,.7g}") for v in marks]
    for d in sorted(dots, key=lambda d: d.outlier):
        kind = "dot outlier" if d.outlier else "dot"
        parts.append(
            f'<a href="{html.escape(d.link)}"><circle class="{kind}" cx="{x(d.x):.1f}" '
            f'cy="{y(math.log10(d.y)):.1f}" r="3.5"><title>{html.escape(d.title)}</title></circle></a>'
        )
    return _framed(parts, across, up)


def _framed(parts: Sequence[str], across: str, up: str) -> str:
    """Marks with the axes' names around them."""
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}'
        f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(across)}</text>'
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{html.escape(up)}</text></svg>'
    )


def _tick_x(at: float, label: str) -> str:
    return f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{html.escape(label)}</text>'


def _tick_y(at: float, label: str) -> str:
    return (
        f'<path class="rule" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{html.escape(label)}</text>'
    )


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Values from low to high -> positions from first to last."""
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The range of some values, with room at both ends."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, four to nine of them: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max(power * m for m in (1, 2, 5) if power * m <= (high - low) / 4)
    return [round(step * k, 9) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
