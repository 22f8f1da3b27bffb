"""From a config and its plan to the parts of one run, wired together on this rank.

Owns which part gets what from which; knows nothing of ranks' starts, of the command line, or of what a loop does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_cppo.config import Config
from megatron_cppo.data.damage import leave_out_damaged
from megatron_cppo.data.lookup import RowFinder
from megatron_cppo.data.prompts import Phase, PromptSource
from megatron_cppo.data.tokenizer import vocabulary
from megatron_cppo.evaluate import Evaluation
from megatron_cppo.loop import Run
from megatron_cppo.plan import Plan
from megatron_cppo.policy.policy import Policy
from megatron_cppo.rewards.grader import Grader
from megatron_cppo.rewards.scoring import Reward
from megatron_cppo.rollout.absent import NoEngine
from megatron_cppo.rollout.build import Needs, build
from megatron_cppo.rollout.engine import Engine
from megatron_cppo.runlog import RunLog
from megatron_cppo.saved import SavedRollouts, Writer
from megatron_cppo.serving import SERVER_KEY
from megatron_cppo.watchdog import Watch


@contextlib.contextmanager
def build_run(
    config: Config, plan: Plan, environment: Mapping[str, str], *, watch: Watch | None = None
) -> Iterator[Run]:
    """Make everything that a loop drives, on this rank. The process group must be up.

    `environment` is this process's: servers inherit it, and it says where they are reached and which GPU is whose.
    """
    algorithm, trainer = config.algorithm, config.trainer
    words = vocabulary(config.model.path)
    log = RunLog(
        Path(trainer.run_dir),
        rank=dist.get_rank(),
        config=config,
        plan_dict=dataclasses.asdict(plan),
        total_steps=trainer.num_steps,
        decode_token=words.decode_token,
        describe_view=(lambda key: sources[key.split].view_name(key)) if algorithm.objective == "cppo" else None,
        wandb_project=trainer.wandb_project,
        watch=watch,
    )
    sources = prompt_sources(config, log.phase, dist.group.WORLD)
    policy = Policy(config, plan, pixels=lambda key: sources[key.split].pixels(key), banned_ids=words.banned_ids)
    rollouts, engine, vocab_size = None, NoEngine(), plan.shape.vocab_size
    if config.debug.train_on:
        rollouts = SavedRollouts(config, find=RowFinder(sources["train"]), vocab_size=vocab_size)
    if rollouts is None or "evaluation" in sources:
        needs = Needs(
            pixels=lambda key: sources[key.split].pixels(key),
            picture=lambda key: sources[key.split].png(key),
            decode=words.decode,
            weights=policy.weights,
            beat=log.watch.advance,
            banned_ids=words.banned_ids,
            end_ids=words.eos_ids,
            max_images=max(1, *(source.max_images for source in sources.values())),
            key=environment.get(SERVER_KEY, ""),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            environment=environment,
        )
        engine = build(config, plan, needs, group=policy.groups.world)
    grader = Grader(
        algorithm.rewards, workers=trainer.grader_processes, deadline_seconds=trainer.grader_timeout_seconds
    )
    with grader, contextlib.closing(engine):
        reward = Reward(
            grader,
            normalize_std=algorithm.normalize_std,
            tolerance=algorithm.reward_tolerance,
            group=policy.groups.world,
        )
        yield Run(
            config=config,
            plan=plan,
            policy=policy,
            engine=engine,
            prompts=sources["train"],
            reward=reward,
            evaluation=_evaluation(config, sources, engine, reward, log.watch),
            log=log,
            writer=Writer(Path(trainer.run_dir), rank=dist.get_rank(), vocab_size=vocab_size),
            rollouts=rollouts,
        )


def prompt_sources(config: Config, phase: Phase, group: dist.ProcessGroup | None) -> dict[str, PromptSource]:
    """Training rows and evaluation rows; of the latter those with a damaged image are left out now, on all ranks."""
    files = {"train": config.data.train, "evaluation": config.data.evaluation}
    sources = {
        split: PromptSource(
            chosen,
            split=split,
            model_path=config.model.path,
            data=config.data,
            model=config.model,
            perception=config.perception,
            seed=config.trainer.seed,
            max_rows=config.trainer.evaluation_rows if split == "evaluation" else 0,
            supervised=split == "train" and config.algorithm.objective == "supervised",
            max_response_tokens=config.rollout.max_response_tokens,
            phase=phase,
        )
        for split, chosen in files.items()
        if chosen
    }
    log = logging.getLogger("megatron_cppo")
    if "evaluation" in sources:
        with phase("decode evaluation", len(sources["evaluation"]) // config.trainer.num_gpus) as advance:
            leave_out_damaged(sources["evaluation"], group=group, advance=advance)
    for split, source in sources.items():
        log.info("%s: %d rows, dropped %s", split, len(source), source.dropped or "none")
    for file in {*map(os.path.realpath, config.data.train)} & {*map(os.path.realpath, config.data.evaluation)}:
        log.warning("data.evaluation: %s is trained on, too: the evaluation does not say what was learned", file)
    return sources


def _evaluation(
    config: Config, sources: dict[str, PromptSource], engine: Engine, reward: Reward, watch: Watch
) -> Evaluation | None:
    if "evaluation" not in sources:
        return None
    source, trainer = sources["evaluation"], config.trainer
    return Evaluation(
        prompts=tuple(source.take(0, len(source))),
        generate=lambda prompts: engine.generate(
            prompts,
            samples_per_prompt=trainer.evaluation_samples,
            temperature=trainer.evaluation_temperature,
            advance=lambda _: watch.advance(),
        ),
        grade=reward,
        portion=max(1, config.rollout.max_sequences * config.trainer.num_gpus // trainer.evaluation_samples),
    )
