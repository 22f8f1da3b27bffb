"""Train a vision-language model from a recipe.

    python -m megatron_cppo.train RECIPE [--section.field VALUE ...] [--check [--measure [--gpu-gib 80]]]

RECIPE is a Python file with a function config() -> Config, or the config.json of an earlier run. Any field can be
overridden. --check prints the config, the plan and every problem, and starts nothing; with --measure, what a GPU of
each stage will hold: the run's own code on fake tensors, for which a folder with the model's config.json is enough.
Without a scheduler's RANK in the environment, all ranks are started on this machine. When a rank fails, all end, and
why is the last that is printed; when they hang, every rank's stacks are; logs/ in the run folder keeps both.
`kill -USR1` shows the stacks meanwhile; after `kill -USR2` the run saves at the end of its step, and
leaves with status 75: the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megatron_cppo import config as configuration
from megatron_cppo import launch, pretrained, ranks, watchdog
from megatron_cppo.config import Config, ConfigError, UserError
from megatron_cppo.plan import Plan, describe, resolve
from megatron_cppo.recipe import UserCode, find, from_python
from megatron_cppo.serving import SERVER_KEY, refuse_interpreter

if TYPE_CHECKING:
    from megatron_cppo.watchdog import Watch

USER_ERROR = 2
PROGRAM = "python -m megatron_cppo.train RECIPE"
TIMEOUT = timedelta(minutes=30)
GPU_GIB, H100_GIB = "--gpu-gib", 80.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a mistake of the user, 75 for a run that left as it was told,
    else what a failing rank returned."""
    # A rank, and not the process that starts it; from here on its launcher sees it, and prints what it raises.
    watch = watchdog.attach(os.environ[ranks.WATCH]) if ranks.WATCH in os.environ else None
    words = list(sys.argv[1:] if arguments is None else arguments)
    asked = {word for word in words if word in ("--check", "--measure")}
    words = [word for word in words if word not in asked]
    if not words or words[0] in ("-h", "--help"):
        _show_help(words)
        return 0 if words else USER_ERROR
    try:
        words, gpu_gib = _gpu_gib(words, asked)
        config = read_config(words[0], words[1:])
        if "--measure" in asked:
            return _measure(config, gpu_gib)
        plan = check_all(config)
        if asked:
            _show(config, plan)
            return 0
        return _launch(words, config, plan) if watch is None else run_rank(config, plan, watch)
    except UserError as error:
        if watch is None:
            sys.stderr.write(f"{error}\n")
        else:
            watch.say(error, kind="user")
        return USER_ERROR


def _gpu_gib(words: list[str], asked: Set[str]) -> tuple[list[str], float]:
    """The words without --gpu-gib, and its value. Raises ConfigError where it, or --measure, stands alone."""
    if "--measure" in asked and "--check" not in asked:
        raise ConfigError("--measure: adds to --check, and starts nothing; give both")
    if GPU_GIB not in words:
        return words, H100_GIB
    if "--measure" not in asked:
        raise ConfigError(f"{GPU_GIB}: is what --check --measure compares with; give all three, or leave it out")
    place = words.index(GPU_GIB)
    value = words[place + 1] if place + 1 < len(words) else ""
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise ConfigError(f"{GPU_GIB}: must be GiB of memory of one GPU, got {value!r}; for example {GPU_GIB} 80")
    return words[:place] + words[place + 2 :], found


def _measure(config: Config, gpu_gib: float) -> int:
    """Show what each stage holds, and then what the run still lacks; 2 where a stage does not fit."""
    plan, lacking = resolve(config, files=False), ""
    try:
        check_all(config)
    except ConfigError as error:
        lacking = f"before this can run:\n{error}\n"
    from megatron_cppo.rehearsal import rehearse

    quiet_libraries(logging.NullHandler())
    table, fits = rehearse(config, plan, gpu_gib=gpu_gib)
    sys.stdout.write(f"memory\n{table}\n{lacking}")
    return 0 if fits else USER_ERROR


def _launch(words: Sequence[str], config: Config, plan: Plan) -> int:
    """Start the ranks and wait for their end: all of them, or the one that a scheduler wants of this process."""
    environment, task = dict(os.environ), None
    if "RANK" in environment:
        task = _task(environment, plan, config.policy.device)
    elif config.policy.device == "cpu":
        threads = max(1, (os.cpu_count() or 1) // config.trainer.num_gpus)
        environment = launch.loopback_interface() | {"OMP_NUM_THREADS": str(threads)} | environment
    return launch.run_ranks(
        launch.rank_command(words),
        num_ranks=plan.num_ranks,
        environment=environment,
        log_dir=_logs(config),
        hang_minutes=config.trainer.hang_minutes,
        task=task,
    )


def _task(environment: Mapping[str, str], plan: Plan, device: str) -> launch.Task:
    local = ("LOCAL_RANK",) if device == "cuda" else ()
    absent = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *local) if name not in environment]
    if absent:
        raise ConfigError(f"RANK is set, but not {', '.join(absent)}; set them, or unset RANK to start all ranks here")
    numbers = ("RANK", "WORLD_SIZE", "MASTER_PORT", *local)
    wrong = [f"{name}={environment[name]!r}" for name in numbers if not environment[name].isdecimal()]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: must be numbers; set them, or unset RANK to start all ranks here")
    rank, world, port = (int(environment[name]) for name in numbers[:3])
    if rank >= world:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE {world}; ranks count from 0")
    if world != plan.num_ranks:
        raise ConfigError(f"trainer.num_gpus is {plan.num_ranks}, but {world} ranks were started; make them equal")
    return launch.Task(rank, world, environment["MASTER_ADDR"], port)


def check_all(config: Config) -> Plan:
    """The plan of `config`. Raises one ConfigError with the problems of plan, checkpoint, rewards and run folder."""
    from megatron_cppo.resume import refuse_other_config
    from megatron_cppo.rewards import parse_terms
    from megatron_cppo.rewards import resolve as resolve_reward
    from megatron_cppo.saved import refuse_incomplete

    problems: list[str] = []
    plan = None
    try:
        plan = resolve(config)
    except ConfigError as error:
        problems += str(error).splitlines()
    others = []
    if os.path.isfile(Path(config.model.path) / "config.json"):  # else the plan has said it
        others += pretrained.problems(config.model.path)
    try:
        for term in parse_terms(config.algorithm.rewards):
            with UserCode(f"the module of reward {term.name!r}"):
                resolve_reward(term.name)
    except UserError as error:
        others.append(f"algorithm.rewards: {error}")
    try:
        refuse_interpreter(config)
    except ConfigError as error:
        others.append(str(error))
    if config.vllm.addresses and config.rollout.engine == "vllm" and not os.environ.get(SERVER_KEY):
        others.append(f"vllm.addresses: separate servers ask for a key; set {SERVER_KEY} to theirs")
    if config.debug.train_on and Path(config.debug.train_on).is_dir():
        try:
            refuse_incomplete(config)
        except UserError as error:
            others.append(str(error))
    try:
        refuse_other_config(Path(config.trainer.run_dir), config)
    except (ConfigError, OSError) as error:
        others.append(f"trainer.run_dir: {error}")
    problems += [f"  {number}. {text}" for number, text in enumerate(others, len(problems) + 1)]
    if plan is None or problems:
        raise ConfigError("\n".join(problems))
    return plan


def read_config(recipe: str, flags: Sequence[str]) -> Config:
    """The recipe's config with the command line's overrides. Raises ConfigError; an unknown flag ends the process."""
    path, start, earlier = find(recipe), Config(), []
    if path.suffix == ".py":
        start = from_python(path)
    else:
        try:
            saved = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ConfigError(f"recipe {recipe!r} is not a saved config ({error}); give a .py or .json file") from error
        earlier = configuration.flags(saved)
    return tyro.cli(Config, default=start, args=[*earlier, *flags], config=(tyro.conf.FlagConversionOff,), prog=PROGRAM)


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


def join_ranks(device: str, *, timeout: timedelta = TIMEOUT) -> None:
    """Set up torch.distributed among the ranks that the launcher started; rank 0 was given the store's socket."""
    import torch.distributed as dist

    from megatron_cppo.policy import platform

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0,
        timeout=TIMEOUT,
        master_listen_fd=int(os.environ[launch.STORE]) if rank == 0 else None,
    )
    dist.init_process_group(platform.backend(device), store=store, rank=rank, world_size=world, timeout=timeout)


def refuse_differing(config: Config) -> None:
    """Raise the same ConfigError on all ranks unless all have the same config: each has run the recipe itself."""
    import torch.distributed as dist

    mine = {
        f"{section}.{name}": value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }
    every: list[dict[str, object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    differing = [name for name in mine if any(other[name] != every[0][name] for other in every)]
    if differing:
        told = "; ".join(f"{name}: {' or '.join(sorted({repr(o[name]) for o in every}))}" for name in differing)
        raise ConfigError(
            f"the recipe gave the ranks different configs: {told}; it is run by every rank, so let it not depend on "
            "time, process or machine"
        )


def run_rank(config: Config, plan: Plan, watch: Watch) -> int:
    """One rank, from its environment to the end of its loop; returns its exit status. Raises UserError."""
    import torch
    import torch.distributed as dist

    from megatron_cppo.assembly import build_run
    from megatron_cppo.loop import Left
    from megatron_cppo.loop_async import loop_of
    from megatron_cppo.policy import platform

    os.register_at_fork(after_in_child=ranks.die_with_parent)  # whatever a library forks here
    rank = int(os.environ["RANK"])
    _log_to(_logs(config), rank)
    if config.policy.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    platform.activate(config.policy.device)
    watch.enter(0, "rendezvous")
    # A hang is to be named by the launcher, before a collective gives up.
    join_ranks(
        config.policy.device, timeout=max(TIMEOUT, timedelta(minutes=min(config.trainer.hang_minutes, 1e6) + 10))
    )
    refuse_differing(config)
    watch.enter(0, "build")
    status = 0
    # Not to be undone after an error: the other ranks may be in a collective, and closing would wait for them.
    if config.debug.replay:
        _replay(config, plan, watch)
    else:
        try:
            with build_run(config, plan, os.environ, watch=watch) as run:
                loop_of(config)(run)
        except Left:
            status = watchdog.LEFT
    dist.destroy_process_group()
    return status


def _replay(config: Config, plan: Plan, watch: Watch) -> None:
    """Compute a skipped update again (debug.replay). The run folder's lock and logs are another's."""
    import torch.distributed as dist

    from megatron_cppo.assembly import prompt_sources
    from megatron_cppo.data.lookup import RowFinder
    from megatron_cppo.data.tokenizer import vocabulary
    from megatron_cppo.policy.policy import Policy
    from megatron_cppo.replay import replay

    @contextlib.contextmanager
    def phase(name: str, _: int) -> Iterator[Callable[[int], None]]:
        watch.enter(0, name)
        yield lambda _: watch.advance()

    trained_on = dataclasses.replace(config, data=dataclasses.replace(config.data, evaluation=()))
    rows = prompt_sources(trained_on, phase, dist.group.WORLD)["train"]
    policy = Policy(config, plan, pixels=rows.pixels, banned_ids=vocabulary(config.model.path).banned_ids)
    with phase("replay", 0) as advance:
        replay(config, plan, policy, find=RowFinder(rows), advance=advance)


def _logs(config: Config) -> Path:
    """Where the ranks of this start write their logs; a replay leaves those of the run alone."""
    return Path(config.debug.replay or config.trainer.run_dir) / "logs"


def _log_to(folder: Path, rank: int) -> None:
    """Rank 0 speaks on stderr; every rank writes its own file. Libraries' warnings go there too, and only there."""
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
    ranks.leave(main())
