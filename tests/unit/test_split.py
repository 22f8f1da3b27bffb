"""How context and sequence parallelism cut a row, and what each rank's attention computes of it, in one process.

Ranks are played one after the other; what they would gather is put together from all of them.
Legend: T tokens of the row, C those of a context rank, N rows asked for, h heads, d head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_cppo.policy import attention
from megatron_cppo.policy.attention import WASTE, PackedAttention, Segments, segments
from megatron_cppo.policy.split import Share, Split, context_tokens

SIZES = (1, 2, 3, 4)
SEEDS = range(12)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    """One rank's view of a process group, as far as rank and size go."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


def random_starts(seed: int, multiple: int) -> np.ndarray:
    """Where segments of random lengths, multiples of `multiple`, start in a row; the last number is its end."""
    rng = np.random.default_rng(seed)
    longest = int(rng.choice([1, 3, 8, 40]))
    lengths = multiple * rng.integers(1, longest + 1, int(rng.integers(1, 9)))
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def starts_for(seed: int, size: int, tensor: int = 1) -> np.ndarray:
    """Of a row that `size` context ranks, and `tensor` ranks of each, can cut: its padding is the last segment."""
    segment = 2 * size if size > 1 else 1
    starts, multiple = random_starts(seed, segment), int(np.lcm(segment, size * tensor))
    rest = -starts[-1] % multiple
    return np.append(starts, starts[-1] + rest) if rest else starts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_context_ranks_tokens_are_a_partition_of_every_segment(seed: int, size: int) -> None:
    starts = random_starts(seed, 2 * size)
    every = [context_tokens(starts, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(every).tolist()) == list(range(starts[-1]))
    for tokens in every:
        assert tokens.tolist() == sorted(tokens.tolist()), "segment after segment, each in its order"
        for start, end in itertools.pairwise(starts):
            assert ((tokens >= start) & (tokens < end)).sum() * size == end - start


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_causal_attention_is_the_same_work_on_every_context_rank(seed: int, size: int) -> None:
    """Of each segment: a token looks at itself and at all before it."""
    starts = random_starts(seed, 2 * size)
    segment_T = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    seen_T = np.arange(starts[-1]) - starts[segment_T] + 1
    work = {
        tuple(np.bincount(segment_T[tokens], weights=seen_T[tokens]).tolist())
        for tokens in (context_tokens(starts, rank, size) for rank in range(size))
    }
    assert len(work) == 1


def test_chunks_of_four_ranks_by_hand() -> None:
    starts = np.array([0, 16, 24])
    found = [context_tokens(starts, rank, 4).tolist() for rank in range(4)]
    assert found == [[0, 1, 14, 15, 16, 23], [2, 3, 12, 13, 17, 22], [4, 5, 10, 11, 18, 21], [6, 7, 8, 9, 19, 20]]
    with pytest.raises(AssertionError, match=r"segments of \[8, 4\] tokens cannot be cut into 8"):
        context_tokens(np.array([0, 8, 12]), 0, 4)


def split_of(starts: np.ndarray, context: Group, tensor: Group, *, sequence_parallel: bool) -> Split:
    groups: Any = SimpleNamespace(context=context, tensor=tensor)
    return Split.of(torch.from_numpy(starts.astype(np.int32)), groups, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_on_one_rank_between_the_layers(seed: int, size: int, tensor: int) -> None:
    starts = starts_for(seed, size, tensor)
    held: list[int] = []
    for rank in range(size):
        runs = []
        for number in range(tensor):
            split = split_of(starts, Group(rank, size), Group(number, tensor), sequence_parallel=True)
            runs.append(split.mine_L)
            assert len(split.mine_L) * tensor * size == starts[-1]
            context_C = split.context_C.numpy()
            wanted = context_tokens(starts, rank, size) if size > 1 else np.arange(starts[-1])
            np.testing.assert_array_equal(context_C, wanted)
            mine = split.rank_T.numpy() == rank
            assert mine.sum() == len(context_C)
            np.testing.assert_array_equal(context_C[split.place_T.numpy()[mine]], np.flatnonzero(mine))
        assert torch.equal(torch.cat(runs), split.context_C), "sequence parallelism cuts runs, in order"
        held += torch.cat(runs).tolist()
        whole = split_of(starts, Group(rank, size), Group(0, tensor), sequence_parallel=False)
        assert torch.equal(whole.mine_L, whole.context_C), "without it every rank of TP holds all"
    assert sorted(held) == list(range(starts[-1]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_features_go_to_the_rank_that_holds_their_place(seed: int, size: int) -> None:
    starts, rng = starts_for(seed, size, 2), np.random.default_rng(seed)
    slots = torch.from_numpy(rng.permutation(starts[-1])[: starts[-1] // 2])
    taken: list[int] = []
    for rank in range(size):
        for number in range(2):
            split = split_of(starts, Group(rank, size), Group(number, 2), sequence_parallel=True)
            chosen, local = split.local(slots)
            assert torch.equal(split.mine_L[local], slots[chosen])
            taken += chosen.tolist()
    assert sorted(taken) == list(range(len(slots)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_the_ranks_rows_become_one_again_in_the_order_asked_for(seed: int, size: int) -> None:
    """Rows may be asked for twice, as a sample's target and as a contrast's, or not at all."""
    starts, rng = starts_for(seed, size), np.random.default_rng(seed)
    values_T = torch.from_numpy(rng.standard_normal(starts[-1]))
    for count in (0, 1, 7, 50):
        rows_N = torch.from_numpy(rng.integers(0, starts[-1], count))
        padded, chosen, share = [], [], None
        for rank in range(size):
            split = split_of(starts, Group(rank, size), Group(0, 1), sequence_parallel=False)
            group: Any = Group(rank, size)
            share = Share.of(split, rows_N, group, CPU)
            mine = values_T[split.context_C][share.local_n]
            assert torch.equal(mine, values_T[rows_N[share.chosen_n]])
            padded.append(torch.cat([mine, torch.full((share.most - len(mine),), torch.nan, dtype=mine.dtype)]))
            chosen += share.chosen_n.tolist()
        assert share is not None
        assert sorted(chosen) == list(range(count)), "a row's gradient goes to one rank"
        assert torch.equal(torch.cat(padded)[share.order_N], values_T[rows_N])


def dense_attention(query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """[T, h, d] -> [T, h * d]: causal attention of each segment, head by head, as its definition says."""
    outputs = torch.empty_like(query)
    share = query.shape[1] // key.shape[1]
    for start, end in itertools.pairwise(starts):
        for head in range(query.shape[1]):
            q, k, v = query[start:end, head], key[start:end, head // share], value[start:end, head // share]
            scores = (q @ k.t() * scale).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
            outputs[start:end, head] = scores.softmax(dim=-1) @ v
    return outputs.flatten(1)


def packed(starts: np.ndarray, rank: int, size: int) -> Segments:
    group: Any = Group(rank, size)
    return segments(torch.from_numpy(starts.astype(np.int32)), int(np.diff(starts).max()), group, CPU)


def attention_of_ranks(
    qkv: tuple[Tensor, Tensor, Tensor], starts: np.ndarray, size: int, scale: float, patch: pytest.MonkeyPatch
) -> Tensor:
    """[T, h * d]: every rank's attention of its own queries, put back where its tokens are."""
    every = [context_tokens(starts, r, size) if size > 1 else np.arange(starts[-1]) for r in range(size)]
    gathered_T = torch.from_numpy(np.concatenate(every))
    query, key, value = qkv
    outputs = []
    for rank, tokens in enumerate(every):
        group: Any = SimpleNamespace(cp=Group(rank, size))
        config: Any = None  # of which it asks nothing
        layer = PackedAttention(config, 1, None, "self", softmax_scale=scale, pg_collection=group)
        mine, everything = torch.stack([key[tokens], value[tokens]], 1), torch.stack([key, value], 1)[gathered_T]

        def gather(tokens_mine: Tensor, _: object, mine: Tensor = mine, everything: Tensor = everything) -> Tensor:
            assert torch.equal(tokens_mine, mine), "a rank gathers its own keys and values"
            return everything

        patch.setattr(attention._GatherTokens, "apply", gather)
        outputs.append(
            layer(query[tokens], key[tokens], value[tokens], None, packed_seq_params=packed(starts, rank, size))
        )
    whole = torch.cat(outputs)
    return whole.new_empty(whole.shape).index_copy(0, gathered_T, whole)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_ranks_attention_is_dense_causal_attention(seed: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients in float64, with four queries to two keys."""
    starts = random_starts(seed, 2 * size if size > 1 else 1)
    generator = torch.Generator().manual_seed(seed)

    def leaf(heads: int) -> Tensor:
        return torch.randn(starts[-1], heads, 6, generator=generator, dtype=torch.float64).requires_grad_()

    qkv, weight = (leaf(4), leaf(2), leaf(2)), leaf(4).detach().flatten(1)
    wanted = dense_attention(*qkv, starts.tolist(), 0.3)
    wanted_gradients = torch.autograd.grad((wanted * weight).sum(), qkv)
    found = attention_of_ranks(qkv, starts, size, 0.3, monkeypatch)
    gradients = torch.autograd.grad((found * weight).sum(), qkv)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_pieces_of_a_bucket_are_about_equally_long(seed: int, size: int) -> None:
    starts = random_starts(seed, 2 * size if size > 1 else 1)
    ends = {int(end) for end in starts[1:]}
    for rank in range(size):
        params, pieces, tokens = packed(starts, rank, size), 0, 0
        assert params.output_C is not None
        for bucket in params.buckets:
            assert bucket.keys_BK.shape[0] == bucket.queries_BQ.shape[0]
            # What was padded repeats the last token, so the distinct ones are those of the piece.
            keys = [len(set(row.tolist())) for row in bucket.keys_BK]
            queries = [len(set(row.tolist())) for row in bucket.queries_BQ]
            assert max(keys) == bucket.keys_BK.shape[1]
            assert max(queries) == bucket.queries_BQ.shape[1]
            assert max(keys) <= WASTE * min(keys)
            assert bucket.keys_BK.numel() <= WASTE * sum(keys)
            assert (bucket.visible_BQK is None) == (size == 1)
            pieces, tokens = pieces + len(keys), tokens + sum(queries)
        assert pieces == len(ends) * (2 if size > 1 else 1)
        assert tokens == len(params.output_C) == starts[-1] // size
        assert len(set(params.output_C.tolist())) == tokens, "every token has an output of its own"


def test_rows_of_alike_segments_need_one_bucket_and_no_padding() -> None:
    params = packed(np.arange(0, 70, 10), 0, 1)
    (bucket,) = params.buckets
    assert bucket.keys_BK.tolist() == bucket.queries_BQ.tolist() == torch.arange(60).view(6, 10).tolist()


def test_the_rows_description_for_megatron_is_one_segment() -> None:
    """Its rope code slices angles once per segment; the true segments are for the kernel."""
    params: Any = packed(np.array([0, 8, 12, 24]), 1, 2)
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [0, 24]
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        assert getattr(params.kernel, name).tolist() == [0, 8, 12, 24]
    assert (params.max_seqlen_q, params.max_seqlen_kv, params.kernel.max_seqlen_q) == (12, 12, 12)
