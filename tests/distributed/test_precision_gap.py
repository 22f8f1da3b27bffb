"""The body of the FP8 measurements (tests/gpu/test_fp8_gpu.py), with the pair of precisions that a CPU has: what it
says of bf16 against fp32 is what the two formats allow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cppo import selfcheck
from tests import precision_gap
from tests.distributed.launch import run_distributed
from tests.precision_gap import Seen, gap, table

NUM_STEPS = 40


def measured(rank: int, world_size: int, folder: Path) -> Any:
    return precision_gap.measure(folder, device="cpu", base="fp32", others=("fp32", "bf16"), num_steps=NUM_STEPS)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Seen, Seen]:
    folder = tmp_path_factory.mktemp("gap")
    wanted, (again, bf16) = run_distributed(measured, 1, folder, timeout_seconds=400)[0]
    print(table(wanted, (again, bf16)))
    return wanted, again, bf16


def test_the_same_precision_has_no_gap(seen: Any) -> None:
    wanted, again, _ = seen
    found = gap(wanted, again)
    assert (found.mean, found.largest, found.mask_iou, found.gradient) == (0.0, 0.0, 1.0, 0.0)
    assert found.rank_correlation == pytest.approx(1.0)


def test_bf16_is_apart_from_fp32_by_its_rounding(seen: Any) -> None:
    wanted, _, bf16 = seen
    found = gap(wanted, bf16)
    print(found)
    assert len(wanted.logp_N) > 300
    assert wanted.mask_N.sum() > 30
    assert selfcheck.MAX_LOGP_GAP["fp32"] < found.mean < selfcheck.MAX_LOGP_GAP["bf16"]
    assert found.mean <= found.p99 <= found.largest
    assert 0.9 < found.rank_correlation < 1.0
    assert 0.5 < found.mask_iou <= 1.0
    assert 1e-4 < found.gradient < 0.2


def test_a_step_is_finite_and_weights_are_streamed_as_they_are(seen: Any) -> None:
    wanted, _, bf16 = seen
    for one in (wanted, bf16):
        assert one.streamed
        assert one.metrics["optim/skipped_updates"] == 0.0
        assert one.gradient_P.isfinite().all()
        assert one.gradient_P.norm() > 0
    assert all(tensor.dtype is torch.bfloat16 for tensor in bf16.weights.values())
    assert all(torch.equal(bf16.weights[name], tensor.bfloat16()) for name, tensor in wanted.weights.items())
