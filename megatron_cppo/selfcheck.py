"""The first step's check, in the product: what must hold exactly when engine and policy agree.

Before any update the ratio of new to old log-probs is one, the KL to the reference is zero, and what the engine says
it sampled is what the policy computes. A run for which this is false would train, and quietly learn the wrong thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from megatron_cppo.types import Batch, SampleStatistics

MAX_LOG_RATIO = {"fp32": 1e-5, "bf16": 5e-2}
"""Two passes over differently packed rows; bf16 rounds each logit to about 3 digits."""
MAX_LOGP_GAP = {"fp32": 1e-4, "bf16": 5e-2}
"""Mean over tokens; a forgotten banned id or a temperature of 0.95 shows in fp32."""
MAX_KL = {"fp32": 1e-8, "bf16": 5e-3}


class SelfCheckError(RuntimeError):
    """Engine, policy and reference disagree at the first step."""


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
    seen = [item for item in statistics if item.sample_id < first_update_samples]
    ratio = _largest(
        abs(new - old)
        for item in seen
        for new, old in zip(item.logp, batch.old_logp[item.sample_id].tolist(), strict=True)
    )
    problems = []
    if not ratio <= MAX_LOG_RATIO[precision]:
        problems.append(
            f"|log ratio| is {ratio:.2e}, not <= {MAX_LOG_RATIO[precision]:.0e}: the same weights gave two answers for "
            "differently packed rows; suspect the attention or the positions"
        )
    if batch.reference_logp is not None and batch.old_logp is not None:
        pairs = zip(batch.old_logp, batch.reference_logp, strict=True)
        gap = _largest(float((old - reference).abs().max()) for old, reference in pairs)
        if not gap * gap / 2 <= MAX_KL[precision]:
            problems.append(
                f"KL to the reference is about {gap * gap / 2:.2e} before any update: wrong reference weights"
            )
    gap, bound = _engine_gap(batch), max_logp_gap or MAX_LOGP_GAP[precision]
    if not gap <= bound:
        problems.append(
            f"engine and policy differ by {gap:.2e} nat a token on average, more than {bound} "
            f"(rollout.max_logp_gap): suspect the weight sync, the image preprocessing, banned ids or the temperature"
        )
    if problems:
        raise SelfCheckError("the first step's self-check failed:\n  " + "\n  ".join(problems))


def _engine_gap(batch: Batch) -> float:
    """Mean |log-prob of the engine - of the scoring pass|; the updates' own metric also holds what they changed."""
    assert batch.old_logp is not None, "the first step must be scored"
    pairs = zip(batch.samples, batch.old_logp, strict=True)
    return fmean(abs(a - b) for sample, old in pairs for a, b in zip(sample.logp, old.tolist(), strict=True))


def _largest(sizes: Iterable[float]) -> float:
    """The largest of `sizes`, 0 without any, and NaN when one of them is: `max` loses a NaN that is not the first."""
    found = list(sizes)
    return math.nan if any(math.isnan(size) for size in found) else max(found, default=0.0)
