"""The loops, in verbs: sample, grade, plan, score, update, sync. Everything with a shape lives one call below."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.config import Config, UserError
from megatron_cppo.data.damage import sound_prompts
from megatron_cppo.data.packing import build_batch, rows_per_rank, scoring_rows
from megatron_cppo.evaluate import Evaluation
from megatron_cppo.plan import Plan
from megatron_cppo.policy.agreement import on_any_rank
from megatron_cppo.rewards.scoring import describe
from megatron_cppo.rollout.engine import Engine
from megatron_cppo.runlog import RunLog, StepRecord
from megatron_cppo.saved import CHECKPOINT, SavedRollouts, Scores, SkippedStep, Writer, trailing
from megatron_cppo.selfcheck import check_engine, check_first_step, engine_gap
from megatron_cppo.storage.checkpoint_files import SaveError
from megatron_cppo.types import Batch, Group, Prompt, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cppo.data.prompts import PromptSource
    from megatron_cppo.policy.policy import Policy

LOG = logging.getLogger("megatron_cppo")


class NonFiniteError(UserError):
    """Too many updates in a row were skipped, as their loss or gradient was not finite."""


class Left(Exception):
    """The run was told to leave, on some rank: all have saved the step that they were in, and closed the log."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a loop drives; made by `assembly.py`, the same on every rank.

    With `rollouts` (saved ones) nothing is sampled for training; the engine then serves an evaluation, or is absent.
    """

    config: Config
    plan: Plan
    policy: Policy
    engine: Engine
    prompts: PromptSource
    reward: Callable[[Sequence[Group]], list[Group]]
    evaluation: Evaluation | None
    log: RunLog
    writer: Writer
    rollouts: SavedRollouts | None = None


def reinforce(run: Run) -> None:
    """Reinforcement learning: one rollout, and `updates_per_step` updates, a step."""
    step, in_a_row = start(run)
    while step < run.config.trainer.num_steps:
        step += 1
        with run.log.step(step) as record:
            groups = _graded_groups(run, step, record)
            with record.span("rollout"):
                run.engine.sleep()
            batch = learn(run, step, groups, record)
            with record.span("sync"):
                run.engine.wake()
                run.engine.load_weights(run.policy.weights(), version=step)
        in_a_row = after_update(run, step, groups, batch, in_a_row)
        after(run, step, batch, in_a_row)
    finish(run)


def sample(run: Run) -> None:
    """Rollouts alone (debug.rollout_only): the weights stay as they were, every step's graded groups are saved."""
    step, _ = start(run)
    while step < run.config.trainer.num_steps:
        step += 1
        with run.log.step(step) as record:
            groups = _graded_groups(run, step, record)
        if _due(step, run.config.trainer.keep_samples_every_steps):
            run.log.samples(step, [sample for group in groups for sample in group.samples], ())
        if _evaluates(run, step):
            _evaluate(run, step)
    run.log.close()


def supervise(run: Run) -> None:
    """Supervised learning of the rows' own responses, through the same policy: one update a step."""
    step, in_a_row = start(run)
    run.engine.sleep()
    while step < run.config.trainer.num_steps:
        step += 1
        evaluates = _evaluates(run, step)
        with run.log.step(step) as record:
            with record.span("batch"):
                prompts, replaced = prompts_of(run, step)
                record.add(replaced)
                groups = [Group(prompt, (_target(prompt),)) for prompt in prompts]
                batch = plan_batch(run.config, run.plan, groups, score=False)
            with record.span("update"), run.log.phase("update", rows_per_rank(batch)) as advance:
                record.add(run.policy.update(batch, advance))
            if evaluates:
                with record.span("sync"):
                    run.engine.wake()
                    run.engine.load_weights(run.policy.weights(), version=step)
        in_a_row = after_update(run, step, groups, batch, in_a_row)
        after(run, step, batch, in_a_row)
        if evaluates:
            run.engine.sleep()
    finish(run)


LOOPS = {"cppo": reinforce, "grpo": reinforce, "supervised": supervise}


def start(run: Run) -> tuple[int, int]:
    """Resume from the newest checkpoint, or evaluate what is there.

    Returns the last finished step, and how many updates were skipped in a row up to its end.
    """
    with run.log.phase("restore", 1) as advance:
        progress = run.policy.restore(_checkpoints(run), keep=run.config.trainer.keep_checkpoints)
        advance(1)
    step = progress["step"] if progress else 0
    run.log.resume(step)
    run.engine.load_weights(run.policy.weights(), version=step)
    if step == 0:
        _evaluate(run, step)
    return step, progress["skipped_in_a_row"] if progress else 0


def _graded_groups(run: Run, step: int, record: StepRecord) -> list[Group]:
    """The step's groups with their rewards and advantages: sampled and graded, or read."""
    rollout, plan = run.config.rollout, run.plan
    if run.rollouts is not None:
        with record.span("read"):
            groups = run.rollouts.groups(step)
    else:
        with record.span("rollout"), run.log.phase("rollout", plan.samples_per_step // plan.num_ranks) as advance:
            prompts, replaced = prompts_of(run, step)
            groups = run.engine.generate(
                prompts, samples_per_prompt=rollout.samples_per_prompt, temperature=rollout.temperature, advance=advance
            )
        record.add(replaced)
        with record.span("reward"):
            groups = run.reward(groups)
    note_groups(run, step, groups, record)
    return groups


def note_groups(run: Run, step: int, groups: Sequence[Group], record: StepRecord) -> None:
    """Count the step's graded groups, and save them where that is asked for."""
    if run.config.debug.save_rollouts or run.config.debug.rollout_only:
        run.writer.rollout(step, groups)
    record.add(describe(groups))


def prompts_of(run: Run, step: int) -> tuple[list[Prompt], dict[str, float]]:
    """The step's prompts, those with a damaged image replaced, and the metric that counts these."""
    count = run.config.trainer.prompts_per_step
    prompts, num_replaced = sound_prompts(run.prompts, (step - 1) * count, count, group=run.policy.groups.world)
    return prompts, {"data/replaced_prompts": num_replaced} if num_replaced else {}


def learn(run: Run, step: int, groups: Sequence[Group], record: StepRecord) -> Batch:
    """The step's updates on its graded groups; returns the batch that they saw. Checks engine and policy when due."""
    config, plan, policy, log = run.config, run.plan, run.policy, run.log
    first = step == 1 and config.trainer.self_check
    # Servers read the first weights themselves; the second step's are the first that were sent after an update.
    sent = step == 2 and config.trainer.self_check and plan.serving is not None
    checks = first or sent or _due(step, config.rollout.check_every_steps)
    old = checks or plan.scores_old_logp
    with record.span("batch"):
        batch = plan_batch(config, plan, groups, score=old or plan.uses_reference)
    with record.span("score"), log.phase("score", scoring_rows(batch) * (old + plan.uses_reference)) as advance:
        scored = policy.score(batch, old=old, reference=plan.uses_reference, advance=advance)
    _finish_save(run, step, wait=False)
    # A check leaves the numbers of its step alone.
    seen = scored if first or plan.scores_old_logp else dataclasses.replace(scored, old_logp=None)
    with record.span("update"), log.phase("update", rows_per_rank(batch)) as advance:
        record.add(policy.update(seen, advance))
    if checks:
        _check(run, step, scored, record, first=first)
    return seen


def plan_batch(config: Config, plan: Plan, groups: Sequence[Group], *, score: bool) -> Batch:
    """The packed rows of a step's groups: its updates, and with `score` the scoring pass."""
    objective = OBJECTIVES[config.algorithm.objective]
    return build_batch(
        groups,
        views_for=objective.views_for,
        num_updates=config.trainer.updates_per_step,
        packing=plan.packing,
        score=score,
        constant_views=config.perception.stop_gradient_views,
        count_masked=objective.count_masked is not None and config.perception.aggregation == "global",
    )


def _check(run: Run, step: int, batch: Batch, record: StepRecord, *, first: bool) -> None:
    """Compare engine and policy, and in the `first` step also the first update with what it must be."""
    precision, bound = run.config.policy.precision, run.config.rollout.max_logp_gap
    gap = engine_gap(batch, version=step - 1)
    record.add(gap)
    if not gap:
        LOG.warning(
            "step %d: engine and policy could not be compared, no token was sampled by the current weights: rollouts "
            "run ahead (rollout.max_staleness)",
            step,
        )
    if first and not run.policy.skipped:
        check_first_step(
            batch,
            run.policy.statistics(),
            precision=precision,
            max_logp_gap=bound,
            first_update_samples=run.plan.prompts_per_update * run.config.rollout.samples_per_prompt,
        )
    elif not any(bool(logp.isnan().any()) for logp in batch.old_logp or ()):  # else the skipped update says more
        check_engine(gap, step=step, precision=precision, max_logp_gap=bound)


def _target(prompt: Prompt) -> Sample:
    return Sample(prompt=prompt, index=0, token_ids=prompt.target, logp=(), text="", truncated=False, version=0)


def after_update(run: Run, step: int, groups: Sequence[Group], batch: Batch, before: int) -> int:
    """Save a step with skipped updates for replay. Returns how many were skipped in a row, `before` of them earlier.

    Raises NonFiniteError, on all ranks, when the step ends with too many of them; the weights, which the last of them
    saw, are then saved with the step.
    """
    trainer, skipped = run.config.trainer, run.policy.skipped
    last = trailing(skipped, len(batch.updates))
    in_a_row = before + last if last == len(batch.updates) else last
    if not skipped:
        return in_a_row
    folder = run.writer.skipped(
        SkippedStep(
            step=step,
            updates=skipped,
            num_updates=len(batch.updates),
            seed=trainer.seed,
            groups=tuple(groups),
            old_logp=_numbers(batch.old_logp),
            reference_logp=_numbers(batch.reference_logp),
        )
    )
    named = ", ".join(str(update + 1) for update in skipped)
    which = f"step {step}: of its {len(batch.updates)} updates {named}"
    stops = in_a_row >= trainer.max_skipped_updates
    if not stops:
        LOG.warning(
            "%s skipped, as loss or gradient is not finite; %d in a row now, the run stops at %d; saved in %s",
            *(which, in_a_row, trainer.max_skipped_updates, folder),
        )
        return in_a_row
    unsaved = ""
    try:
        _finish_save(run, step, wait=True)
    except SaveError as error:
        unsaved = f"\n{error}"
    try:
        run.policy.save(folder / CHECKPOINT, at_step=step, progress={"skipped_in_a_row": in_a_row}, keep=1)
    except SaveError as error:
        unsaved += f"\nthe weights that they saw could not be kept: {error}"
    raise NonFiniteError(
        f"{which} skipped, as loss or gradient is not finite: {in_a_row} in a row, and trainer.max_skipped_updates is "
        f"{trainer.max_skipped_updates}\n"
        f"fix: --debug.replay {folder} (with the same recipe) shows where it stops being finite; then lower "
        "optimizer.learning_rate, or mend the data or the model; the same command resumes from the last checkpoint"
        + unsaved
    )


def _numbers(scores: tuple[Tensor, ...] | None) -> Scores:
    return None if scores is None else tuple(tuple(logp.tolist()) for logp in scores)


def after(run: Run, step: int, batch: Batch, in_a_row: int) -> None:
    """What follows a step when it is due: keep its samples, evaluate, save (last, so that nothing due is lost).

    Raises Left, on all ranks, when the launcher of one was told so (SIGUSR2) and there are steps left.
    """
    trainer, group = run.config.trainer, run.policy.groups.world
    last = step == trainer.num_steps
    if _due(step, trainer.keep_samples_every_steps):
        run.log.samples(step, batch.samples, run.policy.statistics())
    if _evaluates(run, step):
        _evaluate(run, step)
    _finish_save(run, step, wait=False)
    leaves = not last and on_any_rank(run.log.watch.is_told_to_leave(), device=run.policy.trained.device, group=group)
    if last or leaves or _due(step, trainer.save_every_steps):
        _save(run, step, {"skipped_in_a_row": in_a_row}, leaves=leaves)
    if leaves:
        LOG.info("left after step %d of %d, as told; the same command goes on", step, trainer.num_steps)
        run.log.close("left")
        raise Left


def _save(run: Run, step: int, progress: dict[str, Any], *, leaves: bool) -> None:
    """Save a checkpoint: while the run goes on, unless it is the last step's, or the run `leaves`."""
    trainer = run.config.trainer
    ends = leaves or step == trainer.num_steps
    _finish_save(run, step, wait=True)
    with _saves(run, step, leaves=leaves), run.log.phase("save", 1) as advance:
        run.policy.save(
            _checkpoints(run),
            at_step=step,
            progress=progress,
            keep=trainer.keep_checkpoints,
            keep_every=trainer.keep_every_steps,
            background=trainer.save_in_background and not ends,
        )
        advance(1)


def _finish_save(run: Run, now: int, *, wait: bool) -> None:
    """In step `now`, publish the checkpoint that is being written, if all of it is; or `wait` for it."""
    step = run.policy.saving_step
    if step is None:
        return
    with _saves(run, step, superseded=now == run.config.trainer.num_steps):
        if not wait:
            run.policy.finish_save(wait=False)
            return
        with run.log.phase("save", 1) as advance:
            run.policy.finish_save()
            advance(1)


@contextmanager
def _saves(run: Run, step: int, *, superseded: bool = False, leaves: bool = False) -> Iterator[None]:
    """A checkpoint that cannot be written ends the run, or is counted, as configured; one on leaving ends it.

    After the last step it ends the run in any case, but not before the export, the run's result, was tried. One that is
    `superseded`, as the last step's comes right after it, is counted.
    """
    trainer = run.config.trainer
    try:
        yield
    except SaveError as error:
        if superseded:
            run.log.failure(step, "checkpoint", str(error))
            return
        if step == trainer.num_steps:
            try:
                _export(run)
            except UserError as another:
                raise UserError(f"{error}\n{another}") from another
        if step == trainer.num_steps or leaves or trainer.on_save_failure == "stop":
            raise
        run.log.failure(step, "checkpoint", str(error))


def _evaluates(run: Run, step: int) -> bool:
    return step == run.config.trainer.num_steps or _due(step, run.config.trainer.evaluate_every_steps)


def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _evaluate(run: Run, step: int) -> None:
    if run.evaluation is not None:
        with run.log.phase("evaluate", len(run.evaluation.prompts)) as advance:
            run.log.evaluation(step, run.evaluation(advance))


def finish(run: Run) -> None:
    _export(run)
    run.log.close()


def _export(run: Run) -> None:
    if run.config.trainer.export:
        with run.log.phase("export", 1) as advance:
            run.policy.export(Path(run.config.trainer.run_dir) / "export")
            advance(1)


def _checkpoints(run: Run) -> Path:
    return Path(run.config.trainer.run_dir) / "checkpoints"
