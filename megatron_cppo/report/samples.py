"""Answers as HTML: the three views, the tokens coloured by entropy shift, the perception mask outlined.

Owns the cards of single samples. All text comes from data or from the model and is escaped.
"""

from __future__ import annotations

import base64
import io
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from megatron_cppo.report.charts import nice_ticks, number_text
from megatron_cppo.report.records import SampleRecord
from megatron_cppo.types import VIEWS, ImageKey, View

MAX_TOKENS_SHOWN = 1500
MAX_IMAGE_PIXELS = 512
TINY_PIXELS = 160
# Red: the token is less certain without the image. Blue: more certain. The two poles of the legend's scale.
LESS_CERTAIN, MORE_CERTAIN = "227,73,72", "42,120,214"
MAX_TINT = 0.8
SPECIAL = re.compile(r"<\|[^|]*\|>|<[^<>\s]+>")
TEMPLATE = re.compile(r"(<\|[^|<>]*\|>(?: × \d+)?)")
REPEATED = re.compile(r"(<\|[^|<>]*\|>)\1+")


def shift_scale(samples: Sequence[SampleRecord]) -> float:
    """The |entropy shift| in nats that gets the full colour: the 95th percentile of what is shown, rounded up."""
    sizes = sorted(abs(shift) for sample in samples for shift in sample.shifts or () if math.isfinite(shift))
    largest = sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0
    return nice_ticks(0.0, largest)[-1] if largest > 0 else 1.0


def shift_legend(scale: float) -> str:
    """The key to colours and outlines."""
    low, high = f"rgba({MORE_CERTAIN},{MAX_TINT})", f"rgba({LESS_CERTAIN},{MAX_TINT})"
    gradient = f'<i style="background:linear-gradient(90deg,{low},transparent,{high})"></i>'
    return (
        '<div class="key"><span class="bar"><b>more certain without the image</b>'
        f"<span>{number_text(-scale)}</span>{gradient}<span>+{number_text(scale)} nats</span>"
        "<b>less certain without the image</b></span>"
        '<span class="sign"><span class="swatch"></span> in the perception mask</span>'
        '<span class="sign hint">hover a token for its numbers</span></div>'
    )


def sample_card(sample: SampleRecord, scale: float, images: Callable[[ImageKey], Image.Image] | None) -> str:
    """One sample: views, question, ground truth, rewards, and its answer token by token."""
    line = sample.line
    masked = sum(line["mask"]) if sample.gated else 0
    facts = [
        _chip("reward", line["reward"], "good" if not sample.wrong else "bad"),
        *(_chip(name, value) for name, value in line["rewards"].items()),
        _chip("advantage", line["advantage"]),
        *([_chip("grading", line["grading"])] if line["grading"] else []),
        *(['<span class="chip">cut by the length limit</span>'] if line["truncated"] else []),
    ]
    count = f"{len(line['tokens'])} tokens" + (f", {masked} masked" if sample.gated else "")
    closed = "The gate was closed: only" if line["advantage"] <= 0 else "Only"
    unseen = "" if sample.gated else f'<p class="note">{closed} the original view was run.</p>'
    kind = "gated" if sample.gated else "wrong" if sample.wrong else "ungated"
    return (
        f'<article class="sample {kind}"><header><h3>{escape(_title(sample))}</h3><div>{"".join(facts)}</div></header>'
        f'<div class="body">{_views(sample, images)}<div class="words"><h4>Question</h4>'
        f'<p class="question">{_question(line["prompt"])}</p>'
        f'<h4>Ground truth</h4><p class="truth">{escape(line["ground_truth"])}</p></div></div>'
        f"<h4>Answer <small>· {count}</small></h4>{unseen}{_answer(sample, scale)}</article>"
    )


def _title(sample: SampleRecord) -> str:
    line = sample.line
    source = f" · {line['data_source']}" if line["data_source"] else ""
    return f"Step {line['step']}, row {line['row']}, answer {line['index'] + 1}{source}"


def _chip(name: str, value: float | str, kind: str = "") -> str:
    text = value if isinstance(value, str) else number_text(value)
    return f'<span class="chip {kind}">{escape(name)} <b>{escape(text)}</b></span>'


def _question(prompt: str) -> str:
    """The prompt as HTML: a run of one special token is that token and a count, and special tokens step back."""
    short = REPEATED.sub(lambda found: f"{found[1]} × {len(found[0]) // len(found[1])} ", prompt.strip())
    parts = TEMPLATE.split(short)
    return "".join(f"<u>{escape(part)}</u>" if i % 2 else escape(part) for i, part in enumerate(parts))


def _views(sample: SampleRecord, images: Callable[[ImageKey], Image.Image] | None) -> str:
    if images is None or sample.line["num_images"] == 0:
        return ""
    views: tuple[View, ...] = VIEWS if sample.gated else ("original",)
    figures = []
    for index in range(sample.line["num_images"]):
        for view in views:
            drawn = [] if view == "original" else sample.line[view]
            name = f" <span>{escape(drawn[index].replace('_', ' '))}</span>" if drawn else ""
            picture = _picture(images(sample.image(index, view)), f"image {index + 1}, {view} view")
            figures.append(f"<figure>{picture}<figcaption>{view}{name}</figcaption></figure>")
    return f'<div class="views" style="--views:{len(views)}">{"".join(figures)}</div>'


def _picture(image: Image.Image, text: str) -> str:
    """An image as a data URI: small ones pixel by pixel, large ones scaled down."""
    tiny = max(image.size) <= TINY_PIXELS
    shown = image.convert("RGB")
    shown.thumbnail((MAX_IMAGE_PIXELS, MAX_IMAGE_PIXELS))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG" if tiny else "JPEG", **({} if tiny else {"quality": 88}))
    kind = "png" if tiny else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{shown.width}" height="{shown.height}"'
    return f'<img class="{"tiny" if tiny else ""}" {size} alt="{escape(text)}" src="data:image/{kind};base64,{data}">'


def _answer(sample: SampleRecord, scale: float) -> str:
    tokens, mask = sample.line["tokens"], sample.line["mask"]
    shifts = sample.shifts
    columns = [sample.numbers(name) for name in ("logp", "entropy", "entropy_removing")]
    spans = []
    for i, token in enumerate(tokens[:MAX_TOKENS_SHOWN]):
        data = "|".join("" if column is None else number_text(column[i]) for column in (*columns, shifts))
        tint = "" if shifts is None else _tint(shifts[i], scale)
        masked = " masked" if mask is not None and mask[i] else ""
        special = " special" if SPECIAL.fullmatch(token) or not token else ""
        text = _visible(token, sample.line["token_ids"][i])
        spans.append(f'<span class="tok{masked}{special}"{tint} data-v="{data}">{text}</span>')
        if token.endswith("\n"):
            spans.append("<br>")
    left = len(tokens) - MAX_TOKENS_SHOWN
    rest = f'<p class="note">{left} more tokens are not shown.</p>' if left > 0 else ""
    return f'<div class="answer">{"".join(spans)}</div>{rest}'


def _tint(shift: float, scale: float) -> str:
    if not math.isfinite(shift):
        return ""
    alpha = MAX_TINT * min(abs(shift) / scale, 1.0)
    return (
        f' style="background:rgba({LESS_CERTAIN if shift > 0 else MORE_CERTAIN},{alpha:.2f})"' if alpha > 0.02 else ""
    )


def _visible(token: str, token_id: int) -> str:
    """The token as HTML in which spaces, line breaks, control characters and empty tokens can be seen."""
    if not token:
        return f"<u>#{token_id}</u>"
    marks = {" ": "<u>·</u>", "\n": "<u>↵</u>", "\t": "<u>⇥</u>", "\r": "<u>␍</u>"}
    return "".join(marks.get(letter) or _letter(letter) for letter in token)


def _letter(letter: str) -> str:
    if unicodedata.category(letter)[0] in "CZ":
        return f"<u>U+{ord(letter):04X}</u>"
    return escape(letter)
