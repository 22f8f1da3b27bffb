"""What Megatron-Core is told of FP8 and of moments in bf16: its own configs take it, its own rules say where it holds.

Transformer Engine is not installed where these run: no layer computes in FP8 here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cppo import families, fp8, layout
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ConfigError, OptimizerConfig, PolicyConfig
from megatron_cppo.policy import platform
from megatron_cppo.precision import PRECISIONS
from tests.published_models import CONFIGS

FP8 = [name for name, entry in PRECISIONS.items() if entry.recipe]


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's version, which Megatron-Core's configs compare, where there is none to compare."""
    import megatron.core.utils
    from packaging.version import Version

    if megatron.core.utils.get_te_version() is None:
        monkeypatch.setattr(megatron.core.utils, "get_te_version", lambda: Version("2.9.0"))


def shape_of(folder: Path, name: str) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return families.read_shape(str(folder))


def decoder_config(shape: ModelShape, **policy: Any) -> Any:
    from megatron_cppo.policy.model import decoder_config

    chosen = PolicyConfig(**policy)
    return decoder_config(shape, chosen, layers_per_chunk=layout.layers_per_chunk(chosen, shape.num_layers))


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_megatron_core_takes_every_recipe(precision: str, name: str, tmp_path: Path) -> None:
    recipe = PRECISIONS[precision].recipe
    for stages in (1, 2):
        found = decoder_config(shape_of(tmp_path, name), precision=precision, pipeline_parallel=stages)
        assert found.params_dtype is getattr(torch, PRECISIONS[precision].dtype)
        assert found.bf16 == (precision != "fp32")
        assert found.fp8 == (recipe and recipe.format)
        assert not found.fp8_param
        assert not found.fp8_dot_product_attention
        assert not found.fp8_multi_head_attention
        if recipe is not None:
            assert found.fp8_recipe == recipe.name
            assert found.first_last_layers_bf16 == recipe.bf16_ends


@pytest.mark.parametrize(
    ("precision", "overrides", "wanted"),
    [
        ("fp8_tensorwise", (), [0, 27]),
        ("fp8_blockwise", ("num_layers_at_start_in_bf16=3", "num_layers_at_end_in_bf16=0"), [0, 1, 2]),
        ("fp8_mxfp8", ("num_layers_at_end_in_bf16=2",), [0, 26, 27]),
        ("fp8_delayed", (), []),
    ],
)
def test_megatron_core_leaves_the_layers_in_bf16_that_the_plan_says(
    precision: str, overrides: tuple[str, ...], wanted: list[int], tmp_path: Path
) -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    policy: dict[str, Any] = {"precision": precision, "megatron_overrides": overrides}
    found = decoder_config(shape_of(tmp_path, "Qwen2.5-VL-7B-Instruct"), **policy)
    assert [layer for layer in range(28) if is_first_last_bf16_layer(found, layer)] == wanted
    start, end = fp8.bf16_ends(PolicyConfig(**policy))
    assert wanted == [*range(start), *range(28 - end, 28)]


@pytest.mark.parametrize("override", ["fp8=hybrid", "fp8_recipe=mxfp8", "first_last_layers_bf16=false"])
def test_what_follows_from_the_precision_is_not_overridden(override: str, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "Qwen2.5-VL-7B-Instruct")
    with pytest.raises(ConfigError, match="follows from other fields"):
        decoder_config(shape, precision="fp8_tensorwise", megatron_overrides=(override,))


@pytest.mark.parametrize("override", ["fp8=hybrid", "fp4=e2m1", "fp4_param=true"])
def test_nothing_is_quantised_by_an_override(override: str, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "Qwen2.5-VL-7B-Instruct")
    with pytest.raises(ConfigError, match=r"policy\.megatron_overrides"):
        decoder_config(shape, precision="bf16", megatron_overrides=(override,))


@pytest.mark.usefixtures("version")
def test_parameters_in_fp8_are_asked_for_by_name(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "Qwen2.5-VL-7B-Instruct")
    asked: dict[str, Any] = {"precision": "fp8_blockwise", "megatron_overrides": ("fp8_param=true",)}
    assert decoder_config(shape, **asked).fp8_param


class Column: ...


class Row: ...


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_every_matrix_of_a_layer_is_replaced_and_nothing_else(name: str, tmp_path: Path) -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_cppo.policy.layers import decoder_spec, place_linears

    config = decoder_config(shape_of(tmp_path, name))

    def modules(part: Any, path: str = "") -> dict[str, Any]:
        """Every module of a spec under its path; what nothing is built of (shared experts) is left out."""
        if isinstance(part, ModuleSpec):
            found = {path: part.module}
            inner = vars(part.submodules) if part.submodules is not None else {}
            for field, value in inner.items():
                if field != "shared_experts":
                    found |= modules(value, f"{path}.{field}")
            return found
        return {path: part} if isinstance(part, type) else {}

    before = modules(decoder_spec(config, 1, kernels=False).layer_specs[0])
    layer = decoder_spec(config, 1, kernels=False).layer_specs[0]
    place_linears(layer, Column, Row)
    after = modules(layer)
    replaced = {ColumnParallelLinear: Column, RowParallelLinear: Row}
    assert sum(module in replaced for module in before.values()) == 4
    assert after == {path: replaced.get(module, module) for path, module in before.items()}


def test_without_transformer_engine_no_model_is_built(tmp_path: Path) -> None:
    from megatron_cppo.policy.layers import decoder_spec

    if fp8.transformer_engine_installed():
        pytest.skip("Transformer Engine is installed here")
    config = decoder_config(shape_of(tmp_path, "Qwen2.5-VL-7B-Instruct"), precision="fp8_tensorwise")
    with pytest.raises(ConfigError, match=r"pip install 'transformer-engine\[pytorch\]', or use bf16"):
        decoder_spec(config, 1, kernels=False)


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize("precision", FP8)
def test_megatron_cores_optimizer_knows_the_recipe(precision: str, tmp_path: Path) -> None:
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    from megatron_cppo.policy.build import adam_settings

    policy = PolicyConfig(precision=precision)  # pyrefly: ignore[bad-argument-type]
    config = decoder_config(shape_of(tmp_path, "Qwen2.5-VL-7B-Instruct"), precision=precision)
    optimizer = OptimizerConfig(betas=(0.8, 0.9))
    found = MegatronOptimizerConfig(**adam_settings(optimizer, policy, config))
    assert (found.adam_beta1, found.adam_beta2, found.fp8_recipe) == (0.8, 0.9, config.fp8_recipe)
    assert (found.bf16, found.use_precision_aware_optimizer) == (True, False)
    # Moments in bf16 are another optimizer's, which Megatron-Core looks for: no other name is wrong.
    reduced = adam_settings(OptimizerConfig(state_precision="bf16"), policy, config)
    assert reduced["exp_avg_dtype"] is reduced["exp_avg_sq_dtype"] is torch.bfloat16
    with pytest.raises(RuntimeError, match="requires FusedAdam from TransformerEngine"):
        MegatronOptimizerConfig(**reduced)


def test_a_gpu_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    platform.require("fp8_tensorwise", "cuda")
    platform.require("fp8_mxfp8", "cpu")
    with pytest.raises(platform.DeviceError) as caught:
        platform.require("fp8_blockwise", "cuda")
    assert str(caught.value) == (
        "policy.precision: fp8_blockwise on NVIDIA L40S needs compute capability 9.0, this is 8.9; use one of fp32, "
        "bf16, fp8_delayed, fp8_tensorwise"
    )
