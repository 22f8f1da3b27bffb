"""The embedded engine: a Hugging Face vision-language model with a KV cache, decoding in the trainer's own process.

Owns batching, the cache, and stopping. A prompt is prefilled once, images included, and its cache repeated for its
samples; rows that have ended leave the batch once they are a quarter of it. Must not know rewards, or where pixels
come from. On a device of its own a serving engine is faster; this one needs nothing but transformers.

Shape letters: P prompts, L tokens of the longest prompt (shorter ones are padded on the left), R samples of a chunk,
B of them still in the batch, T response tokens, V vocabulary, K banned ids, E end ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_cppo.rollout.ends import end_ids as checkpoint_ends
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.module_weights import load_every_weight
from megatron_cppo.rollout.sampling import drawn_tokens, greedy_tokens, sampling_logp, uniform_numbers
from megatron_cppo.types import Group, ImageKey, Prompt, Sample

_Item = TypeVar("_Item")
_COMPACT_BELOW = 0.75
"""The batch is compacted when fewer than this share of its rows are still being decoded."""


class _Answer(NamedTuple):
    """What ranks exchange of a sample: its prompt and index follow from the order."""

    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    text: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class _Sampling:
    """The arguments of one `generate` or `submit`."""

    samples_per_prompt: int
    temperature: float
    salt: int
    advance: Callable[[int], None]


@dataclass(slots=True)
class _Batch:
    """The rows that are being decoded together; row b is sample `sample_B[b]` of the chunk.

    `visible_B11T` is the attention mask over prompt and response, None where no prompt is padded: attention is
    faster without one.
    """

    cache: Any
    logits_BV: Tensor
    visible_B11T: Tensor | None
    next_position_B: Tensor
    uniform_BT: Tensor
    sample_B: Tensor
    ended_B: Tensor

    def keep(self, row_B: Tensor) -> None:
        """Drop all rows but these; the logits are left alone, being those of the step that is over."""
        self.cache.batch_select_indices(row_B)
        self.visible_B11T = None if self.visible_B11T is None else self.visible_B11T[row_B]
        self.next_position_B = self.next_position_B[row_B]
        self.uniform_BT = self.uniform_BT[row_B]
        self.sample_B = self.sample_B[row_B]
        self.ended_B = self.ended_B[row_B]


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """Prompts that the model has read: their cache, the logits of the first response token, their padding mask."""

    prompts: Sequence[Prompt]
    cache: Any
    logits_PV: Tensor
    mask_PL: Tensor


class TransformersEngine:
    """See `Engine` for what the methods promise.

    Answers depend on the batch only through the rounding of matrix products: the random numbers do not, the
    probabilities agree to about 1e-6 in fp32, and a draw differs where its number falls into such a gap.
    """

    def __init__(
        self,
        model_path: Path | str,
        *,
        pixels: Callable[[ImageKey], Tensor],
        banned_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        max_response_tokens: int,
        max_sequences: int,
        seed: int,
        group: dist.ProcessGroup | None,
        end_ids: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Load the checkpoint folder `model_path`; its weights are version 0.

        `pixels(key)` gives an image's processed patches [num_patches, channels * frames * patch * patch], fp32.
        `decode(ids)` turns a response, end token included, into `Sample.text`. At most `max_sequences` samples are
        decoded at once. The prompts are dealt out over `group`. Answers end at `end_ids`, and at those that
        generation_config.json names. `progress(n)` hears of n more answers while nobody waits for them (`submit`).
        Raises EngineError if the checkpoint names no end token, attends through sliding windows, or lacks one of
        `banned_ids`.
        """
        self._model = AutoModelForImageTextToText.from_pretrained(
            model_path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        )
        self._model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        text_config = self._model.config.get_text_config()
        if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
            raise EngineError(f"{model_path}: sliding-window attention is not supported; set use_sliding_window false")
        self._vocab_size: int = text_config.vocab_size
        if not all(0 <= token < self._vocab_size for token in banned_ids):
            raise EngineError(f"banned ids must be below the vocabulary size {self._vocab_size}, got {banned_ids}")
        self._banned_K = torch.tensor(list(banned_ids), dtype=torch.long, device=self._device)
        ends = sorted({*checkpoint_ends(model_path), *end_ids})
        self._end_E = torch.tensor(ends, device=self._device)
        self._pixels = pixels
        self._decode_text = decode
        self._max_response_tokens = max_response_tokens
        self._max_sequences = max_sequences
        self._seed = seed
        self._group = group
        self._progress = progress or _ignore
        self._version: int | None = 0
        self._awake = True
        self._uncollected: dict[int, list[Group]] = {}
        self._num_submitted = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        temperature: float,
        salt: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """One group of answers for each prompt, the same list on every rank; see `Engine.generate`."""
        return self._sample(prompts, _Sampling(samples_per_prompt, temperature, salt, advance or _ignore))

    def submit(self, prompts: Sequence[Prompt], *, samples_per_prompt: int, temperature: float, salt: int = 0) -> int:
        """Sample at once, under the weights as they are, and keep the groups for `collect`."""
        groups = self._sample(prompts, _Sampling(samples_per_prompt, temperature, salt, self._progress))
        self._num_submitted += 1
        self._uncollected[self._num_submitted] = groups
        return self._num_submitted

    def collect(self, ticket: int, *, advance: Callable[[int], None] | None = None) -> list[Group]:
        """The groups that `submit` sampled."""
        assert ticket in self._uncollected, f"ticket {ticket} is not one of {sorted(self._uncollected)}"
        groups = self._uncollected.pop(ticket)
        (advance or _ignore)(sum(len(group.samples) for group in self._own_block(groups)))
        return groups

    def _sample(self, prompts: Sequence[Prompt], sampling: _Sampling) -> list[Group]:
        if self._version is None:
            raise EngineError("the weights are incomplete since the last load failed; load all of them first")
        if not self._awake:
            raise EngineError("the engine is asleep; wake it before generating")
        if sampling.samples_per_prompt < 1 or sampling.temperature < 0:
            raise EngineError(
                f"need samples_per_prompt >= 1 and temperature >= 0, got {sampling.samples_per_prompt} and "
                f"{sampling.temperature}"
            )
        version = self._version
        answers = self._gather(self._answer(self._own_block(prompts), sampling))
        return [
            Group(
                prompt,
                tuple(
                    Sample(prompt, index, answer.token_ids, answer.logp, answer.text, answer.truncated, version)
                    for index, answer in enumerate(prompt_answers)
                ),
            )
            for prompt, prompt_answers in zip(prompts, answers, strict=True)
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Overwrite every weight in place; see `Engine.load_weights`. Tied models have no `lm_head.weight`."""
        self._version = None
        load_every_weight(self._model, weights)
        self._version = version

    def sleep(self) -> None:
        """Move the weights to the host; on a CPU they are there already."""
        self._awake = False
        if self._device.type == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Move the weights back to the device."""
        self._model.to(self._device)
        self._awake = True

    def close(self) -> None:
        """Nothing is to be let go."""

    def _own_block(self, every: Sequence[_Item]) -> Sequence[_Item]:
        """This rank's contiguous share of the prompts, or of their groups; shares differ by one at most."""
        if self._group is None:
            return every
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        return every[len(every) * rank // size : len(every) * (rank + 1) // size]

    def _gather(self, answers: list[list[_Answer]]) -> list[list[_Answer]]:
        """The answers of all ranks, in the order of the prompts (all-gather over the engine's group)."""
        if self._group is None:
            return answers
        blocks: list[list[list[_Answer]]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(blocks, answers, group=self._group)
        return [prompt_answers for block in blocks for prompt_answers in block]

    @torch.inference_mode()
    def _answer(self, prompts: Sequence[Prompt], sampling: _Sampling) -> list[list[_Answer]]:
        """Answers by prompt; prompts of similar length share a chunk, so that little of it is padding."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        num_prompts = max(1, self._max_sequences // sampling.samples_per_prompt)
        num_samples = min(sampling.samples_per_prompt, self._max_sequences)
        answers: list[list[_Answer]] = [[] for _ in prompts]
        for begin in range(0, len(prompts), num_prompts):
            chunk = by_length[begin : begin + num_prompts]
            prefilled = self._prefill([prompts[i] for i in chunk])
            for first in range(0, sampling.samples_per_prompt, num_samples):
                indices = range(first, min(first + num_samples, sampling.samples_per_prompt))
                decoded = self._decode(self._repeat(prefilled, indices, sampling), sampling)
                for place, i in enumerate(chunk):
                    answers[i] += decoded[place * len(indices) : (place + 1) * len(indices)]
        return answers

    def _prefill(self, prompts: Sequence[Prompt]) -> _Prefilled:
        """Read each prompt once, left-padded to the longest."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        ids_PL = torch.zeros(len(prompts), longest, dtype=torch.long)
        positions_3PL = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        mask_PL = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for p, prompt in enumerate(prompts):
            start = longest - len(prompt.token_ids)
            ids_PL[p, start:] = torch.tensor(prompt.token_ids)
            positions_3PL[:, p, start:] = torch.tensor(prompt.positions)
            mask_PL[p, start:] = True
        mask_PL = mask_PL.to(self._device)
        output = self._model(
            input_ids=ids_PL.to(self._device),
            position_ids=positions_3PL.to(self._device),
            attention_mask=None if mask_PL.all() else mask_PL,
            use_cache=True,
            logits_to_keep=1,
            **self._vision_inputs(prompts),
        )
        return _Prefilled(prompts, output.past_key_values, output.logits[:, -1], mask_PL)

    def _vision_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The stacked patches and grids of all images, in the order of their tokens; nothing where there are none."""
        keys = [key for prompt in prompts for key in prompt.images("original")]
        grids = [grid for prompt in prompts for grid in prompt.grids]
        if not keys:
            return {}
        patches = [self._pixels(key) for key in keys]
        for key, grid, patch in zip(keys, grids, patches, strict=True):
            assert len(patch) == grid.num_patches, f"{key}: {len(patch)} patches, its grid has {grid.num_patches}"
        sizes = [(grid.frames, grid.height, grid.width) for grid in grids]
        return {
            "pixel_values": torch.cat(patches).to(self._device),
            "image_grid_thw": torch.tensor(sizes, device=self._device),
        }

    def _repeat(self, prefilled: _Prefilled, indices: range, sampling: _Sampling) -> _Batch:
        """A batch of the samples `indices` of every prompt, its samples side by side."""
        times, device = len(indices), self._device
        # Repeating replaces the tensors of a cache; with several ranges of samples the original is needed again.
        cache = prefilled.cache if times == sampling.samples_per_prompt else copy.deepcopy(prefilled.cache)
        cache.batch_repeat_interleave(times)
        mask_BL = prefilled.mask_PL.repeat_interleave(times, dim=0)
        num_rows = len(mask_BL)
        visible_BT = torch.cat([mask_BL, mask_BL.new_ones(num_rows, self._max_response_tokens)], dim=1)
        uniform_BT = [
            uniform_numbers(self._max_response_tokens, self._seed, sampling.salt, p.split, p.row, p.epoch, index)
            for p in prefilled.prompts
            for index in indices
        ]
        next_position_P = torch.tensor([prompt.next_position for prompt in prefilled.prompts], device=device)
        return _Batch(
            cache=cache,
            logits_BV=prefilled.logits_PV.repeat_interleave(times, dim=0),
            visible_B11T=None if mask_BL.all() else visible_BT[:, None, None],
            next_position_B=next_position_P.repeat_interleave(times),
            uniform_BT=torch.from_numpy(np.stack(uniform_BT)).to(device),
            sample_B=torch.arange(num_rows, device=device),
            ended_B=torch.zeros(num_rows, dtype=torch.bool, device=device),
        )

    def _decode(self, batch: _Batch, sampling: _Sampling) -> list[_Answer]:
        """Decode a batch to its end, one answer for each of its samples."""
        temperature = sampling.temperature
        num_samples, limit = len(batch.sample_B), self._max_response_tokens
        token_RT = torch.zeros(num_samples, limit, dtype=torch.long, device=self._device)
        logp_RT = torch.zeros(num_samples, limit, device=self._device)
        length_R = torch.full((num_samples,), limit, device=self._device)
        truncated_R = torch.ones(num_samples, dtype=torch.bool, device=self._device)
        for step in range(limit):
            logits_BV = batch.logits_BV[:, : self._vocab_size]
            logp_BV = sampling_logp(logits_BV, temperature=temperature, banned_K=self._banned_K)
            token_B = drawn_tokens(logp_BV, batch.uniform_BT[:, step]) if temperature > 0 else greedy_tokens(logp_BV)
            # Rows that have ended go on until they are dropped; what they add lies beyond their length.
            token_RT[batch.sample_B, step] = token_B
            logp_RT[batch.sample_B, step] = logp_BV.gather(1, token_B[:, None]).squeeze(1)
            ends_B = torch.isin(token_B, self._end_E) & ~batch.ended_B
            length_R[batch.sample_B[ends_B]] = step + 1
            truncated_R[batch.sample_B[ends_B]] = False
            batch.ended_B |= ends_B
            sampling.advance(int(ends_B.sum()))
            row_B = (~batch.ended_B).nonzero().squeeze(1)
            if len(row_B) == 0 or step == limit - 1:
                sampling.advance(len(row_B))
                break
            if len(row_B) < _COMPACT_BELOW * len(token_B):
                batch.keep(row_B)
                token_B = token_B[row_B]
            self._read_token(batch, token_B, step)
        return self._answers(token_RT, logp_RT, length_R, truncated_R)

    def _read_token(self, batch: _Batch, token_B: Tensor, step: int) -> None:
        """Feed the token of `step` to the model: it grows the cache, and its logits are the next step's."""
        mask = batch.visible_B11T
        num_seen = batch.cache.get_seq_length() + 1
        output = self._model(
            input_ids=token_B[:, None],
            position_ids=(batch.next_position_B + step)[None, :, None].expand(3, -1, 1),
            attention_mask=None if mask is None else mask[..., :num_seen],
            past_key_values=batch.cache,
            use_cache=True,
        )
        batch.logits_BV = output.logits[:, -1]

    def _answers(self, token_RT: Tensor, logp_RT: Tensor, length_R: Tensor, truncated_R: Tensor) -> list[_Answer]:
        """The decoded rows as plain Python, each cut to its length."""
        answers: list[_Answer] = []
        columns = (token_RT.tolist(), logp_RT.tolist(), length_R.tolist(), truncated_R.tolist())
        for tokens, logp, length, truncated in zip(*columns, strict=True):
            ids = tuple(tokens[:length])
            answers.append(_Answer(ids, tuple(logp[:length]), self._decode_text(ids), truncated))
        return answers


def _ignore(_: int) -> None:
    """Progress that nobody watches."""
