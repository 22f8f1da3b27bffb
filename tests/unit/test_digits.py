"""The demo's data and model: what they hold, that nothing leaks into the evaluation, and that seeds decide all."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from examples.digits import KINDS, NUM_TRAINING_SCANS, ROW_SCHEMA, make_data, make_model, read_tokens, target_response

SIZES = {"num_train": 60, "num_warm": 50, "num_evaluation": 40}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    paths = make_data(tmp_path_factory.mktemp("data"), seed=3, **SIZES)
    return {split: pq.read_table(path).to_pylist() for split, path in paths.items()}


def pieces(tokenizer: Any, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]


def test_the_folder_loads_as_an_ordinary_checkpoint(model_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    with safe_open(model_folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert {"model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.bias", "visual.merger.ln_q.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"model", "visual"}, "tied: no lm_head on disk"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    vocab_size = model.config.get_text_config().vocab_size
    assert len(tokenizer) < vocab_size
    assert vocab_size % 64 == 0
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_tokens(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert pieces(tokenizer, "<think>17+305=</think>\\boxed{2}") == [
        *("<think", ">", "1", "7", "+", "3", "0", "5", "="),
        *("</", "think", ">\\", "boxed", "{", "2", "}"),
    ]
    for text in ("Grüße, 世界!", *(wording for kind in KINDS.values() for wording in kind.wordings)):
        assert "".join(tokenizer.decode(tokenizer(text)["input_ids"])) == text
    added = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"])
    assert [token - added[0] for token in added] == [0, 1, 2, 21], "22 added tokens in Qwen2.5-VL's order"


def test_the_chat_template(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    content = [{"type": "image"}, {"type": "text", "text": "Sum?"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Sum?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(tokenizer(rendered)["input_ids"]) == 13


def test_columns_and_rows(splits: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    paths = make_data(tmp_path, seed=3, num_train=2, num_warm=2, num_evaluation=2)
    assert list(paths) == ["warm", "train", "evaluation"]
    assert all(pq.read_schema(path).equals(ROW_SCHEMA) for path in paths.values())
    assert {split: len(rows) for split, rows in splits.items()} == {"warm": 50, "train": 60, "evaluation": 40}
    for split, rows in splits.items():
        assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
        assert {row["extra_info"]["kind"] for row in rows} == set(KINDS)
        for row in rows:
            assert row["extra_info"]["split"] == split
            assert row["data_source"] == "digits"
            assert row["reward_model"]["style"] == "rule"
            assert row["prompt"] == [{"role": "user", "content": "<image>" + row["extra_info"]["question"]}]
            assert [image["path"] for image in row["images"]] == [None]
            assert row["extra_info"]["response"] == (row["extra_info"]["answer"] if split == "warm" else "")


def test_pictures(splits: dict[str, list[dict[str, Any]]], model_folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(model_folder)
    scans = load_digits().images
    for row in splits["evaluation"]:
        picture = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (112, 56))
        # Dark ink on light paper: the picture is the two scans, upside down in brightness.
        grey = np.asarray(picture.convert("L").resize((16, 8), Image.Resampling.BOX), dtype=float)
        left, right = row["extra_info"]["scans"]
        assert np.corrcoef(grey.ravel(), np.concatenate([scans[left], scans[right]], axis=1).ravel())[0, 1] < -0.95
        processed = processor(picture, return_tensors="pt")
        assert processed["image_grid_thw"].tolist() == [[1, 4, 8]]
    assert len({row["images"][0]["bytes"] for row in splits["evaluation"]}) == len(splits["evaluation"])


def test_held_out_scans_are_shown_nowhere_else(splits: dict[str, list[dict[str, Any]]]) -> None:
    shown = {split: {scan for row in rows for scan in row["extra_info"]["scans"]} for split, rows in splits.items()}
    assert max(shown["warm"] | shown["train"]) < NUM_TRAINING_SCANS
    assert min(shown["evaluation"]) >= NUM_TRAINING_SCANS
    assert len(shown["evaluation"]) > 50
    scans = load_digits().images
    training, held_out = scans[:NUM_TRAINING_SCANS], scans[NUM_TRAINING_SCANS:]
    assert not {scan.tobytes() for scan in training} & {scan.tobytes() for scan in held_out}


def test_answers_are_right(splits: dict[str, list[dict[str, Any]]]) -> None:
    labels = load_digits().target
    for row in (row for rows in splits.values() for row in rows):
        info = row["extra_info"]
        left, right = info["digits"]
        assert [labels[scan] for scan in info["scans"]] == [left, right]
        right_answer = {"sum": left + right, "difference": abs(left - right), "larger": max(left, right)}[info["kind"]]
        assert row["reward_model"]["ground_truth"] == str(right_answer)
        thought, boxed = re.fullmatch(r"<think>(.*)</think>\\boxed\{(\d+)\}", info["answer"]).groups()
        assert boxed == str(right_answer)
        assert re.findall(r"\d", thought)[:2] == [str(left), str(right)]


def test_few_tokens_are_read_off_the_picture(model_folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    num_read = num_tokens = 0
    for row in splits["train"]:
        tokens = [*pieces(tokenizer, row["extra_info"]["answer"]), "<|im_end|>"]
        flags = read_tokens(tokens)
        assert [int(token) for token, flag in zip(tokens, flags, strict=True) if flag] == row["extra_info"]["digits"]
        assert 15 <= len(tokens) <= 17
        num_read, num_tokens = num_read + sum(flags), num_tokens + len(tokens)
    print(f"tokens read off the picture: {num_read / num_tokens:.3f}")
    assert num_read / num_tokens <= 0.30


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (target_response("sum", 7, 5), [2, 4]),
        (target_response("difference", 7, 5), [2, 4]),
        (target_response("larger", 7, 5), [3, 5]),
        ("7+5=12</think>\\boxed{12}", []),  # nothing is thought
        ("<think>7+5=12\\boxed{12}", [2, 4]),  # the thought never ends
        ("<think>7</think>5", [2]),  # one digit only
        ("<think></think>\\boxed{12}", []),
        ("<think><think>75", [5, 6]),
        ("3<think>75", [3, 4]),  # digits before the thought are not read
        ("</think><think>75", [6, 7]),
        ("", []),
    ],
)
def test_which_tokens_are_read(model_folder: Path, response: str, expected: list[int]) -> None:
    tokens = pieces(AutoTokenizer.from_pretrained(model_folder), response)
    flags = read_tokens(tokens)
    assert len(flags) == len(tokens)
    assert [place for place, flag in enumerate(flags) if flag] == expected, tokens


def test_the_seed_decides_every_byte(tmp_path: Path, model_folder: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    make_model(tmp_path / "model", seed=3)
    assert contents(tmp_path / "model") == contents(model_folder)
    make_model(tmp_path / "other-model", seed=4)
    changed = {
        name for name, content in contents(tmp_path / "other-model").items() if content != contents(model_folder)[name]
    }
    assert changed == {"model.safetensors"}
    for name, seed in (("data", 3), ("again", 3), ("other-data", 4)):
        make_data(tmp_path / name, seed=seed, num_train=5, num_warm=5, num_evaluation=5)
    assert contents(tmp_path / "data") == contents(tmp_path / "again")
    assert all(contents(tmp_path / "data")[name] != other for name, other in contents(tmp_path / "other-data").items())
    # More rows begin with the fewer.
    longer = make_data(tmp_path / "longer", seed=3, num_train=9, num_warm=5, num_evaluation=5)["train"]
    assert pq.read_table(longer).to_pylist()[:5] == pq.read_table(tmp_path / "data/train.parquet").to_pylist()
