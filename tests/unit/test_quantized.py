"""What a parameter in FP8 is filled with: its numbers, and the exact values that its master is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import fp8_utils
from torch import nn

from megatron_cppo.policy import quantized
from tests import fp8_stand_in
from tests.fp8_stand_in import KINDS, StandIn


@pytest.fixture
def parameter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", StandIn)
    monkeypatch.setattr(fp8_utils, "te_post_all_gather_processing", fp8_stand_in._make_transposes)
    layer = nn.ModuleDict({"linear_fc2": nn.Linear(8, 12, bias=False)})
    assert fp8_stand_in.replace_matrices(layer, KINDS[request.param]) == 1
    return layer["linear_fc2"].weight


@pytest.mark.parametrize("parameter", KINDS, indirect=True)
def test_a_matrix_that_is_stored_the_other_way_round(parameter: Any) -> None:
    """As stacks of experts are: what masters are made of is cut flat, and so has no strides of its own."""
    stored = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    quantized.fill(parameter, stored.t())
    exact = parameter.get_high_precision_init_val()
    assert torch.equal(exact.view(-1), stored.t().bfloat16().reshape(-1))
    assert torch.equal(quantized.values(parameter), type(parameter).quantized(stored.t()).dequantize())
    assert torch.equal(parameter.multiplied(), quantized.values(parameter)), "the transpose is not that of the numbers"


@pytest.mark.parametrize("parameter", KINDS, indirect=True)
def test_the_exact_values_are_let_go(parameter: Any) -> None:
    quantized.fill(parameter, torch.ones(12, 8))
    quantized.forget_exact([parameter, nn.Parameter(torch.ones(2))])
    assert parameter.get_high_precision_init_val() is None
    quantized.forget_exact([parameter])
