"""avg@k: what is generated, in which portions, and the averages by reward and by data source."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from megatron_cppo.evaluate import Evaluation, summarise
from megatron_cppo.types import Group, Prompt, Sample


def make_prompt(row: int, source: str) -> Prompt:
    return Prompt("evaluation", row, 0, source, str(row), "", (1, 2), ((0, 1),) * 3, 2, (), ())


def make_group(
    row: int, source: str, accuracies: Sequence[float], *, lengths: Sequence[int], truncated: Sequence[bool]
) -> Group:
    prompt = make_prompt(row, source)
    samples = tuple(
        Sample(
            prompt=prompt,
            index=i,
            token_ids=(7,) * length,
            logp=(0.0,) * length,
            text="",
            truncated=cut,
            version=0,
            reward=0.9 * accuracy + 0.1,
            rewards=(("accuracy", accuracy), ("format", 1.0)),
            grading="ok",
        )
        for i, (accuracy, length, cut) in enumerate(zip(accuracies, lengths, truncated, strict=True))
    )
    return Group(prompt, samples)


GROUPS = [
    make_group(0, "geometry", [1.0, 0.0], lengths=[2, 4], truncated=[False, True]),
    make_group(1, "charts", [1.0, 1.0], lengths=[1, 1], truncated=[False, False]),
    make_group(2, "geometry", [0.0, 0.0], lengths=[8, 8], truncated=[False, False]),
]


def test_averages_over_samples_and_by_source() -> None:
    assert summarise(GROUPS) == {
        "reward": pytest.approx(0.9 * 0.5 + 0.1),
        "length": 4.0,
        "truncated_share": pytest.approx(1 / 6),
        "accuracy": 0.5,
        "format": 1.0,
        "accuracy/charts": 1.0,
        "accuracy/geometry": 0.25,
    }


def test_a_single_source_is_not_repeated() -> None:
    assert list(summarise([GROUPS[1]])) == ["reward", "length", "truncated_share", "accuracy", "format"]


def test_sources_are_split_by_the_first_reward() -> None:
    """A recipe whose first reward has another name is averaged by that one."""

    def renamed(group: Group) -> Group:
        samples = (
            dataclasses.replace(sample, rewards=(("exact", sample.rewards[0][1]), ("other", 0.5)))
            for sample in group.samples
        )
        return Group(group.prompt, tuple(samples))

    values = summarise([renamed(group) for group in GROUPS])
    assert (values["exact"], values["other"]) == (0.5, 0.5)
    assert (values["exact/charts"], values["exact/geometry"]) == (1.0, 0.25)
    assert "accuracy" not in values


@pytest.mark.parametrize(("portion", "portions"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (50, [3])])
def test_prompts_are_generated_and_graded_in_portions(portion: int, portions: list[int]) -> None:
    prompts = tuple(group.prompt for group in GROUPS)
    generated: list[int] = []
    progress: list[int] = []

    def generate(part: Sequence[Prompt]) -> list[Group]:
        assert sum(progress) == len(generated), "progress is told once a portion is done"
        generated.extend(prompt.row for prompt in part)
        ungraded = (dataclasses.replace(s, reward=0.0, rewards=()) for p in part for s in GROUPS[p.row].samples)
        return [Group(prompt, tuple(next(ungraded) for _ in GROUPS[prompt.row].samples)) for prompt in part]

    def grade(groups: Sequence[Group]) -> list[Group]:
        assert all(sample.rewards == () for group in groups for sample in group.samples)
        return [GROUPS[group.prompt.row] for group in groups]

    evaluation = Evaluation(prompts=prompts, generate=generate, grade=grade, portion=portion)
    assert evaluation(progress.append) == summarise(GROUPS)
    assert generated == [0, 1, 2]
    assert progress == portions
