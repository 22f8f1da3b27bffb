"""A mini-batch in float64 for the objectives: samples, a real head that notes what it is asked, and the equations.

Every sample has hidden states of its own for each view, so that gradients can be compared over any packing. The dense
computation is written from the paper's equations: loops over samples, the whole vocabulary, autograd.
Shapes: T tokens of a row, H hidden size, V vocabulary, N response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_cppo.algo.correction import CORRECTIONS
from megatron_cppo.algo.objective import OBJECTIVES, Counts, Outcome, Tokens
from megatron_cppo.algo.vocab_parallel import linear_statistics, linear_view_statistics
from megatron_cppo.config import AlgorithmConfig, PerceptionConfig
from megatron_cppo.data.packing import Member, pack
from megatron_cppo.plan import Packing
from megatron_cppo.types import VIEWS, ImageGrid, Prompt, Sample, View

HIDDEN_SIZE, VOCAB_SIZE, BANNED = 7, 23, (4, 5)
TEMPERATURE = 0.8
OPTIONS: dict[str, Any] = {
    "group": None,
    "vocab_size": VOCAB_SIZE,
    "temperature": TEMPERATURE,
    "banned_ids": BANNED,
}
GRID = ImageGrid(1, 2, 2, 2)
Segment = tuple[int, View]
Gradients = dict[Segment | str, Tensor]

# (images, response tokens, advantage): gated ones, one of a single token; text-only, negative and zero ones.
SAMPLES = ((1, 6, 0.9), (1, 8, -0.7), (2, 1, 0.4), (0, 5, 1.1), (1, 9, 0.3), (0, 3, -0.2), (1, 4, 0.0), (2, 7, 1.3))
GATED = (0, 2, 4, 7)


def make_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for row, (num_images, length, advantage) in enumerate(SAMPLES):
        prompt_ids = (10, *[4] * num_images, 11)
        positions = (tuple(range(len(prompt_ids))),) * 3
        slots = tuple(range(1, 1 + num_images))
        prompt = Prompt("t", row, 0, "", "", "", prompt_ids, positions, len(prompt_ids), (GRID,) * num_images, slots)
        answer = (6 + torch.randint(VOCAB_SIZE - 6, (length,), generator=generator)).tolist()
        samples.append(Sample(prompt, 0, tuple(answer), (), "", False, 0, advantage=advantage))
    return samples


class Problem:
    """Samples with hidden states of their own for each view, so that gradients can be compared over any packing."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.samples = make_samples()
        self.weight_VH = (0.6 * normal(VOCAB_SIZE, HIDDEN_SIZE)).requires_grad_()
        self.hidden: dict[Segment, Tensor] = {}
        self.old_logp: list[Tensor] = []
        self.reference_logp: list[Tensor] = []
        for i, sample in enumerate(self.samples):
            original = normal(len(sample.token_ids), HIDDEN_SIZE)
            nearby = original + 0.1 * normal(*original.shape)
            # Smaller hidden states: the removing view is in more doubt, as it is of a real image.
            away = 0.5 * original + 0.3 * normal(*original.shape)
            for view, hidden in zip(VIEWS, (original, nearby, away), strict=True):
                self.hidden[i, view] = hidden.requires_grad_()
            logp = self.dense(i, "original").gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0].detach()
            self.old_logp.append(logp + 0.3 * normal(len(sample.token_ids)))
            self.reference_logp.append(logp + 0.3 * normal(len(sample.token_ids)))
        # Of a generator of its own, and so far off that every correction cuts some tokens and leaves others.
        generator = torch.Generator().manual_seed(2)
        self.behaviour_logp = [
            old + 0.4 * torch.randn(old.shape, generator=generator, dtype=torch.float64) for old in self.old_logp
        ]

    def dense(self, i: int, view: View) -> Tensor:
        """Log-probabilities [tokens, V] of a segment's response rows."""
        logits = self.hidden[i, view] @ self.weight_VH.t() / TEMPERATURE
        return logits.index_fill(1, torch.tensor(BANNED), -torch.inf).log_softmax(-1)

    def counts(self, num_rows: int) -> Counts:
        return Counts(
            num_tokens=sum(len(sample.token_ids) for sample in self.samples),
            num_samples=len(self.samples),
            num_gated_samples=len(GATED),
            num_microbatches=num_rows,
            max_response_tokens=10,
        )

    def leaves(self) -> Mapping[Segment | str, Tensor]:
        return {**self.hidden, "weight": self.weight_VH}


@dataclass
class RecordingHead:
    """A head on one row's hidden states that notes which rows it was asked for."""

    hidden_TH: Tensor
    weight_VH: Tensor
    asked: list[list[int]] = field(default_factory=list)
    divergences_asked: list[list[list[int]]] = field(default_factory=list)

    def statistics(self, rows_N: Tensor, targets_N: Tensor, *, num_constant: int = 0) -> tuple[Tensor, Tensor]:
        self.asked.append(rows_N.tolist())
        return linear_statistics(
            self.hidden_TH[rows_N], self.weight_VH, targets_N, num_constant=num_constant, **OPTIONS
        )

    def divergences(self, rows_N: Tensor, others: Sequence[Tensor], *, constant_others: bool) -> Tensor:
        self.divergences_asked.append([rows_N.tolist(), *(rows.tolist() for rows in others)])
        hiddens = [self.hidden_TH[rows] for rows in (rows_N, *others)]
        no_targets = torch.full_like(rows_N, -1)
        return linear_view_statistics(
            hiddens, self.weight_VH, no_targets, stop_gradient_views=constant_others, **OPTIONS
        ).kl_KN


@dataclass(frozen=True)
class RowResult:
    """One row's outcome, with what it was computed from."""

    outcome: Outcome
    tokens: Tokens
    head: RecordingHead


FILLER = 5
"""The sample whose tokens a filler (-1) repeats."""


def run_row(
    problem: Problem,
    members: Sequence[int],
    counts: Counts,
    *,
    objective: str,
    algorithm: AlgorithmConfig,
    perception: PerceptionConfig,
    scored: bool,
) -> RowResult:
    """The objective on one packed row; a member of -1 is a filler of zero weight, as the policy makes them."""
    real = [FILLER if i < 0 else i for i in members]
    samples = [problem.samples[i] for i in real]
    views_for = OBJECTIVES[objective].views_for
    views: list[tuple[View, ...]] = [("original",) if i < 0 else tuple(views_for(problem.samples[i])) for i in members]
    row = pack([Member(i, sample, v) for i, sample, v in zip(members, samples, views, strict=True)], Packing())
    hidden_TH = torch.zeros(row.token_ids_T.numel(), HIDDEN_SIZE, dtype=torch.float64)
    by_view = dict(zip(VIEWS, (row.rows_original_N, row.rows_preserving_N, row.rows_removing_N), strict=True))
    for place, i in enumerate(real):
        for view in views[place]:
            rows = by_view[view][row.sample_N == place]
            hidden_TH = hidden_TH.index_copy(0, rows, problem.hidden[i, view])
    lengths = torch.tensor([len(sample.token_ids) for sample in samples])
    advantages = [0.0 if i < 0 else problem.samples[i].advantage for i in members]

    def scores(values: list[Tensor], *, absent: float = 0.0) -> Tensor:
        nothing = torch.full((len(problem.samples[FILLER].token_ids),), absent, dtype=torch.float64)
        return torch.cat([values[i] if i >= 0 else nothing for i in members])

    tokens = Tokens(
        targets_N=row.targets_N,
        sample_N=row.sample_N,
        weight_N=torch.tensor([float(i >= 0) for i in members])[row.sample_N],
        length_N=lengths[row.sample_N],
        advantage_N=torch.tensor(advantages, dtype=torch.float64)[row.sample_N],
        rows_original_N=row.rows_original_N,
        rows_preserving_N=row.rows_preserving_N,
        rows_removing_N=row.rows_removing_N,
        old_logp_N=scores(problem.old_logp) if scored else None,
        behaviour_logp_N=(
            scores(problem.behaviour_logp, absent=torch.inf) if algorithm.correction in CORRECTIONS else None
        ),
        reference_logp_N=scores(problem.reference_logp) if scored else None,
    )
    head = RecordingHead(hidden_TH, problem.weight_VH)
    outcome = OBJECTIVES[objective].loss(tokens, head, counts, algorithm, perception)
    return RowResult(outcome, tokens, head)


def run(
    problem: Problem,
    split: Sequence[Sequence[int]],
    *,
    objective: str,
    algorithm: AlgorithmConfig,
    perception: PerceptionConfig,
    scored: bool,
) -> tuple[Tensor, Gradients, list[RowResult]]:
    """The mini-batch's loss and gradients, summed over the rows of `split` like over micro-batches."""
    row = partial(run_row, problem, objective=objective, algorithm=algorithm, scored=scored)
    counts = problem.counts(len(split))
    if perception.aggregation == "global":
        uncounted = replace(perception, aggregation="sample")
        masks = [row(members, counts, perception=uncounted).outcome.mask_N for members in split]
        counts = replace(counts, num_masked_tokens=sum(int(mask_N.sum()) for mask_N in masks if mask_N is not None))
    results = [row(members, counts, perception=perception) for members in split]
    loss = torch.stack([result.outcome.loss for result in results]).sum()
    return loss.detach(), gradients_of(loss, problem), results


def gradients_of(loss: Tensor, problem: Problem) -> Gradients:
    """In every hidden state and in the head's weight; zero where there is none."""
    leaves = problem.leaves()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def log_probs(problem: Problem, i: int, view: View) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob of each token, entropy, log-probabilities without the banned ids) of a segment."""
    logp_NV = problem.dense(i, view)
    keep = [v for v in range(VOCAB_SIZE) if v not in BANNED]
    kept = logp_NV[:, keep]
    targets_N1 = torch.tensor(problem.samples[i].token_ids)[:, None]
    return logp_NV.gather(1, targets_N1)[:, 0], -(kept.exp() * kept).sum(1), kept


def dense_mask(entropy: Tensor, removing: Tensor) -> list[int]:
    """The better half of the tokens whose entropy rises, by the rise's share in it."""
    score = {t: (b - a) / (b + 1e-6) for t, (a, b) in enumerate(zip(entropy.tolist(), removing.tolist(), strict=True))}
    candidates = sorted((t for t in score if removing[t] > entropy[t]), key=lambda t: -score[t])
    return sorted(candidates[: max(1, len(candidates) // 2)])


def k3(logp: Tensor, other: Tensor) -> Tensor:
    d = (other - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(max=10)


def dense_divergence(kind: str, original: Sequence[Tensor], view: Sequence[Tensor]) -> Tensor:
    if kind == "exact":
        return (original[2].exp() * (original[2] - view[2])).sum(1)
    return k3(original[0], view[0]) if kind == "k3" else (original[0] - view[0]).clamp(-10, 10)


def dense_cpl(problem: Problem, split: Sequence[Sequence[int]], perception: PerceptionConfig) -> Tensor:
    """CPL from the paper's equations: a loop over the gated samples, the whole vocabulary, autograd."""
    per_sample: dict[int, Tensor] = {}
    for i in GATED:
        original, preserving, removing = (log_probs(problem, i, view) for view in VIEWS)
        mask = dense_mask(original[1], removing[1])
        if perception.stop_gradient_views:
            preserving, removing = ([x.detach() for x in values] for values in (preserving, removing))
        d = dense_divergence(perception.divergence, original, preserving)
        d = d - dense_divergence(perception.divergence, original, removing)
        per_sample[i] = torch.nn.functional.softplus(d / perception.temperature)[mask]
    if perception.aggregation == "sample":
        return torch.stack([tokens.mean() if len(tokens) else tokens.sum() for tokens in per_sample.values()]).mean()
    if perception.aggregation == "global":
        return torch.cat(list(per_sample.values())).mean()
    rows = [torch.cat([per_sample[i] for i in members if i in GATED] or [torch.zeros(0)]) for members in split]
    return torch.stack([tokens.mean() if len(tokens) else tokens.sum() for tokens in rows]).sum() / len(split)


def dense_correction(problem: Problem, i: int, algorithm: AlgorithmConfig, scored: bool) -> list[float]:
    """The weight of each token's policy loss, in Python floats."""
    old = problem.old_logp[i] if scored else log_probs(problem, i, "original")[0].detach()
    gaps = [a - b for a, b in zip(old.tolist(), problem.behaviour_logp[i].tolist(), strict=True)]
    level, cut = algorithm.correction.split("_")
    weights = [math.exp(max(-20.0, min(20.0, sum(gaps) if level == "sequence" else gap))) for gap in gaps]
    bound = algorithm.correction_bound
    if cut == "truncate":
        return [min(weight, bound) for weight in weights]
    return [weight if 1 / bound <= weight <= bound else 0.0 for weight in weights]


def dense_policy(problem: Problem, algorithm: AlgorithmConfig, scored: bool) -> Tensor:
    """The clipped surrogate, token mean, with KL and entropy terms."""
    total = torch.zeros((), dtype=torch.float64)
    for i, sample in enumerate(problem.samples):
        logp, entropy, _ = log_probs(problem, i, "original")
        ratio = (logp - (problem.old_logp[i] if scored else logp.detach())).exp()
        clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        tokens = -torch.minimum(sample.advantage * ratio, sample.advantage * clipped)
        if algorithm.dual_clip and sample.advantage < 0:
            tokens = tokens.clamp(max=-algorithm.dual_clip * sample.advantage)
        if algorithm.correction in CORRECTIONS:
            tokens = tokens * torch.tensor(dense_correction(problem, i, algorithm, scored), dtype=torch.float64)
        if scored:
            tokens = tokens + algorithm.beta * k3(logp, problem.reference_logp[i])
        total = total + (tokens - algorithm.entropy_coefficient * entropy).sum()
    return total / sum(len(sample.token_ids) for sample in problem.samples)
