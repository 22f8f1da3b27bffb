"""Submits the scripts of `slurm/` as they are, with other variables, and reads what becomes of the jobs."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.distributed.kills import MARK, alive, commands, parent
from tests.integration.slurm.cluster import WAIT_SECONDS, Cluster

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "slurm" / "train_cppo_72b.sh"
# The script's defaults are those of 128 GPUs.
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2")
LEAVING_SECONDS = 60.0
"""After a job's end; Slurm itself gives up on a step after 20."""
FLAGS = ("--trainer.evaluation_rows", "4", "--trainer.evaluation_samples", "1")


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job; `mark` is in the environment of all its processes."""

    cluster: Cluster
    number: str
    output: Path
    run: Path
    mark: str
    since: float = field(default_factory=time.monotonic)

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def lives(self) -> list[list[str]]:
        """Of each life: job, life, the step that it went on from, nodes."""
        path = self.run / "lives.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def end(self) -> tuple[str, int]:
        """(state, exit status), once all processes are gone too."""
        ended = self.cluster.wait(self.number)
        self.until(lambda: not alive(self.mark), "processes are left", LEAVING_SECONDS)
        return ended

    def until(self, condition: Callable[[], bool], otherwise: str, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                going = "\n".join(f"{pid}: {command}" for pid, command in commands(alive(self.mark)).items())
                raise AssertionError(f"{otherwise}:\n{self.said}\nits processes:\n{going}")
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        """Until the run is in a step, or past it."""
        path = self.run / "status.json"
        reached = lambda: path.exists() and json.loads(path.read_text())["step"] >= step  # noqa: E731
        self.until(reached, f"step {step} was not reached")

    def until_checkpoint(self, step: int) -> None:
        """Until the checkpoint of a step is whole."""
        path = self.run / "checkpoints" / f"step_{step:06d}"
        self.until(path.is_dir, f"the checkpoint of step {step} did not come")

    def rank(self, number: int) -> int:
        """The process of a rank, which is not its launcher."""
        ours = [
            pid
            for pid, environment in alive(self.mark).items()
            if f"RANK={number}" in environment and any(name.startswith("MEGATRON_CPPO_WATCH=") for name in environment)
        ]
        (found,) = (pid for pid in ours if parent(pid) not in ours)  # the others are its graders
        return found


@dataclass(frozen=True, slots=True)
class Jobs:
    """Submits to a cluster; `inputs` has the recipe, the model and the data."""

    cluster: Cluster
    inputs: Path

    def variables(self, run: Path, **others: object) -> dict[str, str]:
        """What the script is given instead of its defaults."""
        own = {
            "RUN_DIR": run,
            "ROOT": ROOT,
            "RECIPE": self.inputs / "recipe.json",
            "MODEL": self.inputs / "model",
            "TRAIN_DATA": self.inputs / "train.parquet",
            "EVALUATION_DATA": self.inputs / "evaluation.parquet",
            "SITE": self.inputs / "site.sh",
            "PYTHON": sys.executable,
            "DEVICE": "cpu",
            "TENSOR_PARALLEL": 2,
            "PIPELINE_PARALLEL": 1,
            "PREFLIGHT": 0,
            "PREFLIGHT_GB_PER_SECOND": 0,
            "PREFLIGHT_MEBIBYTES": 2,
            "OMP_NUM_THREADS": 1,
        }
        return {name: str(value) for name, value in {**own, **others}.items()}

    def submit(
        self, name: str, *flags: str, options: tuple[str, ...] = SMALL, run: Path | None = None, **variables: object
    ) -> Job:
        """sbatch the script."""
        run, mark = run or self.inputs / name, uuid.uuid4().hex
        output = self.inputs / f"{name}.out"
        command = ["sbatch", "--parsable", f"--output={output}", *options, str(SCRIPT), *FLAGS, *flags]
        said = self.cluster.call(*command, variables=self.variables(run, **variables) | {MARK: mark}, cwd=self.inputs)
        return Job(self.cluster, said.strip(), output, run, mark)
