"""What all ranks do, and whether it went well on all: a disk that refuses one must not leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(every) if text]
    if failed:
        raise error(failed)
    return [result for result, _ in every]
