"""Vocab-parallel statistics on one rank, and the merge of shards, against dense float64 arithmetic written out here.

Shapes: N rows, V columns, H hidden size, R shards.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cppo.algo import linear_tiles, shard_kernels_torch
from megatron_cppo.algo.shard_statistics import Shard, finish, merge
from megatron_cppo.algo.vocab_parallel import (
    kl_divergence,
    linear_divergence,
    linear_statistics,
    linear_view_statistics,
    token_statistics,
    view_statistics,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is built for Linux alone; there every backend is tested"
)
VOCAB_SIZE = 53
BANNED = (3, 17, 52)
TEMPERATURE = 0.7


def dense_log_softmax(logits: Tensor, temperature: float, banned: tuple[int, ...] = ()) -> Tensor:
    """Log-probabilities in float64 over the columns that may be sampled; the banned ones get a probability of 0."""
    allowed = torch.ones(logits.shape[1], dtype=torch.bool)
    allowed[list(banned)] = False
    logits = logits.double() / temperature
    return logits - logits[:, allowed].logsumexp(-1, keepdim=True) + torch.where(allowed, 0.0, -1e9)


def dense_statistics(logits: Tensor, targets: Tensor, temperature: float, banned: tuple[int, ...] = ()) -> Any:
    logp = dense_log_softmax(logits, temperature, banned)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def dense_kl(logits_p: Tensor, logits_q: Tensor, temperature: float, banned: tuple[int, ...] = ()) -> Tensor:
    logp, logq = dense_log_softmax(logits_p, temperature, banned), dense_log_softmax(logits_q, temperature, banned)
    return (logp.exp() * (logp - logq)).sum(-1)


def sampleable_targets(num_rows: int) -> Tensor:
    ids = torch.tensor([i for i in range(VOCAB_SIZE) if i not in BANNED])
    return ids[torch.randint(len(ids), (num_rows,))]


def with_rubbish(logits: Tensor, padding: int) -> Tensor:
    """NaN in the banned columns and in `padding` more."""
    padded = torch.nn.functional.pad(logits.detach(), (0, padding), value=torch.nan)
    padded[:, list(BANNED)] = torch.nan
    return padded.requires_grad_()


def assert_gradient(padded: Tensor, dense: Tensor, tolerance: float) -> None:
    """The same gradient as the dense one, and exactly 0 where the rubbish was."""
    assert padded.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(padded.grad[:, :VOCAB_SIZE], dense.grad, rtol=tolerance, atol=tolerance)
    assert (padded.grad[:, VOCAB_SIZE:] == 0).all()
    assert (padded.grad[:, list(BANNED)] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("wanted", ["logp", "entropy", "both"])
def test_token_statistics_match_the_dense_ones(scale: float, wanted: str) -> None:
    torch.manual_seed(0)
    dense = (torch.randn(7, VOCAB_SIZE, dtype=torch.float64) * scale + 100).requires_grad_()
    padded = with_rubbish(dense, padding=11)
    targets = sampleable_targets(7)
    expected = dense_statistics(dense, targets, TEMPERATURE, BANNED)
    given = token_statistics(
        padded, targets, group=None, vocab_size=VOCAB_SIZE, temperature=TEMPERATURE, banned_ids=BANNED
    )
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-11)

    weights = torch.randn(2, 7, dtype=torch.float64) * torch.tensor([[wanted != "entropy"], [wanted != "logp"]])
    for logp, entropy in (given, expected):
        # An output that the loss does not use must not need a gradient of its own.
        terms = [t * w for t, w in zip((logp, entropy), weights, strict=True) if w.any()]
        torch.stack(terms).sum().backward()
    assert_gradient(padded, dense, 1e-10)


@pytest.mark.parametrize(("scale", "distance"), [(1.0, 1.0), (30.0, 1.0), (5.0, 1e-4)])
def test_kl_divergence_matches_the_dense_one_in_both_arguments(scale: float, distance: float) -> None:
    torch.manual_seed(1)
    dense_p = (torch.randn(7, VOCAB_SIZE, dtype=torch.float64) * scale).requires_grad_()
    # Another offset: KL must not depend on it.
    dense_q = (dense_p.detach() + distance * torch.randn(7, VOCAB_SIZE, dtype=torch.float64) - 50).requires_grad_()
    padded_p, padded_q = with_rubbish(dense_p, padding=11), with_rubbish(dense_q, padding=11)
    expected = dense_kl(dense_p, dense_q, TEMPERATURE, BANNED)
    given = kl_divergence(
        padded_p, padded_q, group=None, vocab_size=VOCAB_SIZE, temperature=TEMPERATURE, banned_ids=BANNED
    )
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-11)

    weights = torch.randn(7, dtype=torch.float64)
    (given * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_gradient(padded_p, dense_p, 1e-10)
    assert_gradient(padded_q, dense_q, 1e-10)


def test_gradcheck() -> None:
    torch.manual_seed(2)
    options: dict[str, Any] = {"group": None, "vocab_size": 9, "temperature": 0.8, "banned_ids": (2,)}
    tiny: dict[str, Any] = options | {"chunk_bytes": 150}  # two rows of nine float64 logits
    logits_p, logits_q, weight = (torch.randn(n, 11, dtype=torch.float64, requires_grad=True) for n in (3, 3, 4))
    hidden_p, hidden_q = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = torch.tensor([0, 8, 5])
    check = torch.autograd.gradcheck
    assert check(lambda x: token_statistics(x, targets, **options), (logits_p,))
    assert check(lambda x, y: kl_divergence(x, y, **options), (logits_p, logits_q))
    assert check(lambda h, w: linear_statistics(h, w.t(), targets, **tiny), (hidden_p, weight))
    assert check(lambda p, q, w: linear_divergence(p, q, w.t(), **tiny), (hidden_p, hidden_q, weight))


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("padding", [0, 25])
def test_any_cut_of_the_vocabulary_merges_to_the_same_statistics(num_shards: int, padding: int) -> None:
    torch.manual_seed(3)
    logits_p, logits_q = 5 * torch.randn(2, 6, VOCAB_SIZE, dtype=torch.float64)
    targets = sampleable_targets(6)
    width = -(-(VOCAB_SIZE + padding) // num_shards)
    padded_p, padded_q = (with_rubbish(x, num_shards * width - VOCAB_SIZE).detach() for x in (logits_p, logits_q))
    parts = []
    for rank in range(num_shards):
        shard = Shard.of_rank(
            rank, world_size=num_shards, width=width, vocab_size=VOCAB_SIZE, temperature=0.7, banned_ids=BANNED
        )
        columns = slice(rank * width, (rank + 1) * width)
        parts.append(shard_kernels_torch.view_sums([padded_p[:, columns], padded_q[:, columns]], targets, shard))
    logp, last = finish(merge(torch.stack(parts), 1 / 0.7), 1 / 0.7)[:, 2:].unbind(1)
    logp_p, entropy = dense_statistics(logits_p, targets, 0.7, BANNED)
    logp_q, _ = dense_statistics(logits_q, targets, 0.7, BANNED)
    torch.testing.assert_close((logp[0], logp[1]), (logp_p, logp_q), rtol=0, atol=1e-12)
    kl = dense_kl(logits_p, logits_q, 0.7, BANNED)
    torch.testing.assert_close((last[0], last[1]), (entropy, kl), rtol=0, atol=1e-12)
    # Parts may be merged in parts: tiles of columns first, then ranks.
    half = num_shards // 2
    halves = [merge(torch.stack(part), 1 / 0.7) for part in (parts[:half], parts[half:]) if part]
    again = finish(merge(torch.stack(halves), 1 / 0.7), 1 / 0.7)
    torch.testing.assert_close(again[:, 2:].unbind(1), (logp, last), rtol=0, atol=1e-12)


def test_a_shard_of_banned_columns_adds_nothing() -> None:
    logits = torch.randn(3, 4)
    shards = [
        Shard.of_rank(r, world_size=2, width=2, vocab_size=4, temperature=1.0, banned_ids=(2, 3)) for r in range(2)
    ]
    targets = torch.tensor([0, 1, 0])
    parts = [shard_kernels_torch.view_sums([logits[:, 2 * r : 2 * r + 2]], targets, shards[r]) for r in range(2)]
    _, _, logp, entropy = finish(merge(torch.stack(parts), 1.0), 1.0)[0]
    torch.testing.assert_close((logp.double(), entropy.double()), dense_statistics(logits[:, :2], targets, 1.0))


def test_a_banned_target_has_log_probability_minus_infinity_and_no_gradient_of_its_own() -> None:
    logits = torch.randn(1, 5, requires_grad=True)
    logp, entropy = token_statistics(logits, torch.tensor([4]), group=None, vocab_size=5, banned_ids=(4,))
    assert logp.item() == -torch.inf
    (logp + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 4] == 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_float32_keeps_its_precision_under_an_offset(offset: float) -> None:
    torch.manual_seed(4)
    logits_p = 3 * torch.randn(16, 50_000) + offset
    logits_q = logits_p + 0.1 * torch.randn(16, 50_000)
    targets = torch.randint(50_000, (16,))
    logp, entropy = token_statistics(logits_p, targets, group=None, vocab_size=50_000)
    kl = kl_divergence(logits_p, logits_q, group=None, vocab_size=50_000)
    expected = *dense_statistics(logits_p, targets, 1.0), dense_kl(logits_p, logits_q, 1.0)
    assert logp.dtype == entropy.dtype == kl.dtype == torch.float32
    torch.testing.assert_close((logp.double(), entropy.double(), kl.double()), expected, rtol=0, atol=4e-6)


def test_tiny_entropies_are_accurate_relative_to_themselves() -> None:
    """The perception mask ranks by a ratio of entropies, down to 1e-6 nat."""
    torch.manual_seed(5)
    logits = torch.randn(8, 1000) + 20
    logits[:, 7] += torch.linspace(20, 27, 8)
    _, entropy = token_statistics(logits, torch.full((8,), 7), group=None, vocab_size=1000)
    _, expected = dense_statistics(logits, torch.full((8,), 7), 1.0)
    assert expected.min() < 1e-6
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=0)


BACKENDS = ("torch", "fused", pytest.param("triton", marks=needs_triton))


def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few columns, so that a small vocabulary has several, and banned ids are in some of them."""
    monkeypatch.setattr(linear_tiles, "FEWEST_COLUMNS", 5)
    monkeypatch.setitem(linear_tiles.MOST_COLUMNS, "cpu", 20)


def linear_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sets of hidden rows, a weight with rubbish in its padding, and targets."""
    torch.manual_seed(6)
    hidden_p = torch.randn(9, 16, dtype=torch.float64)
    hidden_q = hidden_p + 0.3 * torch.randn(9, 16, dtype=torch.float64)
    weight = torch.nn.functional.pad(torch.randn(VOCAB_SIZE, 16, dtype=torch.float64), (0, 0, 0, 7), value=torch.nan)
    leaves = (x.to(dtype).requires_grad_() for x in (hidden_p, hidden_q, weight))
    return *leaves, sampleable_targets(9)


def linear_loss(hidden_p: Tensor, hidden_q: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    options = {"group": None, "vocab_size": VOCAB_SIZE, "temperature": 0.7, "banned_ids": BANNED} | options
    divergence = linear_divergence(hidden_p, hidden_q, weight, **options)
    options.pop("stop_gradient_q", None)
    return [*linear_statistics(hidden_p, weight, targets, **options), divergence]


def dense_linear_loss(hidden_p: Tensor, hidden_q: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    logits_p, logits_q = hidden_p @ weight.t(), hidden_q @ weight.t()
    return [*dense_statistics(logits_p, targets, 0.7, BANNED), dense_kl(logits_p, logits_q, 0.7, BANNED)]


def dense_leaves(*leaves: Tensor) -> list[Tensor]:
    return [x.detach()[:VOCAB_SIZE].double().requires_grad_() for x in leaves]


def backward(outputs: list[Tensor]) -> None:
    weights = torch.linspace(-1, 2, len(outputs) * len(outputs[0])).view(len(outputs), -1)
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 60 * 4, 2**29])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_functions_match_the_dense_ones_in_any_number_of_chunks(
    backend: str, chunk_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow_tiles(monkeypatch)
    hidden_p, hidden_q, weight, targets = linear_case(dtype)
    dense = dense_leaves(hidden_p, hidden_q, weight)
    given = linear_loss(hidden_p, hidden_q, weight, targets, chunk_bytes=chunk_bytes, backend=backend)
    expected = dense_linear_loss(*dense, targets)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close([x.double() for x in given], expected, rtol=tolerance, atol=tolerance)

    backward(given)
    backward(expected)
    # Both functions give a gradient to hidden_p and to the weight: each is rounded to the leaf's dtype, then their sum.
    allowed = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    for leaf, reference in zip((hidden_p, hidden_q, weight), dense, strict=True):
        assert leaf.grad is not None
        assert reference.grad is not None
        assert (leaf.grad[VOCAB_SIZE:] == 0).all()
        error = (leaf.grad[:VOCAB_SIZE].double() - reference.grad).norm() / reference.grad.norm()
        assert error < allowed


def test_bfloat16_gradients_are_one_rounding_away() -> None:
    hidden_p, _, weight, targets = linear_case(torch.bfloat16)
    dense = dense_leaves(hidden_p, weight)
    backward(list(linear_statistics(hidden_p, weight, targets, group=None, vocab_size=VOCAB_SIZE)))
    backward(list(dense_statistics(dense[0] @ dense[1].t(), targets, 1.0)))
    for leaf, reference in zip((hidden_p, weight), dense, strict=True):
        assert leaf.grad is not None
        assert reference.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        error = (leaf.grad[:VOCAB_SIZE].double() - reference.grad).abs()
        assert (error <= 2**-8 * reference.grad.abs() + 1e-6).all()


def test_stop_gradient_q_makes_q_a_constant() -> None:
    hidden_p, hidden_q, weight, _ = linear_case(torch.float64)
    dense_p, dense_q, dense_weight = dense_leaves(hidden_p, hidden_q, weight)
    options: dict[str, Any] = {"group": None, "vocab_size": VOCAB_SIZE, "stop_gradient_q": True}
    backward([linear_divergence(hidden_p, hidden_q, weight, **options)])
    backward([dense_kl(dense_p @ dense_weight.t(), (dense_q @ dense_weight.t()).detach(), 1.0)])
    assert hidden_q.grad is None
    assert weight.grad is not None
    torch.testing.assert_close(hidden_p.grad, dense_p.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.grad[:VOCAB_SIZE], dense_weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_statistics_of_three_views_come_from_one_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow_tiles(monkeypatch)
    hidden_p, hidden_q, weight, targets = linear_case(torch.float64)
    hiddens = (hidden_p, hidden_q, (hidden_p.detach() * 0.9).requires_grad_())
    *dense_hiddens, dense_weight = dense_leaves(*hiddens, weight)
    options: dict[str, Any] = {"group": None, "vocab_size": VOCAB_SIZE, "temperature": 0.7, "banned_ids": BANNED}
    given = linear_view_statistics(hiddens, weight, targets, backend=backend, **options)
    logits = [hidden @ dense_weight.t() for hidden in dense_hiddens]
    logps = [dense_statistics(view, targets, 0.7, BANNED)[0] for view in logits]
    _, entropy = dense_statistics(logits[0], targets, 0.7, BANNED)
    expected = [*logps, entropy, *(dense_kl(logits[0], view, 0.7, BANNED) for view in logits[1:])]
    flat = [*given.logp_WN, given.entropy_N, *given.kl_KN]
    torch.testing.assert_close(flat, expected, rtol=1e-12, atol=1e-12)
    backward(flat)
    backward(expected)
    for leaf, dense in zip((*hiddens, weight), (*dense_hiddens, dense_weight), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[:VOCAB_SIZE], dense.grad, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"one shape, got \[\(8, 16\), \(9, 16\)\]"):
        linear_view_statistics((hidden_p, hidden_q[1:]), weight, targets, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_have_statistics_and_no_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow_tiles(monkeypatch)
    hidden, _, weight, targets = linear_case(torch.float64)
    dense_hidden, dense_weight = dense_leaves(hidden, weight)
    options: dict[str, Any] = {"group": None, "vocab_size": VOCAB_SIZE, "backend": backend}
    given = list(linear_statistics(hidden, weight, targets, num_constant=4, **options))
    logits = dense_hidden @ dense_weight.t()
    logits = torch.cat([logits[:5], logits[5:].detach()])
    expected = list(dense_statistics(logits, targets, 1.0))
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    backward(given)
    backward(expected)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad[5:] == 0).all()
    torch.testing.assert_close(hidden.grad, dense_hidden.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.grad[:VOCAB_SIZE], dense_weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weights_gradient_is_added_to_a_buffer_that_is_given(backend: str) -> None:
    """In float32, micro-batch after micro-batch: a bfloat16 gradient of the head would be rounded each time."""
    hidden, hidden_q, weight, targets = linear_case(torch.bfloat16)
    options: dict[str, Any] = {"group": None, "vocab_size": VOCAB_SIZE, "backend": backend}
    total = torch.zeros_like(weight, dtype=torch.float32)
    for part in (hidden, hidden_q):
        backward(list(linear_statistics(part, weight, targets, weight_total_VH=total, **options)))
    backward([linear_divergence(hidden, hidden_q, weight, weight_total_VH=total, **options)])
    assert weight.grad is None
    dense_p, dense_q, dense_weight = dense_leaves(hidden, hidden_q, weight)
    for part in (dense_p, dense_q):
        backward(list(dense_statistics(part @ dense_weight.t(), targets, 1.0)))
    backward([dense_kl(dense_p @ dense_weight.t(), dense_q @ dense_weight.t(), 1.0)])
    assert dense_weight.grad is not None
    error = (total[:VOCAB_SIZE].double() - dense_weight.grad).norm() / dense_weight.grad.norm()
    assert error < 1e-6
    assert (total[VOCAB_SIZE:] == 0).all()


class TestOverwrittenLogits:
    """`overwrite_logits`: the gradient takes the logits' place, once."""

    options: dict[str, Any] = {"group": None, "vocab_size": VOCAB_SIZE, "banned_ids": BANNED}  # noqa: RUF012

    @pytest.mark.parametrize("num_views", [1, 3])
    def test_the_gradient_lies_where_the_logits_were(self, num_views: int) -> None:
        torch.manual_seed(7)
        dense = [torch.randn(6, VOCAB_SIZE, dtype=torch.float64) for _ in range(num_views)]
        kept, overwritten = ([with_rubbish(x, padding=3) for x in dense] for _ in range(2))
        targets = sampleable_targets(6)
        for views, overwrite in ((kept, False), (overwritten, True)):
            given = view_statistics(views, targets, overwrite_logits=overwrite, **self.options)
            backward([*given.logp_WN, given.entropy_N, *given.kl_KN])
        for one, other in zip(kept, overwritten, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)
            assert other.grad.data_ptr() == other.data_ptr()
            assert one.grad.data_ptr() != one.data_ptr()

    @pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
    def test_compiled_code_overwrites_too(self) -> None:
        torch._dynamo.reset()  # nothing of another test's that happens to fit
        views = [torch.randn(4, VOCAB_SIZE, requires_grad=True) for _ in range(2)]
        copies = [view.detach().clone().requires_grad_() for view in views]
        targets = sampleable_targets(4)
        for leaves, backend in ((copies, "torch"), (views, "compiled")):
            given = view_statistics(leaves, targets, backend=backend, overwrite_logits=True, **self.options)
            backward([*given.logp_WN, given.entropy_N, *given.kl_KN])
        for one, other in zip(views, copies, strict=True):
            assert one.grad is not None
            assert one.grad.data_ptr() == one.data_ptr()
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)

    def test_a_second_backward_is_refused_and_said_why(self) -> None:
        logits = torch.randn(2, VOCAB_SIZE, requires_grad=True)
        logp, _ = token_statistics(logits, torch.tensor([0, 1]), overwrite_logits=True, **self.options)
        logp.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="gradient over the logits; pass overwrite_logits=False to keep them"):
            logp.sum().backward()

    @pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
    def test_another_reader_of_the_logits_hears_of_it(self, backend: str) -> None:
        logits = torch.randn(2, VOCAB_SIZE, requires_grad=True)
        options = self.options | {"backend": backend, "overwrite_logits": True}
        logp, _ = token_statistics(logits, torch.tensor([0, 1]), **options)
        other = logits.square().sum()
        logp.sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

    def test_one_tensor_cannot_hold_two_gradients(self) -> None:
        logits = torch.randn(2, VOCAB_SIZE, requires_grad=True)
        both = torch.randn(3, VOCAB_SIZE)
        for views in ((logits, logits), (both[:2], both[1:])):
            with pytest.raises(ValueError, match="share no memory, got two that overlap; clone one"):
                view_statistics(views, torch.tensor([0, 1]), overwrite_logits=True, **self.options)
        with pytest.raises(ValueError, match="got an expanded tensor; clone it"):
            token_statistics(both[:1].expand(2, -1), torch.tensor([0, 1]), overwrite_logits=True, **self.options)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that is computed, in elements."""

    numel = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view of an argument is no new memory.
        if isinstance(result, Tensor) and result.data_ptr() not in {x.data_ptr() for x in args if torch.is_tensor(x)}:
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_exist_for_one_chunk_and_the_weight_is_never_upcast_as_a_whole() -> None:
    num_rows, hidden_size, vocab_size = 64, 8, 40_000
    hidden = torch.randn(num_rows, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocab_size, (num_rows,))
    two_rows = 2 * vocab_size * 4
    with LargestTensor() as largest:
        outputs = linear_statistics(hidden, weight, targets, group=None, vocab_size=vocab_size, chunk_bytes=two_rows)
    assert largest.numel <= 16384 * hidden_size
    with LargestTensor() as largest:
        backward(list(outputs))
    assert largest.numel == weight.numel()  # its gradient
    assert weight.grad is not None


def test_fused_logits_exist_for_one_tile_of_the_vocabulary() -> None:
    num_rows, hidden_size, vocab_size = 64, 8, 40_000
    hidden = torch.randn(num_rows, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    total = torch.zeros(vocab_size, hidden_size)
    targets = torch.randint(vocab_size, (num_rows,))
    with LargestTensor() as largest:
        backward(
            list(
                linear_statistics(
                    hidden,
                    weight,
                    targets,
                    group=None,
                    vocab_size=vocab_size,
                    backend="fused",
                    weight_total_VH=total,
                )
            )
        )
    assert largest.numel <= 4096 * num_rows


def test_a_frozen_head_costs_no_gradient_of_its_weight() -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(1000, 8)
    options: dict[str, Any] = {"group": None, "vocab_size": 1000, "chunk_bytes": 1}
    outputs = [
        *linear_statistics(hidden, weight, torch.tensor([0, 7, 999]), **options),
        linear_divergence(hidden, hidden.flip(0), weight, **options),
    ]
    with LargestTensor() as largest:
        backward(outputs)
    assert largest.numel < weight.numel()
    assert hidden.grad is not None


def test_no_rows() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    logp, entropy = linear_statistics(hidden, weight, targets, group=None, vocab_size=6)
    kl = linear_divergence(hidden, hidden, weight, group=None, vocab_size=6)
    logits = torch.zeros(0, 6, requires_grad=True)
    reference = token_statistics(logits, targets, group=None, vocab_size=6)
    total = sum(
        x.sum() for x in (logp, entropy, kl, *reference, kl_divergence(logits, logits, group=None, vocab_size=6))
    )
    assert logp.shape == entropy.shape == kl.shape == (0,)
    total.backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    assert (weight.grad == 0).all()
    assert hidden.grad.shape == (0, 4)


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    logp, _ = token_statistics(logits, torch.tensor([0, 1]), group=None, vocab_size=5)
    (gradient,) = torch.autograd.grad(logp.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 12}, "vocab_size 12 does not fit 1 shards of 11 columns"),
        ({"vocab_size": 0}, "between 1 and 11"),
        ({"vocab_size": 11, "temperature": 0.0}, "temperature must be > 0, got 0.0"),
        (
            {"vocab_size": 11, "backend": "magic"},
            "unknown backend 'magic'; choose one of torch, compiled, triton, fused",
        ),
    ],
)
def test_impossible_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_statistics(torch.zeros(2, 4), torch.zeros(11, 4), torch.zeros(2).long(), group=None, **options)
