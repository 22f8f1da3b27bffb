"""Prompts whose images do not decode: found by all ranks together before they are needed, and done without.

A header is read when the rows are, and tells nothing of the data behind it. Nothing here is remembered for a
checkpoint: what replaces a prompt follows from the files alone, so a resumed run replaces it by the same one.
Must not know rollouts, rewards or Megatron.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.data.rows import DataError
from megatron_cppo.types import Prompt

DAMAGED = "image: damaged"
_LOG = logging.getLogger("megatron_cppo")


def sound_prompts(
    source: PromptSource, start: int, count: int, *, group: dist.ProcessGroup | None
) -> tuple[list[Prompt], int]:
    """Prompts [start, start + count) of the stream, and how many of them were replaced. Called by all ranks of `group`.

    A prompt with a damaged image gives its place to the next sound one behind the range, which will be seen again when
    its own turn comes. Communicates over `group`. Raises DataError, on all ranks, when one epoch further none is left.
    """
    prompts = source.take(start, count)
    _examine(source, prompts, group)
    places = [place for place, prompt in enumerate(prompts) if prompt.row in source.damaged]
    num_replaced, position, last = len(places), start + count, start + count + len(source)
    width = num_replaced
    while places:
        candidates = source.take(position, min(width, last - position))
        if not candidates:
            raise DataError(
                f"{len(places)} of the prompts {start} to {start + count - 1} cannot be replaced: "
                f"{len(source.damaged)} of {len(source)} rows have an image that cannot be decoded, first "
                f"{next(iter(source.damaged.values()))}"
            )
        position, width = position + len(candidates), 2 * width
        _examine(source, candidates, group)
        sound = [prompt for prompt in candidates if prompt.row not in source.damaged]
        for place, prompt in zip(places, sound, strict=False):
            prompts[place] = prompt
        places = places[len(sound) :]
    return prompts, num_replaced


def leave_out_damaged(
    source: PromptSource, *, group: dist.ProcessGroup | None, advance: Callable[[int], None] | None = None
) -> None:
    """Decode every image of `source` once, and drop the rows of the damaged ones for good, counted in `dropped`.

    For rows whose every prompt counts, as those of an evaluation. Called by all ranks of `group`, and communicates
    over it; `advance(n)` hears of n more prompts of this rank's share. Raises DataError when no row is left.
    """
    _examine(source, source.take(0, len(source)), group, advance)
    if source.damaged:
        source.leave_out(source.damaged, DAMAGED)


def _examine(
    source: PromptSource,
    prompts: Sequence[Prompt],
    group: dist.ProcessGroup | None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Decode the images of `prompts`, each on one rank; afterwards all ranks know the same rows as damaged."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    # The embedded engine's own share: what is decoded here is what this rank is about to show it.
    mine = prompts[len(prompts) * rank // size : len(prompts) * (rank + 1) // size]
    found: dict[int, str] = {}
    failure: DataError | None = None
    try:
        for prompt in mine:
            damage = "" if prompt.row in source.damaged else source.damage(prompt)
            if damage:
                found[prompt.row] = damage
            if advance is not None:
                advance(1)
    except DataError as error:  # the others must not wait for this rank
        failure = error
    every: list[Any] = [(found, failure)]
    if group is not None:
        every = [None] * size
        dist.all_gather_object(every, (found, failure), group=group)
    for part, failed in every:
        if failed is not None:
            raise failed
        for row, reason in part.items():
            _LOG.warning("a row cannot be used: %s", reason)
            source.damaged[row] = reason
