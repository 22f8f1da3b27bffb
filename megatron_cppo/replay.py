"""A skipped update once more (debug.replay): rebuilt from its folder, computed, examined, never applied.

The step's updates before it that were applied then are applied again, in memory, where the weights at hand are older.
Writes FOLDER/replay.json, and the same as a table on rank 0's stdout.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cppo.config import Config
from megatron_cppo.loop import plan_batch
from megatron_cppo.plan import Plan
from megatron_cppo.policy.nonfinite import Finding, Place, RowFinding, as_dict, examine
from megatron_cppo.policy.policy import Policy
from megatron_cppo.saved import CHECKPOINT, FindPrompt, SavedError, Scores, SkippedStep, read_skipped
from megatron_cppo.storage.checkpoint_files import published
from megatron_cppo.types import Batch

REPORT = "replay.json"


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights came from: a checkpoint, or the start ("").

    `before` is the first update that they are the weights of, counted from the first of the step (negative: of a step
    before); `steps_missing` says how many steps' updates are missing, 0 where the replay is exact.
    """

    folder: str
    before: int
    steps_missing: int

    def __str__(self) -> str:
        origin = self.folder or "the starting weights"
        if not self.steps_missing:
            return f"{origin}: exact"
        return f"{origin}: {self.steps_missing} steps before the update, so NOT exact"


def replay(
    config: Config, plan: Plan, policy: Policy, *, find: FindPrompt, advance: Callable[[int], None]
) -> list[Finding]:
    """Examine the skipped updates of the folder debug.replay, and report. Called by all ranks.

    Raises SavedError when the folder's prompts are not those of the data, CheckpointError for damaged weights.
    """
    folder = Path(config.debug.replay)
    step = read_skipped(folder, find=find, vocab_size=plan.shape.vocab_size)
    asked = (config.trainer.updates_per_step, config.trainer.seed)
    if (step.num_updates, step.seed) != asked:
        raise SavedError(
            f"{folder} is of a run with trainer.updates_per_step {step.num_updates} and trainer.seed {step.seed}, the "
            f"config has {asked[0]} and {asked[1]}; replay it with the recipe of its run"
        )
    weights = _restore(policy, folder, Path(config.trainer.run_dir) / "checkpoints", step)
    batch = _batch(config, plan, step)
    findings = []
    for update in range(weights.before, max(step.updates) + 1):
        if update in step.updates:
            findings.append(examine(policy, batch, update, advance))
        else:
            policy.update(dataclasses.replace(batch, updates=(batch.updates[update],)), advance)
    if dist.get_rank() == 0:
        told = {"step": step.step, "weights": dataclasses.asdict(weights), "updates": [as_dict(f) for f in findings]}
        partial = folder / f".partial_{REPORT}"
        partial.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
        partial.replace(folder / REPORT)
        sys.stdout.write(describe(step, weights, findings) + f"all of it: {folder / REPORT}\n")
        sys.stdout.flush()
    return findings


def _restore(policy: Policy, folder: Path, checkpoints: Path, step: SkippedStep) -> Weights:
    """Load the weights that are nearest before the step's skipped updates."""
    own = published(folder / CHECKPOINT)
    if own:
        policy.restore(folder / CHECKPOINT)
        return Weights(str(own[-1]), before=step.weights_before, steps_missing=0)
    before = [path for path in published(checkpoints) if int(path.name.removeprefix("step_")) < step.step]
    if not before:
        return Weights("", before=0, steps_missing=step.step - 1)
    with _alone(before[-1], folder / ".weights") as shown:
        policy.restore(shown)
    missing = step.step - 1 - int(before[-1].name.removeprefix("step_"))
    return Weights(str(before[-1]), before=0, steps_missing=missing)


@contextmanager
def _alone(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """A folder in which `checkpoint` is the only one: to be restored though newer ones exist, and left as it is."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / checkpoint.name).symlink_to(checkpoint.resolve(), target_is_directory=True)
    dist.barrier()
    try:
        yield folder
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _batch(config: Config, plan: Plan, step: SkippedStep) -> Batch:
    def tensors(scores: Scores) -> tuple[torch.Tensor, ...] | None:
        return None if scores is None else tuple(torch.tensor(logp) for logp in scores)

    batch = plan_batch(config, plan, step.groups, score=False)
    return dataclasses.replace(batch, old_logp=tensors(step.old_logp), reference_logp=tensors(step.reference_logp))


def describe(step: SkippedStep, weights: Weights, findings: list[Finding]) -> str:
    """What was found, as text."""
    lines = [f"step {step.step}, skipped updates {', '.join(str(u + 1) for u in step.updates)} of {step.num_updates}"]
    lines.append(f"weights: {weights}")
    for finding in findings:
        said = "finite this time" if finding.finite else "not finite"
        lines.append(
            f"\nupdate {finding.update + 1}: {said}; loss {finding.loss:.6g}, gradient norm {finding.grad_norm:.6g}"
        )
        if finding.weights:
            lines.append(f"  weights that are not finite before the update: {_some(finding.weights)}")
        lines.append("  row     loss          max |log-prob|  max entropy   samples; images; what is not finite")
        lines += [f"  {_row(row)}" for row in finding.rows]
        lines += [f"  first output that is not finite: {_place(place)}" for place in finding.modules]
        lines += [f"  first gradients that are not finite: {_place(place)}" for place in finding.gradients]
        if finding.reduced_gradients and not finding.gradients:
            lines.append(f"  gradients not finite only once they were summed: {_some(finding.reduced_gradients)}")
    return "\n".join([*lines, ""])


def _row(row: RowFinding) -> str:
    bad = ", ".join(f"{count} {name}" for name, count in row.num_not_finite.items())
    marked = f"  <-- NOT FINITE: {bad}" if bad else ""
    images = f"; {', '.join(row.images)}" if row.images else ""
    numbers = f"{row.loss:<12.5g}  {row.max_logp:<14.5g}  {row.max_entropy:<12.5g}"
    return f"{row.replica}.{row.row:<4}  {numbers}  {' '.join(map(str, row.samples))}{images}{marked}"


def _place(place: Place) -> str:
    came = "" if place.started_here else " (what it was given was not, either)"
    return f"row {place.replica}.{place.row}, rank {place.rank}: {', '.join(place.names)}{came}"


def _some(names: tuple[str, ...], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
