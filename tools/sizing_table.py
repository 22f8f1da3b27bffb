"""Measures the recipes of published models with fake tensors, and puts what comes of it into docs/sizing.md.

    python -m tools.sizing_table                        all recipes (minutes), into the page
    python -m tools.sizing_table qwen2_5_vl_7b ...      these alone, only printed; --json FILE: with every stage's bytes

The shapes are those of the published config.json files, so that nothing needs to be there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

from megatron_cppo.config import Config
from megatron_cppo.plan import Plan, resolve
from megatron_cppo.recipe import from_python
from megatron_cppo.sizing import StageSize, size

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sizing.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
RECIPES = (
    "qwen2_5_vl_3b",
    "qwen2_5_vl_7b",
    "qwen2_5_vl_32b",
    "qwen2_5_vl_72b",
    "qwen3_vl_8b",
    "qwen3_vl_32b",
    "qwen3_vl_30b_a3b",
    "qwen3_vl_235b_a22b",
)
"""Files of examples/."""
GPU_GIB = 80.0
COLUMNS = ("recipe", "GPUs", "layout", "update", "rollouts", "spare", "seconds a step (estimate)")

PROMPT_TOKENS, RESPONSE_TOKENS, GATED = 350, 700, 0.3
"""What the estimate takes for a mean sample, and for the share of gated ones."""
PEAK_FLOPS, BANDWIDTH = 989e12, 3.35e12
"""Of an H100 SXM, in bf16 and of its memory, a second."""
TRAINED_AT, TRAINED_EXPERTS_AT, READ_AT = 0.40, 0.20, 0.60
"""Shares of these that are taken to be reached: by dense layers, by experts, and by decoding."""


def recipe_plan(name: str, folder: Path) -> tuple[Config, Plan]:
    """A recipe's config, with the published config.json in `folder` for its model, and its plan."""
    from tests.published_models import CONFIGS

    config = from_python(ROOT / "examples" / f"{name}.py")
    model = folder / Path(config.model.path).name
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIGS[model.name]))
    config = replace(config, model=replace(config.model, path=str(model)))
    return config, resolve(config, files=False)


def row(name: str, config: Config, plan: Plan, sizes: tuple[StageSize, ...], gpu_gib: float) -> list[str]:
    """A recipe's line of the table; of several stages the least and the most."""
    policy = config.policy
    axes = {"TP": policy.tensor_parallel, "PP": policy.pipeline_parallel, "DP": plan.data_parallel}
    layout = " × ".join(f"{axis}{ranks}" for axis, ranks in axes.items() if ranks > 1)
    if policy.expert_parallel > 1:
        layout += f", EP{policy.expert_parallel}"
    elsewhere = plan.serving is not None and plan.serving.where == "separate"
    return [
        f"[{name}](../examples/{name}.py)",
        str(plan.num_ranks),
        layout,
        span([one.update_gib for one in sizes]),
        "on other machines" if elsewhere else span([one.rollouts_gib for one in sizes]),
        f"{min(one.spare(gpu_gib) for one in sizes):.0%}",
        f"{estimated_seconds(config, plan):.0f}",
    ]


def span(values: list[float]) -> str:
    """The least and the most of `values`."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low}–{high}"


def estimated_seconds(config: Config, plan: Plan) -> float:
    """A roofline of one step: arithmetic of the passes, weights read while decoding. Not measured; a lower bound."""
    shape, policy, samples = plan.shape, config.policy, plan.samples_per_step
    active = shape.num_parameters
    if shape.num_experts:
        active -= shape.num_layers * (shape.num_experts - shape.experts_per_token) * shape.expert_parameters
    tokens, views = samples * (PROMPT_TOKENS + RESPONSE_TOKENS), 1 + 2 * GATED
    passes = plan.scores_old_logp + plan.uses_reference + (4 if policy.recompute == "full" else 3) * views
    reached = TRAINED_EXPERTS_AT if shape.num_experts else TRAINED_AT
    training = 2 * active * tokens * passes / (plan.num_ranks * PEAK_FLOPS * reached)
    rows = tokens * views / policy.max_tokens_per_microbatch / plan.data_parallel / config.trainer.updates_per_step
    training *= 1 + (policy.pipeline_parallel - 1) / max(1, math.ceil(rows))
    # The longest answer decides; a server's further answers come in waves of mean length.
    ranks = config.vllm.tensor_parallel
    servers = plan.serving.num_servers if plan.serving is not None else plan.num_ranks
    token = shape.num_parameters * 2 / ranks / (BANDWIDTH * READ_AT) + 1e-3 + (ranks > 1) * shape.num_layers * 2e-5
    waves = math.ceil(samples / servers / config.rollout.max_sequences)
    rollouts = token * (config.rollout.max_response_tokens + RESPONSE_TOKENS * (waves - 1))
    return max(training, rollouts) if config.rollout.max_staleness else training + rollouts


def main(arguments: list[str]) -> int:
    """The command line; 1 where a recipe does not fit."""
    from megatron_cppo.rehearsal import measure_stages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", choices=[*RECIPES, []], help="default: all, and the page is written")
    parser.add_argument("--json", type=Path, help="write every stage's bytes, a line for each recipe")
    parser.add_argument("--gpu-gib", type=float, default=GPU_GIB, help=f"of another GPU (default {GPU_GIB:g})")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    lines, found, fits = [], [], True
    with tempfile.TemporaryDirectory() as folder:
        for name in given.recipes or RECIPES:
            config, plan = recipe_plan(name, Path(folder))
            stages = measure_stages(config, plan)
            sizes = size(config, plan, stages, gpu_gib=given.gpu_gib)
            fits = fits and all(one.verdict(given.gpu_gib) == "fits" for one in sizes)
            lines.append(row(name, config, plan, sizes, given.gpu_gib))
            print(" | ".join(lines[-1]), flush=True)
            spare = [one.spare(given.gpu_gib) for one in sizes]
            found.append({"recipe": name, "spare": spare, "stages": [dataclasses.asdict(stage) for stage in stages]})
    if given.json:
        given.json.write_text("".join(json.dumps(line) + "\n" for line in found))
    if not given.recipes and given.gpu_gib == GPU_GIB:
        table = [COLUMNS, ["---"] * len(COLUMNS), *lines]
        before, rest = PAGE.read_text().split(BEGIN)
        _, after = rest.split(END)
        text = "".join(f"| {' | '.join(line)} |\n" for line in table)
        PAGE.write_text(before + BEGIN + text + END + after)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
