"""Rewards on two ranks: each answer is graded once, by one of them, and both hold the same groups in the same order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_cppo.algo.advantages import group_advantages
from megatron_cppo.rewards.grader import Grader
from megatron_cppo.rewards.scoring import Reward, describe
from megatron_cppo.types import Group, ImageGrid, Prompt, Sample
from tests.distributed.launch import run_distributed

MODULE = "tests.distributed.recorded_reward"
REWARDS = (f"{MODULE}:correct=0.75", f"{MODULE}:process=0.25")
SAMPLES_PER_PROMPT = 4
# name -> (number of prompts, normalize_std, tolerance); one prompt leaves the second rank without any.
CALLS = {
    "uneven": (5, True, 1e-6),
    "even, not normalized": (4, False, 1e-6),
    "one prompt": (1, True, 1e-6),
    "tolerant": (3, True, 10.0),
}


def make_groups(folder: Path, name: str) -> list[Group]:
    """Prompt r's samples answer 0, 1, 2, 3 and so on with ragged lengths; every other prompt has an image."""
    groups = []
    for row in range(CALLS[name][0]):
        grids = (ImageGrid(1, 2, 2, 2),) if row % 2 == 0 else ()
        prompt = Prompt("train", row, 0, str(folder), str(row % 4), "", (1, 2), ((0, 1),) * 3, 2, grids, ())
        samples = tuple(
            Sample(
                prompt=prompt,
                index=index,
                token_ids=(7,) * (row + index + 1),
                logp=(-0.5,) * (row + index + 1),
                text=f"{name} prompt {row} answers {index}",
                truncated=index == 3,
                version=2,
            )
            for index in range(SAMPLES_PER_PROMPT)
        )
        groups.append(Group(prompt, samples))
    return groups


def score(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, list[Group]]:
    """All calls with one grader, as in a run; top-level, for `run_distributed`."""
    group = dist.group.WORLD
    assert group is not None, "no default process group"
    with Grader(REWARDS, workers=1, deadline_seconds=30.0) as grader:
        return {
            name: Reward(grader, normalize_std=CALLS[name][1], tolerance=CALLS[name][2], group=group)(
                make_groups(folder, name)
            )
            for name, folder in folders.items()
        }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the processes that grade for a call keep their files."""
    return {name: tmp_path_factory.mktemp("graded") for name in CALLS}


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> list[dict[str, list[Group]]]:
    return run_distributed(score, 2, folders)


Answers = list[dict[str, list[Group]]]


def flat(groups: Sequence[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


@pytest.mark.parametrize("name", CALLS)
def test_both_ranks_hold_the_same_groups_in_the_order_given(
    name: str, answers: Answers, folders: dict[str, Path]
) -> None:
    """What grading fills in differs from process to process, so equality means that one grade reached both ranks."""
    first, second = (answer[name] for answer in answers)
    assert first == second
    given = make_groups(folders[name], name)
    assert [group.prompt for group in first] == [group.prompt for group in given]
    for found, sample in zip(flat(first), flat(given), strict=True):
        kept = ("prompt", "index", "token_ids", "logp", "text", "truncated", "version")
        assert [getattr(found, field) for field in kept] == [getattr(sample, field) for field in kept]


@pytest.mark.parametrize("name", CALLS)
def test_every_answer_is_graded_once_and_prompts_are_dealt_out(
    name: str, answers: Answers, folders: dict[str, Path]
) -> None:
    by_process = {path.name: path.read_text().splitlines() for path in folders[name].iterdir()}
    graded = [text for texts in by_process.values() for text in texts]
    assert sorted(graded) == sorted(sample.text for sample in flat(answers[0][name]))
    prompts = [{text.split()[-3] for text in texts} for texts in by_process.values()]
    dealt = [{str(row) for row in range(start, CALLS[name][0], 2)} for start in range(2)]
    assert sorted(map(sorted, prompts)) == sorted(map(sorted, filter(None, dealt)))
    # The other reward says which process it was, which must be the one that holds the file.
    for sample in flat(answers[0][name]):
        process = str(round(dict(sample.rewards)[f"{MODULE}:process"] * 2**22))
        assert sample.text in by_process[process]


@pytest.mark.parametrize("name", CALLS)
def test_rewards_are_the_weighted_parts_and_advantages_the_algorithms(name: str, answers: Answers) -> None:
    groups = answers[0][name]
    _, normalize_std, tolerance = CALLS[name]
    for sample in flat(groups):
        (first, correct), (second, process) = sample.rewards
        assert (first, second) == (f"{MODULE}:correct", f"{MODULE}:process")
        assert correct == float(sample.index == sample.prompt.row % 4)
        assert sample.reward == pytest.approx(0.75 * correct + 0.25 * process)
        assert sample.grading == "ok"
    owner = [row for row, group in enumerate(groups) for _ in group.samples]
    rewards = torch.tensor([sample.reward for sample in flat(groups)])
    wanted = group_advantages(rewards, torch.tensor(owner), normalize_std=normalize_std, tolerance=tolerance)
    assert [sample.advantage for sample in flat(groups)] == wanted.tolist()
    if name == "uneven":
        # One right answer in four: 0.75 - 0.1875 above the mean, over a standard deviation of 0.375.
        assert {round(sample.advantage, 4) for sample in flat(groups)} == {1.5, -0.5}
    if name == "tolerant":
        assert {sample.advantage for sample in flat(groups)} == {0.0}


def test_metrics_of_graded_samples(answers: Answers) -> None:
    groups = answers[0]["uneven"]
    samples = flat(groups)
    rewards = [sample.reward for sample in samples]
    lengths = [row + index + 1 for row in range(5) for index in range(4)]
    # Prompts 0, 2 and 4 have an image, and one right answer each.
    assert describe(groups) == pytest.approx(
        {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "response/length": statistics.fmean(lengths),
            "response/truncated_share": 0.25,
            "tokens/response": sum(lengths),
            "groups/informative_share": 1.0,
            "samples/gated_share": 3 / 20,
            f"reward/{MODULE}:correct": 0.25,
            f"reward/{MODULE}:process": statistics.fmean(sample.rewards[1][1] for sample in samples),
            "grading/ok": 20,
        },
        rel=1e-5,
    )
    tolerant = describe(answers[0]["tolerant"])
    assert (tolerant["groups/informative_share"], tolerant["samples/gated_share"]) == (0.0, 0.0)
    assert all(math.isfinite(value) for value in tolerant.values())
