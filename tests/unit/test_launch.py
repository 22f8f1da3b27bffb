"""Ranks end with their launcher, even when it is killed without a chance to tell them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import os, pathlib, time
from megatron_cppo import launch
launch.die_with_parent()
pathlib.Path(r"{folder}", os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""
LAUNCHER = """
import os, sys
from megatron_cppo import launch
launch.run_ranks([sys.executable, "-c", {rank!r}], num_ranks=2, environment=dict(os.environ))
"""


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    script = LAUNCHER.format(rank=RANK.format(folder=tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 or not all(path.read_text() for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert all(_alive(pid) for pid in pids)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)
