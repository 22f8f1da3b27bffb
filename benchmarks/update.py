"""What does one update of CPPO cost next to GRPO's, and next to CPPO computed as its authors' releases do?

    python -m benchmarks.update [--shares 0 0.25 0.3 0.5 1] [--repeats 5] [--prompts 16] [--max-tokens 2048] ...

A real Qwen2.5-VL of random weights on one CPU rank, synthetic images and answers. A share p of the samples, drawn at
random, has a positive advantage: those are CPPO's gated samples, the only ones that get perturbed views. Every variant
is `Policy.update`, optimizer included, on the same model and the same samples. Variants take turns, in a random order
within each repeat, and every ratio is of two times of the same repeat; GRPO runs twice in each, their mean is what the
others are divided by, and their ratio shows the noise. Tables give medians [quartiles].

The vision tower is timed apart: how often an image is encoded depends on the packing, its share of the time on the
sizes (benchmarks/stopwatch.py says how). Images are processed beforehand and not part of any time. Memory is the peak
of torch's allocations during an update, above its start, from the profiler's record of every allocation.

"The releases' way" (benchmarks/releases.py): three views of every sample, all logits of all tokens, images encoded per
sample. That its loss and gradients are CPPO's is checked first.

Bars: CPPO/GRPO <= 1 + 2.2 p; with perception.stop_gradient_views <= 1 + 0.8 p (both without the tower); the releases'
way >= 1.6 times CPPO's time at p = --at, with the tower and without; CPPO's memory <= 1.25 times GRPO's. A bar that
lies within the quartiles is called open. Exit status 1 when one is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.releases import RELEASES, with_own_images
from benchmarks.small_qwen import Sizes, make_checkpoint, make_config, make_groups, pixels
from benchmarks.stopwatch import CLOCKS, Timing, TowerClock, machine, peak_bytes
from megatron_cppo.algo.objective import OBJECTIVES, Objective
from megatron_cppo.config import Config
from megatron_cppo.data.packing import build_batch, passes_of
from megatron_cppo.plan import resolve
from megatron_cppo.policy import platform, step
from megatron_cppo.policy.policy import Policy
from megatron_cppo.types import Batch

GRPO, AGAIN, RELEASES_WAY = "GRPO", "GRPO again", "the releases' way"
COST, COST_STOPPED, SPEEDUP, MEMORY = 2.2, 0.8, 1.6, 1.25
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute an update, on samples of which a share is gated."""

    name: str
    share: float
    config: Config
    objective: Objective
    own_images: bool = False

    @property
    def title(self) -> str:
        """Name and share, one line of a table."""
        return self.name if self.name.startswith(GRPO) else f"{self.name}, p = {self.share:g}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A variant's packed rows, and what makes the policy compute it."""

    variant: Variant
    batch: Batch
    settings: step.LossSettings

    def update(self, policy: Policy) -> dict[str, float]:
        """One update of this variant; the policy's metrics."""
        policy.settings = self.settings
        return policy.update(self.batch)

    @property
    def naive_vision_tokens(self) -> int:
        """Image tokens if every sample's images were encoded for every view that it carries."""
        return sum(
            len(self.variant.objective.views_for(sample)) * sum(grid.num_tokens for grid in sample.prompt.grids)
            for sample in self.batch.samples
        )

    @property
    def row_tokens(self) -> list[list[int]]:
        """Tokens of each packed row of every pass; the last pass is the one with gradients."""
        return [[row.token_ids_T.numel() for row in rows[0]] for rows in passes_of(self.batch.updates[0])]


def variants(base: Config, shares: Sequence[float], at: float) -> list[Variant]:
    """All rows of the tables. The two of GRPO differ in nothing."""

    def cppo(name: str, share: float, **perception: Any) -> Variant:
        config = dataclasses.replace(base, perception=dataclasses.replace(base.perception, **perception))
        return Variant(name, share, config, OBJECTIVES["cppo"])

    grpo = dataclasses.replace(base, algorithm=dataclasses.replace(base.algorithm, objective="grpo"))
    return [
        *(Variant(name, at, grpo, OBJECTIVES["grpo"]) for name in (GRPO, AGAIN)),
        *(cppo("CPPO", share) for share in sorted({*shares, at})),
        *(cppo("CPPO, views stopped", share, stop_gradient_views=True) for share in sorted({*shares, at} - {0.0})),
        *(cppo(f"CPPO, {kind}", at, aggregation=kind) for kind in ("microbatch", "global")),
        Variant(RELEASES_WAY, at, base, RELEASES, own_images=True),
    ]


def gated(sizes: Sizes, share: float) -> list[bool]:
    """Which samples are gated: exactly `share` of them, at random; those of a smaller share are among them."""
    order = list(range(sizes.prompts * sizes.samples_per_prompt))
    random.Random(sizes.seed).shuffle(order)
    chosen = set(order[: round(share * len(order))])
    return [index in chosen for index in range(len(order))]


def prepare(policy: Policy, sizes: Sizes, variant: Variant) -> Prepared:
    """Pack the variant's samples and choose its loss; the policy's model stays."""
    groups = make_groups(sizes, gated(sizes, variant.share))
    batch = build_batch(
        with_own_images(groups) if variant.own_images else groups,
        views_for=variant.objective.views_for,
        num_updates=1,
        packing=resolve(variant.config).packing,
        score=False,
        constant_views=variant.config.perception.stop_gradient_views,
        count_masked=variant.config.perception.aggregation == "global",
    )
    settings = dataclasses.replace(policy.settings, objective=variant.objective, perception=variant.config.perception)
    return Prepared(variant, batch, settings)


def check_same_loss(policy: Policy, ours: Prepared, releases: Prepared) -> str:
    """Loss and gradients of both ways, with CPL at full weight; raises where they differ by more than rounding."""
    found: list[tuple[float, dict[str, torch.Tensor], int]] = []
    for prepared in (ours, releases):
        perception = dataclasses.replace(prepared.settings.perception, coefficient=1.0)
        settings = dataclasses.replace(prepared.settings, perception=perception)
        seen = step.gradients(policy.trained, prepared.batch, prepared.batch.updates[0], settings)
        loss = math.fsum(float(outcome.loss) for _, outcome in seen)
        masked = sum(int(outcome.mask_N.sum()) for _, outcome in seen if outcome.mask_N is not None)
        found.append((loss, {name: gradient.double().clone() for name, gradient in policy.gradients()}, masked))
    (loss, wanted, masked), (other_loss, other, other_masked) = found
    worst = max(float((other[name] - gradient).norm() / gradient.norm()) for name, gradient in wanted.items())
    assert masked == other_masked, f"{masked} masked tokens, {other_masked} in the releases' way"
    assert abs(loss - other_loss) <= 1e-4 * abs(loss), f"losses {loss} and {other_loss}"
    assert worst <= 1e-3, f"a gradient differs by {worst:.1e}"
    return (
        f"Same loss (lambda 1, {masked} masked tokens): CPPO {loss:.7f}, the releases' way {other_loss:.7f}; gradients "
        f"of {len(wanted)} tensors differ by at most {worst:.1e} (relative, L2)."
    )


Times = dict[str, list[Timing]]
"""Of every variant, by title: one timing per repeat."""


def measure(policy: Policy, clock: TowerClock, every: Sequence[Prepared], repeats: int, seed: int) -> Times:
    """Time all variants in turn, in another order each repeat."""
    times: Times = {prepared.variant.title: [] for prepared in every}
    order = list(every)
    shuffler = random.Random(seed)
    for repeat in range(repeats):
        shuffler.shuffle(order)
        for prepared in order:
            times[prepared.variant.title].append(clock.time(partial(prepared.update, policy)))
        print(f"repeat {repeat + 1} of {repeats} done", file=sys.stderr)
    return times


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over the repeats."""

    low: float
    middle: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of these values; of a single one, that one."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return Spread(low, median(values), high)

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


Part = Callable[[Timing], float]


def _all(timing: Timing) -> float:
    return timing.seconds


def _without_tower(timing: Timing) -> float:
    return timing.without_tower


def ratio(times: Times, title: str, part: Part, *, to: str | None = None) -> Spread:
    """A variant's time over another's of the same repeat; over the mean of both of GRPO's without `to`."""
    if to is None:
        base = [(part(one) + part(two)) / 2 for one, two in zip(times[GRPO], times[AGAIN], strict=True)]
    else:
        base = [part(timing) for timing in times[to]]
    return Spread.of([part(timing) / other for timing, other in zip(times[title], base, strict=True)])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, aligned for reading as text."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def time_table(times: Times, every: Sequence[Prepared]) -> str:
    """Seconds and ratios of every variant."""
    rows = []
    for title in (prepared.variant.title for prepared in every):
        to = GRPO if title == AGAIN else None
        seconds = [median(map(part, times[title])) for part in (_all, _without_tower)]
        ratios = [ratio(times, title, part, to=to) for part in (_without_tower, _all)]
        rows.append([title, *(f"{value:.2f}" for value in seconds), *ratios])
    return table(["update", "seconds", "without tower", "/ GRPO without tower", "/ GRPO"], rows)


def share_table(sizes: Sizes, shares: Sequence[float]) -> str:
    """How many prompts have at least one gated sample."""
    n = sizes.samples_per_prompt
    rows = []
    for share in shares:
        flags = gated(sizes, share)
        hit = sum(any(flags[i : i + n]) for i in range(0, len(flags), n))
        rows.append(
            [f"{share:g}", f"{sum(flags)}/{len(flags)}", f"{hit / sizes.prompts:.2f}", f"{1 - (1 - share) ** n:.2f}"]
        )
    return table(["p", "gated samples", "prompts with one", "1 - (1 - p)^n"], rows)


def vision_table(times: Times, every: Sequence[Prepared], releases: int) -> str:
    """Image tokens that the tower encodes in an update, as the metric says and as counted at the tower."""
    rows = []
    for prepared in every:
        title = prepared.variant.title
        counted, logged = times[title][0].tower_tokens, times[title][0].metrics["tokens/vision"]
        tower = median(timing.tower_seconds for timing in times[title])
        rows_of_passes = " + ".join(str(len(tokens)) for tokens in prepared.row_tokens)
        rows.append(
            [title, rows_of_passes, f"{logged:.0f}", counted, prepared.naive_vision_tokens, releases, f"{tower:.2f}"]
        )
    head = ["update", "rows of its passes", "tokens/vision", "counted", "naive", "releases", "tower, seconds"]
    return table(head, rows)


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit on a measured ratio."""

    claim: str
    found: Spread
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """met, missed, or open where the limit lies within the quartiles."""
        if self.found.low < self.limit < self.found.high:
            return "open"
        beyond = self.found.middle < self.limit if self.at_least else self.found.middle > self.limit
        return "missed" if beyond else "met"


def bars(times: Times, every: Sequence[Prepared], peaks: dict[str, int], at: float) -> list[Bar]:
    """All bars, in the order of the tables."""
    found = []
    for prepared in every:
        variant = prepared.variant
        slope = {"CPPO": COST, "CPPO, views stopped": COST_STOPPED}.get(variant.name)
        if slope is not None:
            claim = f"{variant.title}: / GRPO without tower <= 1 + {slope} p"
            found.append(Bar(claim, ratio(times, variant.title, _without_tower), 1 + slope * variant.share))
    ours, releases = f"CPPO, p = {at:g}", f"{RELEASES_WAY}, p = {at:g}"
    for words, part in (("tower included", _all), ("without tower", _without_tower)):
        claim = f"{releases}: / CPPO, {words} >= {SPEEDUP}"
        found.append(Bar(claim, ratio(times, releases, part, to=ours), SPEEDUP, at_least=True))
    memory = peaks[ours] / peaks[GRPO]
    found.append(Bar(f"{ours}: peak memory / GRPO <= {MEMORY}", Spread(memory, memory, memory), MEMORY))
    return found


def report(policy: Policy, sizes: Sizes, config: Config, given: argparse.Namespace) -> list[Bar]:
    """Check, measure, print."""
    every = [prepare(policy, sizes, variant) for variant in variants(config, given.shares, given.at)]
    by_title = {prepared.variant.title: prepared for prepared in every}
    ours, releases = f"CPPO, p = {given.at:g}", f"{RELEASES_WAY}, p = {given.at:g}"
    print(share_table(sizes, sorted({*given.shares, given.at})))
    print(f"\n{check_same_loss(policy, by_title[ours], by_title[releases])}\n")
    by_title[GRPO].update(policy)  # a warm-up, as the check was: the optimizer makes its state
    peaks = {
        title: peak_bytes(partial(by_title[title].update, policy))
        for title in (GRPO, ours, f"CPPO, views stopped, p = {given.at:g}", releases)
    }
    clock = TowerClock(policy.trained.chunks[0].visual, CLOCKS[given.clock])
    times = measure(policy, clock, every, given.repeats, sizes.seed)
    print(time_table(times, every))
    kinds = [ours, f"CPPO, microbatch, p = {given.at:g}", f"CPPO, global, p = {given.at:g}"]
    rows = [
        [title, ratio(times, title, _without_tower, to=ours), ratio(times, title, _all, to=ours)] for title in kinds
    ]
    print("\n" + table(["perception.aggregation", "/ sample without tower", "/ sample"], rows))
    print("\n" + vision_table(times, every, by_title[releases].naive_vision_tokens))
    rows = [
        [title, max(by_title[title].row_tokens[-1]), f"{peak / MIB:.0f}", f"{peak / peaks[GRPO]:.2f}"]
        for title, peak in peaks.items()
    ]
    print("\n" + table(["peak memory", "tokens of the largest trained row", "MiB above the start", "/ GRPO"], rows))
    found = bars(times, every, peaks, given.at)
    rows = [[bar.claim, f"{bar.limit:.2f}", bar.found, bar.verdict] for bar in found]
    print("\n" + table(["bar", "limit", "measured", "verdict"], rows))
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name: str, value: int, words: str) -> None:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} (default {value})")

    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.3, 0.5, 1], metavar="P")
    parser.add_argument("--at", type=float, default=0.3, help="the share of all comparisons that have only one")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: steadier, where others compute too"
    )
    flag("repeats", 5, "how often every variant is timed")
    flag("threads", 2, "of torch")
    flag("max-tokens", 2048, "policy.max_tokens_per_microbatch of all variants")
    flag("prompts", 16, "prompts of an update")
    flag("samples-per-prompt", 5, "n")
    flag("image-side", 8, "image tokens along a side of the square image, so 64 of them")
    flag("text-tokens", 36, "of a prompt, on average")
    flag("shortest-response", 60, "tokens")
    flag("longest-response", 150, "tokens")
    flag("hidden", 192, "the decoder's width, a multiple of 64")
    flag("ffn", 512, "the decoder's inner width")
    flag("layers", 4, "of the decoder")
    flag("vocab", 2048, "ids; few, as a published model's head is about a tenth of its decoder")
    flag("vision-hidden", 128, "the tower's width, a multiple of 32")
    flag("vision-layers", 2, "of the tower")
    flag("seed", 0, "of weights, samples and order")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Build the model, measure and print; exit status 1 when a bar is missed."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    sizes = Sizes(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Sizes)})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder, sizes)
        config = make_config(folder, sizes, max_tokens=given.max_tokens)
        dist.init_process_group(
            platform.backend("cpu"), store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=1)
        )
        policy = Policy(config, resolve(config), pixels=pixels(sizes), banned_ids=())
        count = {name: tensor.numel() for name, tensor in policy.weights()}
        tower = sum(number for name, number in count.items() if "visual." in name)
        head = sizes.vocab * sizes.hidden
        print(f"{machine()}\n")
        print(
            f"{sizes.prompts} prompts x {sizes.samples_per_prompt} samples, {sizes.grid.num_tokens} image tokens each; "
            f"millions of parameters: decoder {(sum(count.values()) - tower - head) / 1e6:.1f}, "
            f"head {head / 1e6:.1f} (tied), tower {tower / 1e6:.1f}\n"
        )
        found = report(policy, sizes, config, given)
        dist.destroy_process_group()
    return 1 if any(bar.verdict == "missed" for bar in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
