"""Ranks with many gated samples next to ranks with none: no rank misses a collective, and the numbers are one rank's.

`tests/unit/test_packing_properties.py` draws plans; here some extreme ones run, in all passes of an update.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import run_distributed
from tests.distributed.layouts import Answer, Case, checkpoint, relative_l2, run_cases

TEMPERATURE = {"perception__temperature": 1.0}
"""At the published 0.1 the loss is ten times as sensitive to rounding, which differs between processors, too."""
WAYS: dict[str, dict[str, Any]] = {
    "three views": {"perception__coefficient": 1.0, **TEMPERATURE},
    "constant views, counted": {
        "perception__coefficient": 1.0,
        **TEMPERATURE,
        "perception__stop_gradient_views": True,
        "perception__aggregation": "global",
        "perception__divergence": "exact",
    },
}
# Prompts have 0, 1, 2 images in turn, and three samples each: 4 and 7 have images, 0 has none.
GATES = {"none": (), "none with an image": (0,), "one": (4,), "all of one prompt": (6, 7, 8), "all": tuple(range(18))}
DATA_PARALLEL = 3


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[tuple[str, str], Answer]]:
    folder = checkpoint(tmp_path_factory.mktemp("hf"))
    cases = {
        (way, gates): Case(folder, {**fields, "policy__max_tokens_per_microbatch": 600}, gated=gated)
        for way, fields in WAYS.items()
        for gates, gated in GATES.items()
    }
    return {world: run_distributed(run_cases, world, cases, timeout_seconds=300)[0] for world in (1, DATA_PARALLEL)}


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("way", WAYS)
def test_an_update_is_that_of_one_rank_however_the_gates_fall(way: str, gates: str, answers: Any) -> None:
    wanted, found = answers[1][way, gates], answers[DATA_PARALLEL][way, gates]
    gated = [sample for sample in found.statistics if sample.entropy_removing is not None]
    assert len(gated) == {"none": 0, "none with an image": 0, "one": 1, "all of one prompt": 3, "all": 12}[gates]
    errors = {name: relative_l2(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients}
    worst = max(errors, key=errors.__getitem__)
    print(
        f"{way}, gated {gates}: {found.num_rows} rows on {DATA_PARALLEL} ranks; gradients {errors[worst]:.1e} {worst}"
    )
    assert errors[worst] <= 1e-5
    for name in ("policy/loss", "perception/cpl"):
        assert (name in found.metrics) == (name in wanted.metrics)
        if name in wanted.metrics:
            assert found.metrics[name] == pytest.approx(wanted.metrics[name], rel=1e-5, abs=1e-7)
