"""Time and memory of one call: its time with the vision tower's share apart, and the peak of torch's allocations.

Must not know what is measured beyond its tower.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Time that passes, or that this process computes for: the second is steadier on a machine that others use too, and
counts every thread, waiting ones as well."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, those of them inside the tower, the image tokens that the tower gave, the call's answer."""

    seconds: float
    tower_seconds: float
    tower_tokens: int
    metrics: dict[str, float]

    @property
    def without_tower(self) -> float:
        """Seconds of all but the tower."""
        return self.seconds - self.tower_seconds


class TowerClock:
    """Adds up the time inside a vision tower, forward and backward, by hooks.

    Forward: from the module's pre-hook to its hook. Backward: from the moment when the gradient of the tower's output
    is there to the last of its parameters' gradients. The engine runs what was built last first, so that a tower's
    nodes, once ready, run without a break and before the embedding's; nothing else falls between the two moments.
    """

    def __init__(self, tower: nn.Module, now: Callable[[], float]) -> None:
        self._now = now
        self.seconds, self.tokens = 0.0, 0
        self._forward_began = self._backward_at = 0.0
        tower.register_forward_pre_hook(self._begin_forward)
        tower.register_forward_hook(self._end_forward)
        for parameter in tower.parameters():
            parameter.register_post_accumulate_grad_hook(self._parameter_done)

    def _begin_forward(self, *_: object) -> None:
        self._forward_began = self._now()

    def _end_forward(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self.seconds += self._now() - self._forward_began
        features: Tensor = output.pooler_output
        self.tokens += features.shape[0]
        if features.requires_grad:
            features.register_hook(self._begin_backward)

    def _begin_backward(self, _gradient: Tensor) -> None:
        self._backward_at = self._now()

    def _parameter_done(self, _parameter: Tensor) -> None:
        now = self._now()
        self.seconds += now - self._backward_at
        self._backward_at = now

    def time(self, call: Callable[[], dict[str, float]]) -> Timing:
        """The timing of one call."""
        self.seconds, self.tokens = 0.0, 0
        began = self._now()
        metrics = call()
        return Timing(self._now() - began, self.seconds, self.tokens, metrics)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The peak of torch's allocations on the CPU during a call, above what was there when it began.

    Exact: the profiler records every allocation and every release of torch's allocator, with the running total. Memory
    of other libraries (scratch space of oneDNN, Python's objects) is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in changes:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def machine() -> str:
    """Where and with what numbers were made: CPU, cores, threads, versions, commit, date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    processor = f"{models[0] if models else platform.processor()}, {len(models)} cores"
    return (
        f"{processor}, {torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}; "
        f"commit {described.stdout.strip() or 'unknown'}; {date.today()}"
    )
