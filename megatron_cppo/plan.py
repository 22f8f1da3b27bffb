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

from megatron_cppo import bounds, families, fp8, layout, serving
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config, ConfigError, Correction, type_problems
from megatron_cppo.layout import nearest_divisor
from megatron_cppo.precision import PRECISIONS

PARQUET = b"PAR1"
"""Begins and ends every parquet file."""


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB per rank, of the stage with the most, that do not depend on the data.

    `fp8_copies_gib`: Transformer Engine holds each matrix of the decoder's layers in FP8 too, and its transpose. As
    parameters in FP8 the two take the place of the one in bf16, of the same size.
    """

    weights_gib: float
    fp8_copies_gib: float
    gradients_gib: float
    optimizer_gib: float
    reference_device_gib: float
    reference_host_gib: float


@dataclass(frozen=True, slots=True)
class Packing:
    """How samples become packed rows, one a microbatch.

    Context parallelism cuts each segment into 2 * CP chunks, sequence parallelism a context rank's tokens into TP runs:
    segments and rows are padded to what can be cut, and rows to what FP8 asks of a rank's tokens. The interleaved
    schedule takes rows in multiples of the stages.
    `drop_oversized`: a gated sample that no row can hold is left out of the update and counted, instead of refused
    before the run.
    """

    data_parallel: int = 1
    max_tokens: int = 8192
    segment_multiple: int = 1
    row_multiple: int = 1
    rows_multiple: int = 1
    drop_oversized: bool = False

    def segment_tokens(self, tokens: int) -> int:
        """Tokens that a segment of `tokens` takes in a row."""
        return math.ceil(tokens / self.segment_multiple) * self.segment_multiple

    def row_tokens(self, tokens: int) -> int:
        """Tokens of a row that holds `tokens`."""
        return math.ceil(tokens / self.row_multiple) * self.row_multiple


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, in numbers. All counts are of the whole run, not of one rank, unless named so.

    `layers_per_chunk` goes through the model: with stages interleaved, chunk c is on stage c modulo the stages.
    """

    shape: ModelShape
    num_ranks: int
    data_parallel: int
    layers_per_chunk: tuple[int, ...]
    padded_vocab_size: int
    samples_per_step: int
    prompts_per_update: int
    num_updates: int
    packing: Packing
    longest_sample_tokens: int
    views_in_one_row: int
    uses_reference: bool
    scores_old_logp: bool
    correction: Correction
    num_parameters: int
    memory: Memory
    serving: serving.Placement | None


def resolve(config: Config, *, files: bool = True) -> Plan:
    """Derive the plan of `config`. Raises one ConfigError that lists every problem; without `files` none of data files,
    folders and what is to be installed, on which a plan does not depend."""
    problems = type_problems(config)
    if problems:  # nothing can be compared
        raise ConfigError("\n".join(f"  {number}. {text}" for number, text in enumerate(problems, 1)))
    shape = None
    try:
        shape = families.read_shape(config.model.path)
    except ConfigError as error:
        problems.append(str(error))
    problems += layout.problems(config, shape) + _batch_problems(config) + bounds.problems(config)
    problems += fp8.problems(config, shape, installed=not files or fp8.transformer_engine_installed())
    problems += serving.problems(config, shape)
    if files:
        problems += _debug_problems(config) + _file_problems(config)
    if problems or shape is None:
        raise ConfigError("\n".join(f"  {number}. {text}" for number, text in enumerate(problems, 1)))
    return _derive(config, shape)


def _derive(config: Config, shape: ModelShape) -> Plan:
    policy, trainer, rollout = config.policy, config.trainer, config.rollout
    supervised = config.algorithm.objective == "supervised"
    reference = config.algorithm.beta > 0 and not supervised
    parallel = policy.tensor_parallel
    data_parallel = trainer.num_gpus // layout.replica_ranks(policy)
    return Plan(
        shape=shape,
        num_ranks=trainer.num_gpus,
        data_parallel=data_parallel,
        layers_per_chunk=layout.layers_per_chunk(policy, shape.num_layers),
        padded_vocab_size=math.ceil(shape.vocab_size / parallel) * parallel,
        samples_per_step=trainer.prompts_per_step * (1 if supervised else rollout.samples_per_prompt),
        prompts_per_update=trainer.prompts_per_step // trainer.updates_per_step,
        num_updates=trainer.num_steps * trainer.updates_per_step,
        packing=packing_of(config, data_parallel),
        longest_sample_tokens=longest_sample(config),
        views_in_one_row=_views(config),
        uses_reference=reference,
        scores_old_logp=(trainer.updates_per_step > 1 or rollout.max_staleness > 0) and not supervised,
        correction=_correction(config),
        num_parameters=shape.num_parameters,
        memory=_memory(config, shape, data_parallel, reference),
        serving=serving.placement(config, shape, value_bytes=PRECISIONS[policy.precision].num_bytes),
    )


def _correction(config: Config) -> Correction:
    """How the loss makes up for an engine that is not the policy; "auto": in some way where the two may differ."""
    differ = PRECISIONS[config.policy.precision].arithmetic != "fp32" or config.rollout.max_staleness > 0
    automatic = "token_truncate" if differ and config.algorithm.objective != "supervised" else "none"
    return automatic if config.algorithm.correction == "auto" else config.algorithm.correction


def packing_of(config: Config, data_parallel: int) -> Packing:
    """How samples become packed rows of that many replicas."""
    policy = config.policy
    # A size below one is a problem of its own, named elsewhere.
    context, tensor = max(1, policy.context_parallel), max(1, policy.tensor_parallel)
    segment = 2 * context if context > 1 else 1
    alignment = PRECISIONS[policy.precision].alignment
    row = math.lcm(segment, alignment * context * (tensor if policy.sequence_parallel else 1))
    return Packing(
        data_parallel=data_parallel,
        max_tokens=policy.max_tokens_per_microbatch // row * row,
        segment_multiple=segment,
        row_multiple=row,
        rows_multiple=policy.pipeline_parallel if policy.virtual_pipeline > 1 else 1,
        drop_oversized=policy.oversized_samples == "drop",
    )


def _views(config: Config) -> int:
    """Segments of a gated sample that must share a row; perturbed views that are constants need not share any."""
    return 3 if config.algorithm.objective == "cppo" and not config.perception.stop_gradient_views else 1


def longest_sample(config: Config, *, views: int = 0) -> int:
    """Tokens of the longest possible sample under all of its views (or `views`); a microbatch must hold it."""
    segment = config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1
    return (views or _views(config)) * packing_of(config, 1).segment_tokens(segment)


def _memory(config: Config, shape: ModelShape, data_parallel: int, reference: bool) -> Memory:
    policy, gib = config.policy, 2**30
    held, trained, experts = _largest_stage(config, shape)
    precision = PRECISIONS[policy.precision]
    weights = held * precision.num_bytes / gib
    copied = precision.recipe is not None and not fp8.parameters_in_fp8(policy)
    masters = 0 if precision.dtype == "float32" else 4
    main = masters + 2 * (4 if config.optimizer.state_precision == "fp32" else 2)
    copies = data_parallel * policy.context_parallel if policy.distributed_optimizer else 1
    ranks = config.trainer.num_gpus // policy.pipeline_parallel
    expert_copies = ranks // _expert_ranks(config) if policy.distributed_optimizer else 1
    on_device = reference and policy.reference == "device"
    return Memory(
        weights_gib=weights,
        fp8_copies_gib=2 * _decoder_matrices(config, shape) / gib if copied else 0.0,
        gradients_gib=trained * 4 / gib,
        optimizer_gib=((trained - experts) / copies + experts / expert_copies) * main / gib,
        reference_device_gib=weights if on_device else 0.0,
        reference_host_gib=weights if reference and not on_device else 0.0,
    )


def _decoder_matrices(config: Config, shape: ModelShape) -> float:
    """The parameters of decoder layers that a rank holds at most."""
    stages, chunks = config.policy.pipeline_parallel, layout.layers_per_chunk(config.policy, shape.num_layers)
    experts = shape.num_experts * shape.expert_parameters
    share = (shape.layer_parameters - experts) / config.policy.tensor_parallel + experts / _expert_ranks(config)
    return share * max(sum(chunks[stage::stages]) for stage in range(stages))


def _expert_ranks(config: Config) -> int:
    """Ranks that share a layer's experts: those of EP, or without EP those of TP, which cut each expert."""
    policy = config.policy
    return policy.expert_parallel if policy.expert_parallel > 1 else policy.tensor_parallel


def _largest_stage(config: Config, shape: ModelShape) -> tuple[float, float, float]:
    """The most parameters that a rank of any stage holds, the most that one trains, and those that are experts'."""
    stages, chunks = config.policy.pipeline_parallel, layout.layers_per_chunk(config.policy, shape.num_layers)
    vocabulary = shape.vocab_size * shape.hidden_size
    experts_of_layer = shape.num_experts * shape.expert_parameters
    held, trained = [], []
    for stage in range(stages):
        num_layers = sum(chunks[stage::stages])
        language = num_layers * (shape.layer_parameters - experts_of_layer)
        if stage == 0:
            language += vocabulary
        if stage == stages - 1:
            # Tied weights are one tensor on a single stage, and a copy of it on the last of several.
            language += shape.hidden_size + (0 if shape.tied and stages == 1 else vocabulary)
        vision = shape.vision.num_parameters if stage == 0 else 0
        experts = num_layers * experts_of_layer / _expert_ranks(config)
        share = language / config.policy.tensor_parallel + experts
        held.append(share + vision)
        trained.append((share + (vision if config.model.train_vision else 0), experts))
    return max(held), *max(trained)


def _batch_problems(config: Config) -> list[str]:
    trainer, problems = config.trainer, []
    if trainer.prompts_per_step >= 1 and trainer.prompts_per_step % max(trainer.updates_per_step, 1):
        nearest = nearest_divisor(trainer.prompts_per_step, trainer.updates_per_step)
        problems.append(
            f"trainer.updates_per_step: {trainer.updates_per_step} does not divide prompts_per_step "
            f"{trainer.prompts_per_step}; use {nearest}"
        )
    packing = packing_of(config, 1)
    views = 1 if config.policy.oversized_samples == "drop" else _views(config)
    needed = longest_sample(config, views=views)
    if packing.max_tokens < needed:
        padded = f", in rows of multiples of {packing.row_multiple}" if packing.row_multiple > 1 else ""
        problems.append(
            f"policy.max_tokens_per_microbatch: {config.policy.max_tokens_per_microbatch} cannot hold the longest "
            f"sample, {views} views x (data.max_prompt_tokens {config.data.max_prompt_tokens} + "
            f"rollout.max_response_tokens {config.rollout.max_response_tokens} - 1){padded}; use at least "
            f"{packing.row_tokens(needed)}"
        )
    if config.optimizer.warmup_updates >= trainer.num_steps * max(trainer.updates_per_step, 1):
        problems.append(
            f"optimizer.warmup_updates: {config.optimizer.warmup_updates} leaves no update after the warm-up "
            f"(the run has {trainer.num_steps * trainer.updates_per_step}); use fewer"
        )
    return problems


def _debug_problems(config: Config) -> list[str]:
    debug = config.debug
    modes = {"rollout_only": debug.rollout_only, "train_on": debug.train_on, "replay": debug.replay}
    chosen, problems = [name for name, value in modes.items() if value], []
    if len(chosen) > 1:
        problems.append(f"debug: {' and '.join(chosen)} were chosen, and exclude each other; keep one")
    supervised, rollout = config.algorithm.objective == "supervised", config.rollout
    if supervised:
        problems += [
            f"debug.{name}: a supervised run has no rollouts; leave it out"
            for name in ("save_rollouts", "rollout_only", "train_on")
            if getattr(debug, name)
        ]
    if rollout.max_staleness > 0:
        halves = [f"debug.{name}" for name in chosen if name != "replay"]
        problems += [
            f"rollout.max_staleness: with {half} no rollout can run ahead of an update; use 0"
            for half in (["algorithm.objective supervised"] if supervised else []) + halves
        ]
    if rollout.check_every_steps > 0 and debug.train_on:
        problems.append("rollout.check_every_steps: saved rollouts are of another run's weights; use 0")
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
    facts |= dataclasses.asdict(plan.packing)
    facts |= {name: f"{value:.3f}" for name, value in dataclasses.asdict(plan.memory).items()}
    facts["reference"] = _reference_text(plan)
    facts["serving"] = "in the trainer's processes"
    if plan.serving is not None:
        servers = dataclasses.asdict(plan.serving).items()
        facts |= {f"serving_{name}": f"{n:.3f}" if isinstance(n, float) else n for name, n in servers}
        del facts["serving"]
    width = max(len(name) for name in facts)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())


def _reference_text(plan: Plan) -> str:
    if not plan.uses_reference:
        return "none (beta is 0)"
    return "in host memory" if plan.memory.reference_host_gib else "on the device"
