"""The report page: headline numbers, curves by section, samples, config. Owns the page's order and words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_cppo.config import Config
from megatron_cppo.progress import duration
from megatron_cppo.report import charts
from megatron_cppo.report.panels import SECTIONS, TOKENS, Panel, Series
from megatron_cppo.report.records import Curve, Run, SampleRecord, choose_samples, read_run
from megatron_cppo.report.samples import sample_card, shift_legend, shift_scale
from megatron_cppo.report.style import SCRIPT, STYLE
from megatron_cppo.types import ImageKey

MIN_OTHER_SHARE = 0.02


def write_report(
    run_dir: Path,
    output: Path,
    *,
    images: Callable[[ImageKey], Image.Image] | None,
    series: Sequence[Series] = (),
    notes: str = "",
    num_samples: int = 6,
) -> None:
    """Write the report of `run_dir` to `output`, one HTML file that loads nothing from elsewhere.

    `images` rebuilds the pixels of a view (None: no pictures), `series` are further panels, `notes` is plain text in
    paragraphs, `num_samples` bounds the answers shown. Raises ConfigError when the folder holds no run.
    """
    run = read_run(run_dir)
    samples = choose_samples(run_dir, num_samples)
    scale = shift_scale(samples)
    cards = "".join(sample_card(sample, scale, images) for sample in samples)
    body = [
        _header(run),
        f'<div class="tiles">{"".join(_tiles(run))}</div>',
        *(f'<p class="notes">{escape(part)}</p>' for part in notes.split("\n\n") if part.strip()),
        *(_section(section.title, section.lead, _panels(run, section.panels)) for section in SECTIONS),
        _section("Measured", "", [_series_card(extra) for extra in series]),
        _section("Time", "", _time_cards(run)),
    ]
    if samples:
        body.append(f"<section><h2>Answers</h2>{_answers_lead(samples, scale)}{cards}</section>")
    body.append(_settings(run))
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(run.name)}</title><style>{STYLE}</style></head>'
        f'<body><main>{"".join(body)}</main><div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which a broken answer may hold, has no UTF-8.
    output.write_bytes(html.encode("utf-8", "replace"))


def _answers_lead(samples: Sequence[SampleRecord], scale: float) -> str:
    if all(sample.shifts is None for sample in samples):
        return "<p>Hover a token for its numbers.</p>"
    return "<p>Colour: how the entropy of a token changes when the image loses its information.</p>" + shift_legend(
        scale
    )


def _header(run: Run) -> str:
    model, algorithm = run.config["model"]["path"], run.config["algorithm"]["objective"]
    policy, trainer = run.config["policy"], run.config["trainer"]
    layout = f"{trainer['num_gpus']} × {policy['device']}, TP {policy['tensor_parallel']}"
    facts = [algorithm.upper(), Path(model).name, layout + f", PP {policy['pipeline_parallel']}", policy["precision"]]
    words = " · ".join(escape(fact) for fact in facts if fact)
    return f'<header class="top"><h1>{escape(run.name)}</h1><p>{words}</p></header>'


def _tiles(run: Run) -> list[str]:
    trainer, rollout = run.config["trainer"], run.config["rollout"]
    tiles = []
    for name, metric, shown in (
        ("Evaluation accuracy", "evaluation/accuracy", _percent),
        ("Training reward", "reward/mean", charts.number_text),
    ):
        if metric in run.curves:
            first, last = _ends(run.curves[metric], window=1 if metric.startswith("evaluation") else 5)
            change = f"{(last - first) * 100:+.1f} points" if shown is _percent else f"{last - first:+.2f}"
            tiles.append(_tile(name, f"<small>{shown(first)} →</small> {shown(last)}", change.replace("-", "−")))
    steps = max(step for curve in run.curves.values() for step in curve.steps)
    group = f"{trainer['prompts_per_step']} prompts × {rollout['samples_per_prompt']} answers"
    tiles.append(_tile("Steps", f"{steps} <small>of {trainer['num_steps']}</small>", group))
    if run.step_seconds:
        busy = sum(run.step_seconds.values())
        each = f"{charts.number_text(busy / len(run.step_seconds))} s per step"
        tiles.append(_tile("Wall time", duration(run.wall_seconds), each))
        tokens = sum(run.curves["tokens/response"].values) if "tokens/response" in run.curves else 0.0
        if tokens:
            rate = f"{charts.number_text(tokens / busy)} <small>tokens/s</small>"
            tiles.append(_tile("Throughput", rate, f"{charts.number_text(tokens)} response tokens in all"))
    return tiles


def _tile(name: str, value: str, detail: str) -> str:
    return f'<div class="tile"><span>{escape(name)}</span><strong>{value}</strong><em>{escape(detail)}</em></div>'


def _ends(curve: Curve, window: int) -> tuple[float, float]:
    size = min(window, len(curve.values))
    return sum(curve.values[:size]) / size, sum(curve.values[-size:]) / size


def _percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def _section(title: str, lead: str, cards: Sequence[str]) -> str:
    if not cards:
        return ""
    words = f"<p>{escape(lead)}</p>" if lead else ""
    return f'<section><h2>{escape(title)}</h2>{words}<div class="cards">{"".join(cards)}</div></section>'


def _card(title: str, now: str, chart: str, caption: str) -> str:
    number = f"<b>{now}</b>" if now else ""
    return (
        f'<figure class="card" data-panel="{escape(title)}"><h3>{escape(title)}{number}</h3>{chart}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _panels(run: Run, panels: Sequence[Panel]) -> list[str]:
    cards = []
    for panel in panels:
        lines = [
            charts.Line(name, run.curves[metric].steps, run.curves[metric].values, dots=metric in panel.dots)
            for name, metric in panel.lines
            if metric in run.curves
        ]
        if lines:
            chart = charts.line_chart(lines, from_zero=panel.from_zero, reference=panel.reference)
            now = charts.number_text(lines[0].y[-1]) if len(lines) == 1 else ""
            cards.append(_card(panel.title, now, chart, panel.caption))
    return cards


def _series_card(series: Series) -> str:
    numbers = [x for x in series.x if isinstance(x, float | int)]
    if len(numbers) == len(series.x):
        chart = charts.line_chart([charts.Line(name, numbers, values) for name, values in series.lines.items()])
    else:
        chart = charts.grouped_bars([str(x) for x in series.x], series.lines)
    return _card(series.title, "", chart, series.caption)


def _time_cards(run: Run) -> list[str]:
    if not run.step_seconds:
        return []
    steps = sorted(run.step_seconds)
    parts = {name: [at.get(step, 0.0) for step in steps] for name, at in run.spans.items()}
    # The largest spans keep a colour of their own, the rest and what no span covers is one part.
    largest = sorted(parts, key=lambda name: -sum(parts[name]))[: charts.NUM_COLORS - 1]
    shown = {name: values for name, values in parts.items() if name in largest}
    other = [max(run.step_seconds[s] - sum(v[i] for v in shown.values()), 0.0) for i, s in enumerate(steps)]
    busy = sum(run.step_seconds.values())
    if sum(other) > MIN_OTHER_SHARE * busy:
        shown["other"] = other
    rows = [(name, sum(values)) for name, values in shown.items()]
    rows += list(run.phases.items())
    rows.sort(key=lambda row: -row[1])
    return [
        _card("Time per step", "", charts.stacked_bars(steps, shown), "Seconds, by span of the loop."),
        _card(
            "Where the time went",
            "",
            _time_table(rows, run.wall_seconds),
            "The whole run with what lies between steps, by rank 0's clock.",
        ),
        *_panels(run, (TOKENS,)),
    ]


def _time_table(rows: Sequence[tuple[str, float]], total: float) -> str:
    largest = max(seconds for _, seconds in rows) or 1.0
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td class="share"><i style="width:{100 * seconds / largest:.1f}%"></i></td>'
        f"<td>{100 * seconds / total:.1f} %</td><td>{duration(seconds)}</td></tr>"
        for name, seconds in rows
    )
    return f'<table class="time">{cells}</table>'


def _settings(run: Run) -> str:
    """What the user chose, the whole config, and what was derived from it."""
    default = dataclasses.asdict(Config())
    chosen = [
        f"<tr><td>{section}.{escape(name)}</td><td>{escape(_setting(value))}</td></tr>"
        for section, fields in run.config.items()
        for name, value in fields.items()
        if value != _as_json(default.get(section, {}).get(name))
    ]
    return (
        "<section><h2>Settings</h2><p>What differs from the defaults.</p>"
        f'<div class="scroll"><table class="settings">{"".join(chosen)}</table></div>'
        f"{_fold('Commands', chr(10).join(run.commands))}"
        f"{_fold('Whole config', json.dumps(run.config, indent=1))}{_fold('Plan', json.dumps(run.plan, indent=1))}"
        "</section>"
    )


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _setting(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _fold(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
