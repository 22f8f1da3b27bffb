"""The launcher itself: results come back in order, and no failure of a rank goes unnoticed or unnamed."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import RankFailedError, run_distributed


def sum_over_ranks(rank: int, world_size: int, values: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    total = values * (rank + 1)
    dist.all_reduce(total)
    assert dist.get_world_size() == world_size
    return rank, total, torch.get_num_threads()


def fail_on_last_rank(rank: int, world_size: int, how: str) -> None:
    if rank == world_size - 1:
        if how == "raise":
            raise RuntimeError("the last rank's own words")
        if how == "die":
            os._exit(7)
        time.sleep(3600)  # hang
    dist.barrier()


def test_results_come_back_in_rank_order() -> None:
    results = run_distributed(sum_over_ranks, 2, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _, _ in results] == [0, 1]
    assert all(torch.equal(total, torch.tensor([3.0, 6.0])) for _, total, _ in results)
    assert all(threads == 1 for _, _, threads in results)


@pytest.mark.parametrize(
    ("how", "timeout_seconds", "message"),
    [
        ("raise", 60, "rank 1 raised(.|\n)*the last rank's own words"),
        ("die", 60, "rank 1 died with exit code 7"),
        ("hang", 10, "did not finish within 10 s(.|\n)*rank 1 hangs at(.|\n)*fail_on_last_rank"),
    ],
)
def test_a_failing_rank_fails_the_test(how: str, timeout_seconds: float, message: str) -> None:
    with pytest.raises(RankFailedError, match=message):
        run_distributed(fail_on_last_rank, 2, how, timeout_seconds=timeout_seconds)
