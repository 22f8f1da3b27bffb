"""These tests start real vLLM servers, by an environment that `make test-vllm` makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.vllm.rig import PYTHON

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Path(PYTHON).exists():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"no vLLM at {PYTHON}: run make test-vllm"))
