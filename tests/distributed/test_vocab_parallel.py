"""Vocab-parallel statistics on real ranks: values, gradients and collectives against a dense float64 computation.

Each world size is spawned once and runs all the checks. Shapes: N rows, V columns of a shard, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.algo.vocab_parallel import (
    kl_divergence,
    linear_divergence,
    linear_statistics,
    linear_view_statistics,
    token_statistics,
)
from tests.distributed.launch import run_distributed

NUM_ROWS, HIDDEN_SIZE = 7, 6
TEMPERATURE = 0.6
COLLECTIVES = ("all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce", "scatter", "send")


class Case:
    """The same seeded problem on every rank: whole logits and head, this rank's padded shard of them, and targets.

    With `empty_shard` the last shard is nothing but padding. Ids are banned on the first and on the last real shard.
    """

    def __init__(self, rank: int, world_size: int, *, empty_shard: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(world_size)
        self.width = 16
        self.one_gather = ["all_gather"] if world_size > 1 else []
        real_shards = world_size - 1 if empty_shard else world_size
        self.vocab_size = real_shards * self.width - 5
        self.banned_ids = (2, 5, self.vocab_size - 1)
        self.columns = slice(rank * self.width, (rank + 1) * self.width)
        self.padding = world_size * self.width - self.vocab_size
        hidden_p = torch.randn(NUM_ROWS, HIDDEN_SIZE)
        self.hidden_p, self.hidden_q = hidden_p.to(dtype), (hidden_p + 0.2 * torch.randn_like(hidden_p)).to(dtype)
        self.weight = torch.randn(self.vocab_size, HIDDEN_SIZE).to(dtype)
        self.logits_p = (3 * torch.randn(NUM_ROWS, self.vocab_size) + 200).to(dtype)
        self.logits_q = (self.logits_p + torch.randn_like(self.logits_p)).to(dtype)
        self.targets = torch.tensor([i for i in range(self.vocab_size) if i not in self.banned_ids])
        self.targets = self.targets[torch.linspace(0, len(self.targets) - 1, NUM_ROWS).long()]
        self.options: dict[str, Any] = {
            "group": dist.group.WORLD,
            "vocab_size": self.vocab_size,
            "temperature": TEMPERATURE,
            "banned_ids": self.banned_ids,
        }

    def shard_of_logits(self, logits: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(logits, (0, self.padding), value=torch.nan)
        padded[:, list(self.banned_ids)] = torch.nan
        return padded[:, self.columns].clone().requires_grad_()

    def shard_of_weight(self) -> Tensor:
        padded = torch.nn.functional.pad(self.weight, (0, 0, 0, self.padding), value=torch.nan)
        return padded[self.columns].clone().requires_grad_()

    def dense_log_softmax(self, logits: Tensor) -> Tensor:
        bias = torch.zeros(self.vocab_size, dtype=torch.float64)
        bias[list(self.banned_ids)] = -1e9
        return (logits / TEMPERATURE + bias).log_softmax(-1)

    def dense(self, logits_p: Tensor, logits_q: Tensor) -> list[Tensor]:
        logp, logq = self.dense_log_softmax(logits_p), self.dense_log_softmax(logits_q)
        target_logp = logp.gather(1, self.targets[:, None]).squeeze(1)
        return [target_logp, -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - logq)).sum(-1)]

    def assert_shard(self, shard_grad: Tensor | None, dense_grad: Tensor | None, dim: int, tolerance: float) -> None:
        assert shard_grad is not None
        assert dense_grad is not None
        pad = [0] * (2 * dense_grad.ndim)
        pad[2 * (dense_grad.ndim - 1 - dim) + 1] = self.padding
        expected = torch.nn.functional.pad(dense_grad, pad)
        expected = expected[self.columns] if dim == 0 else expected[:, self.columns]
        assert_within(shard_grad, expected, tolerance)
        assert (shard_grad[expected == 0] == 0).all(), "a padded or banned column has a gradient"


def assert_within(given: Tensor, expected: Tensor, tolerance: float) -> None:
    """One rounding to the dtype of `given`, on top of the arithmetic's own tolerance."""
    rounding = 0.5 * torch.finfo(given.dtype).eps if given.dtype == torch.bfloat16 else 0.0
    error = (given.double() - expected).abs()
    assert (error <= tolerance + max(tolerance, rounding) * expected.abs()).all(), f"{error.max()} > {tolerance}"


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.float64, copy=True).requires_grad_() for x in tensors]


def weighted_sum(outputs: list[Tensor]) -> Tensor:
    """A loss in which every row of every output has its own weight; the same on all ranks."""
    weights = torch.linspace(-1, 2, len(outputs) * NUM_ROWS, dtype=torch.float64).view(len(outputs), NUM_ROWS)
    return torch.stack([(y.double() * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()


def count(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The function's result, and the names of the collectives that it called."""
    called: list[str] = []

    def noting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return collective(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(COLLECTIVES):
                patch.setattr(dist, name, noting(name, getattr(dist, name)))
        result = function()
    return result, called


def check_reference(case: Case, tolerance: float) -> list[Tensor]:
    p, q = case.shard_of_logits(case.logits_p), case.shard_of_logits(case.logits_q)
    dense_p, dense_q = doubles(case.logits_p, case.logits_q)
    (logp, entropy), collectives = count(lambda: token_statistics(p, case.targets, **case.options))
    assert collectives == case.one_gather
    kl, collectives = count(lambda: kl_divergence(p, q, **case.options))
    assert collectives == case.one_gather
    given, expected = [logp, entropy, kl], case.dense(dense_p, dense_q)
    for value, reference in zip(given, expected, strict=True):
        assert_within(value, reference, tolerance)
    assert count(weighted_sum(given).backward)[1] == []
    weighted_sum(expected).backward()
    # p has a gradient from either function, each rounded to its dtype.
    case.assert_shard(p.grad, dense_p.grad, 1, 4 * tolerance if p.dtype != torch.bfloat16 else 2**-7)
    case.assert_shard(q.grad, dense_q.grad, 1, 4 * tolerance)
    return given


def check_linear(case: Case, tolerance: float, backend: str) -> list[Tensor]:
    hidden_p, hidden_q = (x.clone().requires_grad_() for x in (case.hidden_p, case.hidden_q))
    weight = case.shard_of_weight()
    dense_p, dense_q, dense_weight = doubles(case.hidden_p, case.hidden_q, case.weight)
    two_rows: dict[str, Any] = {"chunk_bytes": 2 * case.width * 4, "backend": backend}
    statistics, collectives = count(
        lambda: linear_statistics(hidden_p, weight, case.targets, **case.options, **two_rows)
    )
    assert collectives == case.one_gather
    kl, collectives = count(lambda: linear_divergence(hidden_p, hidden_q, weight, **case.options, **two_rows))
    assert collectives == case.one_gather
    three = (hidden_p, hidden_q, hidden_q)
    together, collectives = count(
        lambda: linear_view_statistics(three, weight, case.targets, **case.options, **two_rows)
    )
    assert collectives == case.one_gather, "three views, any number of chunks: one all-gather"
    assert_within(together.kl_KN[1], kl.double(), tolerance)
    given, expected = [*statistics, kl], case.dense(dense_p @ dense_weight.t(), dense_q @ dense_weight.t())
    for value, reference in zip(given, expected, strict=True):
        assert_within(value, reference, tolerance)
    assert count(weighted_sum(given).backward)[1] == []
    weighted_sum(expected).backward()
    for hidden, dense_hidden in ((hidden_p, dense_p), (hidden_q, dense_q)):
        assert hidden.grad is not None
        assert dense_hidden.grad is not None
        total = hidden.grad.double()
        dist.all_reduce(total)  # what the caller's region does
        # Every rank's part is rounded to the dtype of the rows, so the bound is on the whole gradient.
        error = (total - dense_hidden.grad).norm() / dense_hidden.grad.norm()
        assert error <= (2**-8 if hidden.dtype == torch.bfloat16 else 4 * tolerance), error
    case.assert_shard(weight.grad, dense_weight.grad, 0, 8 * tolerance if weight.dtype != torch.bfloat16 else 2**-7)
    return given


def check_no_rows(case: Case) -> None:
    """A micro-batch without response rows still takes part in the collective, and gives zero gradients."""
    hidden = torch.zeros(0, HIDDEN_SIZE, requires_grad=True)
    weight = torch.randn(case.width, HIDDEN_SIZE, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    outputs, collectives = count(lambda: linear_statistics(hidden, weight, targets, **case.options))
    assert collectives == case.one_gather
    assert [x.shape for x in outputs] == [(0,), (0,)]
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def check_all(rank: int, world_size: int) -> list[list[Tensor]]:
    outputs = []
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 4e-6), (torch.bfloat16, 4e-6)):
        for empty_shard in (False, True)[:world_size]:
            case = Case(rank, world_size, empty_shard=empty_shard, dtype=dtype)
            found = check_reference(case, tolerance)
            for backend in ("torch", "fused"):
                found += check_linear(case, tolerance, backend)
            outputs.append([x.detach() for x in found])
    check_no_rows(case)
    return outputs


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_function_matches_the_dense_one_with_one_collective(world_size: int) -> None:
    first, *others = run_distributed(check_all, world_size)
    for other in others:
        for given, expected in zip(other, first, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(given, expected, strict=True)), "ranks differ in a bit"
