"""Train a vision-language model from a recipe.

    python -m megatron_cppo.train RECIPE [--section.field VALUE ...] [--check]

RECIPE is a Python file with a function config() -> Config, or the config.json of an earlier run. Any field can be
overridden. --check prints the config, the plan and every problem, and starts nothing. Without a scheduler's RANK in
the environment, all ranks are started on this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megatron_cppo import config as configuration
from megatron_cppo import launch
from megatron_cppo.config import Config, ConfigError, UserError
from megatron_cppo.plan import Plan, describe, resolve

if TYPE_CHECKING:
    from megatron_cppo.data.prompts import Phase, PromptSource
    from megatron_cppo.evaluate import Evaluation
    from megatron_cppo.loop import Run
    from megatron_cppo.rewards.scoring import Reward
    from megatron_cppo.rollout.engine import Engine

USER_ERROR = 2
TIMEOUT = timedelta(minutes=30)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a mistake of the user, else what a failing rank returned."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    check = "--check" in words
    words = [word for word in words if word != "--check"]
    if not words or words[0] in ("-h", "--help"):
        _show_help(words)
        return 0 if words else USER_ERROR
    try:
        config = read_config(words[0], words[1:])
        plan = check_all(config)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return USER_ERROR
    if check:
        _show(config, plan)
        return 0
    if "RANK" not in os.environ:
        environment = dict(os.environ)
        if config.policy.device == "cpu":
            threads = max(1, (os.cpu_count() or 1) // config.trainer.num_gpus)
            environment = launch.loopback_interface() | {"OMP_NUM_THREADS": str(threads)} | environment
        return launch.run_ranks(launch.rank_command(words), num_ranks=plan.num_ranks, environment=environment)
    return run_rank(config, plan)


def check_all(config: Config) -> Plan:
    """The plan of `config`. Raises one ConfigError with the problems of plan, rewards and run folder."""
    from megatron_cppo.rewards import RewardError, parse_terms
    from megatron_cppo.rewards import resolve as resolve_reward
    from megatron_cppo.runlog import refuse_other_config

    problems, plan = [], None
    try:
        plan = resolve(config)
    except ConfigError as error:
        problems.append(str(error))
    try:
        for term in parse_terms(config.algorithm.rewards):
            resolve_reward(term.name)
    except RewardError as error:
        problems.append(f"  algorithm.rewards: {error}")
    try:
        refuse_other_config(Path(config.trainer.run_dir), config)
    except ConfigError as error:
        problems.append(f"  trainer.run_dir: {error}")
    if plan is None or problems:
        raise ConfigError("\n".join(problems))
    return plan


def read_config(recipe: str, flags: Sequence[str]) -> Config:
    """The recipe's config with the command line's overrides. Raises ConfigError; an unknown flag ends the process."""
    path = Path(recipe)
    if not path.is_file():
        raise ConfigError(f"recipe {recipe!r} does not exist; give a .py file with config(), or a saved config.json")
    start, earlier = Config(), []
    if path.suffix == ".py":
        spec = importlib.util.spec_from_file_location("recipe", path)
        assert spec is not None, f"{path} cannot be a module"
        assert spec.loader is not None, f"{path} has no loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses of the recipe look their module up
        spec.loader.exec_module(module)
        if not hasattr(module, "config"):
            raise ConfigError(f"recipe {recipe!r} has no function config() -> Config; add one")
        start = module.config()
        if not isinstance(start, Config):
            raise ConfigError(f"recipe {recipe!r}: config() must return a Config, got {start!r}; return Config(...)")
    else:
        try:
            earlier = configuration.flags(json.loads(path.read_text()))
        except ValueError as error:
            raise ConfigError(f"recipe {recipe!r} is not a saved config ({error})") from error
    return tyro.cli(Config, default=start, args=[*earlier, *flags], config=(tyro.conf.FlagConversionOff,), prog=recipe)


def _show_help(words: Sequence[str]) -> None:
    sys.stdout.write(f"{__doc__}\n")
    if words:
        with contextlib.suppress(SystemExit):
            tyro.cli(Config, args=["--help"], config=(tyro.conf.FlagConversionOff,), prog="RECIPE")


def _show(config: Config, plan: Plan) -> None:
    lines = ["config"]
    for section, fields in dataclasses.asdict(config).items():
        lines += [f"  {section}.{name} = {value}" for name, value in fields.items()]
    sys.stdout.write("\n".join([*lines, "plan", describe(plan), "no problems"]) + "\n")


def run_rank(config: Config, plan: Plan) -> int:
    """One rank, from its environment to the end of its loop."""
    import torch
    import torch.distributed as dist

    from megatron_cppo.loop import LOOPS
    from megatron_cppo.policy import platform

    launch.die_with_parent()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != plan.num_ranks:
        sys.stderr.write(f"trainer.num_gpus is {plan.num_ranks}, but {world} ranks were started; make them equal\n")
        return USER_ERROR
    _log_to(Path(config.trainer.run_dir), rank)
    if config.policy.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    platform.activate(config.policy.device)
    dist.init_process_group(platform.backend(config.policy.device), rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        with build_run(config, plan) as run:
            LOOPS[config.algorithm.objective](run)
    except UserError as error:
        logging.getLogger("megatron_cppo").error("%s", error)  # rank 0 speaks on stderr, every rank in its own file
        return USER_ERROR
    finally:
        dist.destroy_process_group()
    return 0


@contextlib.contextmanager
def build_run(config: Config, plan: Plan) -> Iterator[Run]:
    """Make everything that a loop drives, on this rank. The process group must be up."""
    import torch.distributed as dist

    from megatron_cppo.data.tokenizer import vocabulary
    from megatron_cppo.loop import Run
    from megatron_cppo.policy.model import DTYPES
    from megatron_cppo.policy.policy import Policy
    from megatron_cppo.rewards.grader import Grader
    from megatron_cppo.rewards.scoring import Reward
    from megatron_cppo.rollout.transformers import TransformersEngine
    from megatron_cppo.runlog import RunLog

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
    )
    sources = _prompt_sources(config, log.phase)
    policy = Policy(config, plan, pixels=lambda key: sources[key.split].pixels(key), banned_ids=words.banned_ids)
    engine = TransformersEngine(
        config.model.path,
        pixels=lambda key: sources[key.split].pixels(key),
        banned_ids=words.banned_ids,
        decode=words.decode,
        max_response_tokens=config.rollout.max_response_tokens,
        max_sequences=config.rollout.max_sequences,
        seed=trainer.seed,
        group=policy.groups.world,
        end_ids=words.eos_ids,
        dtype=DTYPES[config.policy.precision],
        device=config.policy.device,
    )
    grader = Grader(
        algorithm.rewards, workers=trainer.grader_processes, deadline_seconds=trainer.grader_timeout_seconds
    )
    with grader:
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
            evaluation=_evaluation(config, sources, engine, reward),
            log=log,
        )


def _prompt_sources(config: Config, phase: Phase) -> dict[str, PromptSource]:
    from megatron_cppo.data.prompts import PromptSource

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
    for split, source in sources.items():
        logging.getLogger("megatron_cppo").info("%s: %d rows, dropped %s", split, len(source), source.dropped or "none")
    return sources


def _evaluation(config: Config, sources: dict[str, PromptSource], engine: Engine, reward: Reward) -> Evaluation | None:
    from megatron_cppo.evaluate import Evaluation

    if "evaluation" not in sources:
        return None
    source, trainer = sources["evaluation"], config.trainer
    return Evaluation(
        prompts=tuple(source.take(0, len(source))),
        generate=lambda prompts: engine.generate(
            prompts, samples_per_prompt=trainer.evaluation_samples, temperature=trainer.evaluation_temperature
        ),
        grade=reward,
        portion=max(1, config.rollout.max_sequences * config.trainer.num_gpus // trainer.evaluation_samples),
    )


def _log_to(run_dir: Path, rank: int) -> None:
    """Rank 0 speaks on stderr; every rank writes its own file. Libraries' warnings go there too, and only there."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank{rank}.log")]
    if rank == 0:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    quiet_libraries(handlers[0])


def quiet_libraries(handler: logging.Handler) -> None:
    """Send what other libraries warn of to `handler` alone, and let them draw no progress bars."""
    for name in ("megatron", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    warned = logging.getLogger("py.warnings")
    warned.addHandler(handler)
    warned.propagate = False
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


if __name__ == "__main__":
    sys.exit(main())
