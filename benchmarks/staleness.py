"""Does CPPO on the digits learn as much from rollouts that run ahead of the updates? Several seeds, 0 to 2 versions.

    python -m benchmarks.staleness [--seeds 0 1 2] [--staleness 0 1 2] [--steps 70] [--vllm-python PYTHON]

Each seed has its own model, data and warm start, which its runs share. Prints held-out avg@4 (T=1, 256 scans) at the
end of each run and over the last three evaluations, then per staleness the mean over seeds, the difference from
staleness 0 seed by seed, and the noise of that difference. By default the embedded engine samples: every token is then
exactly as old as the bound allows. With --vllm-python (an environment with vLLM, `make test-vllm` makes one) a server
samples while the policy updates, and answers are cut at the swaps. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from examples import digits_demo
from megatron_cppo.config import Config, VllmConfig

LAST = 3
"""Evaluations at the end of a run whose mean is the less noisy figure."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Held-out accuracy of one run, and how old its tokens were."""

    final: float
    last: float
    age_mean: float
    age_max: float
    cut_share: float


def _config(folder: Path, name: str, *, seed: int, steps: int, staleness: int, python: str) -> Config:
    base = digits_demo.config(folder, seed=seed, num_steps=steps)
    base = replace(base, trainer=replace(base.trainer, run_dir=str(folder / name), save_every_steps=0))
    rollout = replace(base.rollout, max_staleness=staleness)
    if not python:
        return replace(base, rollout=rollout)
    return replace(
        base,
        rollout=replace(rollout, engine="vllm"),
        vllm=VllmConfig(python=python, arguments=("max-num-batched-tokens=32768",)),
    )


def run(folder: Path, *, seed: int, steps: int, staleness: int, python: str) -> Outcome:
    """Warm start (once a seed) and one run, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    digits_demo.make_inputs(folder, seed=seed)
    if not (folder / "warm" / "export").is_dir():
        digits_demo.run_stage(folder, "warm", digits_demo.warm_config(folder, seed=seed))
    name = f"{'vllm' if python else 'embedded'}-{staleness}"
    if not (folder / name / "export").is_dir():
        chosen = _config(folder, name, seed=seed, steps=steps, staleness=staleness, python=python)
        digits_demo.run_stage(folder, name, chosen)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    curve = [value for _, value in digits_demo.accuracies(folder / name)]
    aged = [line for line in lines if "rollout/staleness_mean" in line]
    return Outcome(
        final=curve[-1],
        last=fmean(curve[-LAST:]),
        age_mean=fmean(line["rollout/staleness_mean"] for line in aged) if aged else 0.0,
        age_max=max((line["rollout/staleness_max"] for line in aged), default=0.0),
        cut_share=fmean(line["rollout/cut_share"] for line in aged) if aged else 0.0,
    )


def _table(outcomes: dict[tuple[int, int], Outcome], seeds: list[int], ages: list[int]) -> list[str]:
    lines = [
        "| staleness | seed | final | last three | token age mean, max | answers cut |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {age} | {seed} | {o.final:.3f} | {o.last:.3f} | {o.age_mean:.2f}, {o.age_max:.0f} | {o.cut_share:.0%} |"
        for age in ages
        for seed in seeds
        for o in [outcomes[seed, age]]
    ]
    for age in ages:
        mean = fmean(outcomes[seed, age].last for seed in seeds)
        gaps = [outcomes[seed, age].last - outcomes[seed, ages[0]].last for seed in seeds]
        error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        lines.append(
            f"staleness {age}: last three {mean:.3f} over {len(seeds)} seeds, "
            f"{100 * fmean(gaps):+.1f} ± {100 * error:.1f} points of staleness {ages[0]} (mean ± standard error)"
        )
    return lines


def main(arguments: list[str]) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=digits_demo.STEPS)
    parser.add_argument("--vllm-python", default="", help="sample by a vLLM server of this interpreter")
    parser.add_argument("--folder", type=Path, default=Path("runs/staleness"))
    given = parser.parse_args(arguments)
    outcomes = {}
    for seed in given.seeds:
        folder = given.folder / f"{given.steps}-steps-seed-{seed}"
        for age in given.staleness:
            outcomes[seed, age] = run(folder, seed=seed, steps=given.steps, staleness=age, python=given.vllm_python)
    print("\n".join(_table(outcomes, given.seeds, given.staleness)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
