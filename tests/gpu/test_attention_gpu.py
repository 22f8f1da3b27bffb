"""Transformer Engine's attention on a packed row against a plain loop, and against this package's own.

Skipped without a CUDA device, and the first part without Transformer Engine: neither has run on a machine without them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (96, 32, 160, 8)
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from megatron_cppo.config import PolicyConfig
    from megatron_cppo.policy import groups as process_groups

    store: Path = tmp_path_factory.mktemp("store") / "store"
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield process_groups.make(PolicyConfig(), seed=0)
    process_groups.destroy()
    dist.destroy_process_group()


def attend(groups: Any, query: Tensor, key: Tensor, value: Tensor, *, kernels: bool) -> Tensor:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cppo.policy.attention import PackedAttention, segments, transformer_engine_attention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=HEAD_SIZE,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    kind: Any = transformer_engine_attention() if kernels else PackedAttention
    module = kind(config, 1, AttnMaskType.causal, "self", pg_collection=groups.collection)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    row = segments(starts, max(LENGTHS), groups.context, torch.device("cuda", 0), kernels=kernels)
    options = {"attn_mask_type": AttnMaskType.padding_causal} if kernels else {}
    return module(query, key, value, None, packed_seq_params=row, **options).reshape(len(query), -1)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of each segment by itself, in float64."""
    outputs = []
    for q, k, v in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True):
        k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) / HEAD_SIZE**0.5
        hidden = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "Transformer Engine"])
def test_packed_attention_is_that_of_each_segment(kernels: bool, groups: Any) -> None:
    if kernels and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    torch.manual_seed(0)
    total = sum(LENGTHS)
    query, key, value = (
        torch.randn(total, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    found = attend(groups, query, key, value, kernels=kernels).double()
    wanted = plain(query, key, value)
    error = float((found - wanted).norm() / wanted.norm())
    print(f"kernels {kernels}: relative L2 {error:.1e}")
    assert error <= 1e-2  # bf16 keeps 8 bits
