"""Does the perception mask find the tokens that are read off the picture? On the digits, we know which those are.

Reads the samples that a run kept, and counts: of the masked tokens, how many are the two digits that the thought
starts with; and what the mask would be under other rules, from the same recorded entropies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.digits import read_tokens
from megatron_cppo.algo.perception import perception_mask
from megatron_cppo.report import Series

# rule of the mask -> its settings; "relative" is the published one, a floor is in nats
RULES: dict[str, dict[str, Any]] = {
    "relative": {},
    "relative, ≥ 0.05": {"min_entropy_shift": 0.05},
    "absolute": {"rank_by": "absolute"},
    "absolute, ≥ 0.05": {"rank_by": "absolute", "min_entropy_shift": 0.05},
}
PERTURBATIONS = ("occlusion", "zoom_crop")


@dataclass(frozen=True, slots=True)
class Share:
    """Of `num_masked` tokens, which share was read off the picture; of all tokens, `base_rate` is."""

    masked: float
    base_rate: float
    num_masked: int
    num_tokens: int


def kept_steps(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The gated samples of every kept step."""
    steps = {}
    for path in sorted((run_dir / "samples").glob("step_*.jsonl")):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        steps[int(path.stem.removeprefix("step_"))] = [sample for sample in samples if sample["mask"] is not None]
    return steps


def share(samples: Sequence[dict[str, Any]], rule: dict[str, Any]) -> Share | None:
    """What `rule` would mask of these gated samples; None when they have no masked token."""
    if not samples:
        return None
    read_N = torch.tensor([flag for sample in samples for flag in read_tokens(sample["tokens"])])
    entropy_N, removing_N = (
        torch.tensor([value for sample in samples for value in sample[name]])
        for name in ("entropy", "entropy_removing")
    )
    owner_N = torch.tensor([i for i, sample in enumerate(samples) for _ in sample["tokens"]])
    mask_N = perception_mask(entropy_N, removing_N, owner_N, **rule)
    if not mask_N.any():
        return None
    return Share(
        masked=read_N[mask_N].float().mean().item(),
        base_rate=read_N.float().mean().item(),
        num_masked=int(mask_N.sum()),
        num_tokens=len(read_N),
    )


def by_perturbation(samples: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The samples whose removing view was made by the perturbation `name` ("all": every sample)."""
    return [sample for sample in samples if name == "all" or sample["removing"][0] == name]


def table(run_dir: Path) -> list[tuple[str, str, Share]]:
    """(rule, perturbation, share) over all kept steps together."""
    samples = [sample for step in kept_steps(run_dir).values() for sample in step]
    rows = []
    for rule, settings in RULES.items():
        for perturbation in ("all", *PERTURBATIONS):
            found = share(by_perturbation(samples, perturbation), settings)
            if found is not None:
                rows.append((rule, perturbation, found))
    return rows


def print_table(rows: Sequence[tuple[str, str, Share]]) -> None:
    """One line a rule and perturbation."""
    print(f"{'rule':20}{'removing view':15}{'masked':>8}{'base':>7}{'ratio':>7}{'tokens masked':>15}")
    for rule, perturbation, found in rows:
        print(
            f"{rule:20}{perturbation:15}{found.masked:8.3f}{found.base_rate:7.3f}"
            f"{found.masked / found.base_rate:7.2f}{found.num_masked:8} of {found.num_tokens}"
        )


def panels(run_dir: Path) -> list[Series]:
    """Panels for the report: the share over steps, and what other rules would change."""
    steps = {step: samples for step, samples in kept_steps(run_dir).items() if share(samples, {}) is not None}
    if not steps:
        return []
    lines: dict[str, list[float]] = {}
    for name in ("all", *PERTURBATIONS):
        shares = [share(by_perturbation(samples, name), {}) for samples in steps.values()]
        lines["masked tokens" if name == "all" else f"masked, {name}"] = [
            float("nan") if found is None else found.masked for found in shares
        ]
    base = [share(samples, {}) for samples in steps.values()]
    lines["all tokens (base rate)"] = [float("nan") if found is None else found.base_rate for found in base]
    rows = [row for row in table(run_dir) if row[1] == "all"]
    return [
        Series(
            "Share of tokens read off the picture",
            list(steps),
            lines,
            "Among the tokens that the perception mask picked, and among all tokens of the same answers.",
        ),
        Series(
            "The same share under other rules",
            [rule for rule, _, _ in rows],
            {
                "masked tokens read off the picture": [found.masked for _, _, found in rows],
                "tokens masked": [found.num_masked / found.num_tokens for _, _, found in rows],
            },
            "perception.rank_by, and min_entropy_shift in nats, applied to the same recorded entropies. The published "
            "rule is relative without a floor.",
        ),
    ]
