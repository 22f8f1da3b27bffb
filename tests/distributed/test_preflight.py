"""The preflight's command on two ranks of this machine; with several machines, `tests/integration/slurm` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_cppo.launch import loopback_interface
from tests.distributed.test_launchers import ROOT, free_port

END_SECONDS = 200


def outcome(ranks: Sequence[tuple[int, Sequence[str]]]) -> tuple[list[int], list[str]]:
    """Exit statuses, and the lines of the first rank, of a world of two of which `ranks` start with these options."""
    port = str(free_port())
    environment = os.environ | loopback_interface() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "preflight.py"), "--device", "cpu", "--mebibytes", "1", *options],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, options in ranks
    ]
    said = [process.communicate(timeout=END_SECONDS)[0] for process in started]
    assert not any(said[1:]), "rank 0 alone speaks"
    return [process.returncode for process in started], said[0].splitlines()


def test_ranks_that_can_work_together_are_ready(tmp_path: Path) -> None:
    statuses, said = outcome([(rank, ("--shared", str(tmp_path / "new"))) for rank in (0, 1)])
    assert statuses == [0, 0]
    assert len(said) == 1
    assert said[0].startswith("preflight: 1 nodes, 2 ranks ready; GPUs not counted (device cpu); all-reduce ")
    assert 0 < float(said[0].split()[-2]) < 1000
    assert list((tmp_path / "new").iterdir()) == [], "nothing is left"


def test_a_floor_that_is_not_reached_ends_all(tmp_path: Path) -> None:
    statuses, said = outcome([(rank, ("--shared", str(tmp_path), "--floor-gb-per-second", "1e6")) for rank in (0, 1)])
    assert statuses == [3, 3]
    assert said[0].endswith("GB/s, the floor is 1e+06")
    assert said[1].endswith("GB/s among its own ranks")


def test_a_folder_that_is_not_shared_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "another disk").mkdir()
    statuses, said = outcome(
        [(0, ("--shared", str(tmp_path / "disk"))), (1, ("--shared", str(tmp_path / "another disk")))]
    )
    assert statuses == [3, 3]
    assert [line.partition(": does not see what rank 0 wrote into ")[2] for line in said] == [
        f"{tmp_path / 'disk'}; is it on a shared disk?"
    ]


def test_a_rank_that_does_not_come_is_named_with_its_node(tmp_path: Path) -> None:
    start = time.monotonic()
    options = ("--shared", str(tmp_path), "--seconds", "4", "--nodes", "alpha", "beta")
    assert outcome([(0, options)]) == ([1], ["preflight: beta (rank 1) did not start"])
    assert time.monotonic() - start < END_SECONDS / 2


def test_a_wrong_call_is_told(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, str(ROOT / "tools" / "preflight.py"), "--shared", str(tmp_path)]
    done = subprocess.run(command, env=environment | {"WORLD_SIZE": "1"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "RANK, MASTER_ADDR, MASTER_PORT not set" in done.stderr
