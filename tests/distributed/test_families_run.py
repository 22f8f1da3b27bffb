"""What a run does beside its updates, for every family in layouts of its own: load, save and go on, export, sync.

Weights come from folders in both orders of stacked experts; what is exported is in the source's order, and answers as
the policy does in Hugging Face's module and in the embedded engine.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from megatron_cppo.types import Batch
from tests.distributed import dense_reference, layouts, matrix, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.matrix import Layout

CASES: dict[str, tuple[str, Layout]] = {
    "qwen2_5_vl CP2": ("qwen2_5_vl", Layout(2, cp=2)),
    "qwen2_5_vl PP2xVPP2": ("qwen2_5_vl", Layout(2, pp=2, vpp=2)),
    "qwen3_vl PP2xVPP2": ("qwen3_vl", Layout(2, pp=2, vpp=2, distributed_optimizer=True)),
    "qwen3_vl TP2xCP2": ("qwen3_vl", Layout(4, tp=2, sp=True, cp=2)),
    "qwen3_vl_moe TP2": ("qwen3_vl_moe", Layout(2, tp=2, sp=True)),
    "qwen3_vl_moe TP2xEP2": ("qwen3_vl_moe", Layout(2, tp=2, sp=True, ep=2)),
    "qwen3_vl_moe official order, EP2": ("official", Layout(2, ep=2, distributed_optimizer=True)),
    "qwen3_vl_moe official order, TP2xPP2xVPP2xEP2": (
        "official",
        Layout(4, tp=2, sp=True, pp=2, vpp=2, ep=2, distributed_optimizer=True),
    ),
}
TRAINING: dict[str, Any] = {
    "optimizer__learning_rate": 1e-2,
    "trainer__num_steps": 3,
    "rollout__max_response_tokens": 6,
}


@dataclass(frozen=True)
class Found:
    """What a rank saw."""

    loaded: dict[str, Tensor]
    whole: dict[str, Tensor]
    restored: dict[str, Tensor]
    progress: dict[str, Any] | None
    keys: set[str]
    logits: list[Tensor]
    gap: float
    num_sampled: int


def run_cases(rank: int, world_size: int, cases: dict[str, tuple[str, Layout, Path]]) -> dict[str, Found]:
    """All cases of a number of ranks; top-level, for `run_distributed`."""
    multiprocessing.current_process().daemon = False
    return {name: run_case(*case, world_size) for name, case in cases.items()}


def run_case(folder: str, layout: Layout, root: Path, world_size: int) -> Found:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(folder, world_size, **layout.fields(), **TRAINING)
    plan = tiny_model.make_plan(config)

    def batch(step: int) -> Batch:
        return build_batch(
            matrix.groups(step),
            views_for=OBJECTIVES["cppo"].views_for,
            num_updates=1,
            packing=plan.packing,
            score=True,
        )

    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    loaded = _copies(policy)
    for step in range(3):
        if step == 2:
            policy.save(root / "checkpoints", at_step=2, progress={"rows": 2}, keep=1)
        policy.update(policy.score(batch(step), old=True, reference=False))
    whole = _copies(policy)
    policy.export(root / "export")
    logits = layouts.sample_logits(policy, batch(0))
    gap, num_sampled = _engine_gap(policy, config, folder, batch(0))
    keys = {tensor.key for chunk in policy.trained.chunks for tensor in _sharded(chunk.sharded_state_dict())}
    process_groups.destroy()
    again = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    progress = again.restore(root / "checkpoints")
    again.update(again.score(batch(2), old=True, reference=False))
    restored = _copies(again)
    process_groups.destroy()
    return Found(loaded, whole, restored, progress, keys, logits, gap, num_sampled)


def _engine_gap(policy: Any, config: Any, folder: str, batch: Batch) -> tuple[float, int]:
    """The largest difference of log-probs between the engine that sampled, and the policy that scores it."""
    from megatron_cppo.rollout.transformers import TransformersEngine

    engine = TransformersEngine(
        folder,
        pixels=tiny_model.pixels,
        banned_ids=tiny_model.BANNED,
        decode=str,
        max_response_tokens=config.rollout.max_response_tokens,
        max_sequences=64,
        seed=3,
        group=policy.groups.world,
        end_ids=(9,),
    )
    engine.load_weights(policy.weights(), version=1)
    prompts = list({sample.prompt.row: sample.prompt for sample in batch.samples}.values())
    groups = engine.generate(prompts, samples_per_prompt=2, temperature=1.0)
    plan = tiny_model.make_plan(config)
    planned = build_batch(
        groups, views_for=OBJECTIVES["grpo"].views_for, num_updates=1, packing=plan.packing, score=True
    )
    scored = policy.score(planned, old=True, reference=False)
    gaps = [
        float((torch.tensor(sample.logp) - logp).abs().max())
        for sample, logp in zip(scored.samples, scored.old_logp or (), strict=True)
    ]
    return max(gaps), sum(len(sample.token_ids) for sample in scored.samples)


def _copies(policy: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.weights()}


def _sharded(state: Any) -> list[Any]:
    """The tensors of a sharded state, whatever it is nested in."""
    if isinstance(state, dict):
        return [tensor for part in state.values() for tensor in _sharded(part)]
    return [state] if hasattr(state, "global_shape") else []


def in_official_order(source: str, target: Path) -> str:
    """A copy of a folder whose stacked experts multiply from the right, as those that Qwen published."""
    target.mkdir()
    for path in Path(source).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(Path(source) / "model.safetensors")
    turned = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()
    }
    save_file(turned, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {
        family: tiny_model.make_checkpoint(
            tmp_path_factory.mktemp(family),
            family=family,
            num_layers=matrix.NUM_LAYERS,
            tied=matrix.TIED.get(family, False),
        )
        for family in matrix.FAMILIES
    }
    made["official"] = in_official_order(made["qwen3_vl_moe"], tmp_path_factory.mktemp("official") / "hf")
    for folder in made.values():
        (Path(folder) / "generation_config.json").write_text('{"eos_token_id": 9}')
    return made


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("run") for name in CASES}


@pytest.fixture(scope="module")
def answers(folders: dict[str, str], roots: dict[str, Path]) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {}
    for ranks in sorted({layout.ranks for _, layout in CASES.values()}):
        cases = {
            name: (folders[source], layout, roots[name])
            for name, (source, layout) in CASES.items()
            if layout.ranks == ranks
        }
        every = run_distributed(run_cases, ranks, cases, timeout_seconds=600)
        found |= {name: [rank[name] for rank in every] for name in cases}
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_rank_streams_what_the_folder_holds(name: str, answers: Any, folders: dict[str, str]) -> None:
    source = folders[CASES[name][0].replace("official", "qwen3_vl_moe")]
    wanted = dict(dense_reference.by_official_name(load_file(Path(source) / "model.safetensors")))
    for found in answers[name]:
        assert found.loaded.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found.loaded[key], wanted[key])] == []


@pytest.mark.parametrize("name", CASES)
def test_a_restored_run_goes_on_to_the_bit(name: str, answers: Any) -> None:
    for found in answers[name]:
        assert found.progress == {"step": 2, "rows": 2}
        assert [key for key, tensor in found.whole.items() if not torch.equal(found.restored[key], tensor)] == []
        moved = [key for key, tensor in found.whole.items() if not torch.equal(found.loaded[key], tensor)]
        assert len(moved) > 0.95 * len(found.whole)


@pytest.mark.parametrize("name", CASES)
def test_the_export_is_like_its_source_and_answers_as_the_policy(
    name: str, answers: Any, folders: dict[str, str], roots: dict[str, Path]
) -> None:
    source, exported = Path(folders[CASES[name][0]]), roots[name] / "export"
    before, after = load_file(source / "model.safetensors"), load_file(exported / "model.safetensors")
    assert {key: tensor.shape for key, tensor in after.items()} == {key: tensor.shape for key, tensor in before.items()}
    model = dense_reference.load(str(exported))
    found = answers[name][0]
    samples = [sample for group in matrix.groups(0) for sample in group.samples]
    wanted = [dense_reference.response_logits(model, sample, "original").detach() for sample in samples]
    worst = max(float((a - b).abs().max()) for a, b in zip(found.logits, wanted, strict=True))
    scale = max(1.0, max(float(part.abs().max()) for part in wanted))
    print(f"{name:48} export against policy: {worst:.1e}, bound {2e-5 * scale:.1e}")
    assert worst <= 2e-5 * scale


@pytest.mark.parametrize("name", CASES)
def test_the_engine_samples_from_the_policys_distribution(name: str, answers: Any) -> None:
    found = answers[name][0]
    print(f"{name:48} engine against policy: {found.gap:.1e} nat over {found.num_sampled} tokens")
    assert found.num_sampled > 20
    assert found.gap <= 1e-4


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] != "qwen2_5_vl"])
def test_checkpoints_name_norms_as_transformer_engine_does(name: str, answers: Any) -> None:
    """Its layers fuse the norm before a dense layer's first matrix, and not the one before experts."""
    keys = set().union(*(found.keys for found in answers[name]))
    fused, alone = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
    wanted, other = (fused, alone) if CASES[name][0] == "qwen3_vl" else (alone, fused)
    assert any(key.endswith(wanted) for key in keys), sorted(keys)
    assert not any(key.endswith(other) for key in keys)
