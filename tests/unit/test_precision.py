"""The table of precisions against the config's choices, devices and Megatron-Core's numbers; and bf16's moments."""

from __future__ import annotations

import typing

import pytest
import torch

from megatron_cppo import config, fp8, selfcheck
from megatron_cppo.precision import PRECISIONS, gpu_problem, usable, version


def test_every_choice_has_one_entry_and_every_bound() -> None:
    assert tuple(PRECISIONS) == typing.get_args(config.Precision)
    arithmetic = {entry.arithmetic for entry in PRECISIONS.values()}
    for bounds in (selfcheck.MAX_LOG_RATIO, selfcheck.MAX_LOGP_GAP, selfcheck.MAX_KL):
        assert bounds.keys() == arithmetic
        assert bounds["fp32"] < bounds["bf16"] < bounds["fp8"]


@pytest.mark.parametrize("name", PRECISIONS)
def test_entries_do_not_contradict_themselves(name: str) -> None:
    entry = PRECISIONS[name]
    dtype = getattr(torch, entry.dtype)
    assert entry.num_bytes == dtype.itemsize
    assert name == (entry.arithmetic if entry.recipe is None else f"fp8_{entry.recipe.name}")
    assert (entry.recipe is None) == (entry.arithmetic != "fp8") == (entry.alignment == 1)


@pytest.mark.parametrize("name", [name for name, entry in PRECISIONS.items() if entry.recipe])
def test_tokens_are_padded_to_what_megatron_core_pads_experts_to_or_more(name: str) -> None:
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    entry = PRECISIONS[name]
    assert entry.recipe is not None
    asked = get_fp8_align_size(Fp8Recipe[entry.recipe.name])
    assert entry.alignment % asked == 0
    assert entry.recipe.channels == asked


@pytest.mark.parametrize(
    ("gpu", "capability", "cuda", "wanted"),
    [
        ("V100", (7, 0), "12.8", "fp32"),
        ("A100", (8, 0), "12.9", "fp32 bf16"),
        ("L40S", (8, 9), "12.9", "fp32 bf16 fp8_delayed fp8_tensorwise"),
        ("L40S", (8, 9), "12.0", "fp32 bf16"),
        ("H200", (9, 0), "12.8", "fp32 bf16 fp8_delayed fp8_tensorwise"),
        ("H200", (9, 0), "12.9", "fp32 bf16 fp8_delayed fp8_tensorwise fp8_blockwise"),
        ("B200", (10, 0), "13.0", "fp32 bf16 fp8_delayed fp8_tensorwise fp8_blockwise fp8_mxfp8"),
        ("RTX 5090", (12, 0), "13.0", "fp32 bf16 fp8_delayed fp8_tensorwise fp8_blockwise"),
    ],
)
def test_what_a_gpu_computes_in(gpu: str, capability: tuple[int, int], cuda: str, wanted: str) -> None:
    assert usable(capability, version(cuda)) == tuple(wanted.split())


def test_why_it_does_not() -> None:
    assert gpu_problem("fp8_blockwise", (8, 9), (12, 9)) == "needs compute capability 9.0, this is 8.9"
    assert gpu_problem("fp8_blockwise", (9, 0), (12, 8)) == "needs a torch built for CUDA 12.9, this one is for 12.8"
    assert gpu_problem("fp8_mxfp8", (12, 0), (13, 0)) == "needs a compute capability below 12.0, this is 12.0"
    assert gpu_problem("bf16", (8, 0), (11, 8)) == ""


def test_versions() -> None:
    assert [version(text) for text in ("12.9", "13", "12.10.1", "")] == [(12, 9), (13, 0), (12, 10), (0, 0)]


def decayed(beta: float, start: float, num_updates: int) -> float:
    """A moment in bf16 after updates with a gradient of zero, computed in fp32 and rounded, as Adam's kernel does."""
    moment = torch.tensor(start, dtype=torch.bfloat16)
    for _ in range(num_updates):
        moment = (moment.float() * beta).bfloat16()
    return float(moment)


@pytest.mark.parametrize("start", [1.0, 1.0078125, 1.5, 1.9921875, 3e-9])
def test_what_is_refused_of_bf16_moments_does_not_move_and_what_is_allowed_does(start: float) -> None:
    rounded = float(torch.tensor(start, dtype=torch.bfloat16))
    assert decayed(0.999, start, 1000) == rounded
    assert decayed(0.99, start, 1000) < 0.6 * rounded
    assert decayed(1 - fp8.BF16_RESOLUTION, start, 1) < rounded
