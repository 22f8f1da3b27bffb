"""SIGUSR2: the run saves the step that it is in, however the signal comes, and leaves with status 75; the same command
then goes on, and in the end every byte is that of a run that was never interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from examples.digits import make_data
from tests.distributed.kills import MARK, alive, differences
from tests.distributed.test_launchers import free_port, wait_until
from tests.distributed.tiny_run import REWARD, TIMEOUT_SECONDS, Launcher, write_recipe

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc")

LEFT = 75
# Saved at the end alone, so that what there is before it was saved by leaving.
RARELY = ("--trainer.save_every_steps", "0", "--trainer.keep_checkpoints", "1")
# Read by every rank: its first update takes until the test allows it to go on.
HELD_IN_ITS_FIRST_UPDATE = """
import os, pathlib, time

if "RANK" in os.environ:
    from megatron_cppo.policy.policy import Policy

    def update(policy, *arguments, call=Policy.update):
        while not pathlib.Path("go").exists():
            time.sleep(0.01)
        return call(policy, *arguments)

    Policy.update = update
"""


class Started:
    """One start of a command, and all processes that descend from it."""

    def __init__(self, folder: Path, run: str, *flags: str, scheduled: bool = False) -> None:
        self.mark, self.folder = uuid.uuid4().hex, folder
        task = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [task | {"RANK": rank} for rank in "01"] if scheduled else [{}]
        self.launchers = [
            Launcher(folder, {"OMP_NUM_THREADS": "1", MARK: self.mark} | environment).start(run, *flags)
            for environment in environments
        ]

    def wait_for_ranks(self) -> None:
        """Until both were started, which is long before they attach."""
        ours = {process.pid for process in self.launchers}

        def ranks() -> list[str]:
            environments = [environment for pid, environment in alive(self.mark).items() if pid not in ours]
            return [name for environment in environments for name in environment if name in ("RANK=0", "RANK=1")]

        wait_until(lambda: {"RANK=0", "RANK=1"} <= set(ranks()), "the ranks did not start")

    def signal_all(self) -> int:
        """SIGUSR2 to every process; returns to how many."""
        pids = list(alive(self.mark))
        for pid in pids:
            os.kill(pid, signal.SIGUSR2)
        return len(pids)

    def statuses(self) -> list[int]:
        """Of the launchers, after whose end nothing may be left."""
        found = [process.wait(TIMEOUT_SECONDS) for process in self.launchers]
        wait_until(lambda: not alive(self.mark), f"these are left: {alive(self.mark)}")
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "go").touch()
    write_recipe(tmp_path, HELD_IN_ITS_FIRST_UPDATE + REWARD)
    return tmp_path


def status(folder: Path) -> dict[str, object]:
    path = folder / "run" / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_a_run_that_left_twice_ends_like_one_that_never_did(folder: Path) -> None:
    assert Started(folder, "reference", *RARELY).statuses() == [0]

    early = Started(folder, "run", *RARELY)
    early.wait_for_ranks()
    early.signal_all()  # the ranks are in the middle of their imports
    assert early.statuses() == [LEFT], Launcher(folder).said("run")
    assert status(folder) == {"step": 1, "phase": "left"}
    assert checkpoints(folder) == ["step_000001"]
    assert "left after step 1 of 3, as told" in Launcher(folder).said("run")

    (folder / "go").unlink()
    amid = Started(folder, "run", *RARELY)
    wait_until(lambda: status(folder) == {"step": 2, "phase": "update"}, "the second update did not begin")
    assert amid.signal_all() == 5, "launcher, two ranks and their graders"
    assert amid.signal_all() == 5, "none has died of it"
    (folder / "go").touch()
    assert amid.statuses() == [LEFT], Launcher(folder).said("run")
    assert checkpoints(folder) == ["step_000002"]

    assert Started(folder, "run", *RARELY).statuses() == [0], Launcher(folder).said("run")
    assert differences(folder / "reference", folder / "run") == []


def test_every_task_of_a_scheduler_leaves_when_one_is_told(folder: Path) -> None:
    """Supervised, on two replicas, while the checkpoint of the step before is written in the background."""
    warm = make_data(folder / "warm", seed=3, num_train=1, num_warm=32, num_evaluation=1)["warm"]
    flags = (
        *("--algorithm.objective", "supervised", "--algorithm.correction", "none", "--data.train", str(warm)),
        *("--policy.tensor_parallel", "1", "--trainer.updates_per_step", "1"),
        *("--rollout.max_response_tokens", "48", "--trainer.evaluation_rows", "4"),
    )
    assert Started(folder, "reference", *flags, scheduled=True).statuses() == [0, 0]

    (folder / "go").unlink()
    told = Started(folder, "run", *flags, scheduled=True)
    wait_until(lambda: status(folder) == {"step": 1, "phase": "update"}, "the first update did not begin")
    told.launchers[1].send_signal(signal.SIGUSR2)
    (folder / "go").touch()
    assert told.statuses() == [LEFT, LEFT], Launcher(folder).said("run")
    assert checkpoints(folder) == ["step_000001"]

    assert Started(folder, "run", *flags, scheduled=True).statuses() == [0, 0]
    assert differences(folder / "reference", folder / "run") == []


def test_the_status_is_what_the_system_calls_try_again() -> None:
    assert os.EX_TEMPFAIL == LEFT
    help_text = subprocess.run([sys.executable, "-m", "megatron_cppo.train", "-h"], capture_output=True, text=True)
    assert f"leaves with status {LEFT}" in help_text.stdout
