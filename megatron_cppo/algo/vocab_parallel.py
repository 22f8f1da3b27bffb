"""Log-probabilities, entropies and exact KL divergences of logits whose vocabulary is split over ranks.

Owns the public functions and the only communication of the loss: one all-gather of a few floats per row in the forward,
nothing in the backward. The vocabulary is never gathered. It must not know whose rows these are, or what loss follows.

Functions of logits: `token_statistics` and `kl_divergence`, and `view_statistics`, which gives both of several views of
the same tokens in one pass over their logits. Functions of hidden rows and the head's weight, which compute the same
numbers without ever holding all logits: `linear_statistics`, `linear_divergence` and `linear_view_statistics`.

Conventions of all six:
- `group` is the process group that the vocabulary is split over, in rank order and in shards of equal width; None means
  one rank. Every rank of it must call, also with N = 0, with the same rows.
- Columns from `vocab_size` on are padding, and `banned_ids` may not be sampled: both count as −∞ whatever they hold,
  NaN included, and get a gradient of exactly 0. The log-probability of such a target is −∞.
- Logits are divided by `temperature`, after their maximum is subtracted. Statistics are float32 (float64 for float64
  arguments) and the same to the last bit on every rank: all merge the same numbers in rank order.
- Gradients assume that every rank of the group computes the same loss from them (Megatron's convention).
- `backend` says what computes: "torch", anywhere; "compiled", the same fused by torch.compile, about twice as fast on a
  CPU with a C++ compiler; "triton", on CUDA (on a CPU in Triton's interpreter); and for hidden rows "fused", which
  tiles the vocabulary where the others cut the rows. ValueError for another, ImportError where Triton is needed and
  absent.

Shapes: N rows (tokens), W views of each, K = W − 1 of them perturbed, V columns of this rank's shard, H hidden size,
R ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cppo.algo import linear_rows, linear_tiles
from megatron_cppo.algo.kernels import Kernels, compiled_kernels, torch_kernels, triton_kernels
from megatron_cppo.algo.shard_statistics import Coefficients, Shard, coefficients, finish, merge, statistics_dtype

Choice = TypeVar("Choice")
# Of logits that exist at once; the kernels need little beside them.
CHUNK_BYTES = 512 * 2**20


class ViewStatistics(NamedTuple):
    """Of W views of N tokens, in nats, all differentiable: the log-prob of the target under every view, the entropy of
    the first (the original), and KL(original‖view) of the K others."""

    logp_WN: Tensor
    entropy_N: Tensor
    kl_KN: Tensor


@dataclass(frozen=True, slots=True)
class LinearBackend:
    """How one rank gets from hidden rows to its shard's sums and back to gradients; see `linear_rows`."""

    sums: Callable[..., Tensor]
    gradients: Callable[..., None]
    kernels: Callable[[torch.device], Kernels]


def _best_kernels(device: torch.device) -> Kernels:
    return triton_kernels() if device.type == "cuda" else torch_kernels()


KERNELS: dict[str, Callable[[torch.device], Kernels]] = {
    "torch": lambda _: torch_kernels(),
    "compiled": lambda _: compiled_kernels(),
    "triton": lambda _: triton_kernels(),
}
BACKENDS: dict[str, LinearBackend] = {
    "torch": LinearBackend(linear_rows.sums, linear_rows.gradients, KERNELS["torch"]),
    "compiled": LinearBackend(linear_rows.sums, linear_rows.gradients, KERNELS["compiled"]),
    "triton": LinearBackend(linear_rows.sums, linear_rows.gradients, KERNELS["triton"]),
    "fused": LinearBackend(linear_tiles.sums, linear_tiles.gradients, _best_kernels),
}


def token_statistics(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    backend: str = "torch",
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and Shannon entropy of each row, both [N], in nats, both differentiable.

    `logits_NV` is this rank's shard, `targets_N` holds vocabulary ids. `overwrite_logits` as in `view_statistics`.
    Raises ValueError for an impossible `vocab_size` or `temperature`.
    """
    logp_1N, entropy_N, _ = view_statistics(
        (logits_NV,),
        targets_N,
        group=group,
        vocab_size=vocab_size,
        temperature=temperature,
        banned_ids=banned_ids,
        backend=backend,
        overwrite_logits=overwrite_logits,
    )
    return logp_1N[0], entropy_N


def kl_divergence(
    logits_p_NV: Tensor,
    logits_q_NV: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    backend: str = "torch",
) -> Tensor:
    """Exact KL(p‖q) of each row over the whole vocabulary, [N], in nats, differentiable in both arguments.

    Rounding can leave a KL of about 0 slightly negative. Raises ValueError for an impossible `vocab_size` or
    `temperature`.
    """
    no_targets_N = torch.full(logits_p_NV.shape[:1], -1, device=logits_p_NV.device)
    return view_statistics(
        (logits_p_NV, logits_q_NV),
        no_targets_N,
        group=group,
        vocab_size=vocab_size,
        temperature=temperature,
        banned_ids=banned_ids,
        backend=backend,
    ).kl_KN[0]


def view_statistics(
    views: Sequence[Tensor],
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    backend: str = "torch",
    overwrite_logits: bool = False,
) -> ViewStatistics:
    """All statistics of W logits [N, V] of the same tokens, the original's first, in one pass over them.

    `overwrite_logits` lets backward write the gradients over the logits, so that no memory beside theirs is needed:
    allowed where nothing reads them after the first backward, which is then also the last (RuntimeError). Raises
    ValueError for views of different shapes, for overwriting logits that share memory, and as `token_statistics` does.
    """
    shapes = {view.shape for view in views}
    if len(shapes) != 1:
        raise ValueError(f"views of the same tokens have one shape, got {sorted(map(tuple, shapes))}")
    if overwrite_logits:
        _check_memory(views)
    shard = _shard(views[0].shape[1], group, vocab_size, temperature, banned_ids)
    kernels = _chosen(KERNELS, backend)(views[0].device)
    return ViewStatistics(*_LogitStatistics.apply(targets_N, shard, group, kernels, overwrite_logits, *views))


def linear_statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    backend: str = "torch",
    chunk_bytes: int = CHUNK_BYTES,
    num_constant: int = 0,
    weight_total_VH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_statistics` of the logits `hidden_NH @ weight_VHᵀ`, of which `chunk_bytes` exist at a time (at least
    one row, with "fused" 512 columns).

    The hidden rows' gradient is this rank's part of it, the sum over its own vocabulary shard: the caller adds the
    parts up over `group`, as the backward of Megatron's copy and gather regions does. The weight's gradient is
    complete; with `weight_total_VH` (float32, Megatron's `main_grad`) it is added to that, and autograd gets none. The
    last `num_constant` rows are constants: no gradient flows through them, and they cost nothing backward. The weight's
    banned rows must be finite; its padding may hold anything. Raises ValueError as `token_statistics` does.
    """
    if not 0 <= num_constant <= len(hidden_NH):
        raise ValueError(
            f"num_constant {num_constant} of {len(hidden_NH)} rows; give how many of the last are constants"
        )
    shard = _shard(weight_VH.shape[0], group, vocab_size, temperature, banned_ids)
    how = _Linear(shard, group, _chosen(BACKENDS, backend), chunk_bytes, num_constant, False, weight_total_VH)
    logp_1N, entropy_N, _ = _LinearStatistics.apply(weight_VH, targets_N, how, hidden_NH)
    return logp_1N[0], entropy_N


def linear_divergence(
    hidden_p_NH: Tensor,
    hidden_q_NH: Tensor,
    weight_VH: Tensor,
    *,
    stop_gradient_q: bool = False,
    **options: Any,
) -> Tensor:
    """`kl_divergence` of the logits of two hidden rows under one head, differentiable in both rows and the weight.

    `stop_gradient_q` makes q a constant: neither `hidden_q_NH` nor, through q, the weight gets a gradient. Options,
    gradients and errors are those of `linear_view_statistics`.
    """
    no_targets_N = torch.full(hidden_p_NH.shape[:1], -1, device=hidden_p_NH.device)
    views = (hidden_p_NH, hidden_q_NH)
    given = linear_view_statistics(views, weight_VH, no_targets_N, stop_gradient_views=stop_gradient_q, **options)
    return given.kl_KN[0]


def linear_view_statistics(
    hiddens: Sequence[Tensor],
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    backend: str = "torch",
    chunk_bytes: int = CHUNK_BYTES,
    stop_gradient_views: bool = False,
    weight_total_VH: Tensor | None = None,
) -> ViewStatistics:
    """`view_statistics` of the logits of W hidden rows [N, H] of the same tokens, the original's first.

    `stop_gradient_views` makes the K others constants. Gradients and errors are those of `linear_statistics`.
    """
    shapes = {hidden.shape for hidden in hiddens}
    if len(shapes) != 1:
        raise ValueError(f"views of the same tokens have one shape, got {sorted(map(tuple, shapes))}")
    shard = _shard(weight_VH.shape[0], group, vocab_size, temperature, banned_ids)
    how = _Linear(shard, group, _chosen(BACKENDS, backend), chunk_bytes, 0, stop_gradient_views, weight_total_VH)
    return ViewStatistics(*_LinearStatistics.apply(weight_VH, targets_N, how, *hiddens))


def _check_memory(views: Sequence[Tensor]) -> None:
    """Raises ValueError where writing one element could change another."""
    spans = sorted(
        (view.data_ptr(), view.data_ptr() + ((len(view) - 1) * view.stride(0) + view.shape[1]) * view.element_size())
        for view in views
        if view.numel()
    )
    if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError("overwrite_logits needs views that share no memory, got two that overlap; clone one")
    if any(len(view) > 1 and view.stride(0) < view.shape[1] for view in views):
        raise ValueError("overwrite_logits needs rows that share no memory, got an expanded tensor; clone it")


def _shard(
    width: int, group: dist.ProcessGroup | None, vocab_size: int, temperature: float, banned_ids: Sequence[int]
) -> Shard:
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    return Shard.of_rank(
        rank,
        world_size=world_size,
        width=width,
        vocab_size=vocab_size,
        temperature=temperature,
        banned_ids=banned_ids,
    )


def _chosen(choices: dict[str, Choice], name: str) -> Choice:
    if name not in choices:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(choices)}")
    return choices[name]


def _over_ranks(sums_W4N: Tensor, group: dist.ProcessGroup | None, inverse_temperature: float) -> Tensor:
    """Every rank's sums, merged and turned into statistics [W, 4, N]: the one collective."""
    if group is not None and group.size() > 1:
        sums_RW4N = sums_W4N.new_empty(group.size(), *sums_W4N.shape)
        dist.all_gather(list(sums_RW4N), sums_W4N.contiguous(), group=group)
        sums_W4N = merge(sums_RW4N, inverse_temperature)
    return finish(sums_W4N, inverse_temperature)


def _outputs(statistics_W4N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return statistics_W4N[:, 2].clone(), statistics_W4N[0, 3].clone(), statistics_W4N[1:, 3].clone()


def _coefficients(statistics_W4N: Tensor, grads: tuple[Any, ...], shard: Shard) -> Coefficients:
    """From the gradients of `_outputs`; None for those that the loss does not use."""
    logp_grad_WN, entropy_grad_N, kl_grad_KN = grads
    if logp_grad_WN is None:
        logp_grad_WN = torch.zeros_like(statistics_W4N[:, 2])
    if len(statistics_W4N) == 1:
        kl_grad_KN = None
    return coefficients(statistics_W4N, logp_grad_WN, entropy_grad_N, kl_grad_KN, shard.inverse_temperature)


class _LogitStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        targets_N: Tensor,
        shard: Shard,
        group: dist.ProcessGroup | None,
        kernels: Kernels,
        overwrite: bool,
        *views: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics_W4N = _over_ranks(kernels.view_sums(views, targets_N, shard), group, shard.inverse_temperature)
        ctx.save_for_backward(targets_N, statistics_W4N, *views)
        ctx.shard, ctx.kernels, ctx.overwrite, ctx.overwritten = shard, kernels, overwrite, False
        ctx.set_materialize_grads(False)
        return _outputs(statistics_W4N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        if ctx.overwritten:
            raise RuntimeError(
                "a second backward through these statistics: the first has written the gradient over the logits; "
                "pass overwrite_logits=False to keep them"
            )
        targets_N, statistics_W4N, *views = ctx.saved_tensors
        ctx.overwritten = ctx.overwrite
        given = _coefficients(statistics_W4N, grad_outputs, ctx.shard)
        plain = [view.detach() for view in views]
        out = [
            None if not needed else view if ctx.overwrite else torch.empty_like(view)
            for view, needed in zip(plain, ctx.needs_input_grad[5:], strict=True)
        ]
        ctx.kernels.view_gradients(plain, targets_N, given, ctx.shard, out)
        if ctx.overwrite:  # kernels that torch knows nothing of do not say that they wrote
            torch.autograd.graph.increment_version([view for view in out if view is not None])
        return *[None] * 5, *out


@dataclass(frozen=True, slots=True)
class _Linear:
    """How the linear functions compute."""

    shard: Shard
    group: dist.ProcessGroup | None
    backend: LinearBackend
    chunk_bytes: int
    num_constant: int
    stop_gradient_views: bool
    weight_total_VH: Tensor | None


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_VH: Tensor, targets_N: Tensor, how: _Linear, *hiddens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = how.backend.kernels(weight_VH.device)
        sums_W4N = how.backend.sums(hiddens, weight_VH, targets_N, how.shard, kernels, how.chunk_bytes)
        statistics_W4N = _over_ranks(sums_W4N, how.group, how.shard.inverse_temperature)
        ctx.save_for_backward(weight_VH, targets_N, statistics_W4N, *hiddens)
        ctx.how, ctx.kernels = how, kernels
        ctx.set_materialize_grads(False)
        return _outputs(statistics_W4N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        weight_VH, targets_N, statistics_W4N, *hiddens = ctx.saved_tensors
        how: _Linear = ctx.how
        needs_weight = ctx.needs_input_grad[0]
        rows = slice(0, targets_N.numel() - how.num_constant)
        dtype = statistics_dtype(weight_VH)
        constant = [number > 0 and how.stop_gradient_views for number in range(len(hiddens))]
        # A row that needs no gradient of its own is still what the weight needs one through.
        totals = [
            torch.zeros_like(hidden_NH, dtype=dtype) if (needed or needs_weight) and not still else None
            for hidden_NH, needed, still in zip(hiddens, ctx.needs_input_grad[3:], constant, strict=True)
        ]
        weight_total_VH = how.weight_total_VH if needs_weight else None
        if needs_weight and weight_total_VH is None:
            weight_total_VH = torch.zeros_like(weight_VH, dtype=dtype)
        how.backend.gradients(
            [hidden_NH[rows] for hidden_NH in hiddens],
            weight_VH,
            targets_N[rows],
            _coefficients(statistics_W4N, grad_outputs, how.shard).rows(rows),
            how.shard,
            ctx.kernels,
            how.chunk_bytes,
            [None if total_NH is None else total_NH[rows] for total_NH in totals],
            weight_total_VH,
        )
        weight_grad_VH = None
        if weight_total_VH is not None and how.weight_total_VH is None:
            weight_grad_VH = weight_total_VH.to(weight_VH.dtype)
        grads = [
            total_NH.to(hidden_NH.dtype) if total_NH is not None and needed else None
            for total_NH, hidden_NH, needed in zip(totals, hiddens, ctx.needs_input_grad[3:], strict=True)
        ]
        return weight_grad_VH, None, None, *grads
