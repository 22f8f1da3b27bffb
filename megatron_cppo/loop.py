"""The loops, in verbs: sample, grade, plan, score, update, sync. Everything with a shape lives one call below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.config import Config
from megatron_cppo.data.packing import build_batch, rows_per_rank, scoring_rows
from megatron_cppo.evaluate import Evaluation
from megatron_cppo.plan import Plan
from megatron_cppo.rewards.scoring import describe
from megatron_cppo.rollout.engine import Engine
from megatron_cppo.runlog import RunLog
from megatron_cppo.selfcheck import check_first_step
from megatron_cppo.types import Batch, Group, Prompt, Sample

if TYPE_CHECKING:
    from megatron_cppo.data.prompts import PromptSource
    from megatron_cppo.policy.policy import Policy


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a loop drives; made by `train.py`, the same on every rank."""

    config: Config
    plan: Plan
    policy: Policy
    engine: Engine
    prompts: PromptSource
    reward: Callable[[Sequence[Group]], list[Group]]
    evaluation: Evaluation | None
    log: RunLog


def reinforce(run: Run) -> None:
    """Reinforcement learning: one rollout, and `updates_per_step` updates, a step."""
    config, plan, policy, engine, log = run.config, run.plan, run.policy, run.engine, run.log
    step = _start(run)
    while step < config.trainer.num_steps:
        step += 1
        checks = step == 1 and config.trainer.self_check
        with log.step(step) as record:
            with record.span("rollout"), log.phase("rollout", plan.samples_per_step // plan.num_ranks) as advance:
                groups = engine.generate(
                    _prompts(run, step),
                    samples_per_prompt=config.rollout.samples_per_prompt,
                    temperature=config.rollout.temperature,
                    advance=advance,
                )
            with record.span("reward"):
                groups = run.reward(groups)
            record.add(describe(groups))
            with record.span("batch"):
                batch = _plan_batch(run, groups, score=checks or plan.scores_old_logp or plan.uses_reference)
            old = checks or plan.scores_old_logp
            with record.span("score"), log.phase("score", scoring_rows(batch) * (old + plan.uses_reference)) as advance:
                scored = policy.score(batch, old=old, reference=plan.uses_reference, advance=advance)
            with record.span("update"), log.phase("update", rows_per_rank(batch)) as advance:
                metrics = policy.update(scored, advance)
            record.add(metrics)
            if checks:
                _check(run, scored)
            with record.span("sync"):
                engine.load_weights(policy.weights(), version=step)
        _after(run, step, batch)
    _finish(run)


def supervise(run: Run) -> None:
    """Supervised learning of the rows' own responses, through the same policy: one update a step."""
    step = _start(run)
    while step < run.config.trainer.num_steps:
        step += 1
        with run.log.step(step) as record:
            with record.span("batch"):
                groups = [Group(prompt, (_target(prompt),)) for prompt in _prompts(run, step)]
                batch = _plan_batch(run, groups, score=False)
            with record.span("update"), run.log.phase("update", rows_per_rank(batch)) as advance:
                record.add(run.policy.update(batch, advance))
            if _evaluates(run, step):
                with record.span("sync"):
                    run.engine.load_weights(run.policy.weights(), version=step)
        _after(run, step, batch)
    _finish(run)


LOOPS = {"cppo": reinforce, "grpo": reinforce, "supervised": supervise}


def _start(run: Run) -> int:
    """Resume from the newest checkpoint, or evaluate what is there; returns the last finished step."""
    progress = run.policy.restore(_checkpoints(run))
    step = progress["step"] if progress else 0
    run.log.resume(step)
    run.engine.load_weights(run.policy.weights(), version=step)
    if step == 0:
        _evaluate(run, step)
    return step


def _prompts(run: Run, step: int) -> list[Prompt]:
    count = run.config.trainer.prompts_per_step
    return run.prompts.take((step - 1) * count, count)


def _plan_batch(run: Run, groups: Sequence[Group], *, score: bool) -> Batch:
    return build_batch(
        groups,
        views_for=OBJECTIVES[run.config.algorithm.objective].views_for,
        num_updates=run.config.trainer.updates_per_step,
        data_parallel=run.plan.data_parallel,
        max_tokens=run.plan.max_tokens_per_microbatch,
        row_multiple=run.plan.row_multiple,
        score=score,
    )


def _check(run: Run, batch: Batch) -> None:
    check_first_step(
        batch,
        run.policy.statistics(),
        precision=run.config.policy.precision,
        max_logp_gap=run.config.rollout.max_logp_gap,
        first_update_samples=run.plan.prompts_per_update * run.config.rollout.samples_per_prompt,
    )


def _target(prompt: Prompt) -> Sample:
    return Sample(prompt=prompt, index=0, token_ids=prompt.target, logp=(), text="", truncated=False, version=0)


def _after(run: Run, step: int, batch: Batch) -> None:
    """What follows a step when it is due: keep its samples, evaluate, save (last, so that nothing due is lost)."""
    trainer = run.config.trainer
    if _due(step, trainer.keep_samples_every_steps):
        run.log.samples(step, batch.samples, run.policy.statistics())
    if _evaluates(run, step):
        _evaluate(run, step)
    if step == trainer.num_steps or _due(step, trainer.save_every_steps):
        with run.log.phase("save", 1) as advance:
            run.policy.save(_checkpoints(run), at_step=step, progress={}, keep=trainer.keep_checkpoints)
            advance(1)


def _evaluates(run: Run, step: int) -> bool:
    return step == run.config.trainer.num_steps or _due(step, run.config.trainer.evaluate_every_steps)


def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _evaluate(run: Run, step: int) -> None:
    if run.evaluation is not None:
        with run.log.phase("evaluate", len(run.evaluation.prompts)) as advance:
            run.log.evaluation(step, run.evaluation(advance))


def _finish(run: Run) -> None:
    if run.config.trainer.export:
        run.policy.export(Path(run.config.trainer.run_dir) / "export")
    run.log.close()


def _checkpoints(run: Run) -> Path:
    return Path(run.config.trainer.run_dir) / "checkpoints"
