"""What `benchmarks.head` compares the head's loss with: the code of others, and what plain autograd gives.

Each function takes the leaves that gradients are wanted of (this rank's logits, or hidden rows and the head's weight),
the targets and the temperature, and returns differentiable statistics by name, in nats. All are called by both ranks of
Megatron-Core's tensor-parallel group. verl lives in an environment of its own (`install_verl`).

megatron.core and verl are imported where they are used: `head_ranks` first puts its counters around the collectives
of torch.distributed, and Megatron-Core keeps some of those under names of its own from its import on.

Shapes: N rows (tokens), V columns of this rank's shard, H hidden size.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VERL = "0.9.1"
LOGP, ENTROPY, KL = "log-prob", "entropy", "KL"

Statistics = dict[str, Tensor]
Implementation = Callable[[Sequence[Tensor], Tensor, float], Statistics]


def install_verl(folder: Path) -> Path:
    """The interpreter of an environment in `folder` with verl and all that this interpreter's environment has.

    Only verl itself is added, into the new environment; torch and Megatron-Core are the same files for everyone that
    is compared.
    """
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        venv.create(folder, clear=True, with_pip=False)
        packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
        (Path(packages) / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, f"verl=={VERL}"], check=True)
        (folder / "complete").touch()
    return python


@cache
def _verl_functions() -> ModuleType:
    """verl/utils/megatron/tensor_parallel.py, from its path: `import verl` would ask for Ray and tensordict as well.

    The module itself needs nothing but torch and Megatron-Core.
    """
    package = importlib.util.find_spec("verl")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("verl is not installed in the environment of the ranks")
    path = Path(package.origin).parent / "utils" / "megatron" / "tensor_parallel.py"
    spec = importlib.util.spec_from_file_location("verl_tensor_parallel", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
    """verl's functions as its Megatron engine calls them (`_lm_head_logits_processor`, default settings).

    The float32 logits are Megatron's: its Float16Module casts what the last stage returns, and verl leaves that so. In
    bfloat16 the entropy would be summed in bfloat16.
    """
    functions = _verl_functions()
    logits_NV = leaves[0].float()
    temperature_N = torch.full(targets_N.shape, temperature)
    temperature_N[temperature_N <= 0] = 1e-8
    assert torch.all(temperature_N > 0).item(), "verl's own check"
    logits_NV.div_(temperature_N.unsqueeze(dim=-1).to(logits_NV.dtype))
    copy_NV = logits_NV.clone()
    entropy_N = functions.vocab_parallel_entropy(logits_NV)
    return {LOGP: functions.vocab_parallel_log_probs_from_logits(copy_NV, targets_N), ENTROPY: entropy_N}


def megatron_core(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
    """Megatron-Core's cross entropy, which overwrites the float32 logits that it is given; it knows no entropy."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_NV = leaves[0].float()
    if temperature != 1.0:
        logits_NV.div_(temperature)
    return {LOGP: -vocab_parallel_cross_entropy(logits_NV, targets_N)}


def full_gather(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
    """A differentiable gather of the whole vocabulary, then log_softmax in float32."""
    logits_NV = _GatherColumns.apply(leaves[0]).float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    logp_NV = logits_NV.log_softmax(-1)
    return {
        LOGP: logp_NV.gather(1, targets_N[:, None]).squeeze(1),
        ENTROPY: -(logp_NV.exp() * logp_NV).sum(-1),
    }


def autograd_composition(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
    """Log-prob of every view, entropy of the first and KL(first‖view) of the others from differentiable all-reduces.

    All sums are of unnormalised exponentials, and everything after a sum is the same on all ranks; so a sum's backward
    is the identity. (Where a rank's columns use the normaliser itself, as in Σ p·log p, the identity would lose what
    the other ranks' columns owe to it: a common mistake, and the backward would need all-reduces.)
    """
    rank, width = _group().rank(), leaves[0].shape[1]
    columns_N = targets_N - rank * width
    owned_N = (columns_N >= 0) & (columns_N < width)
    shifted, exponentials, totals, logps = [], [], [], []
    for logits_NV in leaves:
        z_NV = _minus_maximum(logits_NV.float())
        if temperature != 1.0:
            z_NV = z_NV / temperature
        exp_NV = z_NV.exp()
        total_N = _sum_over_ranks(exp_NV.sum(-1))
        target_N = z_NV.gather(1, columns_N.where(owned_N, 0)[:, None]).squeeze(1).where(owned_N, 0.0)
        logps.append(_sum_over_ranks(target_N) - total_N.log())
        shifted.append(z_NV)
        exponentials.append(exp_NV)
        totals.append(total_N)
    mean_N = _sum_over_ranks((exponentials[0] * shifted[0]).sum(-1)) / totals[0]
    statistics = {LOGP: torch.stack(logps).squeeze(0), ENTROPY: totals[0].log() - mean_N}
    if len(leaves) > 1:
        statistics[KL] = torch.stack(
            [
                _sum_over_ranks((exponentials[0] * (shifted[0] - z_NV)).sum(-1)) / totals[0]
                - (totals[0].log() - total_N.log())
                for z_NV, total_N in zip(shifted[1:], totals[1:], strict=True)
            ]
        )
    return statistics


def materialised(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
    """All logits of the head as a float32 product, then `autograd_composition`."""
    hidden_NH, weight_VH = leaves
    return autograd_composition([hidden_NH.float() @ weight_VH.float().t()], targets_N, temperature)


def materialised_bf16(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
    """All logits of the head as a bfloat16 product that is cast afterwards, as in Megatron; its logits are rounded."""
    hidden_NH, weight_VH = leaves
    return autograd_composition([hidden_NH @ weight_VH.t()], targets_N, temperature)


def dense_reference(views: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
    """What is right: the same statistics of whole rows of float64 logits on one rank, by autograd."""
    logps = [(logits_NV / temperature).log_softmax(-1) for logits_NV in views]
    p_NV = logps[0].exp()
    statistics = {
        LOGP: torch.stack([logp_NV.gather(1, targets_N[:, None]).squeeze(1) for logp_NV in logps]).squeeze(0),
        ENTROPY: -(p_NV * logps[0]).sum(-1),
    }
    if len(views) > 1:
        statistics[KL] = torch.stack([(p_NV * (logps[0] - logp_NV)).sum(-1) for logp_NV in logps[1:]])
    return statistics


def _group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def _minus_maximum(logits_NV: Tensor) -> Tensor:
    """Logits minus their maximum over all ranks, which is a constant: it leaves every statistic as it is."""
    maximum_N = logits_NV.detach().amax(-1)
    dist.all_reduce(maximum_N, op=dist.ReduceOp.MAX, group=_group())
    return logits_NV - maximum_N[:, None]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_N: Tensor) -> Tensor:
        total_N = part_N.clone()
        dist.all_reduce(total_N, group=_group())
        return total_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        return grad_outputs[0]


class _GatherColumns(torch.autograd.Function):
    """Megatron-Core's gather from the tensor-parallel region, which on a CPU asks for the current CUDA device."""

    @staticmethod
    def forward(ctx: Any, shard_NV: Tensor) -> Tensor:
        ctx.rank, ctx.width = _group().rank(), shard_NV.shape[1]
        shards = [torch.empty_like(shard_NV) for _ in range(_group().size())]
        dist.all_gather(shards, shard_NV.detach(), group=_group())
        return torch.cat(shards, dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        return grad_outputs[0][:, ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width].contiguous()


def _sum_over_ranks(part_N: Tensor) -> Tensor:
    return _SumOverRanks.apply(part_N)
