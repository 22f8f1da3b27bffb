"""A run whose last rank fails or hangs in a chosen way, started as the trainer starts its ranks.

    python -m tests.distributed.failing_ranks HOW NUM_RANKS LOG_DIR HANG_SECONDS

Without RANK in the environment all ranks are started, else that one. Each rank writes LOG_DIR/pid<rank> once it is up.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from megatron_cppo import launch, ranks, watchdog
from megatron_cppo.config import UserError
from megatron_cppo.watchdog import Watch


def main() -> int:
    how, num_ranks, folder, hang_seconds = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    if ranks.WATCH in os.environ:
        watch = watchdog.attach(os.environ[ranks.WATCH])
        try:
            run_rank(how, num_ranks, folder, watch)
        except UserError as error:
            watch.say(error, kind="user")
            return 2
        return 0
    task = None
    if "RANK" in os.environ:
        task = launch.Task(
            int(os.environ["RANK"]), num_ranks, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        )
    return launch.run_ranks(
        [sys.executable, "-m", "tests.distributed.failing_ranks", *sys.argv[1:]],
        num_ranks=num_ranks,
        environment=dict(os.environ),
        log_dir=folder,
        hang_minutes=hang_seconds / 60,
        task=task,
    )


def run_rank(how: str, num_ranks: int, folder: Path, watch: Watch) -> None:
    rank = int(os.environ["RANK"])
    if how == "early" and rank == num_ranks - 1:
        raise ImportError("before the ranks have met")
    up = threading.Event()
    # On a busy machine the imports take longer than the seconds after which these tests call it a hang.
    threading.Thread(target=lambda: [watch.advance() for _ in iter(lambda: up.wait(0.1), True)], daemon=True).start()
    import torch
    import torch.distributed as dist

    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        num_ranks,
        is_master=rank == 0,
        timeout=timedelta(seconds=100),
        master_listen_fd=int(os.environ[launch.STORE]) if rank == 0 else None,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=100))
    pair = dist.new_group([0, num_ranks - 1])
    watch.enter(1, "update")
    dist.all_reduce(torch.zeros(1))
    (folder / f"pid{rank}").write_text(f"{os.getpid()}\n")
    dist.barrier()
    up.set()
    if rank == num_ranks - 1:
        WAYS[how]()
        if how == "subgroup":
            dist.all_reduce(torch.zeros(1), group=pair)
    if how == "progress":
        for _ in range(100):
            time.sleep(0.1)
            watch.advance()
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def fail() -> None:
    raise ValueError("the last rank's own words")


def mistake() -> None:
    raise UserError("a field is wrong; got 1; fix: make it 2")


def leave_a_child() -> None:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (Path(sys.argv[3]) / "pidchild").write_text(f"{child.pid}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def hold_interpreter() -> None:
    while True:  # a signal that is answered ends one sleep
        ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock


def read_for_ever() -> None:
    os.read(os.pipe()[0], 1)


WAYS: dict[str, Callable[[], object]] = {
    "raise": fail,
    "user": mistake,
    "exit": lambda: os._exit(7),
    "kill": leave_a_child,
    "crash": faulthandler._sigsegv,
    "interpreter": hold_interpreter,
    "read": read_for_ever,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "subgroup": lambda: None,
    "wait": lambda: None,
    "progress": read_for_ever,
    "sleep": lambda: time.sleep(600),
}


if __name__ == "__main__":
    ranks.leave(main())
