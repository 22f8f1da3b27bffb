"""A run that is killed again and again, anywhere, and started again by the same command, ends with the same bytes as
one that never was: metrics, samples, checkpoints (weights and optimizer state) and export.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.distributed.kills import LAST, START, Chain, Target, kill_chain, kill_table, struck, uninterrupted
from tests.distributed.tiny_run import REWARD, Launcher, write_recipe

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc"),
    pytest.mark.alone,
]

SEED = 7
# What is killed, and where; when exactly within the phase is drawn.
CHAINS = {
    "TP2": (
        (0, START, "launcher"),
        (0, "evaluate", "all"),
        (1, "rollout", "all"),
        (1, "update", "all"),
        (1, "save", "all"),
        (2, "reward", "rank 1"),
        (3, "rollout", "launcher"),
        (3, "save", "all"),
        (LAST, "export", "all"),
    ),
    "DP2": (
        (1, "reward", "all"),
        (1, "update", "all"),
        (2, "save", "all"),
        (3, "reward", "all"),
        (3, "update", "rank 0"),
    ),
}


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chain]:
    folder, draw = tmp_path_factory.mktemp("kills"), random.Random(SEED)
    found = {}
    for layout, places in CHAINS.items():
        targets = [Target(step, phase, draw.uniform(0.05, 0.7), victim) for step, phase, victim in places]
        found[layout] = kill_chain(uninterrupted(folder, layout), f"{layout}-killed", targets)
    return found


@pytest.mark.parametrize("layout", CHAINS)
def test_a_run_killed_anywhere_ends_with_the_same_bytes(layout: str, chains: dict[str, Chain]) -> None:
    print(f"\n{kill_table([chains[layout]])}")
    assert chains[layout].differences == ()


def test_the_kills_struck_where_they_were_meant_to(chains: dict[str, Chain]) -> None:
    hits = struck(list(chains.values()))
    print(f"\n{hits.total()} kills: {dict(hits)}")
    assert hits.total() >= 10
    assert all(hits[phase] >= 2 for phase in ("rollout", "reward", "update", "save")), hits
    assert [target for chain in chains.values() for target in chain.missed] == []
    assert {kill.resumed_from for chain in chains.values() for kill in chain.kills} >= {0, 1, 2}


# Read by every rank: its file of the first save is whole before the second update begins, where it is killed.
KILLED_IN_THE_SECOND_UPDATE = """
import os, signal, time

if "RANK" in os.environ:
    from megatron_cppo.policy.policy import Policy

    def score(policy, *arguments, call=Policy.score, **named):
        while policy._save is not None and not policy._save.saving.is_done:
            time.sleep(0.01)
        return call(policy, *arguments, **named)

    def update(policy, *arguments, call=Policy.update, updated=[]):
        updated.append(call(policy, *arguments) if not updated else os.kill(os.getpid(), signal.SIGKILL))
        return updated[0]

    Policy.score, Policy.update = score, update
"""


def test_what_was_written_while_rollouts_were_sampled_survives_a_kill_in_the_update(tmp_path: Path) -> None:
    write_recipe(tmp_path, KILLED_IN_THE_SECOND_UPDATE + REWARD)
    launcher = Launcher(tmp_path)
    assert launcher.finish("run") == 128 + signal.SIGKILL, launcher.said("run")
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir(), launcher.said("run")
