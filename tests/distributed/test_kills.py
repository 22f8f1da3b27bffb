"""A run that is killed again and again, anywhere, and started again by the same command, ends with the same bytes as
one that never was: metrics, samples, checkpoints (weights and optimizer state) and export.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.distributed.kills import LAST, START, Chain, Target, kill_chain, kill_table, struck, uninterrupted

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc")

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
