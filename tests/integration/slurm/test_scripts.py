"""The scripts of `slurm/` before a run: clean, accepted at their real shape, and --check tells what would run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from tests.distributed.kills import MARK, alive, commands
from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.jobs import ROOT, SCRIPT, SMALL, Jobs

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TRAINERS = [path for path in SCRIPTS if path.name.startswith("train_")]
KEY = "MEGATRON_CPPO_VLLM_KEY"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("script", TRAINERS, ids=lambda path: path.stem)
def test_a_missing_variable_is_named(script: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "RUN_DIR": "/runs/x", "RECIPE": "x.py"}
    done = subprocess.run(["bash", script, "--check"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MODEL: the Hugging Face folder to start from" in done.stderr


REQUEUED = """
source slurm/lives.sh
scontrol() { # as Slurm ends a life: the processes that it finds, a little later
  local found; found=$(jobs -p)
  (sleep 0.5; kill -TERM $$ $found) &
}
next_life 1
"""


def test_nothing_outlives_a_life_that_is_requeued(tmp_path: Path) -> None:
    """Slurm without cgroups ends the processes that it finds; one that begins meanwhile is nobody's."""
    mark = uuid.uuid4().hex
    (tmp_path / "lives.txt").touch()
    variables = {"PATH": os.environ["PATH"], MARK: mark, "RUN_DIR": str(tmp_path), "SLURM_JOB_ID": "1"}
    variables |= {"MAX_LIVES": "9", "MAX_STALLED_LIVES": "9"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", REQUEUED], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, timeout=60
    )
    assert done.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 10
    while left := commands(alive(mark)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "\n#SBATCH" in path.read_text()], ids=lambda path: path.stem
)
def test_slurm_accepts_the_real_shape(script: Path, cluster: Cluster) -> None:
    """16 nodes of 8 H100 for 72B, of which this machine only declares most."""
    said = cluster.call("sbatch", "--test-only", str(script))
    found = re.search(r"to start at .* using (\d+) processors", said)
    assert found, said
    tasks = int(found[1]) // (16 if script.stem == "convert" else 12)
    assert tasks == {"train_cppo_72b": 128, "train_cppo_7b": 16, "convert": 1}[script.stem]


def test_separate_rollout_nodes_are_accepted_too(cluster: Cluster) -> None:
    said = cluster.call("sbatch", "--test-only", "--nodes=20", str(SCRIPT), variables={"ROLLOUT_NODES": "4"})
    assert "to start at" in said


def steps(said: str) -> dict[str, list[str]]:
    """The commands that --check shows, by the words above them."""
    found = re.findall(r"^# \d\. ([^\n]*)\n('srun'.*?)\n(?=\n|$)", said, re.MULTILINE | re.DOTALL)
    return {title: shlex.split(command) for title, command in found}


def test_check_shows_the_real_shape_and_what_the_trainer_says_of_it(jobs: Jobs) -> None:
    """Without a job: the tiny model cannot be cut into 128 ranks, and the trainer's own check says why."""
    variables = jobs.variables(jobs.inputs / "unseen", PREFLIGHT=1, TENSOR_PARALLEL=8, PIPELINE_PARALLEL=4)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--check"],
        cwd=ROOT,
        env=jobs.cluster.environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.search(r"policy\.\w+_parallel", done.stderr), done.stderr
    shown = steps(done.stdout)
    assert list(shown) == ["preflight", "trainer"]
    for command in shown.values():
        assert {"--nodes=16", "--ntasks=128", "--ntasks-per-node=8", "--kill-on-bad-exit=1"} <= set(command)
    trainer = shown["trainer"]
    assert trainer[trainer.index("--trainer.num_gpus") + 1] == "128"
    assert "#SBATCH --signal=B:USR1@1800" in done.stdout
    assert not (jobs.inputs / "unseen").exists(), "nothing is made"


def test_check_of_separate_servers_keeps_the_key_to_itself(jobs: Jobs) -> None:
    variables = jobs.variables(jobs.inputs / "unseen", ROLLOUT_NODES=4, SERVERS_PER_NODE=2, VLLM_PYTHON="/vllm/python")
    done = subprocess.run(
        ["bash", str(SCRIPT), "--check"],
        cwd=ROOT,
        env=jobs.cluster.environment | variables | {KEY: "never-to-be-seen"},
        capture_output=True,
        text=True,
    )
    assert "never-to-be-seen" not in done.stdout + done.stderr
    shown = steps(done.stdout)
    servers, trainer = shown["rollout servers, beside the trainer"], shown["trainer"]
    assert {"--nodes=4", "--relative=12", "--ntasks=4"} <= set(servers)
    assert {"--nodes=12", "--relative=0", "--ntasks=96"} <= set(trainer)
    first = trainer.index("--vllm.addresses") + 1
    assert trainer[first : first + 8] == [
        f"http://node{node}:{port}" for node in range(13, 17) for port in (8000, 8001)
    ]
    assert "--vllm.addresses" not in servers


def test_check_as_a_job(jobs: Jobs) -> None:
    job = jobs.submit("checked", "--check", options=SMALL)
    assert job.end() == ("COMPLETED", 0), job.said
    assert "trainer.num_gpus = 4" in job.said
    assert "no problems" in job.said
    assert not job.run.exists()


def test_conversion(jobs: Jobs) -> None:
    """There and back, each in a job of one node; the second way is found by what the source is."""
    megatron, back = jobs.inputs / "megatron", jobs.inputs / "back"
    for source, target in ((jobs.inputs / "model", megatron), (megatron, back)):
        variables = jobs.variables(jobs.inputs, SOURCE=source, TARGET=target)
        options = ("--parsable", "--cpus-per-task=2", f"--output={target}.out")
        number = jobs.cluster.call("sbatch", *options, str(ROOT / "slurm" / "convert.sh"), variables=variables).strip()
        assert jobs.cluster.wait(number) == ("COMPLETED", 0), Path(f"{target}.out").read_text()
    for file in (jobs.inputs / "model").iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes()
