"""Runs one mini-batch through the policy in a layout and brings back loss, gradients and logits under HF names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch, passes_of
from megatron_cppo.plan import packing_of
from megatron_cppo.types import Batch, Group, Sample, SampleStatistics
from tests.distributed import tiny_model

VOCAB = 131
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"policy__tensor_parallel": 2},
    "TP2+SP": {"policy__tensor_parallel": 2, "policy__sequence_parallel": True},
    "DP2": {},
    "DP2 distributed optimizer": {"policy__distributed_optimizer": True},
    "TP2+SP recompute full": {
        "policy__tensor_parallel": 2,
        "policy__sequence_parallel": True,
        "policy__recompute": "full",
    },
    "TP2 recompute selective": {"policy__tensor_parallel": 2, "policy__recompute": "selective"},
    "CP2": {"policy__context_parallel": 2},
    "PP2": {"policy__pipeline_parallel": 2},
    "PP2 recompute full": {"policy__pipeline_parallel": 2, "policy__recompute": "full"},
    "PP2xDP2": {"policy__pipeline_parallel": 2},
    "PP2xDP2 distributed optimizer": {"policy__pipeline_parallel": 2, "policy__distributed_optimizer": True},
    "TP2xPP2": {"policy__tensor_parallel": 2, "policy__pipeline_parallel": 2},
    "TP2xPP2+SP": {
        "policy__tensor_parallel": 2,
        "policy__pipeline_parallel": 2,
        "policy__sequence_parallel": True,
    },
}


def world(name: str) -> int:
    """Ranks of a layout."""
    fields = LAYOUTS[name]
    axes = ("tensor_parallel", "context_parallel", "pipeline_parallel")
    model = math.prod(fields.get(f"policy__{axis}", 1) for axis in axes)
    return model * (2 if "DP2" in name else 1)


WORLD = {name: world(name) for name in LAYOUTS}


@dataclass(frozen=True)
class Case:
    """One run: a checkpoint, a layout's fields, the objective's, and how the batch is cut and ordered. `gated` are the
    samples with a positive advantage, by number; None leaves the advantages as they are made. With `scores`, `engine`
    makes up log-probs of an engine, too. Rows are padded as for the precision `padded_for`."""

    folder: str
    fields: dict[str, Any]
    reverse: bool = False
    scores: bool = False
    logits: bool = False
    num_updates: int = 1
    gated: tuple[int, ...] | None = None
    engine: bool = False
    padded_for: str = "fp32"


@dataclass(frozen=True)
class Answer:
    """What a layout computed; gradients and logits only on rank 0's request."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    statistics: list[SampleStatistics]
    logits: list[Tensor]
    weights: dict[str, Tensor]
    num_rows: int
    row_tokens: tuple[int, ...]


def run_cases(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Answer]:
    """All `cases` in one process group; top-level, for `run_distributed`."""
    return {name: run_case(case, world_size) for name, case in cases.items()}


def groups_of(case: Case) -> list[Group]:
    groups = tiny_model.make_groups(6, 3, vocab_size=VOCAB)
    if case.gated is not None:
        groups = [_gated(group, range(3 * number, 3 * number + 3), case.gated) for number, group in enumerate(groups)]
    return groups[::-1] if case.reverse else groups


def _gated(group: Group, numbers: Sequence[int], chosen: Sequence[int]) -> Group:
    samples = zip(group.samples, numbers, strict=True)
    return Group(
        group.prompt,
        tuple(dataclasses.replace(s, advantage=abs(s.advantage) * (1 if n in chosen else -1)) for s, n in samples),
    )


def run_case(case: Case, world_size: int) -> Answer:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(case.folder, world_size, **case.fields)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    padded = tiny_model.make_config(case.folder, world_size, **case.fields, policy__precision=case.padded_for)
    batch = build_batch(
        groups_of(case),
        views_for=OBJECTIVES[config.algorithm.objective].views_for,
        num_updates=case.num_updates,
        packing=packing_of(padded, plan.data_parallel),
        score=True,
        constant_views=config.perception.stop_gradient_views,
        count_masked=config.perception.aggregation == "global",
    )
    if case.scores:
        scored = policy.score(batch, old=True, reference=False)
        batch = with_drifted_scores(with_engine_logp(scored) if case.engine else scored)
    logits = sample_logits(policy, batch) if case.logits else []
    metrics = policy.update(batch)
    gradients = (
        {} if config.policy.distributed_optimizer and plan.data_parallel > 1 else dict(_copies(policy.gradients()))
    )
    answer = Answer(
        metrics=metrics,
        gradients=gradients,
        statistics=policy.statistics(),
        logits=logits,
        weights=dict(_copies(policy.weights())),
        num_rows=sum(len(rows) for mini in batch.updates for ranks in passes_of(mini) for rows in ranks),
        row_tokens=tuple(
            len(row.token_ids_T)
            for mini in batch.updates
            for ranks in passes_of(mini)
            for rows in ranks
            for row in rows
        ),
    )
    process_groups.destroy()
    return answer


def _copies(stream: Any) -> Any:
    return ((name, tensor.detach().clone()) for name, tensor in stream)


def with_drifted_scores(batch: Batch) -> Batch:
    """Old and reference log-probs that differ from the policy's, by an offset that depends on the sample alone."""
    assert batch.old_logp is not None, "score first"
    old, reference = drifted(batch.samples, batch.old_logp)
    return dataclasses.replace(batch, old_logp=tuple(old), reference_logp=tuple(reference))


def with_engine_logp(batch: Batch) -> Batch:
    """Samples whose engine was not the policy, by an offset that depends on the sample alone."""
    assert batch.old_logp is not None, "score first"
    engine = engine_logp(batch.samples, batch.old_logp)
    samples = [dataclasses.replace(s, logp=tuple(v.tolist())) for s, v in zip(batch.samples, engine, strict=True)]
    return dataclasses.replace(batch, samples=tuple(samples))


def engine_logp(samples: Sequence[Sample], logp: Sequence[Tensor]) -> list[Tensor]:
    """An engine's log-probs of samples whose log-probs are `logp`."""
    found = []
    for sample, values in zip(samples, logp, strict=True):
        generator = torch.Generator().manual_seed(1000 * sample.prompt.row + sample.index + 500)
        found.append(values + 0.3 * torch.randn(values.shape, generator=generator))
    return found


def drifted(samples: Sequence[Sample], logp: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Old and reference log-probs of samples whose log-probs are `logp`."""
    old, reference = [], []
    for sample, values in zip(samples, logp, strict=True):
        generator = torch.Generator().manual_seed(1000 * sample.prompt.row + sample.index)
        old.append(values + 0.3 * torch.randn(values.shape, generator=generator))
        reference.append(values + 0.3 * torch.randn(values.shape, generator=generator))
    return old, reference


def sample_logits(policy: Any, batch: Batch) -> list[Tensor]:
    """Logits [tokens, V] that predict each sample's response, whole, by the policy's own forward pass."""
    from megatron_cppo.policy import step
    from megatron_cppo.policy.head import HeadSettings

    tensor, context = policy.groups.tensor, policy.groups.context
    vocab_size = policy.trained.shape.vocab_size

    def keep(row: Any, head: Any) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        rows_N = row.rows_original_N
        share = head.share(rows_N) if context.size() > 1 else None
        local = head.hidden_CH[rows_N if share is None else share.local_n] @ head.weight_VH.t()
        parts = [torch.empty_like(local) for _ in range(tensor.size())]
        dist.all_gather(parts, local.contiguous(), group=tensor)
        whole = torch.cat(parts, dim=1)[:, :vocab_size]
        if share is not None:
            whole = share.whole(whole.t()).t()
        counts = torch.bincount(row.sample_N).tolist()
        return whole.sum(), list(zip(row.sample_ids, whole.split(counts), strict=True))

    assert batch.scoring is not None, "plan the batch with score=True"
    rows = batch.scoring.microbatches[policy.groups.data_rank]
    kept = step.run_rows(policy.trained, rows, keep, head=HeadSettings(1.0, (), "torch"), forward_only=True)
    every = policy.groups.from_last_stages([pair for pairs in kept for pair in pairs])
    by_sample = {index: logits for part in every for index, logits in part if index >= 0}
    return [by_sample[i] for i in range(len(batch.samples))]


def relative_l2(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, in float64; for a zero reference, the norm of what was found."""
    scale = wanted.double().norm().item()
    return (found.double() - wanted.double()).norm().item() / (scale or 1.0)


def checkpoint(folder: Path, **variant: Any) -> str:
    return tiny_model.make_checkpoint(folder, vocab_size=VOCAB, **variant)
