"""Where Megatron-Core would compute in FP8: in the decoder's layers, but for the first and last; tower, embedding, norm
and head are outside, in every cut into stages.

Transformer Engine's context, which is not there on a CPU, is stood in for by one that counts who is inside of it; who
enters it, and when, is Megatron-Core's own code and rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from megatron_cppo.precision import PRECISIONS
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import VOCAB, checkpoint

NUM_LAYERS = 4
STAGES: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"policy__pipeline_parallel": 2},
    "two, uneven": {"policy__pipeline_parallel": 2, "policy__layers_per_stage": (3, 1)},
    "two, interleaved": {"policy__pipeline_parallel": 2, "policy__virtual_pipeline": 2},
}
ENDS = {"fp8_tensorwise": [1, 2], "fp8_blockwise": [1, 2], "fp8_mxfp8": [1, 2], "fp8_delayed": [0, 1, 2, 3]}
"""The layers, from zero, that are to be in FP8."""


class Scope:
    """Stands in for `get_fp8_context`: how deep the code that runs is in FP8, and what was seen there."""

    def __init__(self) -> None:
        self.depth = 0
        self.inside: set[str] = set()
        self.outside: set[str] = set()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def context(self, config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        from megatron.core.fp8_utils import is_first_last_bf16_layer

        assert not is_init, "the model is built by now"
        return contextlib.nullcontext() if is_first_last_bf16_layer(config, layer_no) else self.entered()

    def see(self, name: str) -> None:
        (self.inside if self.depth else self.outside).add(name)


def scopes(rank: int, world_size: int, folder: str, stages: str) -> dict[str, tuple[set[str], set[str]]]:
    from megatron.core.transformer import transformer_block

    from megatron_cppo.config import PolicyConfig
    from megatron_cppo.policy import step, weights
    from megatron_cppo.policy.model import _fp8
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(folder, world_size, **STAGES[stages])
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    groups = tiny_model.make_groups(6, 3, vocab_size=VOCAB)
    views_for = OBJECTIVES["cppo"].views_for
    batch = build_batch(groups, views_for=views_for, num_updates=1, packing=plan.packing, score=True)
    found: dict[str, tuple[set[str], set[str]]] = {}
    scope = Scope()
    for chunk in policy.trained.chunks:
        for name, module in chunk.named_modules():
            full = weights.global_name(chunk, name)
            module.register_forward_pre_hook(lambda *_, full=full: scope.see(full))
    transformer_block.get_fp8_context = lambda *words, **named: scope.context(*words, **named)

    def statistics(row: Any, head: Any) -> tuple[torch.Tensor, None]:
        scope.see("head")
        return head.statistics(row.rows_original_N, row.targets_N)[0].sum(), None

    for precision in ENDS:
        for name, value in _fp8(PolicyConfig(precision=precision)).items():  # pyrefly: ignore[bad-argument-type]
            setattr(policy.trained.config, name, value)
        scope.inside, scope.outside = set(), set()
        rows = batch.updates[0].microbatches[policy.groups.data_rank]
        step.run_rows(policy.trained, rows, statistics, head=policy.settings.head, forward_only=True)
        found[precision] = (scope.inside, scope.outside)
        policy.trained.config.first_last_layers_bf16 = False
    return found


def first_microbatches(rank: int, world_size: int, folder: str, stages: str) -> list[list[bool]]:
    """Per pass and row, whether a matrix is told to round its weight to FP8 anew; it forgets that, as the true one."""
    from megatron_cppo.policy import step
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(folder, world_size, **STAGES[stages], policy__max_tokens_per_microbatch=300)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    groups = tiny_model.make_groups(6, 3, vocab_size=VOCAB)
    batch = build_batch(groups, views_for=OBJECTIVES["cppo"].views_for, num_updates=1, packing=plan.packing, score=True)
    policy.trained.config.fp8 = "hybrid"
    told: list[bool] = []

    def see(module: Any, _: Any) -> None:
        told.append(module.is_first_microbatch)
        module.is_first_microbatch = False

    matrix: Any = policy.trained.chunks[-1].language_model.decoder.layers[0].mlp.linear_fc2
    matrix.is_first_microbatch = False
    matrix.register_forward_pre_hook(see)
    # No FP8 here: only what the schedule tells is looked at.
    from megatron.core.transformer import transformer_block

    transformer_block.get_fp8_context = lambda *_, **__: contextlib.nullcontext()
    passes = []
    for forward_only in (True, False, True):
        rows = batch.updates[0].microbatches[policy.groups.data_rank]
        step.run_rows(policy.trained, rows, _sum_of_logp, head=policy.settings.head, forward_only=forward_only)
        assert len(told) == len(rows) > 1
        passes.append(list(told))
        told.clear()
    return passes


def _sum_of_logp(row: Any, head: Any) -> tuple[torch.Tensor, None]:
    return head.statistics(row.rows_original_N, row.targets_N)[0].sum(), None


@pytest.mark.parametrize("stages", ["one", "two", "two, interleaved"])
def test_weights_are_rounded_anew_in_every_pass(stages: str, folder: str) -> None:
    """Once a pass, with its first row: after an update, and when a pass is the reference's, they are others."""
    num_stages = STAGES[stages].get("policy__pipeline_parallel", 1)
    for passes in run_distributed(first_microbatches, num_stages, folder, stages):
        assert all(told[0] and not any(told[1:]) for told in passes), passes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("hf")
    return checkpoint(path, num_layers=NUM_LAYERS)


@pytest.mark.parametrize("stages", STAGES)
def test_only_the_decoders_inner_layers_are_in_fp8(stages: str, folder: str) -> None:
    ranks = run_distributed(scopes, STAGES[stages].get("policy__pipeline_parallel", 1), folder, stages)
    assert ENDS.keys() == {name for name, entry in PRECISIONS.items() if entry.recipe}
    for precision, layers in ENDS.items():
        inside = set().union(*(rank[precision][0] for rank in ranks))
        outside = set().union(*(rank[precision][1] for rank in ranks))
        assert not inside & outside
        names = {f"language_model.decoder.layers.{layer}" for layer in range(NUM_LAYERS)}
        in_fp8 = {f"language_model.decoder.layers.{layer}" for layer in layers}
        assert inside & names == in_fp8
        assert all(any(f"{name}.".startswith(f"{layer}.") for layer in in_fp8) for name in inside)
        # All that computes was seen, on one side or the other.
        assert outside >= {"visual", "language_model.embedding", "language_model.decoder.final_layernorm", "head"}
        assert outside & names == names - in_fp8
        for matrix in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            assert {f"{layer}.{matrix}" for layer in in_fp8} <= inside
