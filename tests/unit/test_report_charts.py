"""The report's charts: ticks, thinning, gaps, sums, and how numbers are written."""

from __future__ import annotations

import json
import math

import pytest

from megatron_cppo.report.charts import Line, line_chart, nice_ticks, number_text, stacked_bars
from tests.unit.html_tree import Page


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.32), (-3, 17), (1e-9, 3e-6), (5e5, 7e6), (2, 2)])
def test_ticks_cover_the_data_and_are_few(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7
    inside = nice_ticks(low, high, inside=True)
    assert all(low <= tick <= high for tick in inside)


def test_long_curves_are_thinned_and_gaps_stay_gaps() -> None:
    steps = list(range(1, 10_001))
    chart = line_chart([Line("a", steps, [math.sin(step / 500) for step in steps])])
    hover = json.loads(Page(chart).root.all("svg")[0].attributes["data-hover"] or "")
    assert len(hover["x"]) <= 240
    assert hover["label"][-1] == "step 10000"
    path = Page(line_chart([Line("a", [1, 2, 3, 4], [1, 2, math.nan, 4])])).root.all("path")[0].attributes["d"] or ""
    assert path.count("M") == 2


def test_stacked_bars_keep_the_sum() -> None:
    steps = list(range(1, 100))
    parts = {"a": [1.0] * 99, "b": [float(step % 2) for step in steps]}
    chart = Page(stacked_bars(steps, parts)).root
    hover = json.loads(chart.all("svg")[0].attributes["data-hover"] or "")
    assert len(hover["x"]) <= 40
    assert hover["label"][0] == "step 1–3, mean"
    # The gap between parts is 0.7 pixels of each.
    heights = [float(bar.attributes["height"] or 0) + 0.7 for bar in chart.all("rect")]
    assert len(heights) == 2 * len(hover["x"])
    assert sum(heights[1::2]) / sum(heights[::2]) == pytest.approx(50 / 99, rel=2e-3)


def test_numbers_for_reading() -> None:
    values = (0.0, 0.7033, 1234.5, 31_234, 2.5e6, 1.83e-6, -0.00282, math.nan)
    assert [number_text(value) for value in values] == [
        *("0", "0.703", "1234", "31.2k", "2.5M", "1.83e−6", "−0.00282", "nan"),
    ]
