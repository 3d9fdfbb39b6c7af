"""Small charts as inline SVG: columns, bars in rows and scattered points. All text is escaped, colours are classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 220  # of the drawing, in its own units: about the pixels of a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 38


@dataclass(frozen=True)
class Point:
    """One point of a scatter: where, what it is called, and its class of colour (`c0`, `c1`, ...)."""

    x: float
    y: float
    label: str
    style: str = "c0"


def columns(labels: Sequence[str], values: Sequence[float], x_title: str, y_title: str) -> str:
    """One column for each value, from zero up or down; not a number and infinity leave a gap."""
    finite = [value for value in values if math.isfinite(value)]
    high, low = _round_up(max([*finite, 0.0])), -_round_up(-min([*finite, 0.0]))
    if high == low:
        high = 1.0
    zero = _scale(0.0, low, high, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    marks = []
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        if math.isfinite(value):
            end = _scale(value, low, high, HEIGHT - BOTTOM, TOP)
            marks.append(
                f'<rect class="c0" x="{LEFT + (number + 0.1) * step:.1f}" y="{min(end, zero):.1f}" '
                f'width="{step * 0.8:.1f}" height="{abs(end - zero):.1f}">'
                f"<title>{escape(label)}: {value:.4g}</title></rect>"
            )
    every = max(1, math.ceil(len(labels) / 6))
    ticks = [
        _text(LEFT + (number + 0.5) * step, HEIGHT - BOTTOM + 14, label, "middle")
        for number, label in enumerate(labels)
        if number % every == 0
    ]
    return _drawing(
        [*_y_axis(low, high, y_title), *marks, *ticks, _x_title(x_title)], f"{y_title} by {x_title}"
    )


def scatter(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    frontier: Sequence[int] = (),
    log_y: bool = False,
    more_is_better: bool = False,
) -> str:
    """Points with their labels; those of `frontier` (indices, in order of x) are joined by a stepped line.

    Args:
        more_is_better: of x. Between two points of the line nothing better is claimed than the one that does: the left
            one where less is better, else the right one.
    """
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return ""
    low_x, high_x = _range([point.x for point in shown])
    low_y, high_y = _range([_value(point.y, log_y) for point in shown])

    def at(point: Point) -> tuple[float, float]:
        x = _scale(point.x, low_x, high_x, LEFT, WIDTH - RIGHT)
        return x, _scale(_value(point.y, log_y), low_y, high_y, HEIGHT - BOTTOM, TOP)

    marks = _y_axis(low_y, high_y, y_title, log_y)
    path = [at(points[index]) for index in frontier if points[index] in shown]
    if len(path) > 1:
        corner = "V{1:.1f}H{0:.1f}" if more_is_better else "H{0:.1f}V{1:.1f}"
        steps = f"M{path[0][0]:.1f} {path[0][1]:.1f}" + "".join(corner.format(x, y) for x, y in path[1:])
        marks.append(f'<path class="frontier" d="{steps}"/>')
    taken: list[tuple[float, float]] = []
    for point in shown:
        x, y = at(point)
        end = x > WIDTH * 0.62
        place, step = y - 6, -11 if y > HEIGHT / 2 else 11
        while any(abs(place - other) < 11 and abs(x - near) < 130 for near, other in taken):
            place += step  # beside a label that is there already, and away from the axes
        taken.append((x, place))
        marks.append(
            f'<circle class="{escape(point.style)}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(point.label)}: '
            f"{point.x:.4g}, {point.y:.4g}</title></circle>"
        )
        marks.append(_text(x - 8 if end else x + 8, place, point.label, "end" if end else "start"))
    for value in _ticks(low_x, high_x, 4):
        marks.append(
            _text(
                _scale(value, low_x, high_x, LEFT, WIDTH - RIGHT),
                HEIGHT - BOTTOM + 14,
                f"{value:.4g}",
                "middle",
            )
        )
    return _drawing([*marks, _x_title(x_title)], f"{y_title} against {x_title}")


def _drawing(parts: Sequence[str], title: str) -> str:
    frame = f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}{frame}</svg>'


def _y_axis(low: float, high: float, title: str, log: bool = False) -> list[str]:
    parts = []
    for value in _ticks(low, high, 4):
        y = _scale(value, low, high, HEIGHT - BOTTOM, TOP)
        told = 10**value if log else value
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 5, y + 4, f"{told:.3g}", "end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(title)}</text>'
    )
    return parts


def _x_title(title: str) -> str:
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, title, "middle")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _scale(value: float, low: float, high: float, first: float, last: float) -> float:
    return first + (last - first) * (value - low) / (high - low)


def _value(value: float, log: bool) -> float:
    return math.log10(max(value, 1e-12)) if log else value


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values take."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between the two."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_up(value: float) -> float:
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        power * factor for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * factor >= value * 0.999999
    )
