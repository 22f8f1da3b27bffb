"""A real Qwen2.5-VL of a few thousand parameters as a checkpoint folder, prompts for it, and what it should answer.

Weights are random and large enough that its distributions are far from uniform. Knows nothing of what is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL

from megatron_cppo.types import ImageGrid, ImageKey, Prompt

VOCAB_SIZE = 96
IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93
VISION_IDS = (IMAGE, VIDEO, VISION_START, VISION_END)
END_IDS = (0, 1)
PATCH_VALUES = 3 * 2 * 14 * 14


def make_tiny_qwen(folder: Path, *, seed: int = 0, tied: bool = True, end_ids: Sequence[int] = END_IDS) -> Path:
    """Write the checkpoint and return its folder."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": END_IDS[0],
            "pad_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QwenVL(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.generation_config = GenerationConfig(eos_token_id=list(end_ids) or None, pad_token_id=END_IDS[0])
    model.save_pretrained(folder)
    return folder


def pixels(key: ImageKey) -> Tensor:
    """Random patches that depend on the key alone, as many as the grid of that image has."""
    generator = torch.Generator().manual_seed(1000 * key.row + key.index)
    return torch.randn(GRIDS[(key.row + key.index) % 2].num_patches, PATCH_VALUES, generator=generator)


GRIDS = (ImageGrid(frames=1, height=4, width=8, merge=2), ImageGrid(frames=1, height=6, width=4, merge=2))


@dataclass(frozen=True, slots=True)
class TinyQwen:
    """The plain Hugging Face module, which answers what an engine should have said."""

    model: Any

    @staticmethod
    def load(folder: Path) -> TinyQwen:
        return TinyQwen(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval())

    def prompt(self, row: int, *, num_text_tokens: int, num_images: int = 0) -> Prompt:
        """A prompt of random text with images in it; positions are those that the module computes itself."""
        generator = torch.Generator().manual_seed(row)
        first, *rest = torch.randint(2, VISION_IDS[0], (num_text_tokens,), generator=generator).tolist()
        grids = tuple(GRIDS[(row + index) % 2] for index in range(num_images))
        images = [token for grid in grids for token in (VISION_START, *[IMAGE] * grid.num_tokens, VISION_END)]
        ids = (first, *images, *rest)
        slots = tuple(place for place, token in enumerate(ids) if token == IMAGE)
        prompt = Prompt("train", row, 0, "tiny", "", "", ids, ((), (), ()), 0, grids, slots)
        positions, delta = self.model.model.get_rope_index(**self._text_inputs(prompt, ()))
        time, height, width = (tuple(values) for values in positions[:, 0].tolist())
        return replace(prompt, positions=(time, height, width), next_position=len(ids) + int(delta))

    @torch.no_grad()
    def logits(self, prompt: Prompt, response: Sequence[int]) -> Tensor:
        """[T, V] logits of each response token: one forward of the whole text, no cache, no padding."""
        inputs = self._text_inputs(prompt, response) | self._images(prompt)
        return self.model(**inputs, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]

    @torch.no_grad()
    def greedy(self, prompt: Prompt, *, max_new_tokens: int, banned_ids: Sequence[int]) -> list[int]:
        """What the module's own `generate` answers, with the end token, without padding."""
        inputs = self._text_inputs(prompt, ()) | self._images(prompt)
        answer = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, suppress_tokens=list(banned_ids) or None
        )
        return answer[0, len(prompt.token_ids) :].tolist()

    def _text_inputs(self, prompt: Prompt, response: Sequence[int]) -> dict[str, Tensor]:
        ids = torch.tensor([[*prompt.token_ids, *response]])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
        if prompt.grids:
            inputs["image_grid_thw"] = torch.tensor([(grid.frames, grid.height, grid.width) for grid in prompt.grids])
        return inputs

    @staticmethod
    def _images(prompt: Prompt) -> dict[str, Tensor]:
        keys = prompt.images("original")
        return {"pixel_values": torch.cat([pixels(key) for key in keys])} if keys else {}
