"""Saved groups: equal to the bit when they are read again; clear errors where they do not fit the run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from megatron_cppo.config import Config, DebugConfig, RolloutConfig, TrainerConfig
from megatron_cppo.saved import (
    SavedError,
    SavedRollouts,
    SkippedStep,
    Writer,
    read_skipped,
    refuse_incomplete,
    rollout_file,
    trailing,
)
from megatron_cppo.types import Group, ImageGrid, Prompt, Sample

VOCAB = 40
NUMBERS = (-1 / 3, math.nextafter(0.1, 1), -math.inf, math.nan, 5e-324)


def prompt_of(row: int, epoch: int) -> Prompt | None:
    if row > 9:
        return None
    return Prompt(
        split="train",
        row=row,
        epoch=epoch,
        data_source="tiny",
        ground_truth="4",
        text=f"What is {row}? <image>\n",
        token_ids=(1, 5, 5, 2 + row),
        positions=((0, 1, 1, 3), (0, 1, 1, 3), (0, 1, 2, 3)),
        next_position=4,
        grids=(ImageGrid(1, 2, 4, 2),),
        image_slots=(1, 2),
    )


def groups_of(step: int, *, samples: int = 2) -> list[Group]:
    groups = []
    for row in (3, 1):
        prompt = prompt_of(row, epoch=step)
        assert prompt is not None
        made = tuple(
            Sample(
                prompt=prompt,
                index=index,
                token_ids=(7, 8, 9, 10, 11),
                logp=NUMBERS,
                text="é \u2028 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
                truncated=index == 1,
                version=step,
                earlier=((step - 2, 1), (step - 1, 3)) if index == 1 else (),
                reward=0.1 + 0.2,
                rewards=(("accuracy", 1 / 3), ("format", 0.0)),
                grading="ok",
                advantage=-math.sqrt(index + 2),
            )
            for index in range(samples)
        )
        groups.append(Group(prompt, made))
    return groups


def config_of(folder: Path, *, steps: int = 2, prompts: int = 2, samples: int = 2, tokens: int = 5) -> Config:
    return Config(
        trainer=TrainerConfig(num_steps=steps, prompts_per_step=prompts),
        rollout=RolloutConfig(samples_per_prompt=samples, max_response_tokens=tokens),
        debug=DebugConfig(train_on=str(folder)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in (0, 1):
        writer = Writer(tmp_path / f"rank{rank}", rank=rank, vocab_size=VOCAB)
        (tmp_path / f"rank{rank}").mkdir()
        for step in (1, 2):
            writer.rollout(step, groups_of(step))
    assert not (tmp_path / "rank1" / "rollouts").exists()
    return tmp_path / "rank0" / "rollouts"


def test_groups_come_back_equal_to_the_bit(folder: Path) -> None:
    saved = SavedRollouts(config_of(folder), find=prompt_of, vocab_size=VOCAB)
    for step in (1, 2):
        found = saved.groups(step)
        assert repr(found) == repr(groups_of(step))  # NaN is not equal to itself, its text is
        assert [group.prompt for group in found] == [group.prompt for group in groups_of(step)]
        finite = [value for value in found[0].samples[0].logp if math.isfinite(value)]
        assert finite == [value for value in NUMBERS if math.isfinite(value)]
    assert [path.name for path in sorted(folder.iterdir())] == ["step_000001.jsonl", "step_000002.jsonl"]


@pytest.mark.parametrize(
    ("changes", "vocab_size", "said"),
    [
        ({}, VOCAB + 1, "saved with a vocabulary of 40 tokens, and the model of model.path has 41"),
        ({"prompts": 4}, VOCAB, "saved with 2, but trainer.prompts_per_step is 4; use 2"),
        ({"samples": 3}, VOCAB, "saved with 2, but rollout.samples_per_prompt is 3; use 2"),
        ({"tokens": 4}, VOCAB, "has a response of 5 tokens, but rollout.max_response_tokens is 4"),
        ({"steps": 4}, VOCAB, "lacks 2 of the 4 steps, first step_000003.jsonl; use --trainer.num_steps 2, or give"),
    ],
)
def test_rollouts_of_another_run_are_refused(folder: Path, changes: dict, vocab_size: int, said: str) -> None:
    with pytest.raises(SavedError) as error:
        SavedRollouts(config_of(folder, **changes), find=prompt_of, vocab_size=vocab_size)
    assert said in str(error.value)


def test_an_empty_folder_is_refused_without_reading(tmp_path: Path) -> None:
    with pytest.raises(SavedError, match=r"lacks 2 of the 2 steps, first step_000001.jsonl; give the folder"):
        refuse_incomplete(config_of(tmp_path))


def test_rows_that_are_gone_or_changed_are_refused(folder: Path) -> None:
    with pytest.raises(SavedError, match=r"its row 3 is not among the usable rows of data.train"):
        SavedRollouts(config_of(folder), find=lambda row, epoch: None, vocab_size=VOCAB)

    def other(row: int, epoch: int) -> Prompt | None:
        prompt = prompt_of(row, epoch)
        return prompt and dataclasses.replace(prompt, ground_truth="5" if row == 1 else "4")

    with pytest.raises(SavedError, match=r"row 1 of data.train makes another prompt now"):
        SavedRollouts(config_of(folder), find=other, vocab_size=VOCAB)


def test_damaged_files_are_named(folder: Path) -> None:
    path = rollout_file(folder, 2)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    saved = SavedRollouts(config_of(folder), find=prompt_of, vocab_size=VOCAB)
    with pytest.raises(SavedError, match=r"step_000002.jsonl:2 is not JSON"):
        saved.groups(2)
    path.write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(SavedError, match="holds 1 groups, and its head says 2"):
        saved.groups(2)


def change_samples(path: Path, **fields: object) -> None:
    """Give every sample of a file these fields; None removes one."""
    head, *groups = map(json.loads, path.read_text().splitlines())
    for group in groups:
        for sample in group["samples"]:
            sample |= fields
            for name in [name for name, value in fields.items() if value is None]:
                del sample[name]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *groups)))


def test_rollouts_from_before_answers_could_be_cut_are_read(folder: Path) -> None:
    change_samples(rollout_file(folder, 1), earlier=None)
    found = SavedRollouts(config_of(folder), find=prompt_of, vocab_size=VOCAB).groups(1)
    whole = [
        Group(group.prompt, tuple(dataclasses.replace(sample, earlier=()) for sample in group.samples))
        for group in groups_of(1)
    ]
    assert repr(found) == repr(whole)


@pytest.mark.parametrize(
    "earlier", [[[0, 5]], [[0, 0]], [[0, -1]], [[1, 2]], [[2, 2]], [[0, 1], [0, 1]], [[-1, 2], [0, 3]]]
)
def test_parts_of_an_answer_have_to_fit_its_tokens(folder: Path, earlier: list[list[int]]) -> None:
    change_samples(rollout_file(folder, 1), earlier=earlier)
    saved = SavedRollouts(config_of(folder), find=prompt_of, vocab_size=VOCAB)
    with pytest.raises(SavedError, match=r"step_000001.jsonl:2: `earlier` of sample 0 does not fit its tokens"):
        saved.groups(1)


def skipped(step: int, updates: tuple[int, ...] = (1,)) -> SkippedStep:
    scores = tuple(tuple(value + i for value in NUMBERS) for i in range(4))
    return SkippedStep(step, updates, 2, 17, tuple(groups_of(step)), scores, None)


def test_a_skipped_step_comes_back_equal_and_few_are_kept(tmp_path: Path) -> None:
    writer = Writer(tmp_path, rank=0, vocab_size=VOCAB)
    for step in (998, 999, 1_000_000, 999_999):
        folder = writer.skipped(skipped(step))
        assert repr(read_skipped(folder, find=prompt_of, vocab_size=VOCAB)) == repr(skipped(step))
    names = sorted(path.name for path in (tmp_path / "skipped").iterdir())
    assert names == ["step_000999", "step_1000000", "step_999999"]
    assert writer.skipped(skipped(5)).is_dir(), "a run that went back must keep what it saves now"
    assert not (tmp_path / "skipped" / "step_000999").exists()
    (folder / "checkpoint").mkdir()
    assert writer.skipped(skipped(999_999, updates=(0, 1))) == folder
    assert not (folder / "checkpoint").exists(), "it belongs to the step's earlier attempt"
    assert json.loads((folder / "skipped.json").read_text())["updates"] == [0, 1]


@pytest.mark.parametrize(("updates", "before"), [((0,), 4), ((3,), 3), ((0, 2, 3), 2), ((0, 1, 2, 3), 0)])
def test_the_last_skipped_updates_saw_the_weights_of_the_steps_end(updates: tuple[int, ...], before: int) -> None:
    assert trailing(updates, 4) == 4 - before
    assert dataclasses.replace(skipped(1, updates), num_updates=4).weights_before == before
