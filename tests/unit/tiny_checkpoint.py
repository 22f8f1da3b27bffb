"""A checkpoint folder without weights: a small byte-level tokenizer, chat template, image processor and configs.

The layout, the special tokens and the template's text are those of Qwen2.5-VL; the vocabulary is a few hundred ids.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
CORPUS = (
    "You are a helpful assistant. system user assistant",
    "What is the sum of the two digits in the picture? Think first, then answer in the box.",
    "<think>the first digit is 3, the second is 4</think> \\boxed{7}",
)


def write_tiny_checkpoint(folder: Path, *, image_tokens: bool = True, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """Write the folder and return its path; `image_tokens=False` leaves them out of the tokenizer only."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = SPECIAL_TOKENS if image_tokens else SPECIAL_TOKENS[:3]
    tokenizer = _tokenizer(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "clean_up_tokenization_spaces": False}))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 1280,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tiny_config(tokenizer.get_vocab_size()).save_pretrained(folder)
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(folder)
    return str(folder)


def tiny_config(vocab_size: int) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of a few thousand parameters whose special tokens are the vocabulary's last."""
    first = vocab_size - len(SPECIAL_TOKENS)
    ids = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _tokenizer(special_tokens: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer
