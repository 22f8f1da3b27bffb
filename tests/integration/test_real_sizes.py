"""Every published size at its recipe's layout, every stage: what ranks hold is what the mapping and the papers say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cppo.families.experts import place
from megatron_cppo.storage.hf_folder import disk_name
from tests.integration.real_sizes import RECIPES
from tests.published_models import PUBLISHED

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 600
"""Of a busy machine; alone it takes about a quarter of it."""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: stand-ins and fake groups are for good."""
    out = tmp_path_factory.mktemp("sizes") / "sizes.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.real_sizes", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["model"]: found for found in map(json.loads, out.read_text().splitlines())}


def whole_tensors(found: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the stages' ranks, under official names; of experts those that the ranks of EP 0 hold."""
    tensors: dict[str, tuple[int, ...]] = {}
    for stage in found["stages"]:
        for name, size in stage["whole"].items():
            assert name not in tensors, f"{name} is on two stages"
            tensors[name] = tuple(size)
    return tensors


@pytest.mark.parametrize("model", RECIPES)
def test_the_ranks_hold_hugging_faces_tensors(model: str, rehearsed: dict[str, Any]) -> None:
    """Names and sizes, against the module that transformers builds from the same config.json."""
    found = rehearsed[model]
    share = found["layout"].get("expert_parallel", 1)
    held, seen = whole_tensors(found), set()
    for own_name, size in found["module"].items():
        name = disk_name(own_name)
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert held[name] == tuple(size), name
            seen.add(name)
            continue
        # transformers 5 stacks experts: [E, 2I, H] and [E, H, I].
        experts = {each: place(each) for each in held if (where := place(each)) is not None and where.stack == name}
        assert len({where.expert for where in experts.values() if where}) == size[0] // share
        for each, where in experts.items():
            assert where is not None
            assert held[each] == (size[1] // where.parts, size[2]), each
        seen |= experts.keys()
    assert seen == held.keys()


@pytest.mark.parametrize("model", RECIPES)
def test_totals_are_the_published_counts(model: str, rehearsed: dict[str, Any]) -> None:
    found = rehearsed[model]
    experts = found["layout"].get("expert_parallel", 1)
    total = sum(
        math.prod(size) * (experts if place(name) is not None else 1) for name, size in whole_tensors(found).items()
    )
    print(f"{model:28} held {total:,} published {PUBLISHED[model]}")
    assert total == found["parameters"]
    published = PUBLISHED[model]
    assert total == published if published is not None else round(total / 1e9) == 73


@pytest.mark.parametrize("model", RECIPES)
def test_every_parameter_gets_a_gradient(model: str, rehearsed: dict[str, Any]) -> None:
    stages = rehearsed[model]["stages"]
    print(f"{model:28} " + "  ".join(f"{stage['numel'] / 1e9:.2f}e9" for stage in stages) + " parameters on a rank")
    assert {stage["rank"]: stage["gradients_missing"] for stage in stages} == {stage["rank"]: [] for stage in stages}
    assert len(stages) == rehearsed[model]["layout"].get("pipeline_parallel", 1)
