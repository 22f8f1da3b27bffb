"""Where tensors live. On CPU, stand-ins for the CUDA calls that Megatron-Core makes without asking.

`activate("cpu")` is called once per process, before Megatron-Core builds anything; a GPU run never loads a stand-in.
Only factories and device queries are replaced, not every operation, so that the CPU run pays nothing per operation.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_cppo.config import UserError
from megatron_cppo.precision import gpu_problem, usable, version

CPU = torch.device("cpu")
_active = ""


def activate(device: str) -> torch.device:
    """Choose the device type, "cuda" or "cpu", for this process; once. Returns the device tensors are made on."""
    global _active
    assert _active in ("", device), f"the platform is already {_active!r}, cannot become {device!r}"
    first, _active = not _active, device
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    if device == "cpu":
        if first:
            _replace_cuda_calls()
            _replace_random_state()
            _replace_expert_calls()
        return CPU
    return torch.device("cuda", torch.cuda.current_device())


class DeviceError(UserError):
    """The GPU cannot do what the config asks of it."""


def require(precision: str, device: str) -> None:
    """Refuse a GPU that does not compute in `precision`, before anything takes memory on it.

    Raises DeviceError, which names the GPU and what it does compute in. A CPU is the plan's to refuse.
    """
    if device == "cpu":
        return
    capability, cuda = torch.cuda.get_device_capability(), version(torch.version.cuda or "")
    problem = gpu_problem(precision, capability, cuda)
    if problem:
        others = ", ".join(usable(capability, cuda))
        raise DeviceError(
            f"policy.precision: {precision} on {torch.cuda.get_device_name()} {problem}; use one of {others}"
        )


def backend(device: str) -> str:
    """The torch.distributed backend of a device type."""
    return {"cpu": "gloo", "cuda": "nccl"}[device]


def _to_cpu(device: object) -> object:
    """`device`, or the CPU where it names a CUDA device (Megatron-Core hard-codes them)."""
    if isinstance(device, int):
        return CPU
    return CPU if str(device).startswith("cuda") else device


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _InertStream:
    """Streams and events order work on a GPU; on a CPU work is in order already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _InertStream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def record_event(self, *_: object) -> _InertStream:
        return self

    def record(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


def _replace_cuda_calls() -> None:
    # `with torch.device(...)` recognises factories by identity, from a set that is made at its first use. It must hold
    # the true ones, or the context has no effect, and Hugging Face loads models with uninitialised buffers.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    cuda: Any = torch.cuda
    for name in ("Stream", "Event", "current_stream", "default_stream", "stream"):
        setattr(cuda, name, _InertStream)
    cuda.current_device = lambda: CPU
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    kind = torch.Tensor.type

    @functools.wraps(kind)
    def type_as_on_gpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # DistributedOptimizer compares this string with torch.cuda.FloatTensor and its kin.
        answer = kind(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    tensor.type = type_as_on_gpu


def _replace_random_state() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core warns at import that TE and Apex are absent; so they are
        from megatron.core.tensor_parallel import random as megatron_random
    module: Any = megatron_random
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _replace_expert_calls() -> None:
    """What Megatron-Core 0.16.1's experts need: a name that is undefined without Transformer Engine, and counts of
    tokens as numbers, which it makes of a GPU's tensors only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    modules: tuple[Any, Any] = (moe_utils, token_dispatcher)
    modules[0].te_general_gemm = None

    def as_counted(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for module in modules:
        module.maybe_move_tensor_to_cpu = as_counted
