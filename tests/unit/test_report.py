"""The report: whole, self-contained, and true to the files; whatever text a model or a data set puts into it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_cppo.config import ConfigError
from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.report import Series, write_report
from megatron_cppo.report.panels import SECTIONS
from megatron_cppo.report.records import SampleRecord, choose_samples, read_run
from megatron_cppo.runlog import RunLog, read_lines
from megatron_cppo.types import VIEWS, ImageKey
from tests.unit.example_run import answers, example_config, example_log, image, metrics, write_run
from tests.unit.html_tree import Node, Page
from tests.unit.tiny_checkpoint import write_tiny_checkpoint

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    write_run(folder, num_steps=50)
    return folder


def page_of(run_dir: Path, output: Path, **options: object) -> Node:
    write_report(run_dir, output, images=image, **options)  # pyrefly: ignore
    return Page(output.read_text()).root


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Node:
    series = [
        Series("By rule", ["occlusion", "zoom_crop"], {"mask": [0.54, 0.38], "base rate": [0.27, 0.27]}, "Shares."),
        Series("By step", [0, 10, 20], {"mask": [0.3, 0.4, 0.5]}, "Shares."),
    ]
    return page_of(run_dir, run_dir / "report.html", series=series, notes="First < second.\n\nThird.")


def test_every_panel_is_there_with_data(page: Node) -> None:
    titles = [card.attributes["data-panel"] for card in page.all("figure", "card")]
    expected = [panel.title for section in SECTIONS for panel in section.panels]
    assert titles == [
        *expected,
        *("By rule", "By step"),
        *("Time per step", "Where the time went", "Tokens per step"),
    ]
    for chart in page.all("svg", "chart"):
        hover = json.loads(chart.attributes["data-hover"] or "")
        assert len(hover["x"]) == len(hover["label"]) > 0
        assert all(len(series["text"]) == len(hover["x"]) for series in hover["series"])


def test_headlines(page: Node, run_dir: Path) -> None:
    tiles = {tile.all("span")[0].text: tile.all("strong")[0].text for tile in page.all("div", "tile")}
    run = read_run(run_dir)
    last = run.curves["evaluation/accuracy"].values[-1]
    assert tiles["Evaluation accuracy"] == f"29.1 % → {100 * last:.1f} %"
    assert tiles["Steps"] == "50 of 50"
    tokens = sum(line.get("tokens/response", 0.0) for line in read_lines(run_dir / "metrics.jsonl"))
    busy = sum(line.get("total", 0.0) for line in read_lines(run_dir / "timings.jsonl"))
    assert tiles["Throughput"] == f"{tokens / busy:.3g} tokens/s"
    assert run.wall_seconds == pytest.approx(busy + 2 * 4.2)
    assert [note.text for note in page.all("p", "notes")] == ["First < second.", "Third."]


def test_nothing_is_loaded_from_elsewhere(page: Node, run_dir: Path) -> None:
    text = (run_dir / "report.html").read_text()
    assert not re.findall(r"https?:|@import|url\(", text)
    for node in page.all():
        for name in ("src", "href", "srcset", "data", "action"):
            value = node.attributes.get(name)
            assert value is None or value.startswith("data:image/"), f"<{node.tag} {name}={value}>"
    assert len(text) < 1_000_000


def shown(page: Node, run_dir: Path) -> list[tuple[Node, SampleRecord]]:
    return list(zip(page.all("article", "sample"), choose_samples(run_dir, 6), strict=True))


def test_the_mask_is_outlined_token_by_token(page: Node, run_dir: Path) -> None:
    outlined = 0
    for article, sample in shown(page, run_dir):
        tokens = article.all("span", "tok")
        assert len(tokens) == len(sample.line["tokens"])
        mask = sample.line["mask"] or [False] * len(tokens)
        assert ["masked" in token.classes for token in tokens] == mask
        outlined += sum(mask)
    assert outlined > 10


def test_colour_follows_the_entropy_shift(page: Node, run_dir: Path) -> None:
    seen: list[tuple[float, float]] = []
    for article, sample in shown(page, run_dir):
        for i, token in enumerate(article.all("span", "tok")):
            numbers = (token.attributes["data-v"] or "").replace("−", "-").split("|")
            assert float(numbers[0]) == pytest.approx(float(sample.line["logp"][i]), rel=5e-3)
            style = token.attributes.get("style")
            if sample.shifts is None:
                assert style is None
                assert numbers[2:] == ["", ""]
            else:
                assert float(numbers[3]) == pytest.approx(sample.shifts[i], rel=5e-3)
                found = re.fullmatch(r"background:rgba\((\d+),\d+,\d+,([\d.]+)\)", style) if style else None
                sign = 0.0 if found is None else (1.0 if found[1] == "227" else -1.0)
                seen.append((sample.shifts[i], sign * float(found[2]) if found else 0.0))
    seen.sort()
    assert [tint for _, tint in seen] == sorted(tint for _, tint in seen), "the tint grows with the shift"
    assert seen[-1][1] == 0.8
    assert seen[0][1] < 0


def test_samples_are_gated_ones_of_each_kind_and_a_wrong_one(page: Node, run_dir: Path) -> None:
    samples = choose_samples(run_dir, 6)
    assert [sample.gated for sample in samples] == [True] * 5 + [False]
    assert samples[-1].wrong
    assert len({sample.row for sample in samples}) == 6
    assert {sample.line["removing"][0] for sample in samples[:2]} == {"occlusion", "zoom_crop"}
    for article, sample in shown(page, run_dir):
        captions = [caption.text.split()[0] for caption in article.all("figcaption")]
        assert captions == (["original", "preserving", "removing"] if sample.gated else ["original"])
        assert all("tiny" in picture.classes for picture in article.all("img"))
        assert "advantage" in article.text
        assert ("Only" in article.text or "gate was closed" in article.text) != sample.gated


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_the_number_of_samples_is_kept(run_dir: Path, count: int) -> None:
    samples = choose_samples(run_dir, count)
    assert len(samples) == min(count, len({sample.row for sample in samples}))
    assert (len(samples) > 6) == (count == 40)


def test_spaces_and_empty_tokens_can_be_seen(page: Node) -> None:
    texts = [token.text for token in page.all("span", "tok")]
    assert {"·left", "↵", "<think>", "<|im_end|>"} <= set(texts)
    assert "special" in page.all("span", "tok")[0].classes
    assert "<|image_pad|> × 2" in page.all("p", "question")[0].text


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&amp;'


def test_all_text_is_escaped(tmp_path: Path) -> None:
    samples, seen = answers(1, np.random.default_rng(0))
    odd = [
        dataclasses.replace(
            sample,
            prompt=dataclasses.replace(sample.prompt, text=HOSTILE, ground_truth=HOSTILE, data_source=HOSTILE),
            text=HOSTILE,
            grading=HOSTILE,
            rewards=(("accuracy", sample.reward // 1), (HOSTILE, 1.0)),
        )
        for sample in samples
    ]
    log = RunLog(
        tmp_path,
        rank=0,
        config=example_config(tmp_path, 1),
        plan_dict={HOSTILE: HOSTILE},
        total_steps=1,
        decode_token=lambda token: "" if token == 1 else HOSTILE + "\u202e\ud800",
        describe_view=lambda key: HOSTILE,
    )
    with log.step(1) as record:
        record.add({"reward/mean": 1.0})
        with record.span(HOSTILE):
            pass
    log.samples(1, odd, seen)
    clean = page_of(
        tmp_path,
        tmp_path / "report.html",
        notes=HOSTILE,
        series=[Series(HOSTILE, ["a", HOSTILE], {HOSTILE: [1, 2]}, HOSTILE)],
    )
    assert len(clean.all("script")) == 1
    assert clean.all("script")[0].text.count("alert") == 0
    assert not [node for node in clean.all() if any(name.startswith("on") for name in node.attributes)]
    tokens = clean.all("article", "sample")[0].all("span", "tok")
    assert tokens[0].text == "#1"
    assert tokens[1].text == HOSTILE.replace(" ", "·") + "U+202EU+D800"
    assert clean.all("p", "truth")[0].text == HOSTILE
    assert clean.all("p", "notes")[0].text == HOSTILE


def test_a_run_without_views_has_no_perception(tmp_path: Path) -> None:
    log = example_log(tmp_path, 2)
    samples, seen = answers(1, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    for step in (1, 2):
        with log.step(step) as record:
            record.add({name: value for name, value in metrics(0.5, rng).items() if "perception" not in name})
    blind = [dataclasses.replace(one, mask=None, entropy_removing=None) for one in seen]
    log.samples(2, samples, blind)
    page = page_of(tmp_path, tmp_path / "report.html")
    titles = {card.attributes["data-panel"] for card in page.all("figure", "card")}
    assert "Reward" in titles
    assert "Masked tokens" not in titles
    assert "Perception" not in [title.text for title in page.all("h2")]
    assert len(page.all("article")) == 4
    assert not page.all("div", "key")


def test_a_run_that_is_being_written_and_holds_nan(tmp_path: Path) -> None:
    log = example_log(tmp_path, 2)
    with log.step(1) as record:
        record.add({"reward/mean": math.nan, "policy/kl": math.inf, "policy/entropy": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"policy/entropy": 0.')
    page = page_of(tmp_path, tmp_path / "new" / "report.html")
    assert {"Reward", "KL to the reference", "Entropy"} <= {
        card.attributes.get("data-panel") for card in page.all("figure")
    }
    assert "NaN" not in (tmp_path / "new" / "report.html").read_text()


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run.*fix: give a trainer\.run_dir"):
        write_report(tmp_path, tmp_path / "report.html", images=None)
    example_log(tmp_path, 1)
    with pytest.raises(ConfigError, match="has no line yet; fix: wait"):
        write_report(tmp_path, tmp_path / "report.html", images=None)
    with pytest.raises(ValueError, match="line 'a' has 1 values for 2 x; fix: one each"):
        Series("s", [1, 2], {"a": [1.0]}, "")
    with pytest.raises(ValueError, match="9 lines over 1 x; fix: 1 to 8 lines"):
        Series("s", [1], {str(i): [1.0] for i in range(9)}, "")


def test_command_line_without_images(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    words = [str(run_dir), "--output", str(output), "--samples", "2", "--no-images"]
    environment = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPO / "tools" / "report.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(output)
    page = Page(output.read_text()).root
    assert len(page.all("article")) == 2
    assert not page.all("img")


def test_command_line_says_what_it_cannot_open(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(REPO / "tools" / "report.py"))["main"]
    assert main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.path: no config.json in 'checkpoints/digits-1m'")
    assert "--no-images" in error


def test_command_line_rebuilds_the_pictures_of_the_training_rows(tmp_path: Path) -> None:
    keys = [ImageKey("train", row, 0, 0, "original") for row in range(4)]
    buffers = [io.BytesIO() for _ in keys]
    for key, buffer in zip(keys, buffers, strict=True):
        image(key).save(buffer, "PNG")
    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": "<image>What is the sum?"}],
            "images": [{"bytes": buffer.getvalue(), "path": None}],
            "reward_model": {"style": "rule", "ground_truth": "7"},
        }
        for buffer in buffers
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    base = example_config(tmp_path / "run", 1)
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path=write_tiny_checkpoint(tmp_path / "checkpoint")),
        data=dataclasses.replace(base.data, train=(str(tmp_path / "train.parquet"),)),
        trainer=dataclasses.replace(base.trainer, seed=5),
    )
    source = PromptSource(
        config.data.train,
        split="train",
        model_path=config.model.path,
        data=config.data,
        model=config.model,
        perception=config.perception,
        seed=config.trainer.seed,
    )
    samples, seen = answers(1, np.random.default_rng(0))
    asked = source.take(4, 4)
    samples = [dataclasses.replace(sample, prompt=asked[i // 5]) for i, sample in enumerate(samples)]
    log = RunLog(
        tmp_path / "run",
        rank=0,
        config=config,
        plan_dict={},
        total_steps=1,
        decode_token=str,
        describe_view=source.view_name,
    )
    with log.step(1) as record:
        record.add({"reward/mean": 0.5})
    log.samples(1, samples, seen)
    assert runpy.run_path(str(REPO / "tools" / "report.py"))["main"]([str(tmp_path / "run")]) == 0
    page = Page((tmp_path / "run" / "report.html").read_text()).root
    chosen = choose_samples(tmp_path / "run", 6)
    expected = [
        source.image(sample.image(0, view)) for sample in chosen for view in (VIEWS if sample.gated else VIEWS[:1])
    ]
    pictures = [(node.attributes["src"] or "").removeprefix("data:image/png;base64,") for node in page.all("img")]
    assert len(pictures) == len(expected) == 10
    for data, picture in zip(pictures, expected, strict=True):
        found = Image.open(io.BytesIO(base64.b64decode(data)))
        assert np.array_equal(np.asarray(found), np.asarray(picture))


def test_large_pictures_are_scaled_down(tmp_path: Path, run_dir: Path) -> None:
    large = Image.effect_mandelbrot((1600, 900), (-2, -1.2, 1, 1.2), 40).convert("RGB")
    write_report(run_dir, tmp_path / "report.html", images=lambda key: large)
    picture = Page((tmp_path / "report.html").read_text()).root.all("img")[0]
    assert (picture.attributes["width"], picture.attributes["height"]) == ("512", "288")
    assert (picture.attributes["src"] or "").startswith("data:image/jpeg;base64,")
    assert "tiny" not in picture.classes
