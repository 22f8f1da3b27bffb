"""The third table of `head_gpu`: this project's head against others, one rank on each GPU that is there, over NCCL."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks import head_peers
from megatron_cppo.algo.vocab_parallel import token_statistics

HEADER = "ranks | rows | implementation | forward + backward ms | x | peak u"
Implementation = Callable[[Sequence[Tensor], Tensor, float], dict[str, Tensor]]


def _ours(overwrite: bool, vocabulary: int) -> Implementation:
    def run(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> dict[str, Tensor]:
        logp_N, entropy_N = token_statistics(
            leaves[0],
            targets_N,
            group=dist.group.WORLD,
            vocab_size=vocabulary,
            temperature=temperature,
            backend="triton",
            overwrite_logits=overwrite,
        )
        return {head_peers.LOGP: logp_N, head_peers.ENTROPY: entropy_N}

    return run


def measured(rows: int, vocabulary: int, timer: Callable[..., float], *, interpret: bool) -> list[list[str]]:
    """The table's lines; with `interpret` two ranks on the CPU, over gloo."""
    ranks = 2 if interpret else torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, rows, vocabulary, timer, interpret)
        torch.multiprocessing.spawn(_rank, args=arguments, nprocs=ranks)
        return torch.load(Path(folder) / "lines.pt", weights_only=True)


def _rank(rank: int, ranks: int, folder: str, rows: int, vocabulary: int, timer: Any, interpret: bool) -> None:
    from megatron.core import parallel_state

    device = torch.device("cpu") if interpret else torch.device("cuda", rank)
    if not interpret:
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo" if interpret else "nccl", init_method=store, rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    torch.manual_seed(0)
    targets_N = torch.randint(vocabulary, (rows,), device=device)
    logits_NV = (3 * torch.randn(rows, vocabulary // ranks, device=device)).bfloat16()
    every: dict[str, Implementation] = {
        "this project": _ours(False, vocabulary),
        "this project, overwrite_logits": _ours(True, vocabulary),
        "Megatron-Core, log-prob only": head_peers.megatron_core,
        "autograd composition": head_peers.autograd_composition,
        "full gather, autograd": head_peers.full_gather,
    }
    lines: list[list[str]] = []
    first = 0.0
    for name, implementation in every.items():
        leaf_NV = logits_NV.clone().requires_grad_()

        def run(leaf_NV: Tensor = leaf_NV, implementation: Implementation = implementation) -> None:
            leaf_NV.grad = None
            torch.stack([value.sum() for value in implementation([leaf_NV], targets_N, 1.0).values()]).sum().backward()

        elapsed = timer(run, device)
        first = first or elapsed
        peak = 0.0
        if not interpret:
            leaf_NV.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / (4 * logits_NV.numel())
        lines.append([str(ranks), str(rows), name, f"{elapsed:.3f}", f"{elapsed / first:.2f}", f"{peak:.2f}"])
    if rank == 0:
        torch.save(lines, os.path.join(folder, "lines.pt"))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
