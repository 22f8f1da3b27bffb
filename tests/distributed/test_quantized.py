"""Parameters in FP8 (`fp8_param`): loaded, trained, gathered, exchanged with the reference, saved and restored.

Transformer Engine needs a GPU; here `tests/fp8_stand_in.py` holds the numbers, under Megatron-Core's own DDP and
distributed optimizer. Computed in bf16, which a plan refuses on a CPU.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.fp8_stand_in import KINDS, LARGEST, StandIn, activate, replace_matrices

VOCAB = 131
NUM_LAYERS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2+SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel": 2, "layers_per_stage": (1, 2)},
    "EP2": {"expert_parallel": 2},
}
PLACES = {"tensorwise": "device", "blockwise": "host"}
EXPERTS = {"EP2"}
"""Of a model with experts."""


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a run in FP8: log-probs, and the parameters' bytes and streamed weights at its moments."""

    old: list[Tensor]
    reference_at_start: list[Tensor]
    reference_at_end: list[Tensor]
    policy_at_end: list[Tensor]
    restored: list[Tensor]
    bytes: dict[str, dict[str, Tensor]]
    stream: dict[str, Tensor]
    metrics: dict[str, float]


def policy_of(model: str, layout: str, kind: str, place: str = "device") -> tuple[Any, Any]:
    """A policy in bf16, with `kind` of matrices in the second and third layer; "": plain ones."""
    from megatron_cppo.policy import build
    from megatron_cppo.policy.policy import Policy

    fields = {f"policy__{name}": value for name, value in LAYOUTS[layout].items()}
    fields |= {"policy__distributed_optimizer": True, "policy__reference": place, "algorithm__beta": 0.1}
    fields |= {"optimizer__learning_rate": 3e-3, "optimizer__weight_decay": 0.1}
    config = tiny_model.make_config(model, 2, **fields)
    plan = tiny_model.make_plan(config)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, precision="bf16"))
    make_chunks = build.make_chunks

    def quantized_chunks(*args: Any, **kwargs: Any) -> Any:
        chunks = make_chunks(*args, **kwargs)
        layers = [layer for chunk in chunks for layer in chunk.language_model.decoder.layers if layer.layer_number > 1]
        count = sum(replace_matrices(layer, KINDS[kind]) for layer in layers)
        # Query, key and value, the attention's output, and two of a feed-forward part or of each of a rank's experts.
        assert count == (2 + tiny_model.NUM_EXPERTS if layout in EXPERTS else 4) * len(layers)
        return chunks

    build.make_chunks = quantized_chunks if kind else make_chunks
    try:
        policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    finally:
        build.make_chunks = make_chunks
    return policy, plan


def held_bytes(policy: Any) -> dict[str, Tensor]:
    """Of every parameter in FP8 the numbers and scales; their transposes are those of the numbers."""
    found: dict[str, Tensor] = {}
    for chunk in policy.trained.chunks:
        for name, parameter in chunk.named_parameters():
            if isinstance(parameter, StandIn):
                numbers, scales, transpose = parameter.tensors
                assert torch.equal(transpose, numbers.t()), name
                found |= {f"{name} numbers": numbers.clone(), f"{name} scales": scales.clone()}
    return found


def in_buffer(policy: Any) -> Iterator[bool]:
    """Whether the numbers lie in DDP's memory, which is gathered."""
    for wrapped in policy.trained.wrapped:
        buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
        memory = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers}
        for parameter in wrapped.parameters():
            if isinstance(parameter, StandIn):
                yield parameter.tensors[0].untyped_storage().data_ptr() in memory


def visit(rank: int, world_size: int, models: dict[str, str], folder: Path) -> dict[tuple[str, str], Seen]:
    from megatron_cppo.policy import groups as process_groups

    activate()
    seen = {}
    for layout, model in models.items():
        plain, _ = policy_of(model, layout, "")
        plain.save(folder / f"{layout} plain", at_step=0, progress={}, keep=1)
        process_groups.destroy()
        for kind, place in PLACES.items():
            seen[layout, kind] = run(model, layout, kind, place, folder)
        # What was trained in FP8 goes on in bf16, and the other way round.
        plain, _ = policy_of(model, layout, "")
        plain.restore(folder / f"{layout} blockwise")
        plain.save(folder / f"{layout} in bf16", at_step=2, progress={}, keep=1)
        process_groups.destroy()
        other, _ = policy_of(model, layout, "tensorwise")
        other.restore(folder / f"{layout} in bf16")
        other.save(folder / f"{layout} other", at_step=2, progress={}, keep=1)
        process_groups.destroy()
    return seen


def run(model: str, layout: str, kind: str, place: str, folder: Path) -> Seen:
    from megatron_cppo.policy import groups as process_groups

    policy, plan = policy_of(model, layout, kind, place)
    assert all(in_buffer(policy))
    groups = tiny_model.make_groups(4, 3, vocab_size=VOCAB)
    views = OBJECTIVES["cppo"].views_for
    batch = build_batch(groups, views_for=views, num_updates=1, packing=plan.packing, score=True)
    moments = {"loaded": held_bytes(policy)}
    policy.save(folder / f"{layout} {kind} start", at_step=0, progress={}, keep=1)
    scored = policy.score(batch, old=True, reference=True)
    moments["scored"] = held_bytes(policy)
    for _ in range(2):
        metrics = policy.update(scored)
    moments["updated"] = held_bytes(policy)
    again = policy.score(batch, old=True, reference=True)
    moments["scored again"] = held_bytes(policy)
    assert all(in_buffer(policy))
    alike_over_data(policy, moments["updated"])
    stream = {name: tensor.clone() for name, tensor in policy.weights()}
    policy.save(folder / f"{layout} {kind}", at_step=2, progress={}, keep=1)
    process_groups.destroy()
    policy, plan = policy_of(model, layout, kind, place)
    policy.restore(folder / f"{layout} {kind}")
    moments["restored"] = held_bytes(policy)
    restored = policy.score(batch, old=True, reference=False)
    process_groups.destroy()
    return Seen(
        old=list(scored.old_logp or ()),
        reference_at_start=list(scored.reference_logp or ()),
        reference_at_end=list(again.reference_logp or ()),
        policy_at_end=list(again.old_logp or ()),
        restored=list(restored.old_logp or ()),
        bytes=moments,
        stream=stream,
        metrics=metrics,
    )


def alike_over_data(policy: Any, found: dict[str, Tensor]) -> None:
    group = policy.groups.data
    for name, tensor in found.items():
        if ".local_experts." in name:
            continue  # dealt over these ranks
        first = tensor.clone()
        dist.broadcast(first, group=group, group_src=0)
        assert torch.equal(first, tensor), name


@dataclass(frozen=True)
class Run:
    folder: Path
    seen: list[dict[tuple[str, str], Seen]]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("quantized")
    families = ("qwen2_5_vl", "qwen3_vl_moe")
    dense, experts = (
        tiny_model.make_checkpoint(folder / family, family=family, vocab_size=VOCAB, num_layers=NUM_LAYERS)
        for family in families
    )
    models = {layout: experts if layout in EXPERTS else dense for layout in LAYOUTS}
    return Run(folder, run_distributed(visit, 2, models, folder, timeout_seconds=300))


def stored(folder: Path) -> dict[str, Tensor]:
    from megatron_cppo.storage import torch_dist

    (step,) = folder.glob("step_*")
    reader = torch_dist.Folder(step)
    return {key: reader.read(key, offset=(0,) * len(reader.size(key)), shape=reader.size(key)) for key in reader.keys}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    return all(
        found[name].dtype is tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) > 0 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
class TestParametersInFP8:
    def test_masters_are_the_folder_s_weights(self, layout: str, kind: str, run_of: Run) -> None:
        """Those of a plain policy in bf16, to the bit; and so is the rest of a checkpoint."""
        assert same(stored(run_of.folder / f"{layout} {kind} start"), stored(run_of.folder / f"{layout} plain"))

    def test_scoring_leaves_every_byte(self, layout: str, kind: str, run_of: Run) -> None:
        for seen in (rank[layout, kind] for rank in run_of.seen):
            assert same(seen.bytes["scored"], seen.bytes["loaded"])
            assert same(seen.bytes["scored again"], seen.bytes["updated"])

    def test_the_reference_stays_as_it_was_loaded(self, layout: str, kind: str, run_of: Run) -> None:
        for seen in (rank[layout, kind] for rank in run_of.seen):
            assert equal(seen.reference_at_start, seen.old)
            assert equal(seen.reference_at_end, seen.reference_at_start)
            assert not equal(seen.policy_at_end, seen.old)

    def test_an_update_rounds_its_masters(self, layout: str, kind: str, run_of: Run) -> None:
        """Every matrix moves, and what is streamed is each master to half a step of FP8, as far as scales are alike."""
        checkpoint = stored(run_of.folder / f"{layout} {kind}")
        for seen in (rank[layout, kind] for rank in run_of.seen):
            assert seen.metrics["optim/skipped_updates"] == 0.0
            numbers = [name for name in seen.bytes["updated"] if name.endswith("numbers")]
            assert all(not torch.equal(seen.bytes["updated"][name], seen.bytes["loaded"][name]) for name in numbers)
            streamed = [t.float() for name, t in seen.stream.items() if name.endswith("self_attn.o_proj.weight")]
            (masters,) = (t for key, t in checkpoint.items() if re.search(r"fp32_param.*\.linear_proj\.weight$", key))
            assert torch.equal(streamed[0], masters[0].bfloat16().float()), "the first layer is plain"
            for found, wanted in zip(streamed[1:], masters[1:], strict=True):
                error = (found - wanted).abs()
                # Half a step of three bits and bf16's rounding, or half of the smallest step, 2^-10 of the scale, which
                # may be twice as large to be a power of two.
                bound = wanted.abs() * (2**-4 + 2**-8) + wanted.abs().max() * 2**-8 / LARGEST
                assert (error <= bound).all()
                assert error.max() > 2**-8 * wanted.abs().max()

    def test_a_checkpoint_is_that_of_bf16(self, layout: str, kind: str, run_of: Run) -> None:
        checkpoint = stored(run_of.folder / f"{layout} {kind}")
        masters = {key: t for key, t in checkpoint.items() if key.startswith("optimizer.state.fp32_param.")}
        assert len(masters) > 20
        for key, tensor in masters.items():
            assert torch.equal(checkpoint[key.removeprefix("optimizer.state.fp32_param.")], tensor.bfloat16()), key

    def test_a_restored_policy_has_every_byte(self, layout: str, kind: str, run_of: Run) -> None:
        for seen in (rank[layout, kind] for rank in run_of.seen):
            assert same(seen.bytes["restored"], seen.bytes["updated"])
            assert equal(seen.restored, seen.policy_at_end)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_go_on_in_bf16_and_back(layout: str, run_of: Run) -> None:
    wanted = stored(run_of.folder / f"{layout} blockwise")
    assert same(stored(run_of.folder / f"{layout} in bf16"), wanted)
    assert same(stored(run_of.folder / f"{layout} other"), wanted)
