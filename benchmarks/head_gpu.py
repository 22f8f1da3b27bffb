"""How near the head's Triton kernels come to the memory's speed, on one GPU: bytes moved, and the share of a copy's.

    python -m benchmarks.head_gpu [--rows 8192] [--vocabulary 151936] [--tensor-parallel 1 2]
    python -m benchmarks.head_gpu --interpret --rows 4 --vocabulary 640    # no GPU: runs every line, times nothing

The floor of the forward is one read of the logits, of the backward one read and one write, of a column tile or a whole
row alike; what is measured is divided by the speed of a device-to-device copy of the same size, measured in the same
run. Tensor-parallel shards are emulated one after the other: their sums are merged as ranks' are, only the all-gather
of a few floats a row is missing. The fused head is set against its matrix products alone. The last table runs one rank
on each GPU that is there (NCCL) and sets the head against others.

Every number is checked first: statistics and gradients of some rows against float64.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import head_gpu_ranks
from megatron_cppo.algo.kernels import triton_kernels
from megatron_cppo.algo.shard_statistics import Shard, coefficients, finish, merge
from megatron_cppo.algo.vocab_parallel import linear_statistics

REPEATS = 10
BAR = 0.8


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of `REPEATS` calls after two; on CUDA by events."""
    times = []
    for repeat in range(REPEATS + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            function()
            elapsed = 1e3 * (time.perf_counter() - began)
        if repeat >= 2:
            times.append(elapsed)
    return statistics.median(times)


def copy_speed(num_bytes: int, device: torch.device) -> float:
    """Bytes a millisecond of a copy, counting what is read and what is written."""
    source = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * num_bytes / milliseconds(lambda: target.copy_(source), device)


def shards_of(views: Sequence[Tensor], parallel: int) -> list[tuple[Shard, list[Tensor]]]:
    vocabulary = views[0].shape[1]
    width = vocabulary // parallel
    common = {"world_size": parallel, "width": width, "vocab_size": vocabulary, "temperature": 1.0, "banned_ids": ()}
    return [
        (Shard.of_rank(rank, **common), [view[:, rank * width : (rank + 1) * width] for view in views])
        for rank in range(parallel)
    ]


def worst_error(
    views: Sequence[Tensor], targets: Tensor, found: Tensor, gradients: Sequence[Tensor]
) -> tuple[float, float]:
    """Of the statistics in nats, and of the gradients relative to the largest, on the rows that were kept."""
    leaves = [view.double().requires_grad_() for view in views]
    logps = [leaf.log_softmax(-1) for leaf in leaves]
    p = logps[0].exp()
    last = [-(p * logps[0]).sum(-1), *((p * (logps[0] - logp)).sum(-1) for logp in logps[1:])]
    wanted = [*(logp.gather(1, targets[:, None]).squeeze(1) for logp in logps), *last]
    given = [*found[:, 2], *found[:, 3]]
    error = max(float((a.double() - b).detach().abs().max()) for a, b in zip(given, wanted, strict=True))
    torch.stack(wanted).sum().backward()
    relative = max(
        float((gradient.double() - leaf.grad).abs().max() / leaf.grad.abs().max())
        for gradient, leaf in zip(gradients, leaves, strict=True)
        if leaf.grad is not None
    )
    return error, relative


def measure(num_views: int, rows: int, vocabulary: int, parallel: int, device: torch.device) -> list[str]:
    """One line of the first table: forward and backward of all shards."""
    kernels = triton_kernels()
    torch.manual_seed(0)
    first = (3 * torch.randn(rows, vocabulary, device=device)).bfloat16()
    views = [first, *((first + 0.3 * torch.randn_like(first)) for _ in range(num_views - 1))]
    targets = torch.randint(vocabulary, (rows,), device=device)
    shards = shards_of(views, parallel)

    def forward() -> Tensor:
        return finish(merge(torch.stack([kernels.view_sums(part, targets, s) for s, part in shards]), 1.0), 1.0)

    found = forward()
    ones = torch.ones(num_views, rows, device=device)
    given = coefficients(found, ones, ones[0], ones[1:] if num_views > 1 else None, 1.0)

    def backward() -> None:
        for shard, part in shards:
            kernels.view_gradients(part, targets, given, shard, part)

    kept = [view[:16].clone() for view in views]
    forward_time = milliseconds(forward, device)
    copy = copy_speed(min(first.nbytes, 4 * 2**30), device)
    backward()  # over the logits, so each further one differentiates what the last one wrote: as much work
    errors = worst_error(kept, targets[:16], found[:, :, :16], [view[:16] for view in views])
    backward_time = milliseconds(backward, device)
    read = num_views * first.nbytes
    shares = read / forward_time / copy, 2 * read / backward_time / copy
    met = "-" if device.type == "cpu" else "met" if min(shares) >= BAR else "missed"
    return [
        *(str(number) for number in (num_views, rows, parallel)),
        f"{read / 2**30:.2f}",
        f"{forward_time:.3f}",
        f"{backward_time:.3f}",
        f"{copy * 1e3 / 1e12:.2f}",
        *(f"{share:.2f}" for share in shares),
        f"{errors[0]:.1e}",
        f"{errors[1]:.1e}",
        met,
    ]


def measure_fused(rows: int, hidden_size: int, vocabulary: int, device: torch.device) -> list[str]:
    """One line of the second table: the fused head against its products, and what it holds beside its inputs."""
    hidden = torch.randn(rows, hidden_size, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5).bfloat16().requires_grad_()
    total = torch.zeros(vocabulary, hidden_size, device=device)
    targets = torch.randint(vocabulary, (rows,), device=device)

    def head() -> None:
        hidden.grad = None
        logp, entropy = linear_statistics(
            hidden, weight, targets, group=None, vocab_size=vocabulary, backend="fused", weight_total_VH=total
        )
        (logp + entropy).sum().backward()

    gradient = torch.zeros(rows, min(vocabulary, 16384), device=device, dtype=torch.bfloat16)

    def products() -> None:
        """Logits, logits again, and both gradients, in bfloat16 and tile by tile."""
        with torch.no_grad():
            for begin in range(0, vocabulary, gradient.shape[1]):
                tile = weight[begin : begin + gradient.shape[1]]
                part = gradient[:, : len(tile)]
                for _ in range(2):
                    hidden @ tile.t()
                part @ tile
                part.t() @ hidden

    head_time, products_time = milliseconds(head, device), milliseconds(products, device)
    peak = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head()
        peak = (torch.cuda.max_memory_allocated() - before) / (4 * rows * vocabulary)
    ratio = head_time / products_time
    return [str(rows), str(hidden_size), f"{head_time:.2f}", f"{products_time:.2f}", f"{ratio:.2f}", f"{peak:.3f}"]


def table(header: str, lines: Sequence[Sequence[str]]) -> None:
    names = header.split(" | ")
    widths = [max(len(row[column]) for row in (names, *lines)) for column in range(len(names))]
    for row in (names, ["-" * width for width in widths], *lines):
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print()


def main(arguments: list[str]) -> int:
    """Print both tables; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="response tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=8192, help="of the fused head (72B: 8192)")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--interpret", action="store_true", help="on the CPU, in Triton's interpreter: no timings")
    given = parser.parse_args(arguments)
    if given.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("head_gpu: no CUDA device; run it on a GPU, or with --interpret, small, to see that it runs")
        return 2
    device = torch.device("cpu" if given.interpret else "cuda")
    name = "Triton's interpreter (times mean nothing)" if given.interpret else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, vocabulary {given.vocabulary}, bfloat16\n")
    lines = [measure(1, given.rows, given.vocabulary, parallel, device) for parallel in given.tensor_parallel]
    masked = max(1, given.rows // 7)
    lines += [measure(3, masked, given.vocabulary, parallel, device) for parallel in given.tensor_parallel]
    table(
        "views | rows | TP | GiB read | forward ms | backward ms | copy TB/s | forward/copy | backward/copy | "
        f"error nat | gradient error | bar {BAR}",
        lines,
    )
    size = 64 if given.interpret else given.hidden_size
    table(
        "rows | hidden | fused head ms | its products ms | ratio | peak u",
        [measure_fused(rows, size, given.vocabulary, device) for rows in (masked, given.rows)],
    )
    table(
        head_gpu_ranks.HEADER,
        head_gpu_ranks.measured(given.rows, given.vocabulary, milliseconds, interpret=given.interpret),
    )
    print("peak u: memory beside inputs and the weight's gradient, in float32 buffers [rows, vocabulary]")
    return int(not given.interpret and any(line[-1] == "missed" for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
