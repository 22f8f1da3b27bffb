"""Graded groups on disk, of every step (rollouts) or of one whose update was skipped: JSON lines, exact to the bit.

    rollouts/step_000012.jsonl          a head (what the groups need), then one group a line
    skipped/step_000012/groups.jsonl    the same, of a step of which an update was not finite
                        scores.jsonl    old and reference log-probs, one sample a line
                        skipped.json    the step and its skipped updates
                        checkpoint/     when the run stopped there: the weights that the last of them saw

Prompts are not repeated: a row number names one, and a digest of everything in it says whether the data, the tokenizer
and the image sizes still make the same. Numbers that are not finite are the strings "nan", "inf" and "-inf". Files are
published by rename, and nothing in them is executed when they are read. Standard library only; must not know models.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cppo.config import Config, UserError
from megatron_cppo.types import Group, Prompt, Sample

KEPT_SKIPPED_STEPS = 3
GROUPS, SCORES, SKIPPED, CHECKPOINT = "groups.jsonl", "scores.jsonl", "skipped.json", "checkpoint"

FindPrompt = Callable[[int, int], Prompt | None]
"""(row, epoch) -> the prompt, or None when the data have no such row (any more)."""
Scores = tuple[tuple[float, ...], ...] | None
"""Log-probs of each sample's tokens; None where the update had none."""


class SavedError(UserError):
    """Saved groups that cannot be used; the text says which, why, and how to mend it."""


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step with updates that were not finite: all that is needed, with the weights, to compute them again.

    `updates` are the skipped ones of its `num_updates`, from 0. Updates from `weights_before` on left the weights as
    they were at the end of the step: those of the checkpoint, if the run stopped there.
    """

    step: int
    updates: tuple[int, ...]
    num_updates: int
    seed: int
    groups: tuple[Group, ...]
    old_logp: Scores
    reference_logp: Scores

    @property
    def weights_before(self) -> int:
        return self.num_updates - trailing(self.updates, self.num_updates)


def trailing(skipped: Sequence[int], num_updates: int) -> int:
    """How many of a step's last updates were skipped in a row.

    >>> trailing((0, 2, 3), 4)
    2
    """
    count = 0
    while count < num_updates and num_updates - 1 - count in skipped:
        count += 1
    return count


class Writer:
    """Writes groups into a run folder. Every rank calls the same methods; rank 0 writes."""

    def __init__(self, run_dir: Path, *, rank: int, vocab_size: int) -> None:
        self._run_dir, self._writes, self._vocab_size = run_dir, rank == 0, vocab_size

    def rollout(self, step: int, groups: Sequence[Group]) -> None:
        """Write a step's graded groups; an earlier file of this step is replaced."""
        if self._writes:
            folder = self._run_dir / "rollouts"
            folder.mkdir(exist_ok=True)
            _publish(rollout_file(folder, step), _lines(step, groups, self._vocab_size))

    def skipped(self, step: SkippedStep) -> Path:
        """Write a step with skipped updates, and delete all but the newest few; returns its folder."""
        folder = self._run_dir / "skipped" / f"step_{step.step:06d}"
        if not self._writes:
            return folder
        partial = folder.with_name(f".partial_{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _publish(partial / GROUPS, _lines(step.step, step.groups, self._vocab_size))
        _publish(partial / SCORES, _score_lines(step))
        told = {name: getattr(step, name) for name in ("step", "updates", "num_updates", "seed")}
        _publish(partial / SKIPPED, iter([json.dumps(told)]))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        # By age, not by step: a run may have gone back.
        others = [path for path in folder.parent.glob("step_*") if path != folder]
        for old in sorted(others, key=lambda path: path.stat().st_mtime)[: 1 - KEPT_SKIPPED_STEPS]:
            shutil.rmtree(old)
        return folder


def rollout_file(folder: Path, step: int) -> Path:
    """Where a step's groups are.

    >>> rollout_file(Path("rollouts"), 12).name
    'step_000012.jsonl'
    """
    return folder / f"step_{step:06d}.jsonl"


class SavedRollouts:
    """The rollouts of a folder, in place of an engine. The constructor reads the head of every step that is needed.

    Raises SavedError when steps are missing, or were made for other data, another tokenizer, or other numbers of
    prompts, samples or tokens than `config` has.
    """

    def __init__(self, config: Config, *, find: FindPrompt, vocab_size: int) -> None:
        self._folder, self._find = Path(config.debug.train_on), find
        refuse_incomplete(config)
        digest = functools.cache(lambda row: _digest_of(find, row))
        for step in range(1, config.trainer.num_steps + 1):
            path = rollout_file(self._folder, step)
            head = _head(path)
            _compare(path, head, config, vocab_size)
            _compare_prompts(path, head, digest)

    def groups(self, step: int) -> list[Group]:
        """The groups of `step`, equal to those that were saved."""
        return _read_groups(rollout_file(self._folder, step), self._find)


def refuse_incomplete(config: Config) -> None:
    """Raise SavedError when debug.train_on lacks files of the config's steps; reads none of them."""
    folder, last = Path(config.debug.train_on), config.trainer.num_steps
    missing = [step for step in range(1, last + 1) if not rollout_file(folder, step).is_file()]
    if missing:
        fix = f"use --trainer.num_steps {missing[0] - 1}, or " if missing[0] > 1 else ""
        raise SavedError(
            f"debug.train_on: {folder} lacks {len(missing)} of the {last} steps, first "
            f"{rollout_file(folder, missing[0]).name}; {fix}give the folder `rollouts` of a run of {last} steps"
        )


def read_skipped(folder: Path, *, find: FindPrompt, vocab_size: int) -> SkippedStep:
    """A step that `Writer.skipped` wrote. Raises SavedError when its prompts are not those of the data any more."""
    path = folder / GROUPS
    told = _parse(folder / SKIPPED, (folder / SKIPPED).read_text(), 1)
    head = _head(path)
    if head["vocab_size"] != vocab_size:
        raise _other_vocabulary(path, head, vocab_size)
    _compare_prompts(path, head, functools.cache(lambda row: _digest_of(find, row)))
    columns: dict[str, Any] = {"old_logp": [], "reference_logp": []}
    for number, line in enumerate((folder / SCORES).read_text().splitlines(), 1):
        values = _parse(folder / SCORES, line, number)
        for name, column in columns.items():
            column.append(None if values[name] is None else tuple(map(float, values[name])))
    scores = {name: None if None in column else tuple(column) for name, column in columns.items()}
    return SkippedStep(
        step=told["step"],
        updates=tuple(told["updates"]),
        num_updates=told["num_updates"],
        seed=told["seed"],
        groups=tuple(_read_groups(path, find)),
        **scores,
    )


def _lines(step: int, groups: Sequence[Group], vocab_size: int) -> Iterator[str]:
    samples = [sample for group in groups for sample in group.samples]
    head = {
        "step": step,
        "num_groups": len(groups),
        "samples_per_prompt": max(len(group.samples) for group in groups),
        "longest_response": max(len(sample.token_ids) for sample in samples),
        "vocab_size": vocab_size,
        "prompts": [[group.prompt.row, digest(group.prompt)] for group in groups],
    }
    yield json.dumps(head)
    for group in groups:
        prompt = group.prompt
        line = {"row": prompt.row, "epoch": prompt.epoch, "prompt": prompt.text}
        yield json.dumps(line | {"samples": [_sample_line(sample) for sample in group.samples]}, allow_nan=False)


def _sample_line(sample: Sample) -> dict[str, Any]:
    return {
        "index": sample.index,
        "token_ids": sample.token_ids,
        "logp": [_plain(value) for value in sample.logp],
        "text": sample.text,
        "truncated": sample.truncated,
        "version": sample.version,
        "earlier": sample.earlier,
        "reward": _plain(sample.reward),
        "rewards": [[name, _plain(value)] for name, value in sample.rewards],
        "grading": sample.grading,
        "advantage": _plain(sample.advantage),
    }


def _score_lines(step: SkippedStep) -> Iterator[str]:
    for i in range(sum(len(group.samples) for group in step.groups)):
        columns = {"old_logp": step.old_logp, "reference_logp": step.reference_logp}
        line = {name: None if scores is None else [_plain(v) for v in scores[i]] for name, scores in columns.items()}
        yield json.dumps(line, allow_nan=False)


def _head(path: Path) -> dict[str, Any]:
    with path.open() as file:
        return _parse(path, file.readline(), 1)


def _read_groups(path: Path, find: FindPrompt) -> list[Group]:
    groups = []
    with path.open() as file:
        head = _parse(path, file.readline(), 1)
        for number, text in enumerate(file, 2):
            line = _parse(path, text, number)
            prompt = find(line["row"], line["epoch"])
            assert prompt is not None, f"{path}:{number}: row {line['row']} was there when the head was read"
            samples = tuple(_sample(prompt, fields) for fields in line["samples"])
            wrong = [sample.index for sample in samples if not _parts_fit(sample)]
            if wrong:
                raise SavedError(
                    f"{path}:{number}: `earlier` of sample {wrong[0]} does not fit its tokens; save it again"
                )
            groups.append(Group(prompt, samples))
    if len(groups) != head["num_groups"]:
        raise SavedError(f"{path} holds {len(groups)} groups, and its head says {head['num_groups']}; save it again")
    return groups


def _sample(prompt: Prompt, fields: dict[str, Any]) -> Sample:
    exact: dict[str, Any] = {
        "token_ids": tuple(fields["token_ids"]),
        "logp": tuple(map(float, fields["logp"])),
        "earlier": tuple((version, count) for version, count in fields.get("earlier", ())),
        "reward": float(fields["reward"]),
        "rewards": tuple((name, float(value)) for name, value in fields["rewards"]),
        "advantage": float(fields["advantage"]),
    }
    return Sample(prompt=prompt, **(fields | exact))


def _parts_fit(sample: Sample) -> bool:
    """Whether the parts of a cut answer are of ever later versions, and leave a token to the last one."""
    counts = [count for _, count in sample.earlier]
    versions = [*(version for version, _ in sample.earlier), sample.version]
    return (
        all(before < after for before, after in itertools.pairwise(versions))
        and all(count > 0 for count in counts)
        and (not counts or sum(counts) < len(sample.token_ids))
    )


def _parse(path: Path, text: str, number: int) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SavedError(f"{path}:{number} is not JSON ({error}); the file is damaged, save it again") from error


def _compare(path: Path, head: dict[str, Any], config: Config, vocab_size: int) -> None:
    if head["vocab_size"] != vocab_size:
        raise _other_vocabulary(path, head, vocab_size)
    wanted = {
        "trainer.prompts_per_step": (config.trainer.prompts_per_step, head["num_groups"]),
        "rollout.samples_per_prompt": (config.rollout.samples_per_prompt, head["samples_per_prompt"]),
    }
    for name, (here, there) in wanted.items():
        if here != there:
            raise SavedError(f"debug.train_on: {path} was saved with {there}, but {name} is {here}; use {there}")
    if head["longest_response"] > config.rollout.max_response_tokens:
        raise SavedError(
            f"debug.train_on: {path} has a response of {head['longest_response']} tokens, but "
            f"rollout.max_response_tokens is {config.rollout.max_response_tokens}; use that of the run that was saved"
        )


def _other_vocabulary(path: Path, head: dict[str, Any], vocab_size: int) -> SavedError:
    return SavedError(
        f"{path} was saved with a vocabulary of {head['vocab_size']} tokens, and the model of model.path has "
        f"{vocab_size}; use the model (or one of its family) that the rollouts were made with"
    )


def _compare_prompts(path: Path, head: dict[str, Any], digest_here: Callable[[int], str | None]) -> None:
    for row, there in head["prompts"]:
        here = digest_here(row)
        if here is None:
            raise SavedError(
                f"{path}: its row {row} is not among the usable rows of data.train; give the files that it was made of"
            )
        if here != there:
            raise SavedError(
                f"{path}: row {row} of data.train makes another prompt now than when it was saved; use the same files, "
                "tokenizer, data.instruction, and model.min_pixels and max_pixels"
            )


def digest(prompt: Prompt) -> str:
    """Of everything in a prompt but its epoch."""
    return hashlib.sha256(repr(dataclasses.replace(prompt, epoch=0)).encode()).hexdigest()[:16]


def _digest_of(find: FindPrompt, row: int) -> str | None:
    prompt = find(row, 0)
    return None if prompt is None else digest(prompt)


def _publish(path: Path, lines: Iterator[str]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.writelines(line + "\n" for line in lines)
    partial.replace(path)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
