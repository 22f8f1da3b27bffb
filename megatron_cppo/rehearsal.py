"""The fullest rows that a config allows, run through every stage of it on fake tensors: what `--measure` prints.

Owns the rows and which rank stands for which stage; what is counted is `policy/footprint.py`'s, what it means
`sizing.py`'s. Needs the checkpoint's config.json and no other file.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_cppo import families
from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config
from megatron_cppo.data.packing import Member, pack
from megatron_cppo.plan import Plan
from megatron_cppo.sizing import StageBytes, size
from megatron_cppo.sizing_table import describe_sizes
from megatron_cppo.types import Batch, ImageGrid, ImageKey, MiniBatch, Prompt, Sample

TEXT_TOKENS = 64
"""Of a prompt that is otherwise pictures: what its question takes at least."""


def rehearse(config: Config, plan: Plan, *, gpu_gib: float) -> tuple[str, bool]:
    """The table of all stages, and whether all fit into GPUs of `gpu_gib`."""
    sizes = size(config, plan, measure_stages(config, plan), gpu_gib=gpu_gib)
    return describe_sizes(config, plan, sizes, gpu_gib=gpu_gib), all(one.spare(gpu_gib) >= 0 for one in sizes)


def measure_stages(config: Config, plan: Plan, batches: tuple[Batch, ...] = ()) -> tuple[StageBytes, ...]:
    """What a rank of each stage holds, with the first row of each of `batches`, or of the fullest rows there are.

    Sets up and takes down a process group per stage; for a process that has none.
    """
    from megatron_cppo.policy import fake, groups
    from megatron_cppo.policy.footprint import measure

    stages, found = config.policy.pipeline_parallel, []
    known: dict[object, StageBytes] = {}
    fullest, pixels = full_rows(config, plan), pixels_of(config, plan)
    for stage in range(stages):
        # Stages between the first and the last hold the same where they have as many layers.
        like = (stage == 0, stage == stages - 1, plan.layers_per_chunk[stage::stages])
        if like not in known:
            with warnings.catch_warnings(), fake.world(stage * plan.num_ranks // stages, plan.num_ranks):
                warnings.simplefilter("ignore")
                mine = groups.make(config.policy, seed=config.trainer.seed)
                share, kernels = config.perception.top_fraction, config.policy.attention == "default"
                with fake.tensors(gpu=config.policy.device == "cuda", kernels=kernels, top_fraction=share):
                    known[like] = measure(config, plan, batches or _where(fullest, stage, stages), mine, pixels)
        found.append(known[like])
    return tuple(found)


def _where(batches: tuple[Batch, ...], stage: int, stages: int) -> tuple[Batch, ...]:
    """Those that can be a stage's fullest: pictures matter on the first, answers on the last."""
    if stages == 1:
        return batches
    return batches[:1] if stage == 0 else batches[1:]


def full_rows(config: Config, plan: Plan) -> tuple[Batch, ...]:
    """Two updates of one full row each: with as many pictures as it can hold, and with the longest answers."""
    prompt = full_prompt(config, plan)
    room = _segment(plan) - len(prompt.token_ids) + 1
    lengths = (1, min(room, config.rollout.max_response_tokens))
    return tuple(
        _batch(config, plan, (_sample(prompt, row, tokens) for row in itertools.count())) for tokens in lengths
    )


def _segment(plan: Plan) -> int:
    """Tokens of the longest sample that a row holds under all views; longer ones are dropped, or the plan refuses."""
    packing = plan.packing
    return packing.max_tokens // plan.views_in_one_row // packing.segment_multiple * packing.segment_multiple


def full_prompt(config: Config, plan: Plan) -> Prompt:
    """A prompt of the most tokens, of which pictures take all that a short question leaves."""
    shape, tokens = plan.shape, min(config.data.max_prompt_tokens, _segment(plan))
    image = shape.image_token_id
    side = shape.vision.patch_size * shape.vision.merge_size
    most = max(1, config.model.max_pixels // side**2)
    room = max(1, tokens - min(TEXT_TOKENS, tokens // 4))
    grid = _grid(min(most, room), shape)
    count = max(1, room // grid.num_tokens)
    slots = tuple(range(1, 1 + count * grid.num_tokens))
    text = 1 if image != 1 else 2
    ids = [text, *[image] * len(slots)]
    ids += [text] * (tokens - len(ids))
    positions, following = families.part(shape.family, "positions").rope_positions(
        ids, [grid] * count, image_token_id=image
    )
    time, height, width = (tuple(axis.tolist()) for axis in positions)
    return Prompt(
        "train", 0, 0, "", "", "", tuple(ids), (time, height, width), following, (grid,) * count, image_slots=slots
    )


def _grid(tokens: int, shape: ModelShape) -> ImageGrid:
    """Of a nearly square picture with at most so many tokens."""
    height = math.isqrt(tokens)
    merge = shape.vision.merge_size
    return ImageGrid(frames=1, height=height * merge, width=tokens // height * merge, merge=merge)


def _sample(prompt: Prompt, row: int, tokens: int) -> Sample:
    """A gated answer to a prompt of its own."""
    return Sample(replace(prompt, row=row), 0, (0,) * tokens, (0.0,) * tokens, "", False, 0, advantage=1.0)


def _batch(config: Config, plan: Plan, samples: Iterable[Sample]) -> Batch:
    """As many of `samples` as a row holds, under all of their views, and text in what is left."""
    packing, views_for = plan.packing, OBJECTIVES[config.algorithm.objective].views_for
    constant = config.perception.stop_gradient_views
    members, left = [], packing.max_tokens
    for number, sample in enumerate(samples):
        original, *others = views_for(sample)
        views = (original,) if constant else (original, *others)
        cost = len(views) * packing.segment_tokens(len(sample.prompt.token_ids) + len(sample.token_ids) - 1)
        if cost > left:
            break
        members.append(Member(number, sample, views, tuple(others) if constant else ()))
        left -= cost
    left -= left % packing.segment_multiple
    if left:
        members.append(Member(len(members), _sample(_text(left), 0, 1), ("original",)))
    chosen = tuple(member.sample for member in members)
    row = pack(members, packing)
    scores = tuple(torch.zeros(len(sample.token_ids)) for sample in chosen)
    mini = MiniBatch(((row,),), sum(map(len, scores)), len(chosen), max(1, sum(s.gated for s in chosen)))
    return Batch(
        samples=chosen,
        scoring=None,
        updates=(mini,),
        old_logp=scores if plan.scores_old_logp else None,
        reference_logp=scores if plan.uses_reference else None,
    )


def _text(tokens: int) -> Prompt:
    places = tuple(range(tokens))
    return Prompt("train", 0, 0, "", "", "", (0,) * tokens, (places, places, places), tokens, (), ())


def pixels_of(config: Config, plan: Plan) -> Callable[[ImageKey], Tensor]:
    """Patches of the pictures of `full_rows`."""
    vision, grid = plan.shape.vision, full_prompt(config, plan).grids[0]

    def pixels(_: ImageKey) -> Tensor:
        return torch.empty(grid.num_patches, 3 * vision.temporal_patch_size * vision.patch_size**2)

    return pixels
