"""Independent tasks over worker processes: bounded in threads, ended with their parent, and their deaths noticed.

Owns the processes. Knows nothing of checkpoints: a task is whatever can be pickled.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from megatron_cppo import ranks
from megatron_cppo.config import UserError

Setting = TypeVar("Setting")
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerError(UserError):
    """A worker process died."""


class _Worker:
    """What a worker process keeps between its tasks: their setting, made at the first of them."""

    make: Callable[[], Any]
    made: bool = False
    setting: Any = None


def each(
    make: Callable[[], Setting], work: Callable[[Setting, Task], Result], tasks: Sequence[Task], *, workers: int
) -> Iterator[Result]:
    """`work(make(), task)` of all tasks, as they end, in `workers` processes; 0: in this one.

    `make` is called once in every process. What a task raises is raised here, after the tasks that have begun are
    done; no more are begun then. Raises WorkerError when a process dies.
    """
    if not workers:
        setting = make()
        for task in tasks:
            yield work(setting, task)
        return
    # Spawned: this process may have threads, and a fork of it would have their locks.
    context = multiprocessing.get_context("spawn")
    count = max(1, min(workers, len(tasks)))
    pool = concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(make,))
    waits = True
    try:
        futures = [pool.submit(_work, work, task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process was killed, mostly because memory ran out; what is finished is kept: run the same "
            "command again, with fewer --workers"
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        waits = False  # workers end with this process
        raise
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)


def _begin(make: Callable[[], Any]) -> None:
    """In a new worker: one thread, Ctrl-C is the parent's to hear, and nothing is done for a parent that is gone."""
    ranks.die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _Worker.make = make


def _work(work: Callable[[Any, Any], Any], task: Any) -> Any:
    if not _Worker.made:
        _Worker.setting = _Worker.make()
        _Worker.made = True
    return work(_Worker.setting, task)


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
