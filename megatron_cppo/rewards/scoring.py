"""Groups of samples -> the same groups with rewards and advantages, graded once and shared with every rank.

Knows groups and ranks, so that `grader.py` need not. A grade is made on one rank only: two ranks could disagree about
a sample that ran into its deadline, and then about everything that follows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from megatron_cppo.algo.advantages import group_advantages
from megatron_cppo.rewards.grader import Grade, GradeItem, Grader
from megatron_cppo.types import Group, Sample


class Reward:
    """Callable on a step's groups, by all ranks of `group` together; each grades its share of the prompts."""

    def __init__(self, grader: Grader, *, normalize_std: bool, tolerance: float, group: dist.ProcessGroup) -> None:
        self._grader, self._group = grader, group
        self._normalize_std, self._tolerance = normalize_std, tolerance

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with `reward`, `rewards`, `grading` and `advantage` of every sample filled."""
        rank, size = self._group.rank(), self._group.size()
        every: list[Any] = [None] * size
        dist.all_gather_object(every, self._grades(groups[rank::size]), group=self._group)
        graded = [
            [
                _with_grade(sample, grade)
                for sample, grade in zip(group.samples, every[i % size][i // size], strict=True)
            ]
            for i, group in enumerate(groups)
        ]
        flat = [sample for samples in graded for sample in samples]
        owner = [i for i, samples in enumerate(graded) for _ in samples]
        advantages = group_advantages(
            torch.tensor([sample.reward for sample in flat]),
            torch.tensor(owner),
            normalize_std=self._normalize_std,
            tolerance=self._tolerance,
        ).tolist()
        final = iter(dataclasses.replace(s, advantage=a) for s, a in zip(flat, advantages, strict=True))
        return [Group(group.prompt, tuple(next(final) for _ in group.samples)) for group in groups]

    def _grades(self, groups: Sequence[Group]) -> list[list[Grade]]:
        """All answers in one call, so that many are graded at once and one that hangs holds up nothing else."""
        items = [
            GradeItem(sample.text, group.prompt.ground_truth, group.prompt.data_source)
            for group in groups
            for sample in group.samples
        ]
        grades = iter(self._grader.grade(items))
        return [[next(grades) for _ in group.samples] for group in groups]


def _with_grade(sample: Sample, grade: Grade) -> Sample:
    return dataclasses.replace(sample, reward=grade.total, rewards=grade.parts, grading=grade.status)


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """A step's metrics of its graded samples."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = torch.tensor([sample.reward for sample in samples])
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        "response/length": fmean(len(sample.token_ids) for sample in samples),
        "response/truncated_share": fmean(sample.truncated for sample in samples),
        "tokens/response": float(sum(len(sample.token_ids) for sample in samples)),
        "groups/informative_share": fmean(any(sample.advantage for sample in group.samples) for group in groups),
        "samples/gated_share": fmean(sample.gated for sample in samples),
    }
    for name, _ in samples[0].rewards:
        metrics[f"reward/{name}"] = fmean(dict(sample.rewards)[name] for sample in samples)
    for status, count in Counter(sample.grading for sample in samples).items():
        metrics[f"grading/{status}"] = float(count)
    return metrics
