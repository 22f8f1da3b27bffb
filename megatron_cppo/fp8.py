"""Which choices do not go together with FP8, or with an optimizer's state in bf16. Standard library only.

Owns what Megatron-Core 0.16.1 and Transformer Engine would refuse later, or take and get wrong; `plan` reports it. What
the GPU itself computes in is seen by the ranks (`policy/platform.py`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config, PolicyConfig
from megatron_cppo.precision import PRECISIONS, Recipe, version

BF16_RESOLUTION = 2**-8
"""A change by less than this share of a number may leave it as it was in bf16."""
AT_START, AT_END = "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"
PARAMETERS = "fp8_param"
"""Megatron-Core's name: matrices of the decoder's layers are parameters in FP8, and gathered as such."""
_NO_PARAMETERS = {
    "delayed": "its scales come from earlier passes, and are in no checkpoint",
    "mxfp8": "Megatron-Core gathers its parameters through the gradients' memory",
}
PARAMETERS_SINCE = (2, 10)
"""Transformer Engines before it have no `post_all_gather_processing`: a transpose that is made while the reference is
there would stay in the policy's backward."""
_ATTENTION = ("fp8_dot_product_attention", "fp8_multi_head_attention")
_REMEDY = "pip install 'transformer-engine[pytorch]'"


def bf16_ends(policy: PolicyConfig) -> tuple[int, int]:
    """How many of the first and of the last decoder layers stay in bf16 under an FP8 precision: one each.

    `policy.megatron_overrides` may say otherwise; what is no number counts as one here, and is a problem.
    """
    given = _given(policy)
    start, end = (int(text) if (text := given.get(name, "")).isdecimal() else 1 for name in (AT_START, AT_END))
    recipe = PRECISIONS[policy.precision].recipe
    return (start, end) if recipe is not None and recipe.bf16_ends else (0, 0)


def parameters_in_fp8(policy: PolicyConfig) -> bool:
    """Whether the matrices of the decoder's layers are kept in FP8 alone, beside their fp32 masters."""
    return _given(policy).get(PARAMETERS, "").lower() == "true"


def _given(policy: PolicyConfig) -> dict[str, str]:
    return {name: text for name, _, text in (pair.partition("=") for pair in policy.megatron_overrides)}


def problems(config: Config, shape: ModelShape | None, *, installed: bool) -> list[str]:
    """Everything in the config that FP8, or reduced optimizer state, does not go together with; `installed` says
    whether Transformer Engine is there."""
    policy, recipe = config.policy, PRECISIONS[config.policy.precision].recipe
    found = _state_problems(config, installed=installed)
    if policy.device == "cpu":  # which the layout's rules say computes in fp32
        return [*found, *(_parameter_problems(policy, None, text) if (text := _given(policy).get(PARAMETERS)) else ())]
    if recipe is not None and not installed:
        found.append(
            f"policy.precision: {policy.precision} is computed by Transformer Engine, which is not installed; "
            f"{_REMEDY}, or use bf16"
        )
    found += _override_problems(policy, recipe, shape)
    if recipe is not None and shape is not None:
        found += _size_problems(policy, recipe, shape)
    return found


def transformer_engine_installed() -> bool:
    """Whether it could be imported; it is not, as it takes seconds and a GPU's libraries."""
    return importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_version() -> str:
    """Of the one that is installed; "" where none is."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _state_problems(config: Config, *, installed: bool) -> list[str]:
    policy, optimizer, name = config.policy, config.optimizer, "optimizer.state_precision"
    if optimizer.state_precision == "fp32":
        return []
    found = []
    if policy.device == "cpu":
        found.append(f"{name}: bf16 is Transformer Engine's Adam, which needs a GPU; use fp32 with device cpu")
    elif not installed:
        found.append(f"{name}: bf16 is Transformer Engine's Adam, which is not installed; {_REMEDY}, or use fp32")
    if not policy.distributed_optimizer:
        found.append(f"{name}: bf16 needs policy.distributed_optimizer; turn it on, or use fp32")
    if policy.precision == "fp32":
        found.append(f"{name}: bf16 beside parameters in fp32; use --policy.precision bf16, or fp32 for both")
    slow = [beta for beta in optimizer.betas if 1 - beta < BF16_RESOLUTION]
    if slow:
        found.append(
            f"{name}: with a beta of {max(slow)} an update changes a moment by less than bf16 resolves, and the moment "
            f"stays as it is; use betas up to {1 - BF16_RESOLUTION:.3f}, such as 0.9 0.99, or fp32"
        )
    return found


def _override_problems(policy: PolicyConfig, recipe: Recipe | None, shape: ModelShape | None) -> list[str]:
    """Of Megatron-Core's fields that are about FP8; `policy/model.py` checks the others, and the names of all."""
    found, where = [], "policy.megatron_overrides"
    for name, _, text in (pair.partition("=") for pair in policy.megatron_overrides):
        if name == PARAMETERS:
            found += _parameter_problems(policy, recipe, text)
        elif name in _ATTENTION:
            found.append(f"{where}: {name} is not supported, attention stays in bf16; leave it out")
        elif name not in (AT_START, AT_END):
            continue
        elif recipe is None:
            found.append(f"{where}: {name} is about FP8, but policy.precision is {policy.precision}; leave it out")
        elif not recipe.bf16_ends:
            found.append(
                f"{where}: {name}, but {policy.precision} has all layers in FP8 (its scales are exchanged once for "
                "all); leave it out, or use fp8_tensorwise"
            )
        elif not text.isdecimal():
            found.append(f"{where}: {name} must be a whole number, got {text!r}; write {name}=1")
        elif shape is not None and int(text) > (most := shape.num_layers // max(1, policy.pipeline_parallel)):
            found.append(f"{where}: {name}={text} exceeds the {most} layers of a stage; use at most {most}")
    if found or recipe is None or not recipe.bf16_ends or shape is None:
        return found
    start, end = bf16_ends(policy)
    if start + end >= shape.num_layers:
        found.append(
            f"policy.precision: {policy.precision} with {start} first and {end} last layers in bf16 leaves none of the "
            f"model's {shape.num_layers} in FP8; use bf16, or fewer by {where} {AT_START}=0 {AT_END}=0"
        )
    return found


def _parameter_problems(policy: PolicyConfig, recipe: Recipe | None, text: str) -> list[str]:
    """What parameters in FP8 do not go together with."""
    where = f"policy.megatron_overrides: {PARAMETERS}"
    if text.lower() == "false":
        return []
    if text.lower() != "true":
        return [f"{where} must be true or false, got {text!r}; write {PARAMETERS}=true"]
    if recipe is None:
        return [f"{where} is about FP8, but policy.precision is {policy.precision}; leave it out"]
    found, there = [], transformer_engine_version()
    if there and version(there) < PARAMETERS_SINCE:
        least = ".".join(map(str, PARAMETERS_SINCE))
        found.append(
            f"{where} needs Transformer Engine {least} or newer, {there} is installed; "
            f"pip install 'transformer-engine[pytorch]>={least}', or leave {PARAMETERS} out"
        )
    if recipe.name in _NO_PARAMETERS:
        reason = _NO_PARAMETERS[recipe.name]
        found.append(f"{where} with {policy.precision}: {reason}; leave it out, or use fp8_blockwise or fp8_tensorwise")
    if not policy.distributed_optimizer:
        found.append(
            f"{where} needs policy.distributed_optimizer, whose masters have what FP8 has not; turn it on, or leave "
            f"{PARAMETERS} out"
        )
    return found


def _size_problems(policy: PolicyConfig, recipe: Recipe, shape: ModelShape) -> list[str]:
    """The dimensions of a rank's matrices that Transformer Engine cannot multiply in FP8."""
    tensor = policy.tensor_parallel
    gathered = recipe.gathered_channels if policy.sequence_parallel else recipe.channels
    # An expert is whole on its rank where the experts are dealt out.
    ffn_ranks = 1 if shape.num_experts and policy.expert_parallel > 1 else tensor
    sizes = {
        "hidden size": (shape.hidden_size, 1, max(gathered, recipe.channels)),
        "query, key and value channels": (
            (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size,
            tensor,
            recipe.channels,
        ),
        "attention channels": (shape.num_heads * shape.head_size, tensor, recipe.channels),
        "feed-forward channels": (shape.ffn_size, ffn_ranks, recipe.channels),
    }
    return [
        f"policy.precision: {policy.precision} needs the {name} of a rank in multiples of {multiple}, but they are "
        f"{size}{f' / {ranks}' if ranks > 1 else ''}; use "
        + ("a smaller tensor_parallel, or bf16" if size % multiple == 0 and ranks > 1 else "bf16")
        for name, (size, ranks, multiple) in sizes.items()
        if ranks > 0 and size % ranks == 0 and (size // ranks) % multiple
    ]
