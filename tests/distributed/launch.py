"""Runs a test function on several gloo ranks of this machine and brings back what each rank returned.

    def check(rank: int, world_size: int, width: int) -> float: ...

    values = run_distributed(check, 4, 128)

The ranks are processes of their own with one thread each and an initialised default process group; they start from
one that has only imported what all of them need, which saves each the seconds of doing so. A rank that raises, dies or
does not come back fails the test, with that rank's own traceback. It must not know what is being tested.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_cppo.ranks import leave

# gloo looks up the host name unless it is told which interface is the local one.
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
IMPORTED_ONCE = [
    "tests.distributed.launch",
    "megatron_cppo.policy",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
]
"""By the process that ranks are forked from. It may compute nothing: threads of torch do not survive a fork."""
EXIT_SECONDS = 60.0
"""Ranks of a busy machine take their time to leave, after they have said what they found."""
ECHO_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank says at its end: its result, or its traceback and the moment it was raised."""

    result: Any = None
    failure: str = ""
    time: float = 0.0


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: object, timeout_seconds: float = 120
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` gloo ranks and return their results in rank order.

    `function` must be importable (defined at the top level of a module), and its arguments and result picklable;
    tensors travel by value. The default process group is up when it is called and is taken down afterwards. Raises
    RankFailedError with the first failing rank's traceback, or with the stacks of the ranks that are still running
    after `timeout_seconds`, start-up (a few seconds) included. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in RANK_ENVIRONMENT.items():
                    patch.setenv(name, value)
                for rank in range(world_size):
                    receiver, sender = context.Pipe(duplex=False)
                    # Told in words, as the ranks are children of the process that imported, which knows older ones.
                    environment = dict(os.environ)
                    target_args = (sender, environment, function, rank, world_size, folder, timeout_seconds, args)
                    process = context.Process(target=_run_rank, args=target_args, name=f"rank {rank}", daemon=True)
                    process.start()
                    # Only the rank may hold the sending end: its death must read as the end of the pipe.
                    sender.close()
                    processes.append(process)
                    pipes.append(receiver)
            return _collect(processes, pipes, Path(folder), timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(processes: list[BaseProcess], pipes: list[Connection], folder: Path, timeout_seconds: float) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    reports: dict[int, _Report] = {}
    while len(reports) < len(processes):
        waiting = [rank for rank in range(len(processes)) if rank not in reports]
        ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if any(report.failure for report in reports.values()):
                break
            raise RankFailedError(_stacks_of_hanging(processes, waiting, folder, timeout_seconds))
        for rank in waiting:
            if pipes[rank] in ready:
                reports[rank] = _receive(processes[rank], pipes[rank])
                if reports[rank].failure:
                    # The other ranks fail in consequence, or hang: only a moment to hear who was first.
                    deadline = min(deadline, time.monotonic() + ECHO_SECONDS)
    failures = [report for report in reports.values() if report.failure]
    if failures:
        raise RankFailedError(min(failures, key=lambda report: report.time).failure)
    for process in processes:
        process.join(EXIT_SECONDS)
        if process.exitcode != 0:
            raise RankFailedError(f"{process.name} returned a result, then ended with exit code {process.exitcode}")
    return [reports[rank].result for rank in range(len(processes))]


def _receive(process: BaseProcess, pipe: Connection) -> _Report:
    try:
        report: _Report = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(EXIT_SECONDS)
        # A rank that died without a word is the cause of what the others report, hence the earliest time.
        return _Report(failure=f"{process.name} died with exit code {process.exitcode} and no traceback")
    return report


def _stacks_of_hanging(processes: list[BaseProcess], ranks: list[int], folder: Path, timeout_seconds: float) -> str:
    for rank in ranks:
        pid = processes[rank].pid
        # A rank that has not written its (empty) stack file yet would be killed by the signal instead of answering it.
        if pid is not None and processes[rank].is_alive() and _stack_file(folder, rank).exists():
            os.kill(pid, signal.SIGUSR1)
    time.sleep(1.0)
    message = f"ranks {ranks} did not finish within {timeout_seconds} s"
    for rank in ranks:
        stack_file = _stack_file(folder, rank)
        stack = stack_file.read_text() if stack_file.exists() else "still starting\n"
        message += f"\n--- rank {rank} hangs at\n{stack}"
    return message


def _run_rank(
    pipe: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout_seconds: float,
    args: tuple[object, ...],
) -> None:
    """The body of one rank's process."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with _stack_file(Path(folder), rank).open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )
            result = function(rank, world_size, *args)
            # Pickled here, by value: tensors in shared memory would die with this process.
            message = pickle.dumps(_Report(result=result))
            # No rank may take its connections down while another still uses them.
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:  # whatever ends a rank is the test's result
            failure = f"rank {rank} raised\n{traceback.format_exc()}"
            pipe.send_bytes(pickle.dumps(_Report(failure=failure, time=time.monotonic())))
            pipe.close()
            # The other ranks may be stuck in a collective with this one, and so may its own clean-up.
            os._exit(1)
        pipe.send_bytes(message)
        pipe.close()
        faulthandler.unregister(signal.SIGUSR1)
    leave(0)


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"
