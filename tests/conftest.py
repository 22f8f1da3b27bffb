"""Options of the test suite: which tests are too slow for every run, and where measured errors are kept."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before the first import of a kernel: without a GPU to compile for, Triton's are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (make test-all)")
    parser.addoption("--write-errors", default="", metavar="FILE", help="append what test_matrix.py measures, as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests unless they are asked for; they are no skips, which would be looked at."""
    if config.getoption("--slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if "slow" not in item.keywords]
