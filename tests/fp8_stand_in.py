"""Parameters that hold FP8 numbers, where there is no Transformer Engine: its tensors' ways, on a CPU.

Real FP8 numbers (torch's float8_e4m3fn) and real scales, per tensor or in blocks, under the names that Transformer
Engine 2.11 gives them; and with its pitfalls. A product reads the transpose, which is made anew only when asked for: a
forgotten `refresh` computes with old weights. The values that a parameter was made of are kept, as they are there. What
Megatron-Core asks of Transformer Engine is put in its place by `activate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LARGEST = 448.0
"""Of float8_e4m3fn."""


class StandIn(torch.Tensor):
    """Calls itself bf16. `side`: one scale for a block of so many rows and columns; 0: one for all."""

    side = 0
    names = ("_data", "_scale_inv", "_transpose")
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    @classmethod
    def of(cls, numbers: Tensor, scales: Tensor, transpose: Tensor) -> StandIn:
        self: Any = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.bfloat16, device=numbers.device)
        for name, tensor in zip(cls.names, (numbers, scales, transpose), strict=True):
            setattr(self, name, tensor)
        return self

    @classmethod
    def quantized(cls, values: Tensor) -> StandIn:
        scales = _reciprocal_scales(_largest(values.bfloat16().float(), cls.side), cls.side)
        numbers = _numbers(values.bfloat16().float(), scales, cls.side)
        return cls.of(numbers, scales, numbers.t().contiguous())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        numbers, scales, transpose = (getattr(self, name) for name in self.names)
        return numbers, scales, transpose

    def dequantize(self) -> Tensor:  # pyrefly: ignore[bad-override]
        numbers, scales, _ = self.tensors
        return _values(numbers, scales, self.side)

    def multiplied(self) -> Tensor:
        """What products take."""
        _, scales, transpose = self.tensors
        return _values(transpose.t(), scales, self.side)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls.of(*args[0].tensors)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], StandIn):
            for mine, new in zip(args[0].tensors, cls.quantized(args[1]).tensors, strict=True):
                mine.copy_(new)
            return args[0]
        if func is torch.ops.aten.view.default or func._schema.is_mutable:
            raise NotImplementedError(f"{func} of a parameter in FP8")
        plain = lambda leaf: leaf.multiplied() if isinstance(leaf, StandIn) else leaf  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class InBlocks(StandIn):
    """As Float8BlockwiseQTensor: scales are powers of two; blocks of 4 x 4 only, as the tests' matrices are small."""

    side = 4
    names = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data")


KINDS: dict[str, type[StandIn]] = {"tensorwise": StandIn, "blockwise": InBlocks}


def activate() -> None:
    """Have Megatron-Core take these for Transformer Engine's, in this process from now on."""
    from megatron.core import fp8_utils
    from megatron.core.distributed import param_and_grad_buffer

    module: Any = fp8_utils
    module.HAVE_TE_FP8_TENSOR_CLASS, module.FP8_TENSOR_CLASS = True, StandIn
    module._modify_underlying_storage_impl = _replace_numbers
    module._quantize_param_shard_impl = _quantize_shards
    module.te_post_all_gather_processing = _make_transposes
    # Bytes and bf16 are gathered in one group of collectives, which gloo takes for one type: here one by one.
    buffers: Any = param_and_grad_buffer
    buffers._coalescing_manager = lambda *_, **__: contextlib.nullcontext()


def replace_matrices(layers: nn.Module, kind: type[StandIn]) -> int:
    """Make FP8 parameters of the matrices that Transformer Engine's modules take the place of; how many they are."""
    count = 0
    for path, module in layers.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 2 and path.rpartition(".")[2].startswith("linear_"):
                made: Any = nn.Parameter(kind.quantized(parameter.detach()))
                made.__dict__.update(parameter.__dict__)
                made._high_precision_init_val = parameter.detach().clone()
                made.get_high_precision_init_val = MethodType(lambda self: self._high_precision_init_val, made)
                made.clear_high_precision_init_val = MethodType(_clear, made)
                setattr(module, name, made)
                count += 1
    return count


def _clear(self: Any) -> None:
    self.__dict__.pop("_high_precision_init_val", None)


def _largest(values: Tensor, side: int) -> Tensor:
    if not side:
        return values.abs().max().reshape(1)
    rows, columns = values.shape
    return values.reshape(rows // side, side, columns // side, side).abs().amax((1, 3))


def _reciprocal_scales(largest: Tensor, side: int) -> Tensor:
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return scales.log2().ceil().exp2() if side else scales


def _spread(scales: Tensor, side: int) -> Tensor:
    return scales.repeat_interleave(side, 0).repeat_interleave(side, 1) if side else scales


def _numbers(values: Tensor, scales: Tensor, side: int) -> Tensor:
    scaled = (values / _spread(scales, side)).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def _values(numbers: Tensor, scales: Tensor, side: int) -> Tensor:
    return (numbers.contiguous().view(torch.float8_e4m3fn).float() * _spread(scales, side)).bfloat16()


def _replace_numbers(parameter: Any, numbers: Tensor) -> None:
    numbers.detach().copy_(parameter.tensors[0])
    setattr(parameter, parameter.names[0], numbers)


def _quantize_shards(
    parameters: Sequence[Any], masters: Sequence[Tensor | None], starts: Sequence[int | None], group: Any, *_: Any
) -> None:
    """Each rank rounds its part of the numbers; scales are of the whole matrix."""
    for parameter, master, start in zip(parameters, masters, starts, strict=True):
        parameter.clear_high_precision_init_val()
        numbers, scales, _ = parameter.tensors
        values = torch.zeros(parameter.shape)
        if master is not None:
            assert start is not None
            values.view(-1)[start : start + master.numel()] = master.to(parameter.dtype).float()
        largest = _largest(values, parameter.side)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scales.copy_(_reciprocal_scales(largest, parameter.side))
        if master is not None:
            mine = slice(start, start + master.numel())
            numbers.view(-1)[mine] = _numbers(values, scales, parameter.side).view(-1)[mine]


def _make_transposes(parameters: Sequence[Any]) -> None:
    for parameter in parameters:
        numbers, _, transpose = parameter.tensors
        transpose.copy_(numbers.t())
