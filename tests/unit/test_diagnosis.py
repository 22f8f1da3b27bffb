"""Who is blamed for a failure or a hang, from what ranks were seen to do."""

from __future__ import annotations

import pytest

from megatron_cppo import diagnosis
from megatron_cppo.diagnosis import Failure, Standing

PACKAGES = "/env/lib/python3.11/site-packages"
COLLECTIVE = (f"{PACKAGES}/torch/distributed/distributed_c10d.py", 3252, "all_reduce")
PIPELINE = (f"{PACKAGES}/megatron/core/pipeline_parallel/p2p_communication.py", 90, "_communicate")
GRADIENT = (f"{PACKAGES}/torch/autograd/graph.py", 829, "_engine_run_backward")
MATRIX = (f"{PACKAGES}/torch/nn/functional.py", 5, "linear")
STEP = ("/repo/megatron_cppo/policy/step.py", 143, "update")
REWARD = ("/repo/megatron_cppo/rewards/scoring.py", 40, "grade")
Frames = tuple[tuple[str, int, str], ...]


def dump(main: Frames, other: Frames = ()) -> str:
    """As faulthandler writes it, the main thread last."""
    blocks = [("Thread 0x000000000000000b (most recent call first):", other)] if other else []
    blocks.append(("Current thread 0x000000000000000a (most recent call first):", main))
    return "\n".join(
        "\n".join([head, *(f'  File "{a}", line {b} in {c}' for a, b, c in frames)]) for head, frames in blocks
    )


def standing(
    rank: int, *frames: tuple[str, int, str], entered: int = 7, idle: float = 70.0, done: bool = False
) -> Standing:
    return Standing(rank, 2, "update", entered, idle, 0xA, dump(frames) if frames else "", note="", done=done)


def failure(rank: int, kind: str, time: float) -> Failure:
    return Failure(rank, kind, time, "", "", 1)


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ([failure(0, "error", 2.0), failure(1, "error", 1.0)], 1),
        ([failure(0, "communication", 1.0), failure(1, "killed", 1.1)], 1),
        ([failure(0, "communication", 1.0), failure(1, "communication", 0.9)], 1),
        ([failure(2, "error", 1.0), failure(0, "communication", 1.1), failure(1, "killed", 1.4)], 2),
    ],
    ids=["the first", "an echo before its cause", "echoes alone", "aborted in consequence"],
)
def test_the_cause_is_the_first_failure_that_is_no_echo(failures: list[Failure], rank: int) -> None:
    assert diagnosis.cause(failures).rank == rank


@pytest.mark.parametrize(
    ("stack", "waiting"),
    [
        (dump((COLLECTIVE, STEP)), True),
        (dump((PIPELINE, STEP)), True),
        (dump((MATRIX, STEP)), False),
        (dump(((f"{PACKAGES}/torch/distributed/nn/jit/instantiator.py", 93, "exec_module"),)), False),
        (dump((REWARD,), (COLLECTIVE,)), False),
        (dump((GRADIENT, STEP), (COLLECTIVE, MATRIX)), True),
        (dump((GRADIENT, STEP), (MATRIX, COLLECTIVE)), False),
        ("", False),
    ],
    ids=[
        "collective",
        "pipeline",
        "computes",
        "imports",
        "another thread",
        "gradients wait",
        "gradients compute",
        "no answer",
    ],
)
def test_waiting_is_seen_in_the_stack(stack: str, waiting: bool) -> None:
    assert diagnosis.waits(Standing(0, 1, "update", 1, 9.0, 0xA, stack, note="", done=False)) == waiting


WAITS = (COLLECTIVE, STEP)
WAITS_ELSEWHERE = (COLLECTIVE, REWARD)


@pytest.mark.parametrize(
    ("standings", "verdict"),
    [
        ([standing(0, *WAITS), standing(1, REWARD)], "suspect rank 1: not waiting for another rank"),
        ([standing(0, *WAITS), standing(1)], "suspect rank 1: not waiting for another rank"),
        ([standing(0, *WAITS), standing(1, *WAITS, entered=5)], "suspect rank 1: still in phase 'update' of step 2"),
        (
            [standing(0, *WAITS), standing(1, *WAITS_ELSEWHERE), standing(2, *WAITS)],
            "suspect rank 1: at another place than the others",
        ),
        ([standing(0, *WAITS), standing(1, *WAITS_ELSEWHERE)], "suspect ranks 0-1: at different places"),
        ([standing(0, *WAITS), standing(1, done=True)], "suspect rank 1: at its end already, while the others wait"),
        (
            [standing(0, MATRIX), standing(1, MATRIX), standing(2, REWARD)],
            "suspect rank 2: at another place than the others",
        ),
        ([standing(0, REWARD), standing(1, MATRIX, idle=1.0)], "suspect rank 0: not waiting for another rank"),
        ([standing(0, *WAITS), standing(1, *WAITS)], "no suspect"),
        ([standing(0, REWARD)], "suspect rank 0: not waiting for another rank"),
    ],
)
def test_a_hang_has_a_suspect(standings: list[Standing], verdict: str) -> None:
    found = diagnosis.hang(standings, 60.0)
    assert found is not None
    assert found == verdict or (verdict == "no suspect" and found.startswith(verdict))


@pytest.mark.parametrize(
    "standings",
    [
        [standing(0, *WAITS), standing(1, *WAITS, idle=1.0)],
        [standing(0, *WAITS, idle=59.0), standing(1, REWARD, idle=59.0)],
        [standing(0, *WAITS), standing(1, REWARD, idle=59.0)],
        [standing(0, *WAITS, idle=1.0), standing(1, done=True)],
    ],
    ids=["waits for one that works", "not long enough", "waits for one that works long", "has ended"],
)
def test_waiting_for_a_rank_that_works_is_no_hang(standings: list[Standing]) -> None:
    assert diagnosis.hang(standings, 60.0) is None


def test_the_report_has_each_stack_once_and_a_line_for_each_rank() -> None:
    text = diagnosis.report([standing(0, *WAITS), standing(1, REWARD), standing(2, *WAITS), standing(3, *WAITS)])
    assert text.count("in all_reduce") == 1
    assert "--- ranks 0, 2-3\n" in text
    assert "--- rank 1\n" in text
    rows = text.split("\n")[-4:]
    assert rows[0].split(maxsplit=5) == [
        "0", "2", "update", "1m10s", "yes", "step.py:143 update > distributed_c10d.py:3252 all_reduce",
    ]  # fmt: skip
    assert rows[1].split(maxsplit=5) == ["1", "2", "update", "1m10s", "no", "scoring.py:40 grade"]


@pytest.mark.parametrize(
    ("returncode", "kind", "words", "status"),
    [
        (3, "status", "rank 5 ended with exit status 3", 3),
        (-9, "killed", "rank 5 was killed by signal 9 (perhaps out of memory: see dmesg)", 137),
        (-6, "killed", "rank 5 was killed by signal 6", 134),
        (-15, "ended", "rank 5 was ended by signal 15", 143),
    ],
)
def test_a_rank_without_last_words(returncode: int, kind: str, words: str, status: int) -> None:
    assert diagnosis.exit_text(5, returncode) == (kind, words, status)
