"""The 72B script, unmodified, in a real Slurm of two nodes and a spare: what is done to it, and how the run ends."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests.distributed.kills import differences
from tests.distributed.tiny_run import NUM_STEPS
from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.jobs import ROOT, Job, Jobs

TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
MOUNTS = f"{ROOT}:{ROOT},{{0}}:{{0}}"


@pytest.fixture(scope="module")
def reference(jobs: Jobs) -> Job:
    """A run that nothing happens to; in what pyxis would make a container."""
    image = jobs.inputs / "image.sqsh"
    image.touch()
    job = jobs.submit("reference", PREFLIGHT=1, CONTAINER_IMAGE=image, CONTAINER_MOUNTS=MOUNTS.format(jobs.inputs))
    assert job.end() == ("COMPLETED", 0), job.said
    return job


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints a row of the table in docs/slurm.md: the test's own words, and its seconds."""
    start = time.monotonic()
    if request.function is test_to_the_end:  # its job is the one that others are compared with
        start = request.getfixturevalue("reference").since
    yield
    print(f"\n| {' '.join((request.function.__doc__ or '').split())} | {time.monotonic() - start:.0f} |")


def resumed_from(job: Job) -> list[int]:
    return [int(step) for step in re.findall(r"resumed from \S*step_(\d+)", job.said)]


def test_to_the_end(reference: Job, jobs: Jobs, scenario: None) -> None:
    """nothing, with CONTAINER_IMAGE | preflight, all steps, FINISHED; submitted again, it ends at once"""
    told = rf"^\d: container: image \S+/image.sqsh mounts {MOUNTS.format(jobs.inputs)} workdir {ROOT}$"
    assert len(re.findall(told, reference.said, re.MULTILINE)) == 8, "four tasks, in two steps"
    assert "preflight: 2 nodes, 4 ranks ready; GPUs not counted (device cpu)" in reference.said
    assert reference.lives == [[reference.number, "0", "0", "node[01-02]"]]
    assert (reference.run / "FINISHED").exists()
    again = jobs.submit("again", run=reference.run)
    assert again.end() == ("COMPLETED", 0), again.said
    assert "nothing to do" in again.said
    assert len(reference.lives) == 1


def test_time_limit(reference: Job, jobs: Jobs, cluster: Cluster, scenario: None) -> None:
    """the signal before the time limit | the step is finished and saved, requeued, resumed, the same bytes"""
    job = jobs.submit("limited")
    job.until_step(1)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)  # what --signal=B:USR1@1800 sends
    assert job.end() == ("COMPLETED", 0), job.said
    (left,) = re.findall(r"left after step (\d+) of", job.said)
    assert int(left) < NUM_STEPS
    assert [life[1:3] for life in job.lives] == [["0", "0"], ["1", left]]
    assert resumed_from(job) == [int(left)]
    assert differences(reference.run, job.run) == []


def test_killed_node(reference: Job, jobs: Jobs, cluster: Cluster, scenario: None) -> None:
    """a node dies | Slurm requeues on the spare, resumed from the last checkpoint, the same bytes"""
    job = jobs.submit("node")
    job.until_checkpoint(1)
    assert cluster.shown(job.number, "NodeList") == "node[01-02]"
    cluster.kill_node("node02")
    try:
        assert job.end() == ("COMPLETED", 0), job.said
    finally:
        cluster.start_node("node02")
    assert [life[1] for life in job.lives] == ["0", "1"]
    assert job.lives[1][3] == "node[01,03]"
    assert resumed_from(job)[0] >= 1
    assert differences(reference.run, job.run) == []


def test_killed_rank(reference: Job, jobs: Jobs, scenario: None) -> None:
    """a rank is killed | the step ends on all nodes, requeued, resumed, the same bytes"""
    job = jobs.submit("rank")
    job.until_checkpoint(1)
    os.kill(job.rank(3), signal.SIGKILL)
    killed = time.monotonic()
    job.until(lambda: "the trainer ended with status 137" in job.said, "the step goes on")
    assert time.monotonic() - killed < 20
    assert job.end() == ("COMPLETED", 0), job.said
    assert "rank 3 was killed by signal 9" in job.said
    assert [life[1] for life in job.lives] == ["0", "1"]
    assert resumed_from(job)[0] >= 1
    assert differences(reference.run, job.run) == []


HANGING = """
import os, time
from megatron_cppo.train import read_config

def config():
    if "MEGATRON_CPPO_WATCH" in os.environ and os.environ["RANK"] == "1":
        time.sleep(600)
    return read_config({recipe!r}, [])
"""


def test_lives_that_hang(jobs: Jobs, scenario: None) -> None:
    """a rank hangs at the start of each life | all stacks are shown, requeued, the end after MAX_STALLED_LIVES=2"""
    recipe = jobs.inputs / "hanging.py"
    recipe.write_text(HANGING.format(recipe=str(jobs.inputs / "recipe.json")))
    flags = ("--trainer.hang_minutes", "0.3")
    job = jobs.submit("hanging", *flags, options=TWO_RANKS, RECIPE=recipe, MAX_STALLED_LIVES=2)
    assert job.end() == ("FAILED", 1), job.said
    # Whom it suspects depends on how far rank 0 is with its imports by then.
    assert len(re.findall(r"^0: no progress for 18s; suspect rank \d", job.said, re.MULTILINE)) == 2
    assert [life[1:3] for life in job.lives] == [["0", "0"], ["1", "0"]]
    assert "the last 2 lives saved no new step (0): the end" in job.said


SERVED = """
import os, pathlib, time
from megatron_cppo.train import read_config

def config():
    while "RANK" in os.environ and not pathlib.Path({served!r}).exists():
        time.sleep(0.1)
    return os._exit(7) if "RANK" in os.environ else read_config({recipe!r}, [])
"""
SERVER = """#!/bin/bash
echo "$(hostname) $VLLM_API_KEY $*" > {served}.partial
mv {served}.partial {served}
exec sleep 600
"""


def test_separate_servers(jobs: Jobs, cluster: Cluster, scenario: None) -> None:
    """ROLLOUT_NODES=1, a stand-in for vLLM | a server on the last node, its key in no argument; it ends with the job"""
    served, recipe, server = (jobs.inputs / name for name in ("served", "serving.py", "server.sh"))
    recipe.write_text(SERVED.format(served=str(served), recipe=str(jobs.inputs / "recipe.json")))
    server.write_text(SERVER.format(served=served))
    server.chmod(0o755)
    options = ("--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=2")
    variables = {"ROLLOUT_NODES": 1, "VLLM_PYTHON": server, "MAX_LIVES": 1, "RECIPE": recipe}
    job = jobs.submit("separate", options=options, **variables)
    job.until(served.exists, "no server was started")
    node, key, *arguments = served.read_text().split()
    assert job.end() == ("FAILED", 7), job.said
    assert node == "node03"
    assert arguments[arguments.index("--port") + 1] == "8000"
    assert arguments[arguments.index("--tensor-parallel-size") + 1] == "1"
    assert len(key) == 48
    assert key not in " ".join(arguments) + job.said


def test_mistake(jobs: Jobs, scenario: None) -> None:
    """a mistake in the configuration | told once, no other life"""
    job = jobs.submit("mistake", "--trainer.num_steps", "0")
    assert job.end() == ("FAILED", 2), job.said
    assert len(job.lives) == 1
    assert "trainer.num_steps" in job.said
    assert "the trainer refuses this, see above: no other life" in job.said


def test_slow_node(jobs: Jobs, cluster: Cluster, scenario: None) -> None:
    """a node sends 40 Mbit/s | preflight names it, the end"""
    with cluster.slow_node("node02", megabits=40):
        options = ("--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=2")
        job = jobs.submit("slow", options=options, PREFLIGHT=1, PREFLIGHT_GB_PER_SECOND=0.02)
        assert job.end() == ("FAILED", 3), job.said
    assert re.findall(r"preflight: (node\d\d): .* with its best partner", job.said) == ["node02"]
    assert len(job.lives) == 1


def test_folder_that_is_not_shared(jobs: Jobs, cluster: Cluster, scenario: None) -> None:
    """RUN_DIR is on each node's own disk | preflight names the node that does not see it, the end"""
    run = cluster.folder / "local" / "run"
    job = jobs.submit("unshared", options=TWO_RANKS, run=run, PREFLIGHT=1)
    assert job.end() == ("FAILED", 3), job.said
    assert re.findall(r"preflight: (\w+): does not see what rank 0 wrote", job.said) == ["node02"]
    assert cluster.shown(job.number, "Restarts") == "0"
