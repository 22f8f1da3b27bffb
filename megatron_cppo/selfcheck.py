"""The truth check, in the product: what must hold when engine and policy agree.

Before any update the ratio of new to old log-probs is one, the KL to the reference is zero, and what the engine says
it sampled is what the policy computes; the last must hold at any later step too, of tokens that the current weights
sampled. A run for which this is false would train, and quietly learn the wrong thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_cppo.precision import PRECISIONS, Arithmetic
from megatron_cppo.types import Batch, SampleStatistics

MAX_LOG_RATIO: dict[Arithmetic, float] = {"fp32": 1e-5, "bf16": 5e-2, "fp8": 0.8}
"""Two passes over differently packed rows; bf16 rounds each logit to about 3 digits. FP8 (e4m3) keeps 4 bits where bf16
keeps 8, so all its bounds are bf16's times 16: not measured yet (docs/fp8.md)."""
MAX_LOGP_GAP: dict[Arithmetic, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp8": 0.8}
"""Mean over tokens; a forgotten banned id or a temperature of 0.95 shows in fp32."""
MAX_KL: dict[Arithmetic, float] = {"fp32": 1e-8, "bf16": 5e-3, "fp8": 1.3}
MODALITIES = ("image", "text")
"""Tokens that answer a prompt with images, and those that answer one without."""
_GAP = "rollout/logp_gap_"
_SUSPECT_ALL = "the weight sync, banned ids, the temperature, or a prefix cache that outlived its weights"
_SUSPECT_IMAGES = (
    "the image preprocessing, vision features or a prefix cache that outlived their weights in the engine, or the sync "
    "of the tower's weights"
)


class SelfCheckError(RuntimeError):
    """Engine, policy and reference disagree."""


def check_first_step(
    batch: Batch,
    statistics: Sequence[SampleStatistics],
    *,
    precision: str,
    max_logp_gap: float,
    first_update_samples: int,
) -> None:
    """Compare the first update's log-probs with the scoring pass, the reference and the engine.

    Only the first `first_update_samples` samples were seen before any update. Raises SelfCheckError with a hint.
    """
    assert batch.old_logp is not None, "the first step must be scored"
    arithmetic = PRECISIONS[precision].arithmetic
    seen = [item for item in statistics if item.sample_id < first_update_samples]
    ratio = _largest(
        abs(new - old)
        for item in seen
        for new, old in zip(item.logp, batch.old_logp[item.sample_id].tolist(), strict=True)
    )
    problems: list[str] = []
    if not ratio <= MAX_LOG_RATIO[arithmetic]:
        problems.append(
            f"|log ratio| is {ratio:.2e}, not <= {MAX_LOG_RATIO[arithmetic]:.0e}: the same weights gave two answers "
            "for differently packed rows; suspect the attention or the positions"
        )
    if batch.reference_logp is not None and batch.old_logp is not None:
        pairs = zip(batch.old_logp, batch.reference_logp, strict=True)
        gap = _largest(float((old - reference).abs().max()) for old, reference in pairs)
        if not gap * gap / 2 <= MAX_KL[arithmetic]:
            problems.append(
                f"KL to the reference is about {gap * gap / 2:.2e} before any update: wrong reference weights"
            )
    problems += _engine_problems(engine_gap(batch, version=0), precision=precision, max_logp_gap=max_logp_gap)
    if problems:
        raise SelfCheckError("the first step's self-check failed:\n  " + "\n  ".join(problems))


def check_engine(gap: Mapping[str, float], *, step: int, precision: str, max_logp_gap: float) -> None:
    """Hold the `engine_gap` of a later step against the bound. Raises SelfCheckError with a hint."""
    problems = _engine_problems(gap, precision=precision, max_logp_gap=max_logp_gap)
    if problems:
        raise SelfCheckError(f"step {step}: the check of the engine against the policy failed:\n  {problems[0]}")


def engine_gap(batch: Batch, *, version: int) -> dict[str, float]:
    """|log-prob of the engine - of the scoring pass| as metrics, over the tokens that the weights `version` sampled.

    Mean, 99th percentile and largest of all, and the mean of each modality that there is; nothing without such tokens.
    The updates' own metric also holds what they and the age of a token changed.
    """
    assert batch.old_logp is not None, "the step must be scored"
    parts: dict[str, list[Tensor]] = {modality: [] for modality in MODALITIES}
    for sample, old in zip(batch.samples, batch.old_logp, strict=True):
        if sample.version == version:
            start = sum(count for _, count in sample.earlier)
            engine = torch.tensor(sample.logp[start:], dtype=torch.float64)
            parts["image" if sample.prompt.grids else "text"].append((engine - old[start:].double()).abs())
    by_modality = {name: torch.cat(gaps) for name, gaps in parts.items() if gaps}
    if not by_modality:
        return {}
    every = torch.cat(list(by_modality.values()))
    found = {
        "mean": every.mean(),
        "p99": every.kthvalue(math.ceil(0.99 * len(every))).values,
        "max": every.max(),
        **{name: gaps.mean() for name, gaps in by_modality.items()},
    }
    return {f"{_GAP}{name}": float(value) for name, value in found.items()}


def _engine_problems(gap: Mapping[str, float], *, precision: str, max_logp_gap: float) -> list[str]:
    bound = max_logp_gap or MAX_LOGP_GAP[PRECISIONS[precision].arithmetic]
    means = {name: gap[f"{_GAP}{name}"] for name in MODALITIES if f"{_GAP}{name}" in gap}
    wrong = {name: mean for name, mean in means.items() if not mean <= bound}
    if not wrong:
        return []
    told = " and ".join(f"{mean:.2e} on {name} prompts" for name, mean in wrong.items())
    right = "".join(f" ({name} prompts: {mean:.2e})" for name, mean in means.items() if name not in wrong)
    suspects = _SUSPECT_ALL if "text" in wrong else _SUSPECT_IMAGES
    return [
        f"engine and policy differ by {told}, in nats a token on average, more than {bound} (rollout.max_logp_gap)"
        f"{right}: suspect {suspects}"
    ]


def _largest(sizes: Iterable[float]) -> float:
    """The largest of `sizes`, 0 without any, and NaN when one of them is: `max` loses a NaN that is not the first."""
    found = list(sizes)
    return math.nan if any(math.isnan(size) for size in found) else max(found, default=0.0)
