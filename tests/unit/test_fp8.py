"""Plans in FP8: how rows are padded, what is refused and what it says, and what it costs.

Transformer Engine is not installed where these run, and `--check` says so; the other rules are seen with that one
answer changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_cppo import fp8, plan
from megatron_cppo.config import Config, DataConfig, ModelConfig, PolicyConfig, RolloutConfig, TrainerConfig
from megatron_cppo.precision import PRECISIONS
from tests.published_models import CONFIGS
from tests.unit.layout_case import changed, problems

FP8 = [name for name, entry in PRECISIONS.items() if entry.recipe]
ABSENT = (
    "is computed by Transformer Engine, which is not installed; pip install 'transformer-engine[pytorch]', or use bf16"
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "transformer_engine_installed", lambda: True)


def make_config(folder: Path, content: dict[str, Any], precision: str = "fp8_tensorwise", **policy: Any) -> Config:
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "rows.parquet").write_bytes(b"PAR1 as every parquet file begins and ends PAR1")
    config = Config(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train=(str(folder / "rows.parquet"),), max_prompt_tokens=100),
        rollout=RolloutConfig(max_response_tokens=29),
        policy=PolicyConfig(max_tokens_per_microbatch=65_536, **policy),
        trainer=TrainerConfig(num_gpus=64, prompts_per_step=64),
    )
    return changed(config, policy__precision=precision)


def model(name: str, **fields: object) -> dict[str, Any]:
    """A published config.json with other numbers, at the top level or in its text_config."""
    content = json.loads(json.dumps(CONFIGS[name]))
    (content.get("text_config") or content).update(fields)
    return content


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path, CONFIGS["Qwen2.5-VL-7B-Instruct"])


@pytest.mark.parametrize("precision", FP8)
def test_without_transformer_engine_it_is_refused(precision: str, config: Config) -> None:
    if fp8.transformer_engine_installed():
        pytest.skip("Transformer Engine is installed here")
    found = problems(changed(config, policy__precision=precision, optimizer__state_precision="bf16"))
    assert found[0].startswith("optimizer.state_precision: bf16 is Transformer Engine's Adam, which is not installed;")
    assert found[-1] == f"policy.precision: {precision} {ABSENT}"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("context", [1, 2, 3])
def test_rows_are_cut_and_padded_for_both(precision: str, tensor: int, context: int, config: Config) -> None:
    """By hand: a rank's tokens are a row over CP, and over TP under sequence parallelism."""
    config = changed(
        config,
        policy__precision=precision,
        policy__tensor_parallel=tensor,
        policy__context_parallel=context,
        policy__sequence_parallel=tensor > 1,
        trainer__num_gpus=24,
        trainer__prompts_per_step=24,
    )
    packing = plan.packing_of(config, 1)
    alignment = {"fp32": 1, "bf16": 1, "fp8_blockwise": 128, "fp8_mxfp8": 32}.get(precision, 16)
    assert packing.segment_multiple == (2 * context if context > 1 else 1)
    assert packing.row_multiple % packing.segment_multiple == 0
    assert packing.row_multiple // context // (tensor if tensor > 1 else 1) % alignment == 0
    smaller = [packing.row_multiple // prime for prime in (2, 3) if packing.row_multiple % prime == 0]
    for rows in smaller:  # none does: it is the least multiple
        assert rows % packing.segment_multiple or rows % (alignment * context * tensor)
    assert packing.max_tokens == 65_536 // packing.row_multiple * packing.row_multiple


@pytest.mark.usefixtures("installed")
def test_capacity_is_told_in_rows_of_fp8(config: Config) -> None:
    config = changed(config, policy__max_tokens_per_microbatch=384, policy__precision="fp8_blockwise")
    assert problems(config) == []
    (said,) = problems(changed(config, policy__max_tokens_per_microbatch=383))
    assert said.endswith("in rows of multiples of 128; use at least 384")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("precision", FP8)
def test_what_the_plan_derives(precision: str, config: Config) -> None:
    wanted, found = plan.resolve(changed(config, policy__precision="bf16")), None
    found = plan.resolve(changed(config, policy__precision=precision))
    assert found.correction == wanted.correction == "token_truncate"
    assert found.memory.weights_gib == wanted.memory.weights_gib
    assert found.memory.optimizer_gib == wanted.memory.optimizer_gib
    assert wanted.memory.fp8_copies_gib == 0.0
    layers = found.shape.num_layers * found.shape.layer_parameters
    assert found.memory.fp8_copies_gib == pytest.approx(2 * layers / 2**30)
    half = plan.resolve(changed(config, policy__precision=precision, policy__tensor_parallel=2)).memory
    assert half.fp8_copies_gib == pytest.approx(layers / 2**30)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("there", ["2.9.0", "2.10.0", "2.11.0+abc"])
def test_parameters_in_fp8_need_a_transformer_engine_that_makes_transposes_anew(
    there: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "transformer_engine_version", lambda: there)
    said = problems(changed(config, policy__megatron_overrides=("fp8_param=true",)))
    assert said == (
        [
            "policy.megatron_overrides: fp8_param needs Transformer Engine 2.10 or newer, 2.9.0 is installed; "
            "pip install 'transformer-engine[pytorch]>=2.10', or leave fp8_param out"
        ]
        if there == "2.9.0"
        else []
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("precision", ["fp8_tensorwise", "fp8_blockwise"])
def test_parameters_in_fp8_take_the_copies_place(precision: str, config: Config) -> None:
    of = lambda text: changed(config, policy__precision=precision, policy__megatron_overrides=(f"fp8_param={text}",))  # noqa: E731
    copied, kept = plan.resolve(of("false")).memory, plan.resolve(of("true")).memory
    assert copied.fp8_copies_gib > 0.0
    assert kept == dataclasses.replace(copied, fp8_copies_gib=0.0)


@pytest.mark.usefixtures("installed")
def test_state_in_bf16_is_four_bytes_less(config: Config) -> None:
    less = {"optimizer__state_precision": "bf16", "optimizer__betas": (0.9, 0.95), "trainer__num_gpus": 1}
    wanted = plan.resolve(changed(config, trainer__num_gpus=1)).memory.optimizer_gib
    found = plan.resolve(changed(config, **less)).memory.optimizer_gib
    assert found == pytest.approx(wanted * 8 / 12)


BLOCKWISE = {"policy__precision": "fp8_blockwise"}
STATE = {"optimizer__state_precision": "bf16", "optimizer__betas": (0.9, 0.95)}
PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "on cpu": (
        {"policy__device": "cpu"},
        "policy.precision: the cpu platform computes in fp32; use --policy.precision fp32",
    ),
    "end layers of a recipe without": (
        {"policy__precision": "fp8_delayed", "policy__megatron_overrides": ("num_layers_at_end_in_bf16=2",)},
        "policy.megatron_overrides: num_layers_at_end_in_bf16, but fp8_delayed has all layers in FP8 (its scales are "
        "exchanged once for all); leave it out, or use fp8_tensorwise",
    ),
    "end layers without FP8": (
        {"policy__precision": "bf16", "policy__megatron_overrides": ("num_layers_at_start_in_bf16=2",)},
        "policy.megatron_overrides: num_layers_at_start_in_bf16 is about FP8, but policy.precision is bf16; leave it "
        "out",
    ),
    "end layers beyond a stage": (
        {"policy__pipeline_parallel": 4, "policy__megatron_overrides": ("num_layers_at_start_in_bf16=8",)},
        "policy.megatron_overrides: num_layers_at_start_in_bf16=8 exceeds the 7 layers of a stage; use at most 7",
    ),
    "end layers of no number": (
        {"policy__megatron_overrides": ("num_layers_at_start_in_bf16=-1",)},
        "policy.megatron_overrides: num_layers_at_start_in_bf16 must be a whole number, got '-1'; write "
        "num_layers_at_start_in_bf16=1",
    ),
    "nothing left in FP8": (
        {"policy__megatron_overrides": ("num_layers_at_start_in_bf16=27",)},
        "policy.precision: fp8_tensorwise with 27 first and 1 last layers in bf16 leaves none of the model's 28 in "
        "FP8; use bf16, or fewer by policy.megatron_overrides num_layers_at_start_in_bf16=0 "
        "num_layers_at_end_in_bf16=0",
    ),
    "parameters in FP8": (
        {"policy__megatron_overrides": ("fp8_param=yes",)},
        "policy.megatron_overrides: fp8_param must be true or false, got 'yes'; write fp8_param=true",
    ),
    "parameters without FP8": (
        {"policy__precision": "bf16", "policy__megatron_overrides": ("fp8_param=true",)},
        "policy.megatron_overrides: fp8_param is about FP8, but policy.precision is bf16; leave it out",
    ),
    "parameters with delayed scales": (
        {"policy__precision": "fp8_delayed", "policy__megatron_overrides": ("fp8_param=true",)},
        "policy.megatron_overrides: fp8_param with fp8_delayed: its scales come from earlier passes, and are in no "
        "checkpoint; leave it out, or use fp8_blockwise or fp8_tensorwise",
    ),
    "parameters with mxfp8": (
        {"policy__precision": "fp8_mxfp8", "policy__megatron_overrides": ("fp8_param=true",)},
        "policy.megatron_overrides: fp8_param with fp8_mxfp8: Megatron-Core gathers its parameters through the "
        "gradients' memory; leave it out, or use fp8_blockwise or fp8_tensorwise",
    ),
    "parameters on cpu": (
        {
            "policy__device": "cpu",
            "policy__precision": "fp32",
            "policy__distributed_optimizer": False,
            "policy__megatron_overrides": ("fp8_param=true",),
        },
        "policy.megatron_overrides: fp8_param is about FP8, but policy.precision is fp32; leave it out",
    ),
    "parameters without masters": (
        {"policy__distributed_optimizer": False, "policy__megatron_overrides": ("fp8_param=true",)},
        "policy.megatron_overrides: fp8_param needs policy.distributed_optimizer, whose masters have what FP8 has not; "
        "turn it on, or leave fp8_param out",
    ),
    "attention in FP8": (
        {"policy__megatron_overrides": ("fp8_dot_product_attention=true",)},
        "policy.megatron_overrides: fp8_dot_product_attention is not supported, attention stays in bf16; leave it out",
    ),
    "state of a moment that stands still": (
        STATE | {"optimizer__betas": (0.9, 0.999)},
        "optimizer.state_precision: with a beta of 0.999 an update changes a moment by less than bf16 resolves, and "
        "the moment stays as it is; use betas up to 0.996, such as 0.9 0.99, or fp32",
    ),
    "state that every rank holds": (
        STATE | {"policy__distributed_optimizer": False},
        "optimizer.state_precision: bf16 needs policy.distributed_optimizer; turn it on, or use fp32",
    ),
    "state of less than its weights": (
        STATE | {"policy__precision": "fp32"},
        "optimizer.state_precision: bf16 beside parameters in fp32; use --policy.precision bf16, or fp32 for both",
    ),
    "state on cpu": (
        STATE | {"policy__device": "cpu", "policy__precision": "bf16"},
        "optimizer.state_precision: bf16 is Transformer Engine's Adam, which needs a GPU; use fp32 with device cpu",
    ),
    "one beta": (
        {"optimizer__betas": (0.9,)},
        "optimizer.betas: must be a tuple of 2, each item a number, got (0.9,)",
    ),
    "a beta that forgets nothing": (
        {"optimizer__betas": (0.9, 1.0)},
        "optimizer.betas: (0.9, 1.0) must be in [0, 1); (0.9, 0.999) is usual",
    ),
    "a beta of nothing": (
        {"optimizer__betas": (math.nan, 0.9)},
        "optimizer.betas: nan is not a finite number; give one",
    ),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_go_together_is_named(name: str, config: Config) -> None:
    fields, said = PROBLEMS[name]
    found = problems(changed(config, **fields))
    assert said in found
    assert len(found) == (2 if name == "state on cpu" else 1)  # the cpu does not compute in bf16 either


SIZES: dict[str, tuple[str, dict[str, object], str, dict[str, Any], tuple[str, ...]]] = {
    "7B, TP 4": ("Qwen2.5-VL-7B-Instruct", {}, "fp8_tensorwise", {"tensor_parallel": 4}, ()),
    "72B, TP 8, blocks": (
        *("Qwen2.5-VL-72B-Instruct", {}, "fp8_blockwise"),
        {"tensor_parallel": 8, "sequence_parallel": True},
        (),
    ),
    "72B, TP 8, MXFP8": (
        *("Qwen2.5-VL-72B-Instruct", {}, "fp8_mxfp8", {"tensor_parallel": 8}),
        (
            "policy.precision: fp8_mxfp8 needs the feed-forward channels of a rank in multiples of 32, but they are "
            "29568 / 8; use a smaller tensor_parallel, or bf16",
        ),
    ),
    "experts, whole": (
        *("Qwen3-VL-30B-A3B-Instruct", {}, "fp8_mxfp8"),
        {"tensor_parallel": 4, "sequence_parallel": True, "expert_parallel": 8},
        (),
    ),
    "experts, cut": (
        *("Qwen3-VL-30B-A3B-Instruct", {"moe_intermediate_size": 96}, "fp8_mxfp8"),
        {"tensor_parallel": 4, "sequence_parallel": True},
        (
            "policy.precision: fp8_mxfp8 needs the feed-forward channels of a rank in multiples of 32, but they are "
            "96 / 4; use a smaller tensor_parallel, or bf16",
        ),
    ),
    "odd channels": (
        *("Qwen2.5-VL-7B-Instruct", {"intermediate_size": 18_952}, "fp8_delayed", {}),
        (
            "policy.precision: fp8_delayed needs the feed-forward channels of a rank in multiples of 16, but they are "
            "18952; use bf16",
        ),
    ),
    "gathered in blocks": (
        *("Qwen3-VL-30B-A3B-Instruct", {"hidden_size": 2080}, "fp8_blockwise"),
        {"tensor_parallel": 2, "sequence_parallel": True},
        (
            "policy.precision: fp8_blockwise needs the hidden size of a rank in multiples of 128, but they are 2080; "
            "use bf16",
        ),
    ),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_cannot_be_multiplied_are_named(name: str, tmp_path: Path) -> None:
    published, fields, precision, policy, said = SIZES[name]
    content = model(published, **fields)
    content["vision_config"]["out_hidden_size"] = (content.get("text_config") or content)["hidden_size"]
    assert problems(make_config(tmp_path, content, precision, **policy)) == list(said)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("precision", "overrides", "wanted"),
    [
        ("fp8_blockwise", (), (1, 1)),
        ("fp8_tensorwise", ("num_layers_at_start_in_bf16=3",), (3, 1)),
        ("fp8_mxfp8", ("num_layers_at_start_in_bf16=0", "num_layers_at_end_in_bf16=0"), (0, 0)),
        ("fp8_delayed", (), (0, 0)),
        ("bf16", (), (0, 0)),
    ],
)
def test_layers_in_bf16(precision: str, overrides: tuple[str, ...], wanted: tuple[int, int], config: Config) -> None:
    config = changed(config, policy__precision=precision, policy__megatron_overrides=overrides)
    assert problems(config) == []
    assert fp8.bf16_ends(config.policy) == wanted
