"""Grading many responses in worker processes, so that no response can stop the run.

Owns: the workers, a wall-clock deadline for each sample, the cache, and what is counted and logged.
Must not know: how a reward is computed, groups, tensors.
Graders hang on legal input (a power of a sum may expand for ever), and Python cannot interrupt C code: the only sure
deadline is to kill the process. A sample whose grading hangs, crashes or raises earns 0 and is counted.
"""

import functools
import logging
import math
import signal
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from multiprocessing.connection import wait
from types import TracebackType
from typing import Literal, get_args

from megatron_cppo.rewards import combine, parse_terms, resolve
from megatron_cppo.rewards.process import WorkerProcess
from megatron_cppo.rewards.worker import OUT_OF_MEMORY_EXIT_CODE, Reply

logger = logging.getLogger(__name__)

Status = Literal["ok", "timeout", "crashed", "capped", "none_gold", "error"]
_CHUNK_ITEMS = 16
_START_ATTEMPTS = 3
_LOGGED_TEXTS = 100


class GraderError(RuntimeError):
    """The workers do not start, or the grader is closed."""


@dataclass(frozen=True, slots=True)
class GradeItem:
    """One response to grade.

    Example: GradeItem(response_text="<think>2 + 2</think> \\\\boxed{4}", ground_truth="4", data_source="geometry3k")
    """

    response_text: str
    ground_truth: str
    data_source: str


@dataclass(frozen=True, slots=True)
class Grade:
    """What one response earned: the weighted total, and each reward's own value, unweighted.

    "capped": the answer is too large to be compared, and counts as wrong. "none_gold": there is nothing to compare it
    with. "timeout", "crashed" and "error" earn 0 in all.
    Example: Grade(total=1.0, parts=(("accuracy", 1.0), ("format", 1.0)), status="ok")
    """

    total: float
    parts: tuple[tuple[str, float], ...]
    status: Status


class Grader:
    """Persistent worker processes behind `grade`; a context manager. Reward functions must be pure: grades are cached.

    `rewards` as in the config: ("accuracy=0.9", "format=0.1") or ("package.module:function=1.0",).
    `memory_limit_gib` is what grading one sample may allocate. Raises `RewardError` for rewards that do not exist.
    """

    def __init__(
        self,
        rewards: Sequence[str] = ("accuracy=0.9", "format=0.1"),
        *,
        workers: int = 2,
        deadline_seconds: float = 5.0,
        memory_limit_gib: float | None = 4.0,
        cache_size: int = 8192,
    ) -> None:
        assert workers >= 1, f"grading needs a worker, got {workers}"
        assert deadline_seconds > 0, f"the deadline must be positive, got {deadline_seconds}"
        self._terms = parse_terms(rewards)
        for term in self._terms:
            resolve(term.name)  # a wrong name should fail here, with its message, not in a worker
        memory_limit_bytes = None if memory_limit_gib is None else int(memory_limit_gib * 2**30)
        names = tuple(term.name for term in self._terms)
        self._start = functools.partial(WorkerProcess, names, deadline_seconds, memory_limit_bytes)
        self._deadline_seconds = deadline_seconds
        self._cache: OrderedDict[GradeItem, Grade] = OrderedDict()
        self._cache_size = cache_size
        self._counts: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._workers = [self._start() for _ in range(workers)]

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """Grades in the order of the items; equal items are graded once. Safe to call from several threads.

        Blocks at most about (items / workers) · deadline, plus restarts. Raises `GraderError` if workers cannot start.
        """
        with self._lock:
            if not self._workers:
                raise GraderError("the grader is closed; create a new one")
            grades = {item: self._cache[item] for item in items if item in self._cache}
            missing = [item for item in dict.fromkeys(items) if item not in grades]
            grades.update(zip(missing, self._grade_missing(missing), strict=True))
            self._remember(grades)
            self._counts.update(grades[item].status for item in items)
        return [grades[item] for item in items]

    @property
    def counters(self) -> dict[str, int]:
        """How many samples got each status since the start, zeros included."""
        return {status: self._counts[status] for status in get_args(Status)}

    def close(self) -> None:
        """End the workers; may be called again."""
        with self._lock:
            self._end_workers()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type | None, raised: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _grade_missing(self, items: Sequence[GradeItem]) -> list[Grade]:
        grades: dict[int, Grade] = {}
        queue = deque(range(len(items)))
        chunk_items = max(1, min(_CHUNK_ITEMS, math.ceil(len(items) / (4 * len(self._workers)))))
        try:
            while len(grades) < len(items):
                self._dispatch(queue, items, chunk_items)
                seconds = max(0.0, min(worker.seconds_left for worker in self._workers))
                readable = wait([worker.connection for worker in self._workers], timeout=seconds)
                for index, worker in enumerate(self._workers):
                    if worker.connection in readable:
                        self._listen(index, items, queue, grades)
                    elif worker.is_overdue():
                        self._replace(index, "timeout", items, queue, grades)
        finally:
            self._forget_unanswered()  # none, unless interrupted: its late replies would meet the next call's numbers
        return [grades[number] for number in range(len(items))]

    def _dispatch(self, queue: deque[int], items: Sequence[GradeItem], chunk_items: int) -> None:
        for index, worker in enumerate(self._workers):
            if not queue or not worker.is_idle:
                continue
            numbers = [queue.popleft() for _ in range(min(chunk_items, len(queue)))]
            if not worker.assign(numbers, [astuple(items[number]) for number in numbers]):
                queue.extendleft(reversed(numbers))
                worker.kill()
                self._workers[index] = self._start()

    def _listen(self, index: int, items: Sequence[GradeItem], queue: deque[int], grades: dict[int, Grade]) -> None:
        worker = self._workers[index]
        try:
            answer = worker.receive()
        except (EOFError, OSError):
            self._replace(index, "crashed", items, queue, grades)
            return
        self._failed_starts = 0
        if answer is not None:
            number, reply = answer
            if reply.message:
                self._warn_once(reply.message, items[number])
            grades[number] = self._grade_of(reply)

    def _replace(
        self, index: int, status: Status, items: Sequence[GradeItem], queue: deque[int], grades: dict[int, Grade]
    ) -> None:
        """Kill a worker, blame the request it was at, give back the others, start a new one."""
        worker = self._workers[index]
        code = worker.kill()
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                self._end_workers()
                raise GraderError(
                    f"grading workers do not start: {self._failed_starts} in a row ended with exit code {code} before "
                    "they were ready; their error output is above this message"
                )
        if worker.pending:
            number = worker.pending.popleft()
            status = "timeout" if code == -signal.SIGALRM else status
            grades[number] = self._zero(status)
            self._warn_once(self._explain(status, code), items[number])
        queue.extendleft(reversed(worker.pending))
        self._workers[index] = self._start()

    def _forget_unanswered(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker.pending:
                worker.kill()
                self._workers[index] = self._start()

    def _end_workers(self) -> None:
        while self._workers:
            self._workers.pop().kill()

    def _grade_of(self, reply: Reply) -> Grade:
        parts = tuple((term.name, value) for term, value in zip(self._terms, reply.values, strict=True))
        return Grade(combine(parts, self._terms), parts, reply.status)

    def _zero(self, status: Status) -> Grade:
        return Grade(0.0, tuple((term.name, 0.0) for term in self._terms), status)

    def _explain(self, status: Status, code: int | None) -> str:
        if status == "timeout":
            return f"grading took longer than {self._deadline_seconds:g} s"
        reason = "ran out of memory" if code == OUT_OF_MEMORY_EXIT_CODE else f"ended with exit code {code}"
        return f"the grading worker {reason}"

    def _warn_once(self, text: str, item: GradeItem) -> None:
        """Each distinct event once, with the first sample that met it; `counters` says how often."""
        if text in self._logged or len(self._logged) >= _LOGGED_TEXTS:
            return
        self._logged.add(text)
        logger.warning(
            "%s; the sample earns 0 (logged once). Source %r, ground truth %r, response ends with %r",
            text,
            item.data_source,
            item.ground_truth[:200],
            item.response_text[-200:],
        )

    def _remember(self, grades: dict[GradeItem, Grade]) -> None:
        """Keep grades that depend on the item alone, the latest used last; a timeout deserves another try."""
        for item, grade in grades.items():
            if grade.status in ("ok", "capped", "none_gold"):
                self._cache[item] = grade
                self._cache.move_to_end(item)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
