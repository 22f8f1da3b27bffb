"""Parameters that Transformer Engine keeps in FP8 (`fp8_param`): their values in, their values out, their bytes.

Such a parameter calls itself bf16, but holds FP8 numbers and scales, and on some GPUs a transpose of them: what is done
to a plain parameter's `data` in place would not reach all of it. The exact weights are the optimizer's masters, of
which each data-parallel rank has its share. Plain parameters pass through here too, so that nobody else need ask what a
parameter is. Must not know names, checkpoints or layouts; Transformer Engine is asked through Megatron-Core alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron-Core warns at import that TE and Apex are absent; so they are
    from megatron.core import fp8_utils


def is_quantized(parameter: Tensor) -> bool:
    """Whether Transformer Engine holds it in FP8."""
    return fp8_utils.is_float8tensor(parameter)


def fill(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter these values, from which its master weights are to be made too."""
    if not is_quantized(parameter):
        parameter.data.copy_(values)
        return
    exact = values.to(parameter.dtype).contiguous()
    with torch.no_grad():
        parameter.copy_(exact)
    refresh([parameter])
    # Megatron-Core makes masters of what a quantised parameter was initialised with, which it keeps in host memory:
    # here random numbers.
    made_of: Any = parameter
    if hasattr(made_of, "clear_high_precision_init_val"):
        made_of.clear_high_precision_init_val()

    def forget() -> None:
        made_of.get_high_precision_init_val = lambda: None

    made_of.get_high_precision_init_val = lambda: exact.cpu()
    made_of.clear_high_precision_init_val = forget


def forget_exact(parameters: Iterable[Tensor]) -> None:
    """Let go of what masters are made of, also of those that other ranks make."""
    for parameter in parameters:
        if is_quantized(parameter) and hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()  # pyrefly: ignore[not-callable]


def values(parameter: Tensor) -> Tensor:
    """What the model computes with, as a plain tensor: the parameter's own memory, or made of its FP8 numbers."""
    if not is_quantized(parameter):
        return parameter.data
    with torch.no_grad():
        return parameter.dequantize()


def stored(parameter: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a parameter's values, to be read and written in place; `refresh` comes after a write.

    Of FP8 (per tensor, or in blocks): numbers as bytes, and the reciprocals of their scales.
    """
    if not is_quantized(parameter):
        return (parameter.data,)
    fp8: Any = parameter
    if hasattr(fp8, "_rowwise_data"):
        return fp8._rowwise_data, fp8._rowwise_scale_inv
    return fp8._data, fp8._scale_inv


def refresh(parameters: Iterable[Tensor]) -> None:
    """Make anew what is derived of `stored`: the transposes that products of the backward take."""
    quantized = [parameter for parameter in parameters if is_quantized(parameter)]
    if quantized:
        fp8_utils.post_all_gather_processing(quantized)
