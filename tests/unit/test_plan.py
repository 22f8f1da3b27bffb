"""The plan: every problem at once with its cure, every derived number against a count by hand or by transformers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cppo import architecture, families, plan
from megatron_cppo.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from tests.published_models import CONFIGS, PUBLISHED
from tests.unit.layout_case import changed

VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 96,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TEXT = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}
IDS = {"model_type": "qwen2_5_vl", "image_token_id": 5, "video_token_id": 8}
ROPE = {"rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
NEW_STYLE: dict[str, Any] = {
    **IDS,
    "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", **ROPE}},
    "vision_config": VISION,
    "tie_word_embeddings": False,
}
OLD_STYLE: dict[str, Any] = {
    **IDS,
    **TEXT,
    "rope_theta": ROPE["rope_theta"],
    "rope_scaling": {"type": "mrope", "mrope_section": ROPE["mrope_section"]},
    "vision_config": VISION,
    "tie_word_embeddings": False,
}
NESTED_OLD_STYLE: dict[str, Any] = {
    **IDS,
    "text_config": {key: OLD_STYLE[key] for key in (*TEXT, "rope_theta", "rope_scaling")},
    "vision_config": VISION,
    "tie_word_embeddings": False,
}
STYLES = {"5.x": NEW_STYLE, "4.x": OLD_STYLE, "4.x nested": NESTED_OLD_STYLE}


def write(folder: Path, config: dict[str, Any] | str) -> str:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


@pytest.fixture
def good(tmp_path: Path) -> Config:
    """A config without problems, of a model of a few thousand parameters on two replicas of TP 2."""
    rows = tmp_path / "rows.parquet"
    rows.write_bytes(b"PAR1 as every parquet file begins and ends PAR1")
    return Config(
        model=ModelConfig(path=write(tmp_path, NEW_STYLE)),
        data=DataConfig(train=(str(rows),), max_prompt_tokens=100),
        rollout=RolloutConfig(max_response_tokens=29, samples_per_prompt=5),
        policy=PolicyConfig(tensor_parallel=2, sequence_parallel=True, max_tokens_per_microbatch=384),
        trainer=TrainerConfig(num_gpus=4, prompts_per_step=12, updates_per_step=3, num_steps=7),
    )


def problems(config: Config) -> list[str]:
    """The problems of `config`, without their numbers, which must count from one."""
    with pytest.raises(ConfigError) as caught:
        plan.resolve(config)
    lines = str(caught.value).splitlines()
    assert [line.split(".")[0] for line in lines] == [f"  {number}" for number in range(1, len(lines) + 1)]
    return [line.split(". ", 1)[1] for line in lines]


# One wrong choice each: what is said must name it, say what was given, and how to mend it.
SINGLE_PROBLEMS: dict[str, tuple[dict[str, object], str]] = {
    "TP divides nothing": (
        {"policy__tensor_parallel": 7, "trainer__num_gpus": 7, "policy__max_tokens_per_microbatch": 385},
        "policy.tensor_parallel: 7 does not divide the model's 12 attention heads, 4 key/value heads, "
        "60 feed-forward channels; use 4, and another trainer.num_gpus",
    ),
    "TP divides heads only": (
        {"policy__tensor_parallel": 6, "trainer__num_gpus": 6},
        "policy.tensor_parallel: 6 does not divide the model's 4 key/value heads; use 2",
    ),
    "TP below one": ({"policy__tensor_parallel": 0}, "policy.tensor_parallel: 0 is outside [1, inf]; use 1"),
    "no ranks": ({"trainer__num_gpus": 0}, "trainer.num_gpus: 0 is outside [1, inf]; use 1"),
    "ranks that do not fit": (
        {"trainer__num_gpus": 7},
        "trainer.num_gpus: 7 ranks cannot be cut into replicas of 2 (TP 2 x PP 1); use 8",
    ),
    "ranks that do not fit, down": (
        {"trainer__num_gpus": 9, "policy__tensor_parallel": 4},
        "trainer.num_gpus: 9 ranks cannot be cut into replicas of 4 (TP 4 x PP 1); use 8",
    ),
    "fewer ranks than a replica": (
        {"trainer__num_gpus": 1},
        "trainer.num_gpus: 1 ranks cannot be cut into replicas of 2 (TP 2 x PP 1); use 2",
    ),
    "SP without TP": (
        {"policy__tensor_parallel": 1},
        "policy.sequence_parallel: splits over TP ranks, but tensor_parallel is 1; turn it off",
    ),
    "more stages than layers": (
        {"policy__pipeline_parallel": 4, "trainer__num_gpus": 8},
        "policy.pipeline_parallel: 4 stages, but the model has 2 layers; use fewer",
    ),
    "layers of too few stages": (
        {"policy__pipeline_parallel": 2, "policy__layers_per_stage": (2,)},
        "policy.layers_per_stage: 2 are 1 stages with 2 layers; pipeline_parallel is 2, the model has 2 layers, and "
        "each stage needs one; use 1 1",
    ),
    "layers of another model": (
        {"policy__layers_per_stage": (3,)},
        "policy.layers_per_stage: 3 are 1 stages with 3 layers; pipeline_parallel is 1, the model has 2 layers, and "
        "each stage needs one; use 2",
    ),
    "a stage without layers": (
        {"policy__pipeline_parallel": 2, "policy__layers_per_stage": (0, 2)},
        "policy.layers_per_stage: 0 2 are 2 stages with 2 layers; pipeline_parallel is 2, the model has 2 layers, and "
        "each stage needs one; use 1 1",
    ),
    "no stage": ({"policy__pipeline_parallel": 0}, "policy.pipeline_parallel: 0 is outside [1, inf]; use 1"),
    "Triton's kernels on cpu": (
        {"policy__device": "cpu", "policy__precision": "fp32", "policy__head_backend": "triton"},
        "policy.head_backend: triton compiles for a GPU, but policy.device is cpu; use fused or torch",
    ),
    "bf16 on cpu": (
        {"policy__device": "cpu"},
        "policy.precision: the cpu platform computes in fp32; use --policy.precision fp32",
    ),
    "capacity": (
        {"policy__max_tokens_per_microbatch": 383},
        "policy.max_tokens_per_microbatch: 383 cannot hold the longest sample, 3 views x (data.max_prompt_tokens 100 + "
        "rollout.max_response_tokens 29 - 1), in rows of multiples of 2; use at least 384",
    ),
    "updates": (
        {"trainer__updates_per_step": 5},
        "trainer.updates_per_step: 5 does not divide prompts_per_step 12; use 4",
    ),
    "no prompts": ({"trainer__prompts_per_step": 0}, "trainer.prompts_per_step: 0 is outside [1, inf]; use 1"),
    "rollouts of the future": (
        {"rollout__max_staleness": -1},
        "rollout.max_staleness: -1 is outside [0, inf]; use 0",
    ),
    "a lead without rollouts": (
        {"rollout__max_staleness": 1, "algorithm__objective": "supervised"},
        "rollout.max_staleness: with algorithm.objective supervised no rollout can run ahead of an update; use 0",
    ),
    "a lead over saved rollouts": (
        {"rollout__max_staleness": 1, "debug__train_on": "/"},
        "rollout.max_staleness: with debug.train_on no rollout can run ahead of an update; use 0",
    ),
    "a lead over nothing": (
        {"rollout__max_staleness": 2, "debug__rollout_only": True},
        "rollout.max_staleness: with debug.rollout_only no rollout can run ahead of an update; use 0",
    ),
    "checks of saved rollouts": (
        {"rollout__check_every_steps": 1, "debug__train_on": "/"},
        "rollout.check_every_steps: saved rollouts are of another run's weights; use 0",
    ),
    "warm-up": (
        {"optimizer__warmup_updates": 21},
        "optimizer.warmup_updates: 21 leaves no update after the warm-up (the run has 21); use fewer",
    ),
    "top fraction": (
        {"perception__top_fraction": 1.5},
        "perception.top_fraction: 1.5 is outside [1e-06, 1]; use 1",
    ),
    "clip": ({"algorithm__clip_low": -0.1}, "algorithm.clip_low: -0.1 is outside [0, 1]; use 0"),
    "dual clip": (
        {"algorithm__dual_clip": 0.5},
        "algorithm.dual_clip: 0.5 must exceed 1, or be 0 to turn it off; 3.0 is usual",
    ),
    "bound that leaves no weight above one": (
        {"algorithm__correction_bound": 1.0},
        "algorithm.correction_bound: 1.0 must exceed 1; 2.0 is usual",
    ),
    "bound of nothing": (
        {"algorithm__correction_bound": float("nan")},
        "algorithm.correction_bound: nan is not a finite number; give one",
    ),
    "correction without an engine": (
        {"algorithm__objective": "supervised", "algorithm__correction": "sequence_mask"},
        "algorithm.correction: sequence_mask, but supervised has no engine; use none",
    ),
    "unknown correction": (
        {"algorithm__correction": "truncate"},
        "algorithm.correction: must be one of 'auto', 'none', 'token_truncate', 'token_mask', 'sequence_truncate', "
        "'sequence_mask', got 'truncate'",
    ),
    "pixels": (
        {"model__min_pixels": 4000, "model__max_pixels": 3136},
        "model.min_pixels: 4000 exceeds model.max_pixels 3136; lower it",
    ),
    "no views": (
        {"perception__removing": ()},
        "perception.preserving and perception.removing need at least one perturbation each",
    ),
    "no rows": ({"data__train": ()}, "data.train: no parquet file given; use --data.train FILE [FILE ...]"),
    "missing rows": (
        {"data__train": ("/no/rows.parquet",)},
        "data.train: /no/rows.parquet does not exist; check the path",
    ),
    "missing evaluation": (
        {"data__evaluation": ("/no/e.parquet",)},
        "data.evaluation: /no/e.parquet does not exist; check the path",
    ),
    "no checkpoint": (
        {"model__path": "/no/model"},
        "model.path: '/no/model' holds no config.json; give a Hugging Face checkpoint folder",
    ),
}


@pytest.mark.parametrize("name", SINGLE_PROBLEMS)
def test_a_wrong_choice_is_one_problem_with_its_cure(name: str, good: Config) -> None:
    fields, said = SINGLE_PROBLEMS[name]
    assert problems(changed(good, **fields)) == [said]


def test_values_of_a_python_recipe_must_be_of_their_fields_types(good: Config) -> None:
    """The command line's parser does not look at defaults, and a dataclass takes anything."""
    wrong: dict[str, object] = {
        "trainer__num_steps": "10",
        "trainer__prompts_per_step": 2.5,
        "trainer__num_gpus": True,
        "trainer__export": 1,
        "trainer__on_save_failure": "ignore",
        "optimizer__learning_rate": None,
        "data__train": "rows.parquet",
        "policy__layers_per_stage": (1, "2"),
    }
    assert problems(changed(good, **wrong)) == [
        "data.train: must be a tuple, each item a text, got 'rows.parquet'",
        "policy.layers_per_stage: must be a tuple, each item a whole number, got (1, '2')",
        "optimizer.learning_rate: must be a number, got None",
        "trainer.num_gpus: must be a whole number, got True",
        "trainer.num_steps: must be a whole number, got '10'",
        "trainer.prompts_per_step: must be a whole number, got 2.5",
        "trainer.on_save_failure: must be one of 'stop', 'continue', got 'ignore'",
        "trainer.export: must be True or False, got 1",
    ]
    section: Any = None
    assert problems(dataclasses.replace(good, data=section)) == ["data: must be a DataConfig, got None"]
    assert plan.resolve(changed(good, optimizer__learning_rate=1)).num_ranks == 4


def test_all_problems_come_at_once(good: Config) -> None:
    fields: dict[str, object] = {}
    for name in ("TP divides nothing", "capacity", "warm-up", "pixels", "missing rows", "dual clip", "top fraction"):
        fields |= SINGLE_PROBLEMS[name][0]
    found = problems(changed(good, **(fields | {"trainer__num_gpus": 8})))
    assert len(found) == 8
    for word in ("divide", "ranks", "hold", "warmup", "pixels", "exist", "dual_clip", "top_fraction"):
        assert sum(word in text.split(";")[0] for text in found) == 1, (word, found)


def test_without_a_checkpoint_the_other_problems_still_come(good: Config) -> None:
    assert len(problems(changed(good, model__path="", data__train=(), trainer__num_gpus=7))) == 3


@pytest.mark.parametrize("wanted", range(1, 9))
def test_the_tensor_parallel_size_that_is_proposed_works(wanted: int, tmp_path: Path, good: Config) -> None:
    """28 heads and 4 key/value heads: 7 would suit the heads alone."""
    path = write(tmp_path, CONFIGS["Qwen2.5-VL-7B-Instruct"])
    config = changed(good, model__path=path, policy__max_tokens_per_microbatch=840)  # a row for any of the sizes
    config = changed(config, policy__tensor_parallel=wanted, trainer__num_gpus=wanted)
    if wanted in (2, 4):
        assert plan.resolve(config).data_parallel == 1
        return
    (said,) = problems(config)
    if wanted == 1:
        assert said == SINGLE_PROBLEMS["SP without TP"][1]
        return
    use = int(said.rsplit("use ", 1)[1].removesuffix(", and another trainer.num_gpus"))
    assert plan.resolve(changed(config, policy__tensor_parallel=use, trainer__num_gpus=use)).num_ranks == use


BROKEN_CHECKPOINTS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "cut off": ('{"model_type": "qwen2', "config.json is not JSON .*; copy the checkpoint again"),
    "not text": ("[1, 2]", "config.json is not a JSON object; copy the checkpoint again"),
    "other family": (
        {"model_type": "llama"},
        "model_type 'llama' is not one of qwen2_5_vl, qwen3_vl, qwen3_vl_moe; use a checkpoint of such a family",
    ),
    "no family": ({}, "model_type None is not one of"),
    "missing field": (
        {key: value for key, value in OLD_STYLE.items() if key != "num_hidden_layers"},
        "config.json has no field 'num_hidden_layers'; copy the checkpoint again",
    ),
    "no vision": (
        {key: value for key, value in OLD_STYLE.items() if key != "vision_config"},
        "has no field 'vision_config'",
    ),
    "no rope": (
        {key: value for key, value in OLD_STYLE.items() if not key.startswith("rope")},
        "has no field 'rope_theta'",
    ),
}


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_a_config_error(name: str, tmp_path: Path) -> None:
    content, said = BROKEN_CHECKPOINTS[name]
    with pytest.raises(ConfigError, match=f"^model.path: .*{said}"):
        families.read_shape(write(tmp_path, content))


@pytest.mark.parametrize("style", STYLES)
def test_both_generations_of_config_files_say_the_same(style: str, tmp_path: Path) -> None:
    shape = families.read_shape(write(tmp_path, STYLES[style]))
    assert (shape.num_layers, shape.hidden_size, shape.ffn_size, shape.vocab_size) == (2, 96, 60, 131)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size) == (12, 4, 8)
    assert (shape.rope_theta, shape.mrope_section, shape.norm_epsilon) == (10_000.0, (1, 1, 2), 1e-6)
    assert (shape.family, shape.image_token_id, shape.tied) == ("qwen2_5_vl", 5, False)
    assert shape.vision == architecture.VisionShape(
        depth=2,
        hidden_size=24,
        ffn_size=48,
        num_heads=2,
        out_size=96,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        num_parameters=tower_parameters(),
    )


def tower_parameters() -> int:
    """The tiny tower's tensors, one by one."""
    block = (24 * 72 + 72) + (24 * 24 + 24) + 2 * (24 * 48 + 48) + (48 * 24 + 24) + 2 * 24
    merger = 24 + (96 * 96 + 96) + (96 * 96 + 96)
    return 3 * 2 * 14 * 14 * 24 + 2 * block + merger


def test_derived_numbers(good: Config) -> None:
    found = plan.resolve(good)
    assert (found.num_ranks, found.data_parallel) == (4, 2)
    assert found.padded_vocab_size == 132  # 131 over 2
    assert (found.samples_per_step, found.prompts_per_update, found.num_updates) == (60, 4, 21)
    assert found.packing == plan.Packing(data_parallel=2, max_tokens=384, row_multiple=2)
    assert (found.longest_sample_tokens, found.views_in_one_row) == (3 * (100 + 29 - 1), 3)
    assert found.uses_reference
    assert found.scores_old_logp
    # Without sequence parallelism no row is padded, and one update a step is on-policy.
    plain = plan.resolve(changed(good, policy__sequence_parallel=False, trainer__updates_per_step=1))
    assert (plain.packing.row_multiple, plain.scores_old_logp, plain.prompts_per_update) == (1, False, 12)
    # Nor is one on rollouts of older weights.
    assert plan.resolve(changed(good, trainer__updates_per_step=1, rollout__max_staleness=1)).scores_old_logp
    assert not plan.resolve(changed(good, algorithm__beta=0.0)).uses_reference
    grpo = plan.resolve(changed(good, algorithm__objective="grpo"))
    assert (grpo.longest_sample_tokens, grpo.views_in_one_row, grpo.uses_reference) == (128, 1, True)
    supervised = plan.resolve(changed(good, algorithm__objective="supervised"))
    assert (supervised.samples_per_step, supervised.longest_sample_tokens) == (12, 128)
    assert (supervised.uses_reference, supervised.scores_old_logp) == (False, False)


@pytest.mark.parametrize("objective", ["cppo", "grpo", "supervised"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_corrected_where_engine_and_policy_may_differ(precision: str, objective: str, good: Config) -> None:
    config = changed(good, policy__precision=precision, algorithm__objective=objective)
    automatic = "token_truncate" if precision == "bf16" and objective != "supervised" else "none"
    assert plan.resolve(config).correction == automatic
    assert plan.resolve(changed(config, algorithm__correction="none")).correction == "none"
    if objective != "supervised":
        for kind in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
            assert plan.resolve(changed(config, algorithm__correction=kind)).correction == kind


def test_memory_against_a_count_by_hand(good: Config) -> None:
    """The tiny model's tensors, one by one: weights in bf16, gradients, main weights and two moments in fp32."""
    qkv, attention_out = 96 * (12 + 2 * 4) * 8 + (12 + 2 * 4) * 8, 12 * 8 * 96
    layer = qkv + attention_out + 3 * 96 * 60 + 2 * 96
    language = 2 * 131 * 96 + 2 * layer + 96
    tower = tower_parameters()
    found = plan.resolve(good)
    assert found.num_parameters == language + tower
    local = language / 2 + tower  # TP 2; every rank holds the tower
    gib = 2**30
    assert dataclasses.asdict(found.memory) == {
        "weights_gib": pytest.approx(2 * local / gib),
        "fp8_copies_gib": 0.0,
        "gradients_gib": pytest.approx(4 * local / gib),
        "optimizer_gib": pytest.approx(12 * local / 2 / gib),  # over DP 2
        "reference_device_gib": pytest.approx(2 * local / gib),
        "reference_host_gib": 0.0,
    }
    frozen = {"policy__distributed_optimizer": False, "model__train_vision": False, "policy__reference": "host"}
    fp32 = plan.resolve(changed(good, **frozen, policy__precision="fp32")).memory
    assert dataclasses.asdict(fp32) == {
        "weights_gib": pytest.approx(4 * local / gib),
        "fp8_copies_gib": 0.0,
        "gradients_gib": pytest.approx(4 * language / 2 / gib),
        "optimizer_gib": pytest.approx(8 * language / 2 / gib),  # the weights are the main weights
        "reference_device_gib": 0.0,
        "reference_host_gib": pytest.approx(4 * local / gib),
    }
    without = plan.resolve(changed(good, algorithm__beta=0.0)).memory
    assert (without.reference_device_gib, without.reference_host_gib) == (0.0, 0.0)


def test_layers_and_memory_of_stages(tmp_path: Path, good: Config) -> None:
    """By hand: the first stage has the tower and the embedding, the last the norm and the head, tied or not."""
    for tied in (False, True):
        folder = tmp_path / str(tied)
        folder.mkdir()
        text = {**NEW_STYLE["text_config"], "num_hidden_layers": 5}
        path = write(folder, {**NEW_STYLE, "text_config": text, "tie_word_embeddings": tied})
        cut = {"policy__pipeline_parallel": 2, "model__path": path, "policy__layers_per_stage": (1, 4)}
        assert problems(changed(good, **cut | {"policy__layers_per_stage": ()})) == [
            "policy.pipeline_parallel: 2 does not divide the model's 5 layers; use 1, or cut them yourself: "
            "--policy.layers_per_stage 3 2"
        ]
        found = plan.resolve(changed(good, **cut))
        shape = found.shape
        vocabulary, tower = 131 * 96, shape.vision.num_parameters
        first = (vocabulary + shape.layer_parameters) / 2 + tower
        last = (vocabulary + 96 + 4 * shape.layer_parameters) / 2
        assert found.layers_per_chunk == (1, 4)
        assert found.data_parallel == 1
        assert found.memory.weights_gib == pytest.approx(2 * max(first, last) / 2**30)
        assert found.memory.gradients_gib == pytest.approx(4 * max(first, last) / 2**30)
        frozen = plan.resolve(changed(good, **cut, model__train_vision=False)).memory
        assert frozen.gradients_gib == pytest.approx(4 * max(first - tower, last) / 2**30)
    even = plan.resolve(changed(good, policy__pipeline_parallel=2))
    assert even.layers_per_chunk == (1, 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({}, "on the device"), ({"policy__reference": "host"}, "in host memory"), ({"algorithm__beta": 0.0}, "none")],
)
def test_the_description_names_every_number(fields: dict[str, object], said: str, good: Config) -> None:
    found = plan.resolve(changed(good, **fields))
    text = plan.describe(found)
    names = [line.split()[0] for line in text.splitlines()]
    records = (plan.Plan, plan.Packing, plan.Memory)
    numbers = {name for record in records for name in record.__slots__} - {"shape", "packing", "memory"}
    assert numbers <= set(names)
    assert f"reference {said}" in " ".join(text.split())


def _with_text(**text: object) -> dict[str, Any]:
    """A config.json of transformers 4.5x that says `text` under text_config, and nothing of tying outside it."""
    config = copy.deepcopy(NESTED_OLD_STYLE)
    del config["tie_word_embeddings"]
    config["text_config"] |= text
    return config


CHECKPOINTS: dict[str, dict[str, Any]] = {
    **STYLES,
    "5.x tied": {**NEW_STYLE, "tie_word_embeddings": True},
    "4.x tied": {**OLD_STYLE, "tie_word_embeddings": True},
    "4.x nested, tied inside": _with_text(tie_word_embeddings=True),
    "4.x nested, tied nowhere": _with_text(),
    **{name: CONFIGS[name] for name in ("Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct")},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_those_of_the_transformers_model(name: str, tmp_path: Path) -> None:
    """The real model, built without memory from the same config.json, and from the one that transformers writes."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    shape = families.read_shape(write(tmp_path, CHECKPOINTS[name]))
    config: Any = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.vision.num_parameters == sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert shape.tied == config.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert shape.num_parameters == PUBLISHED.get(name, shape.num_parameters)
    config.save_pretrained(tmp_path)
    assert families.read_shape(str(tmp_path)) == shape
