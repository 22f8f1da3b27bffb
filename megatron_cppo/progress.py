"""Progress of a long phase on a terminal or in a log file, and how durations and rates are written. Knows no run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

QUIET_SECONDS = 3.0
TTY_PERIOD_SECONDS = 0.1
LINE_PERIOD_SECONDS = 10.0


class Progress:
    """One line of progress: silent for 3 s, then redrawn on a terminal, elsewhere a new line every 10 s."""

    def __init__(self, name: str, total: int, stream: TextIO, clock: Callable[[], float]) -> None:
        self._name, self._total, self._stream, self._clock = name, total, stream, clock
        self._start = clock()
        self._done = 0
        self._shown_at: float | None = None
        self._redraws = stream.isatty()

    def advance(self, count: int) -> None:
        """Count `count` more units as done."""
        self._done += count
        now = self._clock()
        period = TTY_PERIOD_SECONDS if self._redraws else LINE_PERIOD_SECONDS
        late = now - self._start >= QUIET_SECONDS
        if late and self._done < self._total and (self._shown_at is None or now - self._shown_at >= period):
            self._shown_at = now
            rate = self._done / (now - self._start)
            left = duration((self._total - self._done) / rate) if rate else "?"
            self._write(f"{self._name} {self._done}/{self._total}  {brief(rate)}/s  eta {left}")

    def close(self) -> None:
        """Say how long it took, when anything was shown."""
        if self._shown_at is not None:
            self._write(f"{self._name} {self._done}/{self._total} in {duration(self._clock() - self._start)}", end="\n")

    def _write(self, text: str, end: str = "") -> None:
        # "\x1b[K" clears what a longer line left behind.
        self._stream.write(f"\r{text}\x1b[K{end}" if self._redraws else f"{text}\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Two units at most: 45s, 2m10s, 3h05m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02d}m"
    return f"{whole // 86400}d{whole // 3600 % 24:02d}h"


def brief(value: float) -> str:
    """Three significant digits; whole numbers from a thousand on."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
