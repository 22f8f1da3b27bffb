"""The two buffers that weights go through on their way to servers, by transport, and what servers are told to map them.

Must not know what is laid into them (`weight_push`); the servers' side is `inside_vllm`.
"""

from __future__ import annotations

import base64
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_cppo.rollout.engine import EngineError


@dataclass(slots=True)
class Buffers:
    """Two buffers, and what the servers must be told to find them."""

    raw: tuple[Tensor, Tensor]
    told: list[Any] = field(default_factory=list)


def _plain(num_bytes: int, device: torch.device) -> Buffers:
    return Buffers((_bytes(num_bytes, device), _bytes(num_bytes, device)))


def _bytes(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _shared_memory(num_bytes: int, device: torch.device) -> Buffers:
    """Memory without a name, which only processes of this user can map, and of which nothing is left behind."""
    raw, told = [], []
    for which in range(2):
        descriptor = os.memfd_create(f"megatron_cppo_weights_{which}")
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # else too little memory is a SIGBUS later
        except OSError as error:
            raise EngineError(
                f"there is no memory for two buckets of {num_bytes >> 20} MiB ({error.strerror}); give the machine "
                "(the container) more"
            ) from error
        raw.append(torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8))
        told.append({"path": path, "num_bytes": num_bytes})
        weakref.finalize(raw[-1], os.close, descriptor)
    return Buffers((raw[0], raw[1]), told)


def _of_this_gpu(num_bytes: int, device: torch.device) -> Buffers:
    """Buffers of this rank's GPU, told by its UUID: a server's worker on the same GPU maps them (CUDA IPC)."""
    buffers, uuid = _plain(num_bytes, device), str(torch.cuda.get_device_properties(device).uuid)
    for raw in buffers.raw:
        handle: list[Any] = [
            base64.b64encode(part).decode() if isinstance(part, bytes) else part
            for part in raw.untyped_storage()._share_cuda_()
        ]
        buffers.told.append({uuid: handle})
    return buffers


BUFFERS: dict[str, Callable[[int, torch.device], Buffers]] = {
    "shm": _shared_memory,
    "ipc": _of_this_gpu,
    "gloo": _plain,
    "nccl": _plain,
}
