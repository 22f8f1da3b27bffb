"""A converted checkpoint in Megatron-Core's own hands: its loader fills our model's shards, in every layout, with what
a load of the Hugging Face folder gives, bit for bit; and its readers of single parts read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cppo.convert.conversion import Options
from megatron_cppo.convert.to_megatron import to_megatron
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import VOCAB

VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "qwen2_5_vl tied": {"tied": True},
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
}
LAYERS = 3
TP2 = {"policy__tensor_parallel": 2, "policy__sequence_parallel": True}
UNEVEN = {"policy__pipeline_parallel": 2, "policy__layers_per_stage": (2, 1)}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, TP2),
    "PP2": (2, UNEVEN),
    "EP2": (2, {"policy__expert_parallel": 2}),
    "TP2xPP2": (4, {**TP2, **UNEVEN}),
    "EP2xPP2": (4, {"policy__expert_parallel": 2, **UNEVEN}),
}
CASES = [(variant, layout) for variant in VARIANTS for layout in LAYOUTS if ("EP" not in layout or "moe" in variant)]


@dataclass(frozen=True)
class Answer:
    """What a rank found: names that the loader filled, those that then differed from the direct load."""

    filled: list[str]
    differing: list[str]


def run_cases(rank: int, world_size: int, cases: dict[Any, tuple[str, str, dict[str, Any]]]) -> dict[Any, Answer]:
    """All cases of one world size; top-level, for `run_distributed`."""
    return {name: run_case(world_size, *case) for name, case in cases.items()}


def run_case(world_size: int, model: str, converted: str, fields: dict[str, Any]) -> Answer:
    """Load the weights twice: from the Hugging Face folder, by the policy, then by Megatron-Core over noise."""
    from megatron.core import dist_checkpointing

    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(model, world_size, **fields)
    policy = Policy(config, tiny_model.make_plan(config), pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    (chunk,) = policy.trained.chunks
    wanted = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_()
    state = {k: v for k, v in chunk.sharded_state_dict().items() if not k.endswith("_extra_state")}
    loaded = dist_checkpointing.load(state, converted)
    chunk.load_state_dict(loaded, strict=False)
    found = dict(chunk.named_parameters())
    differing = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    process_groups.destroy()
    return Answer(sorted(loaded), differing)


@dataclass(frozen=True)
class Runs:
    """The ranks' answers of each case; where each variant is."""

    answers: dict[tuple[str, str], list[Answer]]
    sources: dict[str, Path]
    converted: dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("converted")
    sources, converted = {}, {}
    for number, (variant, fields) in enumerate(VARIANTS.items()):
        sources[variant], converted[variant] = root / f"hf{number}", root / f"megatron{number}"
        family = variant.split()[0]
        tiny_model.make_checkpoint(sources[variant], family=family, vocab_size=VOCAB, num_layers=LAYERS, **fields)
        to_megatron(sources[variant], converted[variant], Options(workers=0))
    answers: dict[tuple[str, str], list[Answer]] = {}
    for world in sorted({world for world, _ in LAYOUTS.values()}):
        cases = {
            case: (str(sources[case[0]]), str(converted[case[0]]), LAYOUTS[case[1]][1])
            for case in CASES
            if LAYOUTS[case[1]][0] == world
        }
        ranks = run_distributed(run_cases, world, cases, timeout_seconds=300)
        answers |= {case: [rank[case] for rank in ranks] for case in cases}
    return Runs(answers, sources, converted)


@pytest.mark.parametrize(("variant", "layout"), CASES, ids=[" ".join(case) for case in CASES])
def test_megatrons_loader_gives_what_the_direct_load_gives(variant: str, layout: str, runs: Runs) -> None:
    ranks = runs.answers[variant, layout]
    assert len(ranks) == LAYOUTS[layout][0]
    for answer in ranks:
        assert answer.differing == []
        assert any("linear_fc1" in name for name in answer.filled)
    everywhere = {name for answer in ranks for name in answer.filled}
    assert any(name.startswith("visual.") for name in everywhere)
    assert "language_model.embedding.word_embeddings.weight" in everywhere


def read_parts(rank: int, world_size: int, folder: str) -> tuple[Any, Any, Any]:
    """What Megatron-Core reads without a model."""
    from megatron.core import dist_checkpointing

    plain = dist_checkpointing.load_plain_tensors(folder)
    told = dist_checkpointing.load_tensors_metadata(folder)
    shapes = {key: (tuple(tensor.global_shape), tensor.dtype) for key, tensor in told.items()}
    return plain, shapes, dist_checkpointing.load_common_state_dict(folder)


def test_megatron_reads_tensors_and_common_state_without_a_model(runs: Runs) -> None:
    variant = "qwen2_5_vl"
    ((plain, shapes, common),) = run_distributed(read_parts, 1, str(runs.converted[variant]))
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    source = load_file(runs.sources[variant] / "model.safetensors")
    assert plain.keys() - shapes.keys() == {"iteration", "checkpoint_version"}
    assert {key: (tuple(plain[key].shape), plain[key].dtype) for key in shapes} == shapes
    layers = "language_model.decoder.layers."
    for layer in range(LAYERS):
        hf = f"model.layers.{layer}."
        parts = [source[f"{hf}mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
        assert torch.equal(plain[layers + "mlp.linear_fc1.weight"][layer], torch.cat(parts))
        for key in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
            assert torch.equal(plain[layers + key][layer], source[hf + "input_layernorm.weight"])
    assert torch.equal(plain["language_model.output_layer.weight"], source["lm_head.weight"])
    assert torch.equal(plain["visual.patch_embed.proj.weight"], source["visual.patch_embed.proj.weight"])
