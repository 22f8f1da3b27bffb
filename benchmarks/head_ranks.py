"""One rank of `benchmarks.head`: checks and measures every implementation, and writes what it found as JSON.

    python -m benchmarks.head_ranks RANK STORE RESULT OPTIONS     (started by benchmarks.head, one process per rank)

How things are measured:
- Time: implementations take turns within each repeat, in an order that rotates, after a barrier and with fresh inputs;
  a step took as long as its slower rank.
- Memory: every allocation and release of torch's CPU allocator, as torch.profiler reports them, temporaries inside of
  kernels and what the collectives' own threads allocate included. So held and peak are exact sums of bytes. Inputs
  were there before and do not count, nor do outputs count as held; gradients count.
- Weight gradients: a peak without them leaves out what is allocated in backward and is as large as the weight, in its
  own type or in float32. `Sizes.check` refuses sizes where something else would be as large.
- Collectives: calls of torch.distributed's functions, and the bytes of the tensor that a rank hands over.
- Errors: worst of a small case against float64; in nats for statistics, relative to the largest entry for gradients.

Shapes: N rows (tokens), V columns of this rank's shard, H hidden size.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import head_peers
from benchmarks.head_peers import ENTROPY, KL, LOGP, Implementation, Statistics
from megatron_cppo.algo import vocab_parallel

RANKS = 2
MARK = "end of forward"
TOKENS, VIEWS, LINEAR = "tokens", "views", "linear"
OURS, OVERWRITING, OURS_LOGP = "this project", "this project, overwrite_logits", "this project, log-prob only"
CHUNKED = 'this project, backend="torch"'
COMPILED = 'this project, backend="compiled"'
VERL_ROW = f"verl {head_peers.VERL}"
COMPOSITION = "autograd composition"
# Where each collective takes the tensor that a rank hands over: its place, and its name.
COLLECTIVES = {
    "all_reduce": (0, "tensor"),
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input"),
    "broadcast": (0, "tensor"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the inputs of one case are; `vocab_size` is that of all ranks together."""

    rows: int
    vocab_size: int
    hidden: int

    @property
    def width(self) -> int:
        """Columns of one rank."""
        return self.vocab_size // RANKS

    @property
    def unit(self) -> int:
        """u: the bytes of one float32 buffer of a rank's logits."""
        return 4 * self.rows * self.width

    def check(self) -> None:
        """Raise ValueError where the weight's gradient would be as large as a buffer of logits."""
        if {2 * self.rows, 4 * self.rows} & {2 * self.hidden, 4 * self.hidden}:
            raise ValueError(
                f"{self.rows} rows and hidden size {self.hidden}: logits and the weight's gradient have equally many "
                "bytes, so that the measured allocations cannot be told apart; choose another --hidden"
            )


@dataclass(frozen=True, slots=True)
class Options:
    """What the ranks are asked to measure; a JSON object on their command line."""

    rows: list[int]
    repeats: int
    temperature: float
    vocab_size: int
    hidden: int
    table: str
    with_verl: bool


@dataclass(slots=True)
class Measurement:
    """One implementation at one number of rows; seconds per repeat, memory in u, collectives as (calls, bytes)."""

    table: str
    name: str
    rows: int
    failure: str = ""
    seconds: list[float] = field(default_factory=list)
    held: float = 0.0
    peak: float = 0.0
    peak_without_weight: float = 0.0
    forward: tuple[int, int] = (0, 0)
    backward: tuple[int, int] = (0, 0)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Case:
    """Inputs of one table, and the gradients that its statistics are given."""

    sizes: Sizes
    temperature: float
    leaves: list[Tensor]
    kept: list[Tensor]
    targets_N: Tensor
    grads: Statistics

    def refill(self) -> None:
        """Undo what an implementation wrote into its inputs."""
        with torch.no_grad():
            for leaf, original in zip(self.leaves, self.kept, strict=True):
                leaf.copy_(original)


class Collectives:
    """The calls of torch.distributed's collectives from now on."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        for name, (place, keyword) in COLLECTIVES.items():
            setattr(dist, name, self._counted(getattr(dist, name), place, keyword))

    def _counted(self, function: Callable[..., Any], place: int, keyword: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            handed = named[keyword] if keyword in named else arguments[place]
            parts = handed if isinstance(handed, list) else [handed]
            self.calls.append(sum(part.numel() * part.element_size() for part in parts))
            return function(*arguments, **named)

        return counted

    def take(self) -> tuple[int, int]:
        """Number and bytes of the calls since the last time."""
        number, total = len(self.calls), sum(self.calls)
        self.calls.clear()
        return number, total


def implementations(with_verl: bool) -> dict[str, dict[str, Implementation]]:
    """All that is compared, by table and name; the first of each table is what the others are compared with."""
    verl = {VERL_ROW: head_peers.verl} if with_verl else {}
    return {
        TOKENS: {
            OURS: _tokens(),
            OVERWRITING: _tokens(overwrite_logits=True),
            COMPILED: _tokens(backend="compiled"),
            **verl,
            "full gather, autograd": head_peers.full_gather,
            COMPOSITION: head_peers.autograd_composition,
            OURS_LOGP: _only_logp(_tokens()),
            "Megatron-Core, log-prob only": head_peers.megatron_core,
        },
        VIEWS: {
            OURS: _views(),
            OVERWRITING: _views(overwrite_logits=True),
            COMPILED: _views(backend="compiled"),
            COMPOSITION: head_peers.autograd_composition,
        },
        LINEAR: {
            OURS: _linear("fused"),
            CHUNKED: _linear("torch"),
            "materialised float32 logits": head_peers.materialised,
            "materialised bfloat16 logits": head_peers.materialised_bf16,
        },
    }


def _keywords(width: int, temperature: float) -> dict[str, Any]:
    return {"group": dist.group.WORLD, "vocab_size": RANKS * width, "temperature": temperature}


def _tokens(**more: Any) -> Implementation:
    def run(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
        keywords = _keywords(leaves[0].shape[1], temperature)
        logp_N, entropy_N = vocab_parallel.token_statistics(leaves[0], targets_N, **keywords, **more)
        return {LOGP: logp_N, ENTROPY: entropy_N}

    return run


def _only_logp(implementation: Implementation) -> Implementation:
    return lambda leaves, targets_N, temperature: {LOGP: implementation(leaves, targets_N, temperature)[LOGP]}


def _views(**more: Any) -> Implementation:
    def run(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
        keywords = _keywords(leaves[0].shape[1], temperature)
        found = vocab_parallel.view_statistics(leaves, targets_N, **keywords, **more)
        return {LOGP: found.logp_WN, ENTROPY: found.entropy_N, KL: found.kl_KN}

    return run


def _linear(backend: str) -> Implementation:
    def run(leaves: Sequence[Tensor], targets_N: Tensor, temperature: float) -> Statistics:
        hidden_NH, weight_VH = leaves
        keywords = _keywords(weight_VH.shape[0], temperature)
        logp_N, entropy_N = vocab_parallel.linear_statistics(
            hidden_NH, weight_VH, targets_N, **keywords, backend=backend
        )
        return {LOGP: logp_N, ENTROPY: entropy_N}

    return run


def inputs(table: str, sizes: Sizes, rank: int) -> list[Tensor]:
    """The leaves of one rank, as any rank can draw them: bfloat16, logits of about 3 nat."""
    own = torch.Generator().manual_seed(1 + rank)
    shape = (sizes.rows, sizes.width)
    if table == LINEAR:
        hidden_NH = torch.randn(sizes.rows, sizes.hidden, generator=torch.Generator().manual_seed(0))
        weight_VH = torch.randn(sizes.width, sizes.hidden, generator=own).mul_(3 * sizes.hidden**-0.5)
        return [hidden_NH.bfloat16(), weight_VH.bfloat16()]
    first_NV = torch.randn(shape, generator=own).mul_(3)
    if table == TOKENS:
        return [first_NV.bfloat16()]
    others = [(torch.randn(shape, generator=own).mul_(scale).add_(first_NV)).bfloat16() for scale in (0.1, 1.0)]
    return [first_NV.bfloat16(), *others]


def make_case(table: str, sizes: Sizes, rank: int, temperature: float) -> Case:
    """One rank's inputs; targets and gradients are the same on all ranks."""
    kept = inputs(table, sizes, rank)
    common = torch.Generator().manual_seed(1000)
    per_view = (3, sizes.rows) if table == VIEWS else (sizes.rows,)
    return Case(
        sizes,
        temperature,
        [tensor.clone().requires_grad_() for tensor in kept],
        kept,
        torch.randint(sizes.vocab_size, (sizes.rows,), generator=common),
        {
            LOGP: torch.randn(per_view, generator=common),
            ENTROPY: torch.randn(sizes.rows, generator=common),
            KL: torch.randn(2, sizes.rows, generator=common),
        },
    )


def backward(case: Case, statistics: Statistics) -> tuple[Tensor, ...]:
    """The gradients of all leaves."""
    return torch.autograd.grad(list(statistics.values()), case.leaves, [case.grads[name] for name in statistics])


def errors(table: str, implementation: Implementation, rank: int) -> dict[str, float]:
    """Worst errors of a small case against float64 on one rank, by statistic, and of the gradients."""
    case = make_case(table, Sizes(rows=24, vocab_size=RANKS * 640, hidden=32), rank, temperature=0.7)
    found = implementation(case.leaves, case.targets_N, case.temperature)
    gradients = backward(case, found)
    ranks = [[leaf.double().requires_grad_() for leaf in inputs(table, case.sizes, r)] for r in range(RANKS)]
    if table == LINEAR:
        views = [torch.cat([ranks[0][0] @ leaves[1].t() for leaves in ranks], dim=1)]
        wanted = [ranks[0][0], ranks[rank][1]]
        # The hidden rows' gradient is a rank's part of it; the caller adds the parts up.
        hidden_NH = gradients[0].double()
        dist.all_reduce(hidden_NH)
        gradients = (hidden_NH, gradients[1])
    else:
        views = [torch.cat(shards, dim=1) for shards in zip(*ranks, strict=True)]
        wanted = ranks[rank]
    truth = head_peers.dense_reference(views, case.targets_N, case.temperature)
    loss = torch.stack([(truth[name] * case.grads[name]).sum() for name in found]).sum()
    worst = {name: float((found[name].detach() - truth[name].detach()).abs().max()) for name in found}
    true_gradients = torch.autograd.grad(loss, wanted)
    worst["gradient"] = max(
        float((gradient - true).abs().max() / true.abs().max())
        for gradient, true in zip(gradients, true_gradients, strict=True)
    )
    return worst


def seconds(implementation: Implementation, case: Case) -> float:
    """Of one forward and backward, on this rank."""
    case.refill()
    gc.collect()
    dist.barrier()
    start = time.perf_counter()
    backward(case, implementation(case.leaves, case.targets_N, case.temperature))
    return time.perf_counter() - start


def memory_and_collectives(implementation: Implementation, case: Case, counts: Collectives, into: Measurement) -> None:
    """Fill in what one forward and backward allocates and communicates, see the module's text."""
    case.refill()
    gc.collect()
    counts.take()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        statistics = implementation(case.leaves, case.targets_N, case.temperature)
        into.forward = counts.take()
        with record_function(MARK):
            pass
        gradients = backward(case, statistics)
        into.backward = counts.take()
    assert profiled.profiler is not None, "the profiler ran"
    assert profiled.profiler.kineto_results is not None, "the profiler kept its events"
    events = profiled.profiler.kineto_results.events()
    mark = next(event.start_ns() for event in events if event.name() == MARK)
    allocations = [event for event in events if event.name() == "[memory]"]
    # pyrefly: ignore[missing-attribute]
    changes = sorted(((event.start_ns(), event.nbytes()) for event in allocations), key=lambda change: change[0])
    weight = {4 * case.leaves[-1].numel(), 2 * case.leaves[-1].numel()} if into.table == LINEAR else set()
    held = total = weights = peak = peak_without = 0
    for when, change in changes:
        total += change
        if when < mark:
            held = total
        elif abs(change) in weight:
            weights += change
        peak, peak_without = max(peak, total), max(peak_without, total - weights)
    outputs = sum(tensor.numel() * tensor.element_size() for tensor in statistics.values())
    unit = case.sizes.unit
    into.held, into.peak, into.peak_without_weight = (held - outputs) / unit, peak / unit, peak_without / unit
    del gradients


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """Its result, and why it failed on any rank; fails on all ranks or on none, or the others wait for it."""
    result = failure = None
    try:
        result = function()
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError) as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return result, next((reason for reason in everyone(failure) if reason), "")


def everyone(value: Any) -> list[Any]:
    """The value of every rank."""
    values: list[Any] = [None] * RANKS
    dist.all_gather_object(values, value)
    return values


def measure(table: str, rows: int, options: Options, rank: int, counts: Collectives) -> list[Measurement]:
    """All implementations of one table at one number of rows."""
    sizes = Sizes(rows, options.vocab_size, options.hidden)
    case = make_case(table, sizes, rank, options.temperature)
    running, found = [], []
    for name, implementation in implementations(options.with_verl)[table].items():
        measured = Measurement(table, name, rows)
        found.append(measured)
        worst, measured.failure = attempt(partial(errors, table, implementation, rank))
        if not measured.failure:
            measured.errors = {key: max(ranks[key] for ranks in everyone(worst)) for key in worst}
            seconds(implementation, case)
            memory_and_collectives(implementation, case, counts, measured)
            running.append((implementation, measured))
    for repeat in range(options.repeats):
        turn = repeat % max(1, len(running))
        for implementation, measured in running[turn:] + running[:turn]:
            measured.seconds.append(max(everyone(seconds(implementation, case))))
    for _, measured in running:
        for name in ("held", "peak", "peak_without_weight"):
            setattr(measured, name, max(everyone(getattr(measured, name))))
    return found


def main(arguments: list[str]) -> None:
    """Measure what the options ask for; rank 0 writes the result."""
    rank, store, result, options = (
        int(arguments[0]),
        arguments[1],
        Path(arguments[2]),
        Options(**json.loads(arguments[3])),
    )
    torch.set_num_threads(1)
    counts = Collectives()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    found = []
    for rows in options.rows:
        start = time.monotonic()
        found += measure(options.table, rows, options, rank, counts)
        if rank == 0:
            print(f"{options.table}, {rows} rows: {time.monotonic() - start:.0f} s", flush=True)
    if rank == 0:
        result.write_text(json.dumps([asdict(measured) for measured in found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
