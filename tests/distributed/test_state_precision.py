"""Moments in bf16, as Transformer Engine's Adam keeps them, in checkpoints: saved and loaded to the bit, in another
layout too, and from and into moments in fp32.

That Adam needs a GPU; here torch's is given the same tensors, under the same names.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import matrix, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.matrix import Layout
from tests.distributed.test_resharded import TRAINING, fill

LAYOUTS = {1: Layout(distributed_optimizer=True), 2: Layout(2, tp=2, sp=True, distributed_optimizer=True)}
HELD = ("optimizer", "Adam")
"""Who holds the master weights: Megatron-Core's optimizer, or (without FP8, and with fp8_delayed) Adam."""


def reduce_state(policy: Any, masters: str) -> None:
    """Give torch's Adam what Transformer Engine's would have."""
    from megatron_cppo.policy import held
    from megatron_cppo.policy.checkpoint import initialise_adam

    initialise_adam(policy.trained)
    for inner in held.inner_optimizers(policy.trained):
        for shard, state in inner.optimizer.state.items():
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].bfloat16(), state["exp_avg_sq"].bfloat16()
            if masters == "Adam":
                state["master_param"] = shard.detach().clone()


def visit(rank: int, world_size: int, model: str, source: Path | None, target: Path, masters: str) -> None:
    """Load `source` (or make numbers up), save `target`; what this rank holds. `masters`: "" for moments in fp32."""
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy import held
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(model, world_size, **{**LAYOUTS[world_size].fields(), **TRAINING})
    plan = tiny_model.make_plan(config)
    # A plan refuses bf16 on a CPU: here nothing is computed in it.
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, precision="bf16"))
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    if masters:
        reduce_state(policy, masters)
    if source is None:
        fill(policy)
    else:
        policy.restore(source)
    policy.save(target, at_step=2, progress={}, keep=1)
    kinds = {item.key.split(".")[2]: item.tensor.dtype for item in held.items(policy.trained) if "state" in item.key}
    assert kinds["fp32_param"] is torch.float32
    assert kinds["exp_avg"] is kinds["exp_avg_sq"] is (torch.bfloat16 if masters else torch.float32)
    if masters == "Adam":
        states = [state for inner in held.inner_optimizers(policy.trained) for state in inner.optimizer.state.values()]
        held_by_adam = {state["master_param"].data_ptr() for state in states}
        own = {item.tensor.data_ptr() for item in held.items(policy.trained) if "fp32_param" in item.key}
        assert own == held_by_adam
    process_groups.destroy()


def stored(folder: Path) -> dict[str, Tensor]:
    from megatron_cppo.storage import torch_dist

    reader = torch_dist.Folder(folder / "step_000002")
    return {key: reader.read(key, offset=(0,) * len(reader.size(key)), shape=reader.size(key)) for key in reader.keys}


@pytest.mark.parametrize("masters", HELD)
def test_moments_in_bf16_come_back_to_the_bit(masters: str, tmp_path: Path) -> None:
    model = tiny_model.make_checkpoint(tmp_path / "hf", vocab_size=matrix.VOCAB, num_layers=2)
    run_distributed(visit, 2, model, None, tmp_path / "first", masters)
    run_distributed(visit, 1, model, tmp_path / "first", tmp_path / "second", masters)
    run_distributed(visit, 2, model, tmp_path / "second", tmp_path / "fp32", "")
    run_distributed(visit, 1, model, tmp_path / "fp32", tmp_path / "again", masters)
    wanted = stored(tmp_path / "first")
    moments = [key for key in wanted if ".exp_avg" in key]
    assert len(moments) > 20
    assert all(wanted[key].dtype is torch.bfloat16 and wanted[key].count_nonzero() > 0 for key in moments)
    for name in ("second", "fp32", "again"):
        found = stored(tmp_path / name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype is (torch.float32 if key in moments and name == "fp32" else tensor.dtype), key
            assert torch.equal(found[key].float(), tensor.float()), (name, key)
