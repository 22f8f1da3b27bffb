"""The vocabulary of a checkpoint folder, and folders that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cppo.data.tokenizer import CheckpointError, Vocabulary, banned_ids, vocabulary
from tests.unit.tiny_checkpoint import CHAT_TEMPLATE, SPECIAL_TOKENS, write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_vocabulary(checkpoint: str) -> None:
    words = vocabulary(checkpoint)
    assert vocabulary(checkpoint) is words
    first = words.banned_ids[0] - SPECIAL_TOKENS.index("<|vision_start|>")
    assert banned_ids(checkpoint) == tuple(range(first + 3, first + 8)) == words.banned_ids
    assert words.banned_tokens == SPECIAL_TOKENS[3:]
    assert words.eos_id == first + 2
    assert words.eos_ids == (first, first + 2)
    (ids,) = words.encode(["the sum<|im_end|>"])
    assert words.decode(ids) == "the sum"
    assert "".join(words.decode_token(i) for i in ids) == "the sum<|im_end|>"
    assert words.encode([]) == []


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Vocabulary(str(tmp_path / "absent"))
    plain = write_tiny_checkpoint(tmp_path / "plain", image_tokens=False)
    with pytest.raises(CheckpointError, match=r"image_token_id of config.json is \d+, .* <\|image_pad\|> is None"):
        Vocabulary(plain)
    with pytest.raises(CheckpointError, match="no chat template"):
        Vocabulary(write_tiny_checkpoint(tmp_path / "base", chat_template=None))
    old = Path(write_tiny_checkpoint(tmp_path / "old", chat_template=None))
    (old / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert Vocabulary(str(old)).render([{"role": "user", "content": []}]).endswith("<|im_start|>assistant\n")
    (old / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Vocabulary(str(old))
    broken = Path(write_tiny_checkpoint(tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        Vocabulary(str(broken))
