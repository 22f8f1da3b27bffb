"""What each `policy.precision` stands for: one table of facts. Standard library only.

Owns what is known of a number format before any device is seen, and which GPUs compute in it. Must not know the config,
the model, or torch: a parameter's type is its name in torch. Sources: Transformer Engine 2.9 to 2.11,
`pytorch/quantization.py` (devices), `pytorch/utils.py` and `pytorch/tensor/*_tensor.py` (multiples); Megatron-Core
0.16.1, `fp8_utils.py` and `transformer_config.py` (recipes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arithmetic = Literal["fp32", "bf16", "fp8"]
Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How Transformer Engine scales what it rounds to FP8: the matrices of the decoder's layers and their inputs.

    `name` and `format` are Megatron-Core's `fp8_recipe` and `fp8` (hybrid: gradients have a wider range). A rank's
    matrices must be multiples of `channels` both ways, and the hidden size of `gathered_channels` where activations are
    gathered in FP8 (sequence parallelism). `bf16_ends`: the first and last layers may stay in bf16.
    """

    name: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    format: Literal["hybrid", "e4m3"]
    channels: int = 16
    gathered_channels: int = 16
    bf16_ends: bool = True


@dataclass(frozen=True, slots=True)
class Precision:
    """Of the parameters, and of the products in the decoder's layers.

    `dtype` (torch's name) and `num_bytes` are a parameter's, and what the engine computes in; `arithmetic` is what the
    products' inputs are rounded to, on which depends how far two computations of one number may be apart. The tokens of
    a rank are padded to a multiple of `alignment`. GPUs need a compute capability from `capability` on and, where
    `before` is given, below it, and a torch that was built with CUDA `cuda` or newer.
    """

    dtype: Literal["float32", "bfloat16"]
    num_bytes: int
    arithmetic: Arithmetic
    capability: Version
    before: Version | None = None
    cuda: Version = (0, 0)
    alignment: int = 1
    recipe: Recipe | None = None


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("float32", 4, "fp32", (0, 0)),
    "bf16": Precision("bfloat16", 2, "bf16", (8, 0)),
    # One scale a tensor, from its largest numbers in earlier passes.
    "fp8_delayed": Precision(
        *("bfloat16", 2, "fp8", (8, 9)),
        cuda=(12, 1),
        alignment=16,
        recipe=Recipe("delayed", "hybrid", bf16_ends=False),
    ),
    # One scale a tensor, from what it holds now.
    "fp8_tensorwise": Precision(
        *("bfloat16", 2, "fp8", (8, 9)),
        cuda=(12, 1),
        alignment=16,
        recipe=Recipe("tensorwise", "hybrid"),
    ),
    # One scale for 128 channels of a token, and for 128 x 128 weights.
    "fp8_blockwise": Precision(
        *("bfloat16", 2, "fp8", (9, 0)),
        cuda=(12, 9),
        alignment=128,
        recipe=Recipe("blockwise", "e4m3", gathered_channels=128),
    ),
    # One scale for 32 numbers.
    "fp8_mxfp8": Precision(
        *("bfloat16", 2, "fp8", (10, 0)),
        before=(12, 0),
        cuda=(12, 8),
        alignment=32,
        recipe=Recipe("mxfp8", "e4m3", channels=32, gathered_channels=32),
    ),
}


def usable(capability: Version, cuda: Version) -> tuple[str, ...]:
    """The precisions that a GPU of this compute capability computes in, with a torch built for this CUDA.

    >>> usable((9, 0), (12, 8))
    ('fp32', 'bf16', 'fp8_delayed', 'fp8_tensorwise')
    """
    return tuple(name for name in PRECISIONS if not gpu_problem(name, capability, cuda))


def gpu_problem(precision: str, capability: Version, cuda: Version) -> str:
    """Why such a GPU does not compute in `precision`; "" where it does."""
    needs = PRECISIONS[precision]
    if capability < needs.capability:
        return f"needs compute capability {_text(needs.capability)}, this is {_text(capability)}"
    if needs.before is not None and capability >= needs.before:
        return f"needs a compute capability below {_text(needs.before)}, this is {_text(capability)}"
    if cuda < needs.cuda:
        return f"needs a torch built for CUDA {_text(needs.cuda)}, this one is for {_text(cuda)}"
    return ""


def version(text: str) -> Version:
    """Major and minor number of a version; (0, 0) for "".

    >>> version("12.9")
    (12, 9)
    """
    major, _, rest = text.partition(".")
    return (int(major), int(rest.partition(".")[0] or 0)) if major else (0, 0)


def _text(numbers: Version) -> str:
    return ".".join(map(str, numbers))
