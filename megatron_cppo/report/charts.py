"""Charts as inline SVG: lines, grouped bars, stacked bars. Owns geometry, ticks and hover data; knows no metric.

Colours are CSS variables, so that one drawing serves light and dark. Hover data lies in an attribute, as JSON:
pixel positions, a label for each, and per series its name, colour and values as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 10.0, 22.0
MAX_POINTS = 240
MAX_BARS = 40
MIN_POINTS_TO_SMOOTH = 40
NUM_COLORS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One series; `dots` marks each value, for the few points of an evaluation."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """The data ranges and their pixels."""

    x0: float
    x1: float
    y0: float
    y1: float

    def px(self, x: float) -> float:
        share = (x - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def py(self, y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM), 1)


def line_chart(
    lines: Sequence[Line], *, x_name: str = "step", from_zero: bool = False, reference: tuple[str, float] | None = None
) -> str:
    """Lines over a numeric axis; long ones are thinned to means, and a moving mean is drawn over the faint points."""
    thinned = [Line(line.name, *_thin(line.x, line.y), dots=line.dots) for line in lines]
    xs = [x for line in thinned for x in line.x]
    ys = [y for line in thinned for y in line.y if math.isfinite(y)] + ([reference[1]] if reference else [])
    ticks = nice_ticks(*_padded(ys, from_zero))
    axes = Axes(min(xs), max(xs), ticks[0], ticks[-1])
    marks = [_y_axis(axes, ticks), _x_axis(axes, nice_ticks(axes.x0, axes.x1, inside=True))]
    if reference:
        y = axes.py(reference[1])
        marks.append(f'<line class="ref" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(
            f'<text class="ref" x="{WIDTH - RIGHT}" y="{y - 4}" text-anchor="end">{escape(reference[0])}</text>'
        )
    for number, line in enumerate(thinned):
        marks.append(_line_marks(axes, line, color(number)))
    grid = sorted(set(xs))
    series = []
    for number, line in enumerate(thinned):
        at = dict(zip(line.x, line.y, strict=True))
        values = [at.get(x, math.nan) for x in grid]
        series.append(_hover_series(line.name, color(number), values))
    hover = {"x": [axes.px(x) for x in grid], "label": [f"{x_name} {x:g}" for x in grid], "series": series}
    return legend([line.name for line in lines], [number_text(line.y[-1]) for line in lines]) + _svg(marks, hover)


def grouped_bars(groups: Sequence[str], lines: dict[str, list[float]]) -> str:
    """One group of bars per word, one bar per line, each with its value on top."""
    heights = [0.0, *(y for values in lines.values() for y in values if math.isfinite(y))]
    # Room for the values above the bars.
    ticks = nice_ticks(min(heights), max(heights) * 1.08)
    axes = Axes(0.0, 1.0, ticks[0], ticks[-1])
    marks = [_y_axis(axes, ticks)]
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = min(34.0, slot * 0.82 / len(lines))
    centers = [round(LEFT + slot * (i + 0.5), 1) for i in range(len(groups))]
    for i, group in enumerate(groups):
        start = centers[i] - width * len(lines) / 2
        for number, values in enumerate(lines.values()):
            if math.isfinite(values[i]):
                x, top, base = start + width * number, axes.py(values[i]), axes.py(0.0)
                marks.append(_bar(x + 1, min(top, base), width - 2, abs(base - top), color(number), radius=3))
                label = f'<text class="value" x="{x + width / 2:.1f}" y="{min(top, base) - 4}">'
                marks.append(f"{label}{escape(number_text(values[i]))}</text>")
        marks.append(f'<text x="{centers[i]}" y="{HEIGHT - 6}" text-anchor="middle">{escape(group)}</text>')
    series = [_hover_series(name, color(i), values) for i, (name, values) in enumerate(lines.items())]
    return legend(list(lines)) + _svg(marks, {"x": centers, "label": list(groups), "series": series, "bars": True})


def stacked_bars(steps: Sequence[int], parts: dict[str, list[float]]) -> str:
    """Seconds per step as stacked bars, one colour per part; many steps are averaged into at most 40 bars."""
    size = math.ceil(len(steps) / MAX_BARS)
    chunks = [range(i, min(i + size, len(steps))) for i in range(0, len(steps), size)]
    means = {name: [_mean([values[i] for i in chunk]) for chunk in chunks] for name, values in parts.items()}
    totals = [sum(values[i] for values in means.values()) for i in range(len(chunks))]
    ticks = nice_ticks(0.0, max(totals) or 1.0)
    axes = Axes(0.0, 1.0, 0.0, ticks[-1])
    marks = [_y_axis(axes, ticks)]
    slot = (WIDTH - LEFT - RIGHT) / len(chunks)
    width = min(26.0, slot - (2 if slot > 6 else 0.6))
    centers = [round(LEFT + slot * (i + 0.5), 1) for i in range(len(chunks))]
    for i, center in enumerate(centers):
        below = 0.0
        for number, values in enumerate(means.values()):
            top, base = axes.py(below + values[i]), axes.py(below)
            below += values[i]
            # The gap between two parts is the surface showing through.
            if base - top > 0.7:
                marks.append(_bar(center - width / 2, top, width, base - top - 0.7, color(number), radius=0))
    labels = [_range_name(steps[chunk[0]], steps[chunk[-1]]) for chunk in chunks]
    for i in sorted({0, len(chunks) // 2, len(chunks) - 1}):
        marks.append(f'<text x="{centers[i]}" y="{HEIGHT - 6}" text-anchor="middle">{steps[chunks[i][0]]}</text>')
    series = [_hover_series(name, color(i), values, " s") for i, (name, values) in enumerate(means.items())]
    hover = {"x": centers, "label": [f"step {label}" for label in labels], "series": series, "bars": True}
    return legend(list(parts)) + _svg(marks, hover)


def legend(names: Sequence[str], values: Sequence[str] = ()) -> str:
    """The key of a chart's colours, with last values; a single series needs none, its title names it."""
    if len(names) < 2:
        return ""
    texts = [f" <b>{escape(value)}</b>" for value in values] or [""] * len(names)
    keys = "".join(
        f'<span><i style="background:{color(i)}"></i>{escape(name)}{text}</span>'
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    )
    return f'<div class="legend">{keys}</div>'


def color(number: int) -> str:
    """The CSS colour of the series at this place."""
    assert number < NUM_COLORS, f"series {number} of a chart with {NUM_COLORS} colours"
    return f"var(--c{number + 1})"


def nice_ticks(low: float, high: float, *, inside: bool = False) -> list[float]:
    """Three to six round numbers that cover [low, high], or lie inside of it."""
    span = high - low or abs(high) or 1.0
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9) if inside else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if inside else math.ceil(high / step - 1e-9)
    last = last if inside else max(last, first + 1)
    # Through a decimal text: 3 * 0.1 is not 0.3.
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def number_text(value: float) -> str:
    """A number for reading: three digits, thousands as k and M, tiny ones with an exponent."""
    if not math.isfinite(value):
        return str(value)
    for limit, divisor, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{unit}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return text.replace("e-0", "e-").replace("-", "−")


def _padded(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        high, low = high + (abs(high) or 1.0) * 0.1, low if from_zero else low - (abs(low) or 1.0) * 0.1
    return low, high


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    size = math.ceil(len(x) / MAX_POINTS)
    starts = range(0, len(x), size)
    return [x[min(i + size, len(x)) - 1] for i in starts], [_mean(y[i : i + size]) for i in starts]


def _smooth(y: Sequence[float]) -> list[float]:
    """Centred moving mean over a tenth of the points; at both ends of what there is of the window."""
    half = len(y) // 20
    return [_mean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]


def _line_marks(axes: Axes, line: Line, stroke: str) -> str:
    smooth = len(line.y) >= MIN_POINTS_TO_SMOOTH and not line.dots
    marks = f'<path class="faint" stroke="{stroke}" d="{_path(axes, line.x, line.y)}"/>' if smooth else ""
    shown = _smooth(line.y) if smooth else line.y
    marks += f'<path class="line" stroke="{stroke}" d="{_path(axes, line.x, shown)}"/>'
    if line.dots or len(line.x) == 1:
        points = [(axes.px(x), axes.py(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        marks += "".join(f'<circle class="dot" cx="{x}" cy="{y}" r="4" fill="{stroke}"/>' for x, y in points)
    return marks


def _path(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> str:
    words, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            words.append(f"{'L' if pen_down else 'M'}{axes.px(x):g} {axes.py(y):g}")
        pen_down = math.isfinite(y)
    return "".join(words)


def _bar(x: float, y: float, width: float, height: float, fill: str, *, radius: int) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {box} rx="{radius}" style="fill:{fill}"/>'


def _y_axis(axes: Axes, ticks: Sequence[float]) -> str:
    marks = []
    for tick in ticks:
        y = axes.py(tick)
        kind = "base" if tick == axes.y0 else "grid"
        marks.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number_text(tick)}</text>')
    return "".join(marks)


def _x_axis(axes: Axes, ticks: Sequence[float]) -> str:
    return "".join(
        f'<text x="{axes.px(tick)}" y="{HEIGHT - 6}" text-anchor="middle">{number_text(tick)}</text>' for tick in ticks
    )


def _hover_series(name: str, stroke: str, values: Sequence[float], unit: str = "") -> dict[str, object]:
    texts = [number_text(value) + unit if math.isfinite(value) else None for value in values]
    return {
        "name": name,
        "color": stroke,
        "text": texts,
    }


def _range_name(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}, mean"


def _svg(marks: Sequence[str], hover: Mapping[str, object]) -> str:
    data = escape(json.dumps(hover, separators=(",", ":")), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" data-hover="{data}">{"".join(marks)}'
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/></svg>'
    )
