"""Every number that follows from the config, and every check across its sections. Standard library only.

`resolve` reports all problems at once, each as what was given, what is required, and the nearest valid value.
Lower layers receive the `Plan` and single sections, never the whole config.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_cppo import architecture
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config, ConfigError, PolicyConfig, type_problems

BYTES = {"fp32": 4, "bf16": 2}
PARQUET = b"PAR1"
"""Begins and ends every parquet file."""


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB per rank, of the stage with the most, that do not depend on the data."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    reference_device_gib: float
    reference_host_gib: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, in numbers. All counts are of the whole run, not of one rank, unless named so."""

    shape: ModelShape
    num_ranks: int
    data_parallel: int
    layers_per_stage: tuple[int, ...]
    padded_vocab_size: int
    samples_per_step: int
    prompts_per_update: int
    num_updates: int
    row_multiple: int
    max_tokens_per_microbatch: int
    longest_sample_tokens: int
    views_per_gated_sample: int
    uses_reference: bool
    scores_old_logp: bool
    num_parameters: int
    memory: Memory


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`, the smaller of two.

    >>> nearest_divisor(28, 8)
    7
    """
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def resolve(config: Config) -> Plan:
    """Derive the plan of `config`. Raises one ConfigError that lists every problem."""
    problems = type_problems(config)
    if problems:  # nothing can be compared
        raise ConfigError("\n".join(f"  {number}. {text}" for number, text in enumerate(problems, 1)))
    shape = None
    try:
        shape = architecture.read(config.model.path)
    except ConfigError as error:
        problems.append(str(error))
    problems += _layout_problems(config, shape) + _batch_problems(config) + _value_problems(config)
    problems += _debug_problems(config) + _file_problems(config)
    if problems or shape is None:
        raise ConfigError("\n".join(f"  {number}. {text}" for number, text in enumerate(problems, 1)))
    return _derive(config, shape)


def _derive(config: Config, shape: ModelShape) -> Plan:
    policy, trainer, rollout = config.policy, config.trainer, config.rollout
    supervised = config.algorithm.objective == "supervised"
    reference = config.algorithm.beta > 0 and not supervised
    parallel = policy.tensor_parallel
    data_parallel = trainer.num_gpus // (parallel * policy.pipeline_parallel)
    row_multiple = parallel if policy.sequence_parallel else 1
    return Plan(
        shape=shape,
        num_ranks=trainer.num_gpus,
        data_parallel=data_parallel,
        layers_per_stage=stage_layers(config, shape),
        padded_vocab_size=math.ceil(shape.vocab_size / parallel) * parallel,
        samples_per_step=trainer.prompts_per_step * (1 if supervised else rollout.samples_per_prompt),
        prompts_per_update=trainer.prompts_per_step // trainer.updates_per_step,
        num_updates=trainer.num_steps * trainer.updates_per_step,
        row_multiple=row_multiple,
        max_tokens_per_microbatch=policy.max_tokens_per_microbatch // row_multiple * row_multiple,
        longest_sample_tokens=longest_sample(config),
        views_per_gated_sample=_views(config),
        uses_reference=reference,
        scores_old_logp=trainer.updates_per_step > 1 and not supervised,
        num_parameters=shape.num_parameters,
        memory=_memory(config, shape, data_parallel, reference),
    )


def stage_layers(config: Config, shape: ModelShape) -> tuple[int, ...]:
    """Decoder layers of each pipeline stage, first to last."""
    stages = config.policy.pipeline_parallel
    return config.policy.layers_per_stage or (shape.num_layers // stages,) * stages


def _views(config: Config) -> int:
    return 3 if config.algorithm.objective == "cppo" else 1


def longest_sample(config: Config) -> int:
    """Tokens of the longest possible sample under all of its views; a microbatch must hold it."""
    return _views(config) * (config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1)


def _memory(config: Config, shape: ModelShape, data_parallel: int, reference: bool) -> Memory:
    policy, gib = config.policy, 2**30
    local, trained = _largest_stage(config, shape)
    weights = local * BYTES[policy.precision] / gib
    main = 8 if policy.precision == "fp32" else 12
    shards = data_parallel if policy.distributed_optimizer else 1
    on_device = reference and policy.reference == "device"
    return Memory(
        weights_gib=weights,
        gradients_gib=trained * 4 / gib,
        optimizer_gib=trained * main / shards / gib,
        reference_device_gib=weights if on_device else 0.0,
        reference_host_gib=weights if reference and not on_device else 0.0,
    )


def _largest_stage(config: Config, shape: ModelShape) -> tuple[float, float]:
    """The most parameters that a rank of any stage holds, and the most that one trains."""
    layers, last = stage_layers(config, shape), config.policy.pipeline_parallel - 1
    vocabulary = shape.vocab_size * shape.hidden_size
    held, trained = [], []
    for stage, num_layers in enumerate(layers):
        language = num_layers * shape.layer_parameters
        if stage == 0:
            language += vocabulary
        if stage == last:
            # Tied weights are one tensor on a single stage, and a copy of it on the last of several.
            language += shape.hidden_size + (0 if shape.tied and last == 0 else vocabulary)
        vision = shape.vision.num_parameters if stage == 0 else 0
        share = language / config.policy.tensor_parallel
        held.append(share + vision)
        trained.append(share + (vision if config.model.train_vision else 0))
    return max(held), max(trained)


def _layout_problems(config: Config, shape: ModelShape | None) -> list[str]:
    policy, ranks = config.policy, config.trainer.num_gpus
    model_ranks = policy.tensor_parallel * policy.pipeline_parallel
    problems = []
    if min(model_ranks, ranks) >= 1 and ranks % model_ranks:
        nearest = max(1, round(ranks / model_ranks)) * model_ranks
        problems.append(
            f"trainer.num_gpus: {ranks} ranks cannot be cut into replicas of {model_ranks} "
            f"(TP {policy.tensor_parallel} x PP {policy.pipeline_parallel}); use {nearest}"
        )
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        problems.append("policy.sequence_parallel: splits over TP ranks, but tensor_parallel is 1; turn it off")
    if policy.device == "cpu" and policy.precision != "fp32":
        problems.append("policy.precision: the cpu platform computes in fp32; use --policy.precision fp32")
    if shape is None or policy.tensor_parallel < 1:
        return problems
    counts = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_kv_heads,
        "feed-forward channels": shape.ffn_size,
    }
    undivided = [f"{count} {name}" for name, count in counts.items() if count % policy.tensor_parallel]
    problems += _stage_problems(policy, shape.num_layers)
    if undivided:
        nearest = nearest_divisor(math.gcd(*counts.values()), policy.tensor_parallel)
        problems.append(
            f"policy.tensor_parallel: {policy.tensor_parallel} does not divide the model's {', '.join(undivided)}; "
            f"use {nearest}"
        )
    return problems


def _stage_problems(policy: PolicyConfig, num_layers: int) -> list[str]:
    """How the layers cannot be cut into stages."""
    stages, given = policy.pipeline_parallel, policy.layers_per_stage
    if stages < 1:
        return []
    if stages > num_layers:
        return [f"policy.pipeline_parallel: {stages} stages, but the model has {num_layers} layers; use fewer"]
    even = " ".join(str(num_layers // stages + (stage < num_layers % stages)) for stage in range(stages))
    if given and (len(given) != stages or sum(given) != num_layers or min(given) < 1):
        return [
            f"policy.layers_per_stage: {' '.join(map(str, given))} are {len(given)} stages with {sum(given)} layers; "
            f"pipeline_parallel is {stages}, the model has {num_layers} layers, and each stage needs one; use {even}"
        ]
    if not given and num_layers % stages:
        return [
            f"policy.pipeline_parallel: {stages} does not divide the model's {num_layers} layers; use "
            f"{nearest_divisor(num_layers, stages)}, or cut them yourself: --policy.layers_per_stage {even}"
        ]
    return []


def _batch_problems(config: Config) -> list[str]:
    trainer, problems = config.trainer, []
    if trainer.prompts_per_step >= 1 and trainer.prompts_per_step % max(trainer.updates_per_step, 1):
        nearest = nearest_divisor(trainer.prompts_per_step, trainer.updates_per_step)
        problems.append(
            f"trainer.updates_per_step: {trainer.updates_per_step} does not divide prompts_per_step "
            f"{trainer.prompts_per_step}; use {nearest}"
        )
    needed = longest_sample(config)
    if config.policy.max_tokens_per_microbatch < needed:
        problems.append(
            f"policy.max_tokens_per_microbatch: {config.policy.max_tokens_per_microbatch} cannot hold the longest "
            f"sample, {_views(config)} views x (data.max_prompt_tokens {config.data.max_prompt_tokens} + "
            f"rollout.max_response_tokens {config.rollout.max_response_tokens} - 1); use at least {needed}"
        )
    if config.optimizer.warmup_updates >= trainer.num_steps * max(trainer.updates_per_step, 1):
        problems.append(
            f"optimizer.warmup_updates: {config.optimizer.warmup_updates} leaves no update after the warm-up "
            f"(the run has {trainer.num_steps * trainer.updates_per_step}); use fewer"
        )
    return problems


_BOUNDS: tuple[tuple[str, str, float, float], ...] = (
    ("algorithm", "clip_low", 0, 1),
    ("algorithm", "clip_high", 0, math.inf),
    ("algorithm", "beta", 0, math.inf),
    ("perception", "coefficient", 0, math.inf),
    ("perception", "temperature", 1e-6, math.inf),
    ("perception", "top_fraction", 1e-6, 1),
    ("perception", "min_entropy_shift", 0, math.inf),
    ("rollout", "samples_per_prompt", 1, math.inf),
    ("rollout", "max_response_tokens", 1, math.inf),
    ("rollout", "temperature", 1e-6, math.inf),
    ("rollout", "max_sequences", 1, math.inf),
    ("policy", "tensor_parallel", 1, math.inf),
    ("policy", "pipeline_parallel", 1, math.inf),
    ("optimizer", "learning_rate", 0, math.inf),
    ("optimizer", "max_grad_norm", 0, math.inf),
    ("trainer", "num_gpus", 1, math.inf),
    ("trainer", "num_steps", 1, math.inf),
    ("trainer", "prompts_per_step", 1, math.inf),
    ("trainer", "updates_per_step", 1, math.inf),
    ("trainer", "keep_checkpoints", 1, math.inf),
    ("trainer", "evaluation_samples", 1, math.inf),
    ("trainer", "grader_processes", 1, math.inf),
    ("trainer", "grader_timeout_seconds", 1e-3, math.inf),
    ("trainer", "evaluation_temperature", 0, math.inf),
    ("trainer", "evaluation_rows", 0, math.inf),
    ("trainer", "evaluate_every_steps", 0, math.inf),
    ("trainer", "save_every_steps", 0, math.inf),
    ("trainer", "keep_samples_every_steps", 0, math.inf),
    ("trainer", "max_skipped_updates", 1, math.inf),
    ("trainer", "hang_minutes", 0, math.inf),
    ("trainer", "seed", 0, 2**31 - 1),
    ("optimizer", "min_learning_rate", 0, math.inf),
    ("optimizer", "warmup_updates", 0, math.inf),
    ("optimizer", "weight_decay", 0, math.inf),
    ("optimizer", "beta1", 0, 1 - 1e-9),
    ("optimizer", "beta2", 0, 1 - 1e-9),
    ("optimizer", "epsilon", 1e-30, math.inf),
    ("data", "max_prompt_tokens", 1, math.inf),
    ("data", "max_image_pixels", 1, math.inf),
    ("model", "min_pixels", 1, math.inf),
)


def _value_problems(config: Config) -> list[str]:
    problems = [
        f"{section}.{name}: {value} is not a finite number; give one"
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    for section, name, low, high in _BOUNDS:
        value = getattr(getattr(config, section), name)
        if math.isfinite(value) and not low <= value <= high:
            problems.append(f"{section}.{name}: {value} is outside [{low}, {high}]; use {min(max(value, low), high)}")
    if config.algorithm.dual_clip and config.algorithm.dual_clip <= 1:
        problems.append(
            f"algorithm.dual_clip: {config.algorithm.dual_clip} must exceed 1, or be 0 to turn it off; 3.0 is usual"
        )
    if config.model.min_pixels > config.model.max_pixels:
        problems.append(
            f"model.min_pixels: {config.model.min_pixels} exceeds model.max_pixels {config.model.max_pixels}; lower it"
        )
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        problems.append(
            f"optimizer.min_learning_rate: {config.optimizer.min_learning_rate} exceeds learning_rate "
            f"{config.optimizer.learning_rate}; lower it"
        )
    problems += [
        f"policy.megatron_overrides: {pair!r} is no name=value; write for instance layernorm_epsilon=1e-5"
        for pair in config.policy.megatron_overrides
        if not pair.partition("=")[2]
    ]
    if not config.perception.preserving or not config.perception.removing:
        problems.append("perception.preserving and perception.removing need at least one perturbation each")
    return problems


def _debug_problems(config: Config) -> list[str]:
    debug = config.debug
    modes = {"rollout_only": debug.rollout_only, "train_on": debug.train_on, "replay": debug.replay}
    chosen, problems = [name for name, value in modes.items() if value], []
    if len(chosen) > 1:
        problems.append(f"debug: {' and '.join(chosen)} were chosen, and exclude each other; keep one")
    if config.algorithm.objective == "supervised":
        problems += [
            f"debug.{name}: a supervised run has no rollouts; leave it out"
            for name in ("save_rollouts", "rollout_only", "train_on")
            if getattr(debug, name)
        ]
    if debug.train_on and not Path(debug.train_on).is_dir():
        problems.append(f"debug.train_on: {debug.train_on} is no folder; give the folder `rollouts` of a run")
    if debug.replay and not (Path(debug.replay) / "skipped.json").is_file():
        problems.append(f"debug.replay: {debug.replay} is no skipped step; give a folder run_dir/skipped/step_...")
    return problems


def _file_problems(config: Config) -> list[str]:
    problems = []
    if not config.data.train:
        problems.append("data.train: no parquet file given; use --data.train FILE [FILE ...]")
    for section, files in (("train", config.data.train), ("evaluation", config.data.evaluation)):
        problems += [f"data.{section}: {said}" for file in files if (said := _parquet_problem(Path(file)))]
    problems += _run_dir_problems(Path(config.trainer.run_dir))
    if config.trainer.wandb_project and importlib.util.find_spec("wandb") is None:
        problems.append(
            "trainer.wandb_project: the package wandb is not installed; pip install wandb, or leave it empty"
        )
    return problems


def _parquet_problem(path: Path) -> str:
    """What is wrong with a data file as far as its ends tell; "" when nothing is."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PARQUET))
            file.seek(max(0, path.stat().st_size - len(PARQUET)))
            end = file.read()
    except FileNotFoundError:
        return f"{path} does not exist; check the path"
    except IsADirectoryError:
        return f"{path} is a folder; name its files: {' '.join(map(str, sorted(path.glob('*.parquet')))) or '(none)'}"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); check the path and its permissions"
    if start != PARQUET:
        return f"{path} is not a parquet file, it begins with {start!r}; convert it, e.g. with pandas' to_parquet"
    return (
        "" if end == PARQUET else f"{path} is cut off: {path.stat().st_size} bytes, the end is missing; copy it again"
    )


def _run_dir_problems(path: Path) -> list[str]:
    """Why nothing can be written to the run folder, or why it cannot be made."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(there):
        return [f"trainer.run_dir: {there} is a file, not a folder; choose another --trainer.run_dir"]
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return [f"trainer.run_dir: {there} cannot be written to; choose another --trainer.run_dir"]
    return []


def describe(plan: Plan) -> str:
    """The plan as aligned text, one number a line."""
    facts = {name: value for name, value in dataclasses.asdict(plan).items() if not isinstance(value, dict)}
    facts |= {name: f"{value:.3f}" for name, value in dataclasses.asdict(plan.memory).items()}
    facts["reference"] = _reference_text(plan)
    width = max(len(name) for name in facts)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())


def _reference_text(plan: Plan) -> str:
    if not plan.uses_reference:
        return "none (beta is 0)"
    return "in host memory" if plan.memory.reference_host_gib else "on the device"
