"""The model families: shapes from config.json, parameter totals, and which position each rotary frequency follows."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRotaryEmbedding

from megatron_cppo import families
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ConfigError
from megatron_cppo.families import FAMILIES, part, read_shape
from tests.published_models import CONFIGS, PUBLISHED

ROUNDED_72B = 73.4e9
FAMILY_OF_CLASS = {
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
}


def shape_of(config: dict[str, Any], folder: Path) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config))
    return read_shape(str(folder))


def edited(name: str, **changes: object) -> dict[str, Any]:
    """The config of a published model with fields changed, or left out where they are `...`; __ goes a level down."""
    config = copy.deepcopy(CONFIGS[name])
    for path, value in changes.items():
        *sections, field = path.split("__")
        section = config
        for each in sections:
            section = section[each]
        if value is ...:
            del section[field]
        else:
            section[field] = value
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_have_their_published_parameters(name: str, tmp_path: Path) -> None:
    shape = shape_of(CONFIGS[name], tmp_path)
    assert shape.family == FAMILY_OF_CLASS[CONFIGS[name]["architectures"][0]]
    published = PUBLISHED[name]
    if published is None:  # of 72B only a rounded number is public
        assert name == "Qwen2.5-VL-72B-Instruct"
        assert shape.num_parameters == 73_410_777_344
        assert round(shape.num_parameters, -8) == ROUNDED_72B
        return
    assert shape.num_parameters == published


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_transformers_model(name: str, tmp_path: Path) -> None:
    """The real module, built without memory from the same config.json, and from the one that transformers 5 writes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    shape = shape_of(CONFIGS[name], tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert shape.num_parameters == sum(counts.values())
    assert shape.vision.num_parameters == sum(count for name, count in counts.items() if "visual." in name)
    layer = [count for name, count in counts.items() if ".language_model.layers.1." in name]
    assert shape.layer_parameters == sum(layer)
    assert shape.tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    config.save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)) == shape


@pytest.mark.parametrize("inside", [True, False, ...])
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("name", ["Qwen3-VL-2B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_qwen3s_embeddings_are_tied_where_transformers_ties_them(
    name: str, outside: bool, inside: object, tmp_path: Path
) -> None:
    """`inside` text_config, transformers 5 writes a class's default, whether or not the model is tied."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    small = {"vision_config__depth": 3, "vision_config__deepstack_visual_indexes": [0, 1, 2]}
    config = edited(name, **small, text_config__num_hidden_layers=3)
    for section, tied in ((config, outside), (config["text_config"], inside)):
        section.pop("tie_word_embeddings", None)
        section |= {} if tied is ... else {"tie_word_embeddings": tied}
    shape = shape_of(config, tmp_path)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.tied == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_a_published_model_with_experts_is_read_field_by_field(tmp_path: Path) -> None:
    shape = shape_of(CONFIGS["Qwen3-VL-235B-A22B-Instruct"], tmp_path)
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.vocab_size) == ("qwen3_vl_moe", 94, 4096, 151936)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size) == (64, 4, 128)
    assert (shape.num_experts, shape.experts_per_token, shape.ffn_size) == (128, 8, 1536)
    assert (shape.rope_theta, shape.mrope_section, shape.norm_epsilon) == (5_000_000.0, (24, 20, 20), 1e-6)
    assert (shape.qkv_bias, shape.qk_norm, shape.tied, shape.image_token_id) == (False, True, False, 151655)
    vision = shape.vision
    assert (vision.depth, vision.hidden_size, vision.ffn_size, vision.num_heads) == (27, 1152, 4304, 16)
    assert (vision.out_size, vision.patch_size, vision.temporal_patch_size, vision.merge_size) == (4096, 16, 2, 2)
    assert vision.deepstack_depths == (8, 16, 24)


def test_a_head_may_have_another_size_than_the_hidden_size_over_the_heads(tmp_path: Path) -> None:
    """2,560 over 32 heads would be 80."""
    assert shape_of(CONFIGS["Qwen3-VL-4B-Instruct"], tmp_path).head_size == 128
    assert shape_of(CONFIGS["Qwen2.5-VL-7B-Instruct"], tmp_path).head_size == 3584 // 28
    said = r"mrope_section \[24, 20, 20\] must add up to half the head's size of 80"
    with pytest.raises(ConfigError, match=said):
        shape_of(edited("Qwen3-VL-4B-Instruct", text_config__head_dim=...), tmp_path)


def test_families_differ_in_bias_norms_experts_and_deepstack(tmp_path: Path) -> None:
    found = {
        shape.family: (shape.qkv_bias, shape.qk_norm, shape.num_experts > 0, len(shape.vision.deepstack_depths))
        for shape in (shape_of(config, tmp_path) for config in CONFIGS.values())
    }
    assert found == {
        "qwen2_5_vl": (True, False, False, 0),
        "qwen3_vl": (False, True, False, 3),
        "qwen3_vl_moe": (False, True, True, 3),
    }
    assert found.keys() == set(FAMILIES)


def test_what_the_files_of_qwen2_5_leave_out_is_what_transformers_takes(tmp_path: Path) -> None:
    from transformers import AutoConfig

    vision = shape_of(CONFIGS["Qwen2.5-VL-72B-Instruct"], tmp_path).vision
    theirs: Any = AutoConfig.from_pretrained(tmp_path).vision_config
    assert "depth" not in CONFIGS["Qwen2.5-VL-72B-Instruct"]["vision_config"]
    assert (vision.depth, vision.num_heads, vision.patch_size) == (theirs.depth, theirs.num_heads, theirs.patch_size)
    assert (vision.temporal_patch_size, vision.merge_size) == (theirs.temporal_patch_size, theirs.spatial_merge_size)
    assert vision == shape_of(edited("Qwen2.5-VL-72B-Instruct", vision_config__depth=32), tmp_path).vision
    assert shape_of(edited("Qwen2.5-VL-7B-Instruct", vision_config__depth=31), tmp_path).vision.depth == 31


def test_experts_are_counted_under_either_generations_name(tmp_path: Path) -> None:
    name = "Qwen3-VL-30B-A3B-Instruct"
    older = edited(name, text_config__num_experts=..., text_config__num_local_experts=128)
    assert shape_of(older, tmp_path) == shape_of(CONFIGS[name], tmp_path)
    with pytest.raises(ConfigError, match="has no field 'num_experts'; copy the checkpoint again"):
        shape_of(edited(name, text_config__num_experts=...), tmp_path)


# What a config may not ask for -> (model, changes, what is said after the file's name).
UNKNOWN: dict[str, tuple[str, dict[str, object], str]] = {
    "quantised": (
        "Qwen3-VL-8B-Instruct",
        {"quantization_config": {"bits": 4}},
        "the weights are quantised ({'bits': 4}); use the checkpoint in bf16 or fp32",
    ),
    "scaled rope": (
        "Qwen3-VL-2B-Instruct",
        {"text_config__rope_scaling__rope_type": "yarn"},
        "rotary positions are scaled (rope_type 'yarn'), only 'default' is supported; remove it",
    ),
    "activation of the text": (
        "Qwen2.5-VL-3B-Instruct",
        {"hidden_act": "gelu"},
        "hidden_act of the text model is 'gelu', only 'silu' is supported; use another checkpoint",
    ),
    "Qwen3's activation in Qwen2.5's tower": (
        "Qwen2.5-VL-3B-Instruct",
        {"vision_config__hidden_act": "gelu_pytorch_tanh"},
        "hidden_act of the vision model is 'gelu_pytorch_tanh', only 'silu' is supported; use another checkpoint",
    ),
    "Qwen2.5's activation in Qwen3's tower": (
        "Qwen3-VL-2B-Instruct",
        {"vision_config__hidden_act": "silu"},
        "hidden_act of the vision model is 'silu', only 'gelu_pytorch_tanh' is supported; use another checkpoint",
    ),
    "biased attention": (
        "Qwen3-VL-8B-Instruct",
        {"text_config__attention_bias": True},
        "attention_bias is true, only false is supported; use another checkpoint",
    ),
    "chunked m-rope": (
        "Qwen3-VL-8B-Instruct",
        {"text_config__rope_scaling__mrope_interleaved": False},
        "mrope_interleaved is false, only true is supported; use another checkpoint",
    ),
    "a layer without experts": (
        "Qwen3-VL-30B-A3B-Instruct",
        {"text_config__mlp_only_layers": [3]},
        "some layers have no experts; only models with experts in every layer are supported",
    ),
    "every other layer without experts": (
        "Qwen3-VL-30B-A3B-Instruct",
        {"text_config__decoder_sparse_step": 2},
        "some layers have no experts; only models with experts in every layer are supported",
    ),
    "unnormed experts": (
        "Qwen3-VL-30B-A3B-Instruct",
        {"text_config__norm_topk_prob": False},
        "norm_topk_prob is false, only true is supported; use another checkpoint",
    ),
    "more experts per token than experts": (
        "Qwen3-VL-30B-A3B-Instruct",
        {"text_config__num_experts": 4},
        "8 experts per token of only 4; take config.json and weights from the same checkpoint",
    ),
    "deepstack beyond the tower": (
        "Qwen3-VL-2B-Instruct",
        {"vision_config__deepstack_visual_indexes": [5, 24]},
        "deepstack blocks [5, 24] are beyond the 24 there are; take config.json and weights from the same checkpoint",
    ),
    "deepstack beyond the decoder": (
        "Qwen3-VL-2B-Instruct",
        {"text_config__num_hidden_layers": 2},
        "3 deepstack features need as many decoder layers, not 2; take config.json and weights from the same "
        "checkpoint",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_variant_that_would_be_computed_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    model, changes, said = UNKNOWN[name]
    with pytest.raises(ConfigError) as caught:
        shape_of(edited(model, **changes), tmp_path)
    assert str(caught.value) == f"model.path: {tmp_path / 'config.json'}: {said}"


def test_every_missing_field_is_named_at_once(tmp_path: Path) -> None:
    missing = {
        "text_config__moe_intermediate_size": ...,
        "text_config__num_experts_per_tok": ...,
        "vision_config__deepstack_visual_indexes": ...,
        "vision_config__num_position_embeddings": "48 x 48",
    }
    with pytest.raises(ConfigError) as caught:
        shape_of(edited("Qwen3-VL-30B-A3B-Instruct", **missing), tmp_path)
    for said in (
        "has no field 'moe_intermediate_size'",
        "has no field 'num_experts_per_tok'",
        "has no field 'deepstack_visual_indexes'",
        "has vision_config.num_position_embeddings '48 x 48', which must be a whole number from 1",
    ):
        assert str(caught.value).count(said) == 1, said


def test_each_family_has_every_part() -> None:
    for family in FAMILIES:
        assert callable(part(family, "shape").read)
        assert callable(part(family, "shape").unknown_variants)
        assert callable(part(family, "positions").rope_positions)
        assert callable(part(family, "vision").tower)
        assert callable(part(family, "decoder").settings)
        assert callable(part(family, "decoder").rope_axes)
        assert part(family, "mapping").RULES
    with pytest.raises(AssertionError, match="unknown family 'llama'"):
        families.part("llama", "shape")


SECTIONS = [(2, 1, 1), (1, 1, 2), (16, 24, 24), (4, 2, 2), (24, 20, 20), (3, 0, 1), (5, 1, 2)]
INTERLEAVED = [section for section in SECTIONS if section[0] >= max(section)]
"""Time has at least as many pairs as height and as width; else their turns would not fit."""
ROTARY: dict[str, Any] = {
    "qwen2_5_vl": Qwen2_5_VLRotaryEmbedding,
    "qwen3_vl": Qwen3VLTextRotaryEmbedding,
    "qwen3_vl_moe": Qwen3VLMoeTextRotaryEmbedding,
}
CASES = [(family, s) for family in FAMILIES for s in (SECTIONS if family == "qwen2_5_vl" else INTERLEAVED)]


def shape_with(family: str, section: tuple[int, ...], folder: Path) -> ModelShape:
    name = next(name for name, config in CONFIGS.items() if config["model_type"] == family)
    return dataclasses.replace(shape_of(CONFIGS[name], folder), mrope_section=section, head_size=2 * sum(section))


def chunked(section: tuple[int, ...]) -> list[int]:
    """Qwen2.5: all of time, then all of height, then all of width."""
    axes = []
    for axis in (0, 1, 2):
        axes += [axis] * section[axis]
    return axes


def interleaved(section: tuple[int, ...]) -> list[int]:
    """Qwen3: time, height, width in turn, until height and width have theirs; what is left is time's."""
    axes, left = [], {1: section[1], 2: section[2]}
    for pair in range(sum(section)):
        axis = pair % 3
        if axis and left[axis]:
            left[axis] -= 1
            axes.append(axis)
        else:
            axes.append(0)
    return axes


@pytest.mark.parametrize(("family", "section"), CASES)
def test_rope_axes_are_those_of_a_plain_loop(family: str, section: tuple[int, ...], tmp_path: Path) -> None:
    axes = part(family, "decoder").rope_axes(shape_with(family, section, tmp_path))
    assert axes == (chunked if family == "qwen2_5_vl" else interleaved)(section)
    assert [axes.count(axis) for axis in (0, 1, 2)] == list(section)


@pytest.mark.parametrize(("family", "section"), CASES)
def test_rope_axes_choose_what_transformers_composes(family: str, section: tuple[int, ...], tmp_path: Path) -> None:
    """Frequencies that say their axis and their pair, through the module's own recomposition."""
    axes = part(family, "decoder").rope_axes(shape_with(family, section, tmp_path))
    pairs = sum(section)
    freqs_3BTP = torch.arange(3 * pairs, dtype=torch.float64).view(3, 1, 1, pairs)
    # The function looks at nothing of its module but this.
    module = SimpleNamespace(mrope_section=list(section))
    composed_BTD: Tensor = ROTARY[family].recomposition_frequencies(module, freqs_3BTP.clone())
    chosen = torch.stack([freqs_3BTP[axis, 0, 0, pair] for pair, axis in enumerate(axes)])
    assert torch.equal(composed_BTD[0, 0], torch.cat([chosen, chosen]))


def test_sections_of_the_published_models_are_tried() -> None:
    for config in CONFIGS.values():
        text = config.get("text_config", config)
        assert tuple(text["rope_scaling"]["mrope_section"]) in SECTIONS


def test_time_has_the_most_pairs_where_sections_take_turns(tmp_path: Path) -> None:
    scaling = {**CONFIGS["Qwen3-VL-8B-Instruct"]["text_config"]["rope_scaling"], "mrope_section": [16, 24, 24]}
    with pytest.raises(ConfigError, match=r"mrope_section \[16, 24, 24\] gives height or width more pairs than time"):
        shape_of(edited("Qwen3-VL-8B-Instruct", text_config__rope_scaling=scaling), tmp_path)


def test_experts_are_trained_without_a_loss_of_their_own(tmp_path: Path) -> None:
    """An auxiliary loss would be in no reward, and in the gradient norm."""
    shape = shape_of(CONFIGS["Qwen3-VL-30B-A3B-Instruct"], tmp_path)
    found = part(shape.family, "decoder").settings(shape)
    assert (found["moe_router_load_balancing_type"], found["moe_aux_loss_coeff"]) == ("none", 0.0)
    assert (found["num_moe_experts"], found["moe_router_topk"], found["moe_router_pre_softmax"]) == (128, 8, False)
