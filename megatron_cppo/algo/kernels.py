"""The passes over a shard's logits that a backend can choose from: plain torch, torch compiled, or Triton.

Shapes are those of `shard_kernels_torch`, which documents both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_cppo.algo import shard_kernels_torch


@dataclass(frozen=True, slots=True)
class Kernels:
    """`view_sums` and `view_gradients`, see `shard_kernels_torch`."""

    view_sums: Callable[..., Tensor]
    view_gradients: Callable[..., None]


def torch_kernels() -> Kernels:
    """Everywhere."""
    return Kernels(shard_kernels_torch.view_sums, shard_kernels_torch.view_gradients)


def compiled_kernels() -> Kernels:
    """Where torch.compile works: on a CPU that takes a C++ compiler."""
    from megatron_cppo.algo import shard_kernels_compiled

    return Kernels(shard_kernels_compiled.view_sums, shard_kernels_compiled.view_gradients)


def triton_kernels() -> Kernels:
    """On CUDA, and in Triton's interpreter. Raises ImportError where Triton is not installed."""
    from megatron_cppo.algo import shard_kernels_triton

    return Kernels(shard_kernels_triton.view_sums, shard_kernels_triton.view_gradients)
