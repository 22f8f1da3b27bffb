"""What the preflight concludes from facts and measurements: which node it names, and when it must not name one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tools.preflight import Facts, first_use, name_of, pair_rounds, problems, slow

NODES = ("node01", "node02", "node03", "node04")
VERSIONS = {"driver": "570.86", "NCCL": "2.27.3"}
FACTS = [
    Facts(rank=rank, node=NODES[rank // 2], gpus=8, versions=VERSIONS, sees_shared=True)
    for rank in range(len(NODES) * 2)
]


def changed(node: str, **fields: object) -> list[Facts]:
    return [dataclasses.replace(facts, **fields) if facts.node == node else facts for facts in FACTS]


def found(every: list[Facts], gpus: int = 8) -> list[str]:
    return problems(every, gpus=gpus, shared="/runs/x")


def test_equal_nodes_have_no_problem() -> None:
    assert found(FACTS) == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"gpus": 7}, "node03: sees 7 GPUs, needs 8"),
        ({"versions": VERSIONS | {"driver": "550.1"}}, "node03: driver 550.1, on 3 others 570.86"),
        ({"sees_shared": False}, "node03: does not see what rank 0 wrote into /runs/x; is it on a shared disk?"),
    ],
)
def test_a_node_that_differs_is_named_once(fields: dict[str, object], line: str) -> None:
    assert found(changed("node03", **fields)) == [line]


def test_a_gpu_that_fails_is_named_with_its_rank_and_words() -> None:
    every = [dataclasses.replace(facts, fault="out of memory") if facts.rank == 5 else facts for facts in FACTS]
    assert found(every) == ["node03: rank 5's GPU: out of memory"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and works")
def test_what_is_no_gpu_says_why() -> None:
    assert first_use("cuda") != ""
    assert first_use("cpu") == ""


def test_without_gpus_none_are_counted() -> None:
    assert found(changed("node03", gpus=-1), gpus=-1) == []


def test_all_problems_are_said_at_once() -> None:
    assert len(found(changed("node02", gpus=0, sees_shared=False, versions={"driver": "1", "NCCL": "2"}))) == 4


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_every_node_meets_every_other_once_and_one_at_a_time(count: int) -> None:
    nodes = [f"n{i:02d}" for i in range(count)]
    rounds = pair_rounds(nodes)
    assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(nodes, 2))
    for pairs in rounds:
        met = list(itertools.chain(*pairs))
        assert len(met) == len(set(met))
        assert len(met) >= count - 1


def speeds(slow_nodes: tuple[str, ...], *, alone: float = 300.0, rounds: int = 3) -> dict[tuple[str, str], float]:
    pairs = list(itertools.chain(*pair_rounds(NODES)[:rounds]))
    return {(n, n): alone for n in NODES} | {pair: 4.0 if set(pair) & set(slow_nodes) else 200.0 for pair in pairs}


@pytest.mark.parametrize("node", NODES)
def test_the_node_that_is_slow_with_all_its_partners_is_named_alone(node: str) -> None:
    assert slow(speeds((node,)), 4.0, 50.0) == [
        "all ranks reduce 4 GB/s, the floor is 50",
        f"{node}: 4 GB/s with its best partner",
    ]


def test_two_slow_nodes_are_both_named() -> None:
    assert [line[:6] for line in slow(speeds(("node01", "node04")), 4.0, 50.0)[1:]] == ["node01", "node04"]


def test_a_node_that_is_slow_inside_is_named_though_its_partners_are_slow_with_it() -> None:
    measured = {("a", "a"): 300.0, ("b", "b"): 2.0, ("a", "b"): 2.0}
    assert "b: 2 GB/s among its own ranks" in slow(measured, 2.0, 50.0)


def test_what_cannot_be_told_is_not_claimed() -> None:
    assert slow({("a", "b"): 1.0}, 1.0, 50.0)[-1] == "of two nodes it cannot be told which one is slow"
    assert slow(speeds(()), 4.0, 50.0)[1:] == [
        "no node is slow alone or in a pair: it is the network between many of them"
    ]


def test_a_missing_rank_has_its_nodes_name() -> None:
    assert name_of(127, 128, [f"n{i}" for i in range(16)]) == "n15 (rank 127)"
    assert name_of(3, 4, []) == "rank 3"
