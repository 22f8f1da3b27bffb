"""What a layout decides besides the model's parts: how rows are cut and padded, layers per chunk, memory."""

from __future__ import annotations

import pytest

from megatron_cppo import plan
from megatron_cppo.config import Config
from megatron_cppo.plan import Packing
from tests.unit.layout_case import NUM_EXPERTS, changed, make_configs, problems


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    return make_configs(tmp_path_factory.mktemp("models"))


# Name -> (family, layout, rows, layers of each chunk); 24 ranks, rows of at most 8,401 tokens.
PLANNED: dict[str, tuple[str, dict[str, object], Packing, tuple[int, ...]]] = {
    "nothing": ("qwen3_vl", {}, Packing(data_parallel=24, max_tokens=8401), (8,)),
    "CP": (
        "qwen2_5_vl",
        {"policy__context_parallel": 3},
        Packing(data_parallel=8, max_tokens=8400, segment_multiple=6, row_multiple=6),
        (8,),
    ),
    "CP, TP and SP: a row also into CP * TP runs": (
        "qwen3_vl_moe",
        {"policy__context_parallel": 3, "policy__tensor_parallel": 4, "policy__sequence_parallel": True},
        Packing(data_parallel=2, max_tokens=8400, segment_multiple=6, row_multiple=12),
        (8,),
    ),
    "CP and TP without SP": (
        "qwen3_vl",
        {"policy__context_parallel": 3, "policy__tensor_parallel": 4},
        Packing(data_parallel=2, max_tokens=8400, segment_multiple=6, row_multiple=6),
        (8,),
    ),
    "PP": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 2},
        Packing(data_parallel=12, max_tokens=8401),
        (4, 4),
    ),
    "PP and VPP: rows in multiples of the stages": (
        "qwen2_5_vl",
        {"policy__pipeline_parallel": 4, "policy__virtual_pipeline": 2, "policy__oversized_samples": "drop"},
        Packing(data_parallel=6, max_tokens=8401, rows_multiple=4, drop_oversized=True),
        (1,) * 8,
    ),
    "layers of the user's": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 2, "policy__virtual_pipeline": 2, "policy__layers_per_stage": (3, 1, 2, 2)},
        Packing(data_parallel=12, max_tokens=8401, rows_multiple=2),
        (3, 1, 2, 2),
    ),
    "EP: no rank is taken from DP": (
        "qwen3_vl_moe",
        {"policy__expert_parallel": 12},
        Packing(data_parallel=24, max_tokens=8401),
        (8,),
    ),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_layout_decides_rows_and_chunks(name: str, good: dict[str, Config]) -> None:
    family, fields, packing, layers = PLANNED[name]
    found = plan.resolve(changed(good[family], policy__max_tokens_per_microbatch=8401, **fields))
    assert (found.packing, found.layers_per_chunk) == (packing, layers)
    assert found.data_parallel == packing.data_parallel


def test_a_row_must_hold_the_longest_sample_padded_to_the_layout(good: dict[str, Config]) -> None:
    """Three views of 128 tokens, each padded to a multiple of 6, in rows of multiples of 12."""
    sizes = {"policy__context_parallel": 3, "policy__tensor_parallel": 4, "policy__sequence_parallel": True}
    config = changed(good["qwen3_vl"], **sizes, policy__max_tokens_per_microbatch=395)
    assert plan.longest_sample(config) == 3 * 132 == 33 * 12
    said = (
        "policy.max_tokens_per_microbatch: 395 cannot hold the longest sample, {} views x (data.max_prompt_tokens 100 "
        "+ rollout.max_response_tokens 29 - 1), in rows of multiples of 12; use at least {}"
    )
    assert problems(config) == [said.format(3, 396)]
    assert problems(changed(config, policy__max_tokens_per_microbatch=396)) == []
    # Where oversized samples are dropped, a row must hold the longest that is not gated.
    dropping = changed(config, policy__oversized_samples="drop")
    assert problems(dropping) == []
    assert problems(changed(dropping, policy__max_tokens_per_microbatch=131)) == [
        said.replace("395", "131").format(1, 132)
    ]


def test_memory_of_stages_with_dealt_out_experts_against_a_count_by_hand(good: dict[str, Config]) -> None:
    """Stage 0 holds chunks 0 and 2, the tower and the embedding; a rank has a third of the experts, each whole."""
    sizes = {"policy__tensor_parallel": 2, "policy__sequence_parallel": True, "policy__expert_parallel": 3}
    cut = {"policy__pipeline_parallel": 2, "policy__virtual_pipeline": 2, "policy__layers_per_stage": (3, 1, 2, 2)}
    found = plan.resolve(changed(good["qwen3_vl_moe"], **sizes, **cut, policy__context_parallel=2))
    heads = 96 * (12 + 2 * 4) * 8 + 12 * 8 * 96 + 2 * 8  # queries, keys, values; output; two norms of a head
    layer, experts = heads + 2 * 96 + 96 * NUM_EXPERTS, NUM_EXPERTS * 3 * 96 * 20
    tower = found.shape.vision.num_parameters
    assert found.num_parameters == 2 * 131 * 96 + 8 * (layer + experts) + 96 + tower
    shared, dealt = (131 * 96 + 5 * layer) / 2 + tower, 5 * experts / 3
    gib, data_and_context = 2**30, 3 * 2
    assert found.data_parallel == 3
    assert found.memory.weights_gib == pytest.approx(2 * (shared + dealt) / gib)
    assert found.memory.gradients_gib == pytest.approx(4 * (shared + dealt) / gib)
    copies = 12 // 3  # of each expert, among the 12 ranks of a stage
    assert found.memory.optimizer_gib == pytest.approx(12 * (shared / data_and_context + dealt / copies) / gib)
    whole = plan.resolve(changed(good["qwen3_vl_moe"], **sizes, policy__distributed_optimizer=False)).memory
    held = (2 * 131 * 96 + 8 * layer + 96) / 2 + tower + 8 * experts / 3
    assert whole.optimizer_gib == pytest.approx(12 * held / gib)


def test_without_expert_parallelism_tensor_parallelism_cuts_each_expert(good: dict[str, Config]) -> None:
    config = changed(good["qwen3_vl_moe"], policy__tensor_parallel=4, policy__sequence_parallel=True)
    shape, memory = plan.resolve(config).shape, plan.resolve(config).memory
    held = (shape.num_parameters - shape.vision.num_parameters) / 4 + shape.vision.num_parameters
    assert memory.weights_gib == pytest.approx(2 * held / 2**30)
