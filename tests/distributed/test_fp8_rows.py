"""Rows that are padded as FP8 needs them: the same loss and gradients as unpadded ones, in every way to cut a row.

In fp32, as on a CPU nothing computes in FP8. There, padding has one effect more, which a tensor's single scale makes:
docs/fp8.md.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cppo.precision import PRECISIONS
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import LAYOUTS, WORLD, Answer, Case, checkpoint, relative_l2, run_cases

ROUNDING = 1e-6
"""Of fp32 sums in another order: other shapes are multiplied in other blocks."""
PADDED = [
    ("TP1", "fp8_tensorwise"),
    ("TP1", "fp8_blockwise"),
    ("TP1", "fp8_mxfp8"),
    ("TP2+SP", "fp8_tensorwise"),
    ("TP2+SP", "fp8_blockwise"),
    ("CP2", "fp8_mxfp8"),
    ("CP2", "fp8_blockwise"),
    ("PP2", "fp8_delayed"),
]


def case(folder: str, layout: str, precision: str) -> Case:
    fields = {**LAYOUTS[layout], "policy__max_tokens_per_microbatch": 640, "algorithm__beta": 0.1}
    return Case(folder, fields, scores=True, padded_for=precision)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Answer]:
    folder = checkpoint(tmp_path_factory.mktemp("hf"))
    wanted = [(layout, "fp32") for layout in dict.fromkeys(layout for layout, _ in PADDED)]
    found: dict[tuple[str, str], Answer] = {}
    for world in (1, 2):
        cases: dict[Any, Case] = {name: case(folder, *name) for name in wanted + PADDED if WORLD[name[0]] == world}
        found |= run_distributed(run_cases, world, cases, timeout_seconds=200)[0]
    return found


@pytest.mark.parametrize(("layout", "precision"), PADDED)
def test_loss_and_gradients_do_not_depend_on_what_fp8_pads(layout: str, precision: str, answers: Any) -> None:
    wanted, found = answers[layout, "fp32"], answers[layout, precision]
    multiple = PRECISIONS[precision].alignment * {"TP2+SP": 2, "CP2": 2}.get(layout, 1)
    assert all(tokens % multiple == 0 for tokens in found.row_tokens), found.row_tokens
    assert not all(tokens % multiple == 0 for tokens in wanted.row_tokens), wanted.row_tokens
    assert [s.mask for s in found.statistics] == [s.mask for s in wanted.statistics]
    loss = abs(found.metrics["policy/loss"] - wanted.metrics["policy/loss"])
    errors = {name: relative_l2(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients}
    worst = max(errors, key=errors.__getitem__)
    print(f"{layout:7} {precision:15} rows of {found.row_tokens}: loss {loss:.1e}, {worst} {errors[worst]:.1e}")
    assert loss <= ROUNDING * abs(wanted.metrics["policy/loss"])
    assert errors[worst] <= 10 * ROUNDING
