"""Passes of a mini-batch through Megatron-Core's schedules: an update, or a scoring pass without gradient.

Owns what happens between packed rows and numbers: the forward step, the reduction of gradients and of metrics. The
loss itself is the objective's. Only the last pipeline stage sees losses and log-probs; what is returned is shared
with all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_cppo.algo.objective import Counts, Objective, Outcome, Tokens
from megatron_cppo.config import AlgorithmConfig, PerceptionConfig
from megatron_cppo.policy.build import Trained
from megatron_cppo.policy.groups import Groups
from megatron_cppo.policy.head import NOTHING, Head, HeadSettings, Memory
from megatron_cppo.types import Batch, MicroBatch, MiniBatch, Sample, SampleStatistics

RowFunction = Callable[[MicroBatch, Head], tuple[Tensor, Any]]
"""A row and its head -> the differentiable contribution, and what to keep of the row."""
Seen = tuple[MicroBatch, Outcome]
"""A row that was run, with its outcome."""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What the loss needs beside the batch; `algorithm` with the plan's correction, never "auto"."""

    objective: Objective
    algorithm: AlgorithmConfig
    perception: PerceptionConfig
    max_response_tokens: int
    head: HeadSettings


def ignore(_: int) -> None:
    """Progress that nobody watches."""


def finalize_gradients(groups: Groups) -> Callable[..., None]:
    """Megatron-Core's reduction of gradients, then the vision tower's sum over TP: each rank encoded its own images.

    Losses are already divided by known counts, so nothing is divided by the schedule's token count.
    """

    def finalize(model: list[Any], _num_tokens: Tensor | None = None, **options: Any) -> None:
        finalize_model_grads(model, None, **options)
        gradients = [  # of the first stage; the others hold no tower
            parameter.main_grad
            for chunk in model
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad and ".visual." in f".{name}"
        ]
        if gradients and groups.tensor.size() > 1:
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat, group=groups.tensor)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    return finalize


def run_rows(
    trained: Trained,
    rows: Sequence[MicroBatch],
    function: RowFunction,
    *,
    head: HeadSettings,
    forward_only: bool,
    memory: Memory = NOTHING,
    advance: Callable[[int], None] = ignore,
) -> list[Any]:
    """Run `rows` through the schedule; returns what `function` kept of each on the last stage, else nothing.

    `memory` holds what the rows' `constants` name, on the last stage. `advance(n)` hears of n more rows that this stage
    has sent on.
    """

    last = trained.chunks[-1]

    def forward_step(iterator: Iterator[MicroBatch], wrapped: Any) -> tuple[Tensor, Any]:
        row = next(iterator)

        def loss(hidden_L1H: Tensor) -> tuple[Tensor, Tensor, Any]:
            value, kept = function(row, Head(last, row, hidden_L1H, head, memory))
            return value, torch.zeros((), dtype=torch.int, device=value.device), kept

        hidden_L1H = wrapped(row)
        if wrapped is trained.wrapped[-1]:
            advance(1)
        return hidden_L1H, loss

    pipeline, several = trained.groups.pipeline, len(trained.wrapped) > 1
    neighbours = P2PCommunicator(pipeline, trained.config) if pipeline.size() > 1 else None
    schedule = get_forward_backward_func(pp_size=pipeline.size(), vp_size=len(trained.wrapped) if several else None)
    with torch.set_grad_enabled(not forward_only):
        return schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in trained.wrapped] if several else iter(rows),
            model=list(trained.wrapped),
            num_microbatches=len(rows),
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=neighbours,
            pg_collection=trained.groups.collection,
        )


def score(trained: Trained, batch: Batch, *, head: HeadSettings, advance: Callable[[int], None]) -> tuple[Tensor, ...]:
    """Log-probs of every sample's response tokens under the weights as they are, on all ranks.

    Communicates: each replica scores its rows, all ranks receive all.
    """
    assert batch.scoring is not None, "the batch was planned without a scoring pass"
    groups = trained.groups

    def rows_logp(row: MicroBatch, rows_head: Head) -> tuple[Tensor, dict[int, Tensor]]:
        logp_N, _ = rows_head.statistics(row.rows_original_N.to(trained.device), row.targets_N.to(trained.device))
        pieces = logp_N.detach().cpu().split(torch.bincount(row.sample_N, minlength=len(row.sample_ids)).tolist())
        return logp_N.sum(), {i: piece.clone() for i, piece in zip(row.sample_ids, pieces, strict=True) if i >= 0}

    rows = batch.scoring.microbatches[groups.data_rank]
    kept = run_rows(trained, rows, rows_logp, head=head, forward_only=True, advance=advance)
    every: dict[int, Tensor] = {}
    for part in (row for replica in groups.from_last_stages(kept) for row in replica):
        every |= part
    return tuple(every[i] for i in range(len(batch.samples)))


def update(
    trained: Trained, batch: Batch, mini: MiniBatch, settings: LossSettings, advance: Callable[[int], None]
) -> tuple[dict[str, float], list[Seen]]:
    """One optimizer update on `mini`, or none where loss or gradient are not finite.

    Returns its metrics, the same on all ranks, and what this rank saw (on the last stage). `optim/skipped_updates` is
    1 when nothing was updated: weights, optimizer state and learning-rate schedule are as before.
    """
    kept = gradients(trained, batch, mini, settings, advance)
    losses = [outcome.loss for _, outcome in kept]
    metrics = reduce_metrics([outcome.metrics for _, outcome in kept], trained.groups)
    grad_norm, applied = _apply(trained, losses)
    metrics["optim/grad_norm"] = grad_norm
    metrics["optim/learning_rate"] = float(trained.optimizer.param_groups[0]["lr"])
    metrics["optim/skipped_updates"] = float(not applied)
    return metrics, kept


def gradients(
    trained: Trained, batch: Batch, mini: MiniBatch, settings: LossSettings, advance: Callable[[int], None] = ignore
) -> list[Seen]:
    """Leave `mini`'s reduced gradients in the model's gradient buffers; returns what the last stage saw."""
    groups = trained.groups
    memory = _constant_views(trained, mini, settings, advance)
    counts = _counts(trained, batch, mini, settings, memory, advance)

    for wrapped in trained.wrapped:
        wrapped.zero_grad_buffer()
    trained.optimizer.zero_grad()
    rows = mini.microbatches[groups.data_rank]
    function = contribution(trained.device, batch, counts, settings)
    return run_rows(trained, rows, function, head=settings.head, forward_only=False, memory=memory, advance=advance)


def contribution(device: torch.device, batch: Batch, counts: Counts, settings: LossSettings) -> RowFunction:
    """What a row adds to the loss, as a function of the row and its head; what it keeps is `Seen`."""

    def of_row(row: MicroBatch, head: Head) -> tuple[Tensor, Seen]:
        tokens = response_tokens(row, batch, device, corrected=settings.algorithm.correction != "none")
        outcome = settings.objective.loss(tokens, head, counts, settings.algorithm, settings.perception)
        _add_engine_gap(row, batch, tokens, outcome)
        loss, outcome.loss = outcome.loss, outcome.loss.detach()  # what is kept must not keep the graph
        return loss, (row, outcome)

    return of_row


def _constant_views(
    trained: Trained, mini: MiniBatch, settings: LossSettings, advance: Callable[[int], None]
) -> Memory:
    """A pass without gradient over the perturbed segments that are constants: what the last stage remembers of them."""
    if not mini.constant_views:
        return NOTHING

    def keep(row: MicroBatch, head: Head) -> tuple[Tensor, dict[Any, Any]]:
        return torch.zeros((), device=trained.device), dict(head.keep(row))

    rows = mini.constant_views[trained.groups.data_rank]
    kept = run_rows(trained, rows, keep, head=settings.head, forward_only=True, advance=advance)
    return {key: remembered for part in kept for key, remembered in part.items()}


def _apply(trained: Trained, losses: Sequence[Tensor]) -> tuple[float, bool]:
    """Update the weights when every loss and the gradient norm are finite, on all ranks or on none.

    Returns the gradient norm and whether it was done. The gradient norm is the same on all ranks, as it is a sum over
    them; losses are known to the last stage alone.
    """
    optimizer = trained.optimizer
    unusable = torch.tensor(float(not all(bool(loss.isfinite()) for loss in losses)), device=trained.device)
    dist.all_reduce(unusable, op=dist.ReduceOp.MAX, group=trained.groups.world)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if unusable or not math.isfinite(grad_norm):
        return grad_norm, False
    trained.schedule.step(1)  # before the update, so that the first one of a warm-up does not have rate zero
    optimizer.step()
    return grad_norm, True


def _counts(
    trained: Trained,
    batch: Batch,
    mini: MiniBatch,
    settings: LossSettings,
    memory: Memory,
    advance: Callable[[int], None],
) -> Counts:
    """The mini-batch's counts; the masked tokens of all ranks, where they were planned to be counted, by a pass without
    gradient."""
    counts = Counts(
        num_tokens=mini.num_tokens,
        num_samples=mini.num_samples,
        num_gated_samples=mini.num_gated_samples,
        num_microbatches=sum(len(rows) for rows in mini.microbatches),
        max_response_tokens=settings.max_response_tokens,
    )
    count_masked = settings.objective.count_masked
    if not mini.counting or count_masked is None:
        return counts

    def masked(row: MicroBatch, head: Head) -> tuple[Tensor, int]:
        count = count_masked(response_tokens(row, batch, trained.device), head, settings.perception)
        return torch.zeros((), device=trained.device), count

    rows = mini.counting[trained.groups.data_rank]
    mine = run_rows(trained, rows, masked, head=settings.head, forward_only=True, memory=memory, advance=advance)
    return dataclasses.replace(counts, num_masked_tokens=max(1, sum(trained.groups.from_last_stages(sum(mine)))))


def response_tokens(row: MicroBatch, batch: Batch, device: torch.device, *, corrected: bool = False) -> Tokens:
    """The row's response tokens with their samples' advantages, lengths and scores, on `device`.

    With the engine's log-probs where the loss is to be `corrected` for their gap.
    """
    samples = [batch.samples[i] if i >= 0 else None for i in row.sample_ids]
    lengths_S = torch.bincount(row.sample_N, minlength=len(samples))
    sample_N = row.sample_N
    weight_S = torch.tensor([float(sample is not None) for sample in samples])
    advantage_S = torch.tensor([0.0 if sample is None else sample.advantage for sample in samples])

    def scores(values: tuple[Tensor, ...] | None) -> Tensor | None:
        if values is None:
            return None
        parts = [
            values[i] if i >= 0 else torch.zeros(n) for i, n in zip(row.sample_ids, lengths_S.tolist(), strict=True)
        ]
        return torch.cat(parts).to(device)

    return Tokens(
        targets_N=row.targets_N.to(device),
        sample_N=sample_N.to(device),
        weight_N=weight_S[sample_N].to(device),
        length_N=lengths_S[sample_N].to(device),
        advantage_N=advantage_S[sample_N].to(device),
        rows_original_N=row.rows_original_N.to(device),
        rows_preserving_N=row.rows_preserving_N.to(device),
        rows_removing_N=row.rows_removing_N.to(device),
        old_logp_N=scores(batch.old_logp),
        behaviour_logp_N=_engine_logp(samples, lengths_S).to(device) if corrected else None,
        reference_logp_N=scores(batch.reference_logp),
    )


def _engine_logp(samples: Sequence[Sample | None], lengths_S: Tensor) -> Tensor:
    """The engine's log-probs of a row's tokens, [N]; inf for fillers, and for samples without any."""
    parts = [
        sample.logp if sample is not None and sample.logp else (math.inf,) * length
        for sample, length in zip(samples, lengths_S.tolist(), strict=True)
    ]
    return torch.tensor([value for logp in parts for value in logp])


def _add_engine_gap(row: MicroBatch, batch: Batch, tokens: Tokens, outcome: Outcome) -> None:
    """Mean |log-prob of the engine - of the policy|, over the row's tokens."""
    samples = [batch.samples[i] for i in row.sample_ids if i >= 0]
    if outcome.logp_N is None or not samples or not all(sample.logp for sample in samples):
        return
    engine_N = torch.tensor([value for sample in samples for value in sample.logp], device=outcome.logp_N.device)
    gap = (engine_N - outcome.logp_N[tokens.weight_N > 0]).abs().sum()
    outcome.metrics["policy/logp_gap"] = (gap, torch.tensor(float(engine_N.numel())))


def reduce_metrics(rows: Sequence[dict[str, tuple[Tensor, Tensor]]], groups: Groups) -> dict[str, float]:
    """Sum the last stages' (sum, count) pairs over rows and replicas, then divide; the same on all ranks."""
    mine: dict[str, tuple[float, float]] = {}
    for metrics in rows:
        for name, (total, count) in metrics.items():
            old = mine.get(name, (0.0, 0.0))
            mine[name] = (old[0] + float(total), old[1] + float(count))
    sums: dict[str, tuple[float, float]] = {}
    for part in groups.from_last_stages(mine):
        for name, (total, count) in part.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + total, old[1] + count)
    return {name: total / count for name, (total, count) in sorted(sums.items()) if count}


def sample_statistics(row: MicroBatch, outcome: Outcome) -> Iterator[SampleStatistics]:
    """What the update saw of each sample of a row, for the log."""
    assert outcome.logp_N is not None, "the objective kept no log-probs"
    counts = torch.bincount(row.sample_N, minlength=len(row.sample_ids)).tolist()

    def pieces(values_N: Tensor | None) -> list[list[Any]]:
        return [[] for _ in counts] if values_N is None else [part.tolist() for part in values_N.split(counts)]

    columns = zip(
        row.sample_ids,
        pieces(outcome.logp_N),
        pieces(outcome.entropy_N),
        pieces(outcome.entropy_removing_N),
        pieces(outcome.mask_N),
        row.rows_removing_N.split(counts),
        strict=True,
    )
    for index, logp, entropy, removing, mask, removing_rows in columns:
        if index >= 0:
            perturbed = outcome.mask_N is not None and bool((removing_rows >= 0).all())
            yield SampleStatistics(
                sample_id=index,
                logp=tuple(logp),
                entropy=tuple(entropy),
                entropy_removing=tuple(removing) if perturbed else None,
                mask=tuple(mask) if perturbed else None,
            )
