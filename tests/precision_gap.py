"""How far two precisions of one trained model are apart: log-probs, entropy shifts, perception masks, gradients.

One body for every pair: bf16 against fp32 where there is no GPU, FP8 against bf16 where there is one. The model is the
demo's, which reads digits off pictures, after some supervised steps; its sizes are multiples of 128. Knows nothing of
how large a gap may be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PerceptionConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_cppo.types import Group, Prompt, Sample, SampleStatistics

Device = Literal["cpu", "cuda"]
PROMPTS_OF_A_STEP = 32
ALL_IN_FP8 = ("num_layers_at_start_in_bf16=0", "num_layers_at_end_in_bf16=0")
"""The model has three layers: with one first and one last in bf16 the gap would be that of a single one."""


@dataclass(frozen=True)
class Seen:
    """What one precision saw of the same answers, token after token; its gradients, and the weights that it streams.

    `streamed` says whether the stream was the same before the update, at a learning rate of zero, and after it.
    """

    precision: str
    logp_N: Tensor
    shift_N: Tensor
    mask_N: Tensor
    gradient_P: Tensor
    weights: dict[str, Tensor]
    streamed: bool
    metrics: dict[str, float]


@dataclass(frozen=True)
class Gap:
    """Between two precisions: of log-probs in nats, Spearman's rank correlation of entropy shifts, intersection over
    union of the masks, and relative L2 of the gradients."""

    mean: float
    p99: float
    largest: float
    rank_correlation: float
    mask_iou: float
    gradient: float


def make_config(model: Path, data: Path, *, device: Device, precision: str, **algorithm: Any) -> Config:
    """One rank. The plan is asked for what the device computes in; `Policy` is told the `precision`."""
    return Config(
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=(str(data / "warm.parquet"),), max_prompt_tokens=64),
        algorithm=AlgorithmConfig(beta=0.0, **algorithm),
        perception=PerceptionConfig(coefficient=0.1),
        rollout=RolloutConfig(samples_per_prompt=1, max_response_tokens=32),
        policy=PolicyConfig(
            device=device,
            precision=precision,  # pyrefly: ignore[bad-argument-type]
            distributed_optimizer=False,
            max_tokens_per_microbatch=4096,
            megatron_overrides=ALL_IN_FP8 if precision in ("fp8_tensorwise", "fp8_blockwise", "fp8_mxfp8") else (),
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_updates=5, weight_decay=0.0),
        trainer=TrainerConfig(num_gpus=1, num_steps=1000, prompts_per_step=PROMPTS_OF_A_STEP),
    )


@contextlib.contextmanager
def _unwatched(*_: object) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


@contextlib.contextmanager
def policy_of(config: Config, precision: str) -> Iterator[tuple[Any, Any, Any]]:
    """A policy, its plan and where its prompts come from. The default process group must be up, of one rank."""
    from megatron_cppo.assembly import prompt_sources
    from megatron_cppo.data.tokenizer import vocabulary
    from megatron_cppo.plan import resolve
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    plan = resolve(config)
    # A plan refuses bf16 on a CPU, where nobody should train in it.
    chosen = dataclasses.replace(config, policy=dataclasses.replace(config.policy, precision=precision))
    source = prompt_sources(config, _unwatched, dist.group.WORLD)["train"]
    banned = vocabulary(config.model.path).banned_ids
    policy = Policy(chosen, plan, pixels=source.pixels, banned_ids=banned)
    try:
        yield policy, plan, source
    finally:
        process_groups.destroy()


def answers(prompts: Sequence[Prompt]) -> list[Group]:
    """The right answer of each prompt as its only sample, with a positive advantage: so every one has all views."""
    samples = [Sample(prompt, 0, prompt.target, (), "", False, 0, advantage=1.0) for prompt in prompts]
    return [Group(sample.prompt, (sample,)) for sample in samples]


def train(folder: Path, *, device: Device, precision: str, num_steps: int) -> Path:
    """Write the demo's data and model, and the model after that many supervised steps; its folder."""
    from examples.digits import make_data, make_model
    from megatron_cppo.loop import plan_batch

    make_model(folder / "start", seed=0)
    make_data(folder, seed=0, num_train=1, num_warm=1024, num_evaluation=1)
    config = make_config(folder / "start", folder, device=device, precision=precision, objective="supervised")
    with policy_of(config, precision) as (policy, plan, source):
        for step in range(num_steps):
            groups = answers(source.take(step * PROMPTS_OF_A_STEP, PROMPTS_OF_A_STEP))
            policy.update(plan_batch(config, plan, groups, score=False))
        policy.export(folder / "trained")
    return folder / "trained"


def look(model: Path, data: Path, *, device: Device, precision: str) -> Seen:
    """One CPPO update of `model` in `precision` at a learning rate of zero, the second: delayed scales come from the
    first."""
    from megatron_cppo.loop import plan_batch

    planned = precision if device == "cuda" else "fp32"
    config = make_config(model, data, device=device, precision=planned, objective="cppo")
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.0, max_grad_norm=0.0))
    with policy_of(config, precision) as (policy, plan, _):
        supervised = make_config(model, data, device=device, precision=planned, objective="supervised")
        batch = plan_batch(config, plan, answers(prompts(supervised)), score=False)
        before = _copies(policy.weights())
        policy.update(batch)
        metrics = policy.update(batch)
        after = _copies(policy.weights())
        gradient = torch.cat([tensor.float().reshape(-1).cpu() for _, tensor in policy.gradients()])
        statistics = policy.statistics()
    return Seen(
        precision=precision,
        logp_N=_flat(statistics, lambda item: item.logp),
        shift_N=_flat(statistics, lambda item: item.entropy_removing) - _flat(statistics, lambda item: item.entropy),
        mask_N=_flat(statistics, lambda item: item.mask) > 0,
        gradient_P=gradient,
        weights=after,
        streamed=all(torch.equal(after[name], tensor) for name, tensor in before.items()),
        metrics=metrics,
    )


def prompts(supervised: Config) -> list[Prompt]:
    """Rows with their answers, of which training saw none."""
    from megatron_cppo.assembly import prompt_sources

    source = prompt_sources(supervised, _unwatched, dist.group.WORLD)["train"]
    return source.take(len(source) - PROMPTS_OF_A_STEP, PROMPTS_OF_A_STEP)


def _copies(stream: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in stream}


def _flat(statistics: Sequence[SampleStatistics], of: Callable[[SampleStatistics], Any]) -> Tensor:
    return torch.tensor([float(value) for item in statistics for value in of(item)], dtype=torch.float64)


def gap(wanted: Seen, found: Seen) -> Gap:
    """Of `found` from `wanted`, which saw the same tokens."""
    apart = (found.logp_N - wanted.logp_N).abs().sort().values
    union = (found.mask_N | wanted.mask_N).sum()
    return Gap(
        mean=float(apart.mean()),
        p99=float(apart[math.ceil(0.99 * len(apart)) - 1]),
        largest=float(apart[-1]),
        rank_correlation=rank_correlation(found.shift_N, wanted.shift_N),
        mask_iou=float((found.mask_N & wanted.mask_N).sum() / union),
        gradient=float((found.gradient_P - wanted.gradient_P).norm() / wanted.gradient_P.norm()),
    )


def rank_correlation(a_N: Tensor, b_N: Tensor) -> float:
    """Spearman's, of numbers without ties.

    >>> rank_correlation(torch.tensor([1.0, 5.0, 7.0]), torch.tensor([0.1, 0.2, 9.0]))
    1.0
    """
    ranks = torch.stack([values.argsort().argsort().double() for values in (a_N, b_N)])
    return float(torch.corrcoef(ranks)[0, 1])


def table(wanted: Seen, every: Sequence[Seen]) -> str:
    """The gaps of several precisions from `wanted`, in Markdown."""
    lines = [
        f"| against {wanted.precision} | log-prob gap: mean | p99 | max | entropy shifts: rank correlation | mask: IoU "
        "| gradient: relative L2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in every:
        of = gap(wanted, found)
        lines.append(
            f"| {found.precision} | {of.mean:.1e} | {of.p99:.1e} | {of.largest:.1e} | {of.rank_correlation:.4f} | "
            f"{of.mask_iou:.3f} | {of.gradient:.1e} |"
        )
    return "\n".join(lines)


def measure(
    folder: Path, *, device: Device, base: str, others: Sequence[str], num_steps: int
) -> tuple[Seen, tuple[Seen, ...]]:
    """Train in `base`, then look in it and in each of `others`. The default process group must be up, of one rank."""
    trained_in = base if device == "cuda" else "fp32"
    model = train(folder, device=device, precision=trained_in, num_steps=num_steps)
    seen = [look(model, folder, device=device, precision=precision) for precision in (base, *others)]
    return seen[0], tuple(seen[1:])
