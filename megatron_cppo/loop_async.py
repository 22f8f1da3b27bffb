"""The asynchronous loop: the rollouts of later steps run while the policy updates. And which loop a config asks for.

While step k trains on its answers, the engine has the weights of version k - 1, and the prompts of the steps up to
k + max_staleness are in flight: submitted in the order of the steps, each once. So those of step k are submitted under
version k - 1 - max_staleness or later, and no token that it trains on is older. The prompts of a step follow from its
number alone: what was in flight when a run was killed is submitted again, under the weights that it goes on with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from megatron_cppo.config import Config
from megatron_cppo.loop import LOOPS, Run, after, after_update, finish, learn, note_groups, prompts_of, start
from megatron_cppo.loop import sample as sample_alone
from megatron_cppo.types import Group


class _Flight(NamedTuple):
    """A step's prompts in flight: the engine's ticket, and the metric of those that were replaced."""

    ticket: int
    replaced: dict[str, float]


def reinforce_async(run: Run) -> None:
    """Reinforcement learning as in `loop.reinforce`, on rollouts of weights up to `max_staleness` versions old."""
    trainer, ahead = run.config.trainer, run.config.rollout.max_staleness
    step, in_a_row = start(run)
    submitted, flights = step, deque[_Flight]()
    while step < trainer.num_steps:
        step += 1
        with run.log.step(step) as record:
            with record.span("rollout"):
                while submitted < min(step + ahead, trainer.num_steps):
                    submitted += 1
                    flights.append(_submit(run, submitted))
                flight = flights.popleft()
                with run.log.phase("rollout", run.plan.samples_per_step // run.plan.num_ranks) as advance:
                    groups = run.engine.collect(flight.ticket, advance=advance)
            record.add(flight.replaced)
            record.add(staleness(groups, version=step - 1, max_staleness=ahead))
            with record.span("reward"):
                groups = run.reward(groups)
            note_groups(run, step, groups, record)
            batch = learn(run, step, groups, record)
            with record.span("sync"):
                run.engine.load_weights(run.policy.weights(), version=step)
        in_a_row = after_update(run, step, groups, batch, in_a_row)
        after(run, step, batch, in_a_row)
    finish(run)


def loop_of(config: Config) -> Callable[[Run], None]:
    """The loop that `config` asks for."""
    if config.debug.rollout_only:
        return sample_alone
    return reinforce_async if config.rollout.max_staleness > 0 else LOOPS[config.algorithm.objective]


def staleness(groups: Sequence[Group], *, version: int, max_staleness: int) -> dict[str, float]:
    """Metrics of how many versions before `version`, which trains on them, the response tokens were sampled."""
    samples = [sample for group in groups for sample in group.samples]
    ages: dict[int, int] = {}
    for sample in samples:
        last = len(sample.token_ids) - sum(count for _, count in sample.earlier)
        for sampled, count in (*sample.earlier, (sample.version, last)):
            age = version - sampled
            assert 0 <= age <= max_staleness, (
                f"row {sample.prompt.row}: tokens of weights {sampled} would train weights {version}, and may be "
                f"{max_staleness} versions old at most"
            )
            ages[age] = ages.get(age, 0) + count
    return {
        "rollout/staleness_mean": sum(age * count for age, count in ages.items()) / sum(ages.values()),
        "rollout/staleness_max": float(max(ages)),
        "rollout/cut_share": fmean(bool(sample.earlier) for sample in samples),
    }


def _submit(run: Run, step: int) -> _Flight:
    rollout = run.config.rollout
    prompts, replaced = prompts_of(run, step)
    ticket = run.engine.submit(prompts, samples_per_prompt=rollout.samples_per_prompt, temperature=rollout.temperature)
    return _Flight(ticket, replaced)
