"""Reward functions that leave a trace of who graded what; light to import, since grading workers do so.

`data_source` is the folder in which each process keeps its own file.
"""

from __future__ import annotations

import os
from pathlib import Path


def correct(response_text: str, ground_truth: str, data_source: str) -> float:
    """1 for the right answer; notes the response in this process's file."""
    with Path(data_source, str(os.getpid())).open("a") as file:
        file.write(f"{response_text}\n")
    return float(response_text.split()[-1] == ground_truth)


def process(response_text: str, ground_truth: str, data_source: str) -> float:
    """A number that no two processes share: ranks that graded the same answer would not agree."""
    return os.getpid() / 2**22
