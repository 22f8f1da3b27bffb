"""A checkpoint's vocabulary: chat template, token ids with a meaning, and ids that sampling may not produce.

Owns loading the tokenizer, once per folder. Must not know rows, pixels, models or torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_cppo.config import UserError
from megatron_cppo.pretrained import IMAGE_TOKENS

VISION_PAD = "<|vision_pad|>"


class CheckpointError(UserError):
    """A checkpoint folder that cannot be used; the text says what, what was got, and how to mend it."""


class TemplateRefusal(ValueError):
    """Messages that a chat template raises an error for."""


class Vocabulary:
    """The tokenizer and chat template of one checkpoint folder.

    Raises CheckpointError when the folder lacks a tokenizer, a chat template or the image tokens.
    """

    image_token_id: int
    """Stands where an image's features go, once per image token."""
    video_token_id: int
    eos_id: int
    """Ends an assistant's turn; closes the target of a supervised row."""
    eos_ids: tuple[int, ...]
    """Any of these ends a response: the tokenizer's, and those of generation_config.json."""
    banned_ids: tuple[int, ...]
    """Image and video pads and vision markers, sorted: sampling may not produce them."""
    banned_tokens: tuple[str, ...]
    """The same as text, in the same order: a row that spells one out would fake an image."""

    def __init__(self, model_path: str) -> None:
        self._folder = Path(model_path)
        config = _read_json(self._folder / "config.json")
        if config is None:
            raise CheckpointError(
                f"model.path: no config.json in '{model_path}'; give a Hugging Face checkpoint folder on this machine"
            )
        self._tokenizer = _load_tokenizer(self._folder)
        self._template = self._chat_template()
        ids = {name: self._named_id(config, name, token) for name, token in IMAGE_TOKENS.items()}
        self.image_token_id = ids["image_token_id"]
        self.video_token_id = ids["video_token_id"]
        tokens = self._tokenizer.get_vocab()
        banned = sorted((tokens[token], token) for token in (*IMAGE_TOKENS.values(), VISION_PAD) if token in tokens)
        self.banned_ids = tuple(token_id for token_id, _ in banned)
        self.banned_tokens = tuple(token for _, token in banned)
        self.eos_id, self.eos_ids = self._ends()

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The chat template's text of messages with list content, one image placeholder per image part.

        Raises TemplateRefusal when the template does not take these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"model.path: the chat template of '{self._folder}' cannot be parsed, line {error.lineno}: {error}; "
                "copy the checkpoint's chat template again"
            ) from error
        except TemplateError as error:
            raise TemplateRefusal(str(error)) from error
        assert isinstance(text, str), f"a chat template renders to text, got {type(text)}"
        return text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str), f"one sequence decodes to one text, got {type(text)}"
        return text

    def decode_token(self, token_id: int) -> str:
        """The text of one token, special tokens included; bytes that are no whole character show as U+FFFD."""
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        assert isinstance(text, str), f"one sequence decodes to one text, got {type(text)}"
        return text

    def _chat_template(self) -> str:
        """Preference as in transformers' processors: chat_template.jinja, chat_template.json, the tokenizer's own."""
        processor_template = _read_json(self._folder / "chat_template.json")
        if processor_template is not None and not (self._folder / "chat_template.jinja").exists():
            return str(processor_template["chat_template"])
        template = self._tokenizer.chat_template
        if not isinstance(template, str):
            raise CheckpointError(
                f"model.path: '{self._folder}' has no chat template; an instruction-tuned checkpoint has "
                "chat_template.jinja, chat_template.json, or the key chat_template in tokenizer_config.json"
            )
        return template

    def _named_id(self, config: dict[str, Any], name: str, token: str) -> int:
        in_config, in_tokenizer = config.get(name), self._tokenizer.get_vocab().get(token)
        if in_config is None or in_config != in_tokenizer:
            raise CheckpointError(
                f"model.path: '{self._folder}' is no Qwen vision-language checkpoint: {name} of config.json is "
                f"{in_config}, and the tokenizer's id of {token} is {in_tokenizer}; the two must be equal: take "
                "tokenizer files and config.json from the same checkpoint"
            )
        return int(in_config)

    def _ends(self) -> tuple[int, tuple[int, ...]]:
        eos_id = self._tokenizer.eos_token_id
        if not isinstance(eos_id, int):
            raise CheckpointError(
                f"model.path: the tokenizer of '{self._folder}' has eos_token_id {eos_id}; set eos_token in "
                "tokenizer_config.json"
            )
        generation = _read_json(self._folder / "generation_config.json") or {}
        more = generation.get("eos_token_id")
        more = more if isinstance(more, list) else [] if more is None else [more]
        return eos_id, tuple(sorted({eos_id, *more}))


@lru_cache(maxsize=4)
def vocabulary(model_path: str) -> Vocabulary:
    """The vocabulary of a checkpoint folder, loaded once per process; raises CheckpointError."""
    return Vocabulary(model_path)


def banned_ids(model_path: str) -> tuple[int, ...]:
    """Ids that sampling may not produce, sorted: one list for the engine and for the policy's statistics."""
    return vocabulary(model_path).banned_ids


class _PlainExceptionOfTokenizers:
    """`tokenizers` raises Exception itself, no subclass, for a file that it cannot use; make it a ValueError."""

    def __enter__(self) -> None:
        """Nothing is needed."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is Exception:
            raise ValueError(str(error)) from error


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        with _PlainExceptionOfTokenizers():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.path: no tokenizer can be loaded from '{folder}' ({error}); copy the checkpoint's tokenizer files"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), f"AutoTokenizer gave {type(tokenizer)}"
    return tokenizer


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file, or None where there is no file; CheckpointError when it is no JSON object."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"model.path: {path} is not JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"model.path: {path} must hold a JSON object, got {type(value).__name__}")
    return value
