"""What all ranks do, and whether it went well on all: a disk that refuses one must not leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_cppo.config import UserError
from megatron_cppo.storage import durable

T = TypeVar("T")


def together(work: Callable[[], T], folder: Path, error: Callable[[list[str]], UserError]) -> list[T]:
    """Do this rank's part; returns what it gave on every rank. Called by all ranks, with picklable results.

    Where an OSError stopped one of them, all raise the same `error` of the lines "rank 1: file: reason".
    """
    mine: tuple[T | None, str]
    try:
        mine = (work(), "")
    except OSError as refused:
        mine = (None, durable.describe(refused, folder))
    every = everywhere(mine)
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(every) if text]
    if failed:
        raise error(failed)
    return [result for result, _ in every]


def on_any_rank(mine: bool, *, device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether `mine` is true on some rank of `group`: one number, reduced. Called by all of them."""
    some = torch.tensor(int(mine), device=device)
    dist.all_reduce(some, op=dist.ReduceOp.MAX, group=group)
    return bool(some)


def everywhere(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank of `group` (None: of all) has as `mine`. Called by all of them."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return every
