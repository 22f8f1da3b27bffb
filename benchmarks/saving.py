"""How long training stands still for a checkpoint, and what host memory that takes: these saves and Megatron-Core's.

    python -m benchmarks.saving [--hidden 1024] [--layers 12] [--repeats 3] [--work runs/saving]

Four ranks (TP2 x DP2, distributed optimizer, bf16 with fp32 masters) on this machine save one and the same model:

- at once: training waits for all of it
- in the background: training goes on, and nothing changes before all is written (a long rollout)
- in the background, changed at once: the weights change right after the save began, so all must be copied
- Megatron-Core's dist_checkpointing.save with its optimizer formats dp_reshardable (same layout only) and
  fully_reshardable (any layout; gathers every data-parallel rank's share on one)

Stall: what a step is longer by. Memory: the largest growth of a rank's resident memory meanwhile (forked writers of
Megatron-Core, which share pages with it, are not counted). Kinds take turns; the median of the repeats is told.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import small_qwen
from benchmarks.small_qwen import Sizes
from megatron_cppo import launch
from megatron_cppo.ranks import leave

RANKS = 4
SETTLE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Measured:
    """One save of one kind, on one rank."""

    stall_seconds: float
    whole_seconds: float
    memory_bytes: int


def sizes_of(given: argparse.Namespace) -> Sizes:
    """A decoder of the given size, and hardly any vision tower."""
    return Sizes(
        hidden=given.hidden,
        layers=given.layers,
        ffn=4 * given.hidden,
        vocab=32_000,
        vision_hidden=64,
        vision_layers=2,
        prompts=2,
        samples_per_prompt=2,
        image_side=2,
        text_tokens=4,
        shortest_response=2,
        longest_response=4,
        seed=1,
    )


def resident() -> tuple[int, int]:
    """Resident memory of this process now, and its peak since `forget_peak`, in bytes."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(told[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def forget_peak() -> None:
    """Begin to look for the peak anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(work: Callable[[], float]) -> Measured:
    """`work` returns for how long training went on meanwhile."""
    import torch.distributed as dist

    dist.barrier()
    forget_peak()
    before, start = resident()[0], time.perf_counter()
    free = work()
    whole = time.perf_counter() - start
    return Measured(whole - free, whole, max(0, resident()[1] - before))


def kinds(policy: Any, folder: Path) -> dict[str, Callable[[], float]]:
    """What saves, each into a folder of its own."""

    def at_once() -> float:
        policy.save(folder / "once", at_step=1, progress={}, keep=1)
        return 0.0

    def in_background(*, changes: bool) -> float:
        policy.save(folder / "background", at_step=1, progress={}, keep=1, background=True)
        if changes:
            policy._about_to_change()
        start = time.perf_counter()
        while not policy._save.saving.is_done:
            time.sleep(SETTLE_SECONDS)
        free = time.perf_counter() - start
        policy.finish_save()
        return free

    return {
        "at once": at_once,
        "in the background": lambda: in_background(changes=False),
        "in the background, changed at once": lambda: in_background(changes=True),
        "Megatron-Core, dp_reshardable": lambda: by_megatron(policy, folder / "dp", "dp_reshardable"),
        "Megatron-Core, fully_reshardable": lambda: by_megatron(policy, folder / "fully", "fully_reshardable"),
    }


def by_megatron(policy: Any, folder: Path, form: str) -> float:
    """Save with Megatron-Core's own functions, parallel over DP as it recommends."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    from megatron_cppo.policy.checkpoint import initialise_adam

    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    initialise_adam(policy.trained)
    model: dict[str, Any] = {
        f"model{number}": {k: v for k, v in chunk.sharded_state_dict().items() if not k.endswith("_extra_state")}
        for number, chunk in enumerate(policy.trained.chunks)
    }
    state = policy.trained.optimizer.sharded_state_dict(model, metadata={"distrib_optim_sharding_type": form})
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(), policy.groups.collection.dp_cp, False
    )
    dist_checkpointing.save(model | {"optimizer": state}, str(folder), strategy)
    return 0.0


def run_rank(given: argparse.Namespace) -> None:
    """One rank; rank 0 writes what all measured."""
    import torch
    import torch.distributed as dist

    from megatron_cppo.plan import resolve
    from megatron_cppo.policy import platform
    from megatron_cppo.policy.policy import Policy
    from megatron_cppo.train import join_ranks

    sizes = sizes_of(given)
    platform.activate("cpu")
    join_ranks("cpu")
    config = small_qwen.make_config(given.work / "model", sizes, max_tokens=256)
    policy_config = dataclasses.replace(config.policy, tensor_parallel=2, distributed_optimizer=True)
    trainer = dataclasses.replace(config.trainer, num_gpus=RANKS)
    config = dataclasses.replace(config, policy=policy_config, trainer=trainer)
    plan = resolve(config)
    # A plan refuses bf16 on a CPU, which computes in fp32: here nothing is computed in it.
    config = dataclasses.replace(config, policy=dataclasses.replace(policy_config, precision="bf16"))
    policy = Policy(config, plan, pixels=small_qwen.pixels(sizes), banned_ids=())
    every = kinds(policy, given.work / "saved")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in every}
    for number in range(given.repeats + 1):
        for name, work in every.items():
            ranks: list[Any] = [None] * RANKS
            dist.all_gather_object(ranks, dataclasses.asdict(measure(work)))
            if number:  # the first round warms up
                found[name].append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    if dist.get_rank() == 0:
        told = {"found": found, "parameters": plan.shape.num_parameters, "torch": torch.__version__}
        (given.work / "found.json").write_text(json.dumps(told))
    dist.barrier()


def table(told: dict[str, Any], folder: Path) -> list[str]:
    """Markdown: each kind's medians, and the bytes that it left on the disk."""
    places = ("once", "background", "background", "dp", "fully")
    first = statistics.median(each["stall_seconds"] for each in told["found"]["at once"])
    lines = ["| | stall, s | x | until whole, s | memory a rank, MiB | on disk, MiB |", "| --- |" + " ---: |" * 5]
    for (name, each), place in zip(told["found"].items(), places, strict=True):
        stall, whole, memory = (statistics.median(m[key] for m in each) for key in each[0])
        size = sum(path.stat().st_size for path in (folder / place).rglob("*") if path.is_file())
        cells = [f"{stall:.2f}", f"{stall / first:.2f}", f"{whole:.2f}", f"{memory / 2**20:.0f}", f"{size / 2**20:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str]) -> int:
    """Run the ranks and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers")
    parser.add_argument("--repeats", type=int, default=3, help="saves of each kind, after one that warms up")
    parser.add_argument("--work", type=Path, default=Path("runs/saving"), help="folder for model and checkpoints")
    given = parser.parse_args(arguments)
    if "RANK" in os.environ:
        run_rank(given)
        return 0
    small_qwen.make_checkpoint(given.work / "model", sizes_of(given))
    environment = dict(os.environ) | launch.loopback_interface() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.saving", *arguments]
    status = launch.run_ranks(command, num_ranks=RANKS, environment=environment)
    if status:
        return status
    told = json.loads((given.work / "found.json").read_text())
    print(
        f"{told['parameters']:,} parameters, {RANKS} ranks (TP2 x DP2), torch {told['torch']}; {given.repeats} repeats"
    )
    print()
    print("\n".join(table(told, given.work / "saved")))
    shutil.rmtree(given.work / "saved")
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
