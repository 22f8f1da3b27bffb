"""Says, before a run takes a cluster's time, whether its nodes can work together; names the node that cannot.

    srun ... python tools/preflight.py --shared RUN_DIR --gpus 8 --floor-gb-per-second 50

One process per rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the trainer has them. Rank 0
prints one line per problem, or one with what was measured. Exit status: 0 ready, 3 a node is not, 1 nobody can say (a
rank did not come, or went), 2 a wrong call.

1. every rank comes; every node has --gpus GPUs, and each rank's computes; driver, NCCL, Transformer Engine and others
   are the same everywhere
2. a file that rank 0 writes into --shared is seen by all
3. all ranks reduce --mebibytes together, at --floor-gb-per-second of bus bandwidth or more. Below, nodes are measured
   alone and in pairs: a node that is slow with all its partners is the one.

With --device cpu there are no GPUs to count, and gloo takes NCCL's place.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import importlib.metadata
import json
import math
import os
import platform
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PACKAGES = ("torch", "megatron-core", "transformer-engine")
DRIVER = Path("/sys/module/nvidia/version")
CANARY_SECONDS = 10.0
"""A network file system may show so late that a folder has a new file."""
REPEATS = 5
PAIR_ROUNDS = 3
AFTER_RANK_0_SECONDS = 5.0
BAD_NODE = 3
"""Exit status: a node is not as it should be, and would not be in another life of the job either."""

Pair = tuple[str, str]
"""Two nodes, or one node twice: measured alone."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What one rank saw. Example: Facts(rank=9, node="node02", gpus=8, versions={"NCCL": "2.27.3"}, sees_shared=True)

    `gpus` is -1 where none are to be counted; `fault` is what the rank's own GPU said at its first use, "" if it works.
    """

    rank: int
    node: str
    gpus: int
    versions: dict[str, str]
    sees_shared: bool
    fault: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="a folder that all nodes are to share")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that each rank is to see (default 8)")
    parser.add_argument("--floor-gb-per-second", type=float, default=0.0, help="bus bandwidth (default 0: any)")
    parser.add_argument("--mebibytes", type=int, default=256, help="to reduce (default 256)")
    parser.add_argument("--nodes", nargs="*", default=(), help="names in the order of the ranks, to name a missing one")
    parser.add_argument("--seconds", type=float, default=300.0, help="all ranks must have come by then (default 300)")
    chosen = parser.parse_args(arguments)
    absent = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        sys.stderr.write(f"preflight: {', '.join(absent)} not set; start it like the trainer, one process per rank\n")
        return 2
    # A collective that hangs must not hold the nodes.
    faulthandler.dump_traceback_later(3 * chosen.seconds, exit=True)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=chosen.seconds),
        )
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        sys.stderr.write(f"preflight: {socket.gethostname()} cannot reach rank 0 at {where}: {error}\n")
        return 1
    every, bad = meet(store, chosen, rank, world)
    if not bad:
        bad, measured = measure_all(store, chosen, rank, every)
        if not bad and rank == 0:
            counted = "GPUs not counted (device cpu)" if chosen.device == "cpu" else f"{chosen.gpus} GPUs on each"
            nodes = len({facts.node for facts in every})
            print(
                f"preflight: {nodes} nodes, {world} ranks ready; {counted}; all-reduce {measured:.3g} GB/s", flush=True
            )
    if rank == 0:
        for line in bad:
            print(f"preflight: {line}", flush=True)
    if bad and rank != 0:
        # A scheduler ends all tasks with the first, whose status may be on its own node's disk: let it be rank 0's.
        time.sleep(AFTER_RANK_0_SECONDS)
    if len(every) < world:
        return 1
    return BAD_NODE if bad else 0


def meet(store: dist.TCPStore, chosen: argparse.Namespace, rank: int, world: int) -> tuple[list[Facts], list[str]]:
    """All ranks' facts, and what is wrong with them; the same on all ranks."""
    if rank == 0:
        chosen.shared.mkdir(parents=True, exist_ok=True)
        # A name that nobody has looked up before: that it was not there may be remembered, too.
        store.set("word", word := os.urandom(8).hex())
        (chosen.shared / f".preflight-{word}").write_text(word)
        store.set("written", "")
    store.wait(["written"])
    canary = chosen.shared / f".preflight-{store.get('word').decode()}"
    try:
        mine = Facts(
            rank=rank,
            node=socket.gethostname(),
            gpus=count_gpus(chosen.device),
            versions=versions(),
            sees_shared=sees(canary, store.get("word")),
            fault=first_use(chosen.device),
        )
        store.set(f"facts {rank}", json.dumps(dataclasses.asdict(mine)))
        if rank == 0:
            every, missing = gather(store, world, chosen.seconds)
            bad = [f"{name_of(gone, world, chosen.nodes)} did not start" for gone in missing]
            bad += problems(every, gpus=chosen.gpus if chosen.device == "cuda" else -1, shared=str(chosen.shared))
            store.set("verdict", json.dumps([[dataclasses.asdict(facts) for facts in every], bad]))
        store.set_timeout(timedelta(seconds=2 * chosen.seconds + CANARY_SECONDS))
        facts, bad = json.loads(store.get("verdict"))
        store.add("heard", 1)
        deadline = time.monotonic() + CANARY_SECONDS
        # Rank 0 is the store: it stays until all have read it.
        while rank == 0 and store.add("heard", 0) < len(facts) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [Facts(**fact) for fact in facts], bad
    finally:
        if rank == 0:
            canary.unlink(missing_ok=True)


def gather(store: dist.TCPStore, world: int, seconds: float) -> tuple[list[Facts], list[int]]:
    """The facts of those ranks that come in time, and the others' numbers."""
    deadline, missing = time.monotonic() + seconds, list(range(world))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"facts {rank}"])]
        time.sleep(0.01)
    came = [rank for rank in range(world) if rank not in missing]
    return [Facts(**json.loads(store.get(f"facts {rank}"))) for rank in came], missing


def sees(canary: Path, word: bytes) -> bool:
    """Whether the file has the word, at once or after a while."""
    deadline = time.monotonic() + CANARY_SECONDS
    while True:
        if canary.is_file() and canary.read_bytes() == word:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def count_gpus(device: str) -> int:
    """GPUs that this process sees; -1 where it is to work without."""
    return torch.cuda.device_count() if device == "cuda" else -1


def first_use(device: str) -> str:
    """What is wrong with this rank's GPU (held by another process, not there, broken); "" where it adds one and one."""
    if device == "cpu":
        return ""
    try:
        one = torch.ones(()).to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        return "" if float(one + one) == 2.0 else "1 + 1 is not 2"
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        return next(iter(str(error).splitlines()), type(error).__name__)


def versions() -> dict[str, str]:
    """What must be the same on all nodes; "absent" where it is not there."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found["driver"] = DRIVER.read_text().strip() if DRIVER.exists() else "absent"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "absent"
    return found


def problems(every: Sequence[Facts], *, gpus: int, shared: str) -> list[str]:
    """One line for each node and problem; `gpus` of -1 are not counted."""
    nodes = {facts.node: facts for facts in reversed(every)}
    found = [f"{n}: sees {f.gpus} GPUs, needs {gpus}" for n, f in sorted(nodes.items()) if gpus not in (-1, f.gpus)]
    found += [f"{facts.node}: rank {facts.rank}'s GPU: {facts.fault}" for facts in every if facts.fault]
    for name in next(iter(nodes.values())).versions if nodes else ():
        counts = Counter(facts.versions[name] for facts in nodes.values())
        usual = counts.most_common(1)[0][0]
        odd = [(node, facts.versions[name]) for node, facts in sorted(nodes.items()) if facts.versions[name] != usual]
        found += [f"{node}: {name} {version}, on {counts[usual]} others {usual}" for node, version in odd]
    blind = sorted({facts.node for facts in every if not facts.sees_shared})
    return found + [f"{node}: does not see what rank 0 wrote into {shared}; is it on a shared disk?" for node in blind]


def name_of(rank: int, world: int, nodes: Sequence[str]) -> str:
    """A rank with its node, where the names are known.

    >>> name_of(5, 8, ["node01", "node02"])
    'node02 (rank 5)'
    """
    return f"{nodes[rank * len(nodes) // world]} (rank {rank})" if nodes else f"rank {rank}"


def measure_all(
    store: dist.TCPStore, chosen: argparse.Namespace, rank: int, every: Sequence[Facts]
) -> tuple[list[str], float]:
    """What is slow, and the bus bandwidth of all ranks together in GB/s; the same on all ranks."""
    device = torch.device("cpu")
    if chosen.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Longer than the watch of `main`, which shows where it hangs.
    timeout = timedelta(seconds=4 * chosen.seconds)
    backend = "gloo" if chosen.device == "cpu" else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=len(every), timeout=timeout)
    assert dist.group.WORLD is not None, "a group of all ranks"
    together = math.inf  # alone
    if len(every) > 1:
        together = bus_bandwidth(dist.group.WORLD, chosen.mebibytes, device)
    bad: list[str] = []
    if together < chosen.floor_gb_per_second:
        pairs = dict(measure_pairs(every, rank, chosen.mebibytes, device))
        bad = slow(pairs, together, chosen.floor_gb_per_second)
    dist.barrier()
    dist.destroy_process_group()
    return bad, together


def bus_bandwidth(group: dist.ProcessGroup, mebibytes: int, device: torch.device) -> float:
    """GB/s of the median all-reduce over `group`, times 2 (n - 1) / n as in nccl-tests; the same on all its ranks."""
    data, seconds = torch.zeros(mebibytes * 2**18, device=device), []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    slowest = torch.tensor(sorted(seconds[1:])[REPEATS // 2], device=device)  # the first one connects
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return 2 * (group.size() - 1) / group.size() * data.nbytes / float(slowest) / 1e9


def measure_pairs(
    every: Sequence[Facts], rank: int, mebibytes: int, device: torch.device
) -> Iterator[tuple[Pair, float]]:
    """The bus bandwidth of each node alone, where it has several ranks, and of pairs of nodes. Called by all ranks."""
    ranks: dict[str, list[int]] = {}
    for facts in every:
        ranks.setdefault(facts.node, []).append(facts.rank)
    nodes = list(ranks)
    alone = [(node, node) for node in nodes if len(ranks[node]) > 1]
    for pairs in [alone, *pair_rounds(nodes)[:PAIR_ROUNDS]]:
        mine: dict[Pair, float] = {}
        members = {pair: sorted({*ranks[pair[0]], *ranks[pair[1]]}) for pair in pairs}
        groups = {pair: dist.new_group(members[pair]) for pair in pairs}  # by all ranks, in one order
        for pair, group in groups.items():
            if isinstance(group, dist.ProcessGroup) and rank in members[pair]:
                mine[pair] = bus_bandwidth(group, mebibytes, device)
        told: list[dict[Pair, float]] = [{}] * len(every)
        dist.all_gather_object(told, mine)
        yield from {pair: speed for part in told for pair, speed in part.items()}.items()


def pair_rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Rounds in which every node meets one other, and in all of them each other once.

    >>> pair_rounds(["a", "b", "c"])
    [[('b', 'c')], [('a', 'c')], [('a', 'b')]]
    """
    seats: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        across = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append([(min(one, two), max(one, two)) for one, two in across if one is not None and two is not None])
        seats.insert(1, seats.pop())
    return rounds


def slow(pairs: Mapping[Pair, float], together: float, floor: float) -> list[str]:
    """Who is slow when all together are: nodes that are below the floor alone, or with every partner."""
    what = f"all ranks reduce {together:.3g} GB/s, the floor is {floor:.3g}"
    nodes = sorted({node for pair in pairs for node in pair})
    found = []
    for node in nodes:
        alone = pairs.get((node, node))
        best = max((speed for pair, speed in pairs.items() if node in pair and pair != (node, node)), default=None)
        if alone is not None and alone < floor:
            found.append(f"{node}: {alone:.3g} GB/s among its own ranks")
        elif best is not None and best < floor:
            found.append(f"{node}: {best:.3g} GB/s with its best partner")
    if len(nodes) == 2 and len(found) == 2:
        found.append("of two nodes it cannot be told which one is slow")
    return [what, *(found or ["no node is slow alone or in a pair: it is the network between many of them"])]


if __name__ == "__main__":
    sys.exit(main())
