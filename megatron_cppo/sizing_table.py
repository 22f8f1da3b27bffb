"""The text of `--measure`: every stage of a run beside its GPU's memory. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cppo.config import Config
from megatron_cppo.plan import Plan
from megatron_cppo.serving import gpu_share
from megatron_cppo.sizing import StageSize, cache_tokens

ASSUMPTIONS = {
    "rows": "rows are full, on the first stage of pictures, on the last of the longest answers; all samples are gated",
    "kernels": "the policy's own code ran, without Transformer Engine; attention, norms and head keep what a GPU's "
    "kernels keep",
    "optimizer": "a fused Adam (Transformer Engine's or Apex's), which needs no memory beside its state",
    "experts": "the router loads all experts alike",
    "allowances": "CUDA, NCCL, fragmentation and the engine are allowances (docs/sizing.md)",
}


def describe_sizes(config: Config, plan: Plan, sizes: Sequence[StageSize], *, gpu_gib: float) -> str:
    """A table with a line for each item and a column for each stage, in GiB of one GPU."""
    head = ["GiB of one GPU", *(f"stage {number}" for number in range(len(sizes)))]
    layers = [str(sum(plan.layers_per_chunk[stage :: len(sizes)])) for stage in range(len(sizes))]
    table = [head, ["decoder layers", *layers]]
    for title, part in (("always", "resident"), ("update", "update"), ("rollouts", "rollouts")):
        items = [getattr(size, part) for size in sizes]
        table += [
            [f"{title}: {name}", *(f"{item[name]:.2f}" for item in items)]
            for name in items[0]
            if any(item[name] for item in items)
        ]
    table += [
        ["rows in flight at the peak", *("+".join(map(str, size.rows)) for size in sizes)],
        ["peak of an update", *(f"{size.update_gib:.2f}" for size in sizes)],
    ]
    if sizes[0].rollouts:
        table.append(["peak of rollouts", *(f"{size.rollouts_gib:.2f}" for size in sizes)])
    table += [
        [f"spare of {gpu_gib:g}", *(f"{size.spare(gpu_gib):.0%}" for size in sizes)],
        ["verdict", *(size.verdict(gpu_gib) for size in sizes)],
    ]
    return "\n".join([*_aligned(table), *_notes(config, plan, sizes, gpu_gib)])


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


def _notes(config: Config, plan: Plan, sizes: Sequence[StageSize], gpu_gib: float) -> list[str]:
    lines = []
    if plan.memory.reference_host_gib:
        lines.append(f"the reference is in host memory, {plan.memory.reference_host_gib:.1f} GiB a rank")
    if sizes[0].rollouts:
        tokens = cache_tokens(config, plan, gpu_gib)
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        lines.append(
            f"a vLLM server takes {gpu_share(config):.0%} of each GPU: weights, and room for "
            f"about {tokens:,} tokens, {tokens // longest} of the longest; asleep it holds neither"
        )
    shown = [name for name in ASSUMPTIONS if name != "experts" or plan.shape.num_experts]
    return ["  " + line for line in (*lines, *(f"assumed: {ASSUMPTIONS[name]}" for name in shown))]
