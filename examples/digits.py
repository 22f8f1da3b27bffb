"""The demo's data and model: questions about two real handwritten digits, and a small real Qwen2.5-VL.

The pictures are made of scikit-learn's `load_digits` scans (1,797 handwritten digits, 8x8, from the UCI Optical
Recognition of Handwritten Digits set): two scans side by side, in a random ink on a random paper. An answer first
writes down what it reads off the picture and then computes, so the tokens that need the picture are known:

    <|im_start|>user\\n<image>What is the sum?<|im_end|>\\n<|im_start|>assistant\\n
    <think>7+5=12</think>\\boxed{12}<|im_end|>

Owns the task and the checkpoint folder; knows nothing of training. Everything is a function of the seed: the same
call writes the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SIDE = 56
"""Pixels along one side of a scan in the picture: two 28-pixel image tokens."""
NUM_TRAINING_SCANS = 1500
"""Scans before this index make warm and train rows, the other 297 the evaluation rows."""
INITIALIZER_RANGE = 0.06
"""Of all matrices. Widths are small: with Qwen's 0.02 the digits are noticed a hundred supervised steps later."""

# The 22 added tokens of Qwen2.5-VL in their order; the last eight are not "special" (they survive decoding).
SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)
PLAIN_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
# Qwen2's pre-tokenisation: every digit is a token of its own.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5-VL's frame without its default system message, which would be a third of these short prompts.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question: ways to ask it, how the thought begins, and the right answer."""

    wordings: tuple[str, ...]
    thought: str
    answer: Callable[[int, int], int]


KINDS: dict[str, Kind] = {
    "sum": Kind(
        ("Sum?", "What is the sum?", "Add the digits."),
        "{left}+{right}",
        lambda left, right: left + right,
    ),
    "difference": Kind(
        ("Difference?", "What is the difference?", "How far apart are the digits?"),
        "|{left}-{right}|",
        lambda left, right: abs(left - right),
    ),
    "larger": Kind(
        ("Larger one?", "Which digit is larger?", "What is the maximum?"),
        "max({left},{right})",
        max,
    ),
}

ROW_SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(
            {
                "split": pa.string(),
                "index": pa.int64(),
                "kind": pa.string(),
                "digits": pa.list_(pa.int64()),
                "scans": pa.list_(pa.int64()),
                "question": pa.string(),
                "answer": pa.string(),
                "response": pa.string(),
            }
        ),
    }
)


def target_response(kind: str, left: int, right: int) -> str:
    """The right answer in full, without the end token.

    >>> target_response("difference", 5, 7)
    '<think>|5-7|=2</think>\\\\boxed{2}'
    """
    answer = KINDS[kind].answer(left, right)
    thought = KINDS[kind].thought.format(left=left, right=right)
    return f"<think>{thought}={answer}</think>\\boxed{{{answer}}}"


def read_tokens(tokens: Sequence[str]) -> list[bool]:
    """Which tokens of a response are read off the picture: the first two digit tokens of its thought.

    `tokens` are the response's tokens as text, in order. The thought is what stands between the first `<think>` and
    the next `</think>`; it runs to the end when it is never closed, and without `<think>` nothing was read. A token
    is a digit token when it is one character, 0 to 9.

    >>> read_tokens(["<think", ">", "7", "+", "5", "=", "1", "2", "</", "think", ">"])
    [False, False, True, False, True, False, False, False, False, False, False]
    """
    text = "".join(tokens)
    begin = text.find("<think>")
    if begin < 0:
        return [False] * len(tokens)
    end = text.find("</think>", begin)
    end = len(text) if end < 0 else end
    flags: list[bool] = []
    position = 0
    for token in tokens:
        is_digit = len(token) == 1 and token in "0123456789"
        flags.append(is_digit and begin < position < end and sum(flags) < 2)
        position += len(token)
    return flags


def make_model(folder: Path | str, *, seed: int, tied: bool = True) -> None:
    """Write a randomly initialised Qwen2.5-VL of about one million parameters as a Hugging Face checkpoint folder.

    Weights carry the names of official checkpoints (`model.layers...`, `visual.blocks...`); the tokenizer is trained
    on the demo's sentences, and the embedding is padded beyond it, so that some ids stand for no token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "preprocessor_config.json", _preprocessor_config())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    end_of_turn, end_of_text = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_model_config(tokenizer, tied=tied)).float()
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, pad_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], do_sample=True
    )
    model.save_pretrained(folder)


def make_data(
    folder: Path | str, *, seed: int, num_train: int = 2048, num_warm: int = 4096, num_evaluation: int = 512
) -> dict[str, Path]:
    """Write warm.parquet, train.parquet and evaluation.parquet, and return their paths by split.

    Columns are verl's. Evaluation pictures show scans that no other split shows. `extra_info.answer` is the right
    answer in full; warm rows, which are for supervised training, hold it as `extra_info.response` too (else empty).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scans = load_digits()
    training = range(NUM_TRAINING_SCANS)
    held_out = range(NUM_TRAINING_SCANS, len(scans.target))
    plan = {"warm": (num_warm, training), "train": (num_train, training), "evaluation": (num_evaluation, held_out)}
    paths: dict[str, Path] = {}
    for stream, (split, (num_rows, pool)) in enumerate(plan.items()):
        rows = list(_rows(split, num_rows, pool, scans, np.random.default_rng([seed, stream])))
        paths[split] = folder / f"{split}.parquet"
        # Small groups: readers that take rows at random decode a whole group each time.
        pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), paths[split], row_group_size=128)
    return paths


def _rows(split: str, num_rows: int, pool: range, scans: Any, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    names = list(KINDS)
    for index in range(num_rows):
        pair = [int(scan) for scan in rng.integers(pool.start, pool.stop, size=2)]
        left, right = (int(scans.target[scan]) for scan in pair)
        name = names[int(rng.integers(len(names)))]
        kind = KINDS[name]
        question = kind.wordings[int(rng.integers(len(kind.wordings)))]
        response = target_response(name, left, right)
        yield {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"<image>{question}"}],
            "images": [{"bytes": _png(_picture(scans.images[pair], rng)), "path": None}],
            "ability": "perception",
            "reward_model": {"style": "rule", "ground_truth": str(kind.answer(left, right))},
            "extra_info": {
                "split": split,
                "index": index,
                "kind": name,
                "digits": [left, right],
                "scans": pair,
                "question": question,
                "answer": response,
                "response": response if split == "warm" else "",
            },
        }


def _picture(scans: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Two 8x8 scans of 0 (paper) to 16 (ink), side by side, in a random dark ink on a random light paper."""
    grey = Image.fromarray((np.concatenate(scans, axis=1) * 255 / 16).astype(np.uint8))
    ink_share = np.asarray(grey.resize((2 * SIDE, SIDE), Image.Resampling.BICUBIC))[..., None] / 255
    paper = rng.uniform(190, 255) - rng.uniform(0, 30, size=3)
    ink = rng.uniform(0, 70) + rng.uniform(0, 30, size=3)
    return Image.fromarray((paper + (ink - paper) * ink_share).round().astype(np.uint8))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _sentences() -> Iterator[str]:
    """Everything that the demo ever writes: the frame of a chat, all questions, all answers."""
    yield from ("system\n", "user\n", "assistant\n")
    for name, kind in KINDS.items():
        yield from kind.wordings
        for pair in range(100):
            yield target_response(name, pair // 10, pair % 10)


def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return tokenizer


def _model_config(tokenizer: Tokenizer, *, tied: bool) -> Qwen2_5_VLConfig:
    ids = tokenizer.get_vocab()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": (tokenizer.get_vocab_size() // 64 + 1) * 64,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "initializer_range": INITIALIZER_RANGE,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 1024,
        "split_special_tokens": False,
    }


def _preprocessor_config() -> dict[str, Any]:
    """Qwen2.5-VL's, with its normalisation; the picture's own size lies within the limits, so nothing is rescaled."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": SIDE * SIDE,
        "max_pixels": 16 * SIDE * SIDE,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
