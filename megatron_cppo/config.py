"""What the user says, each fact once: frozen dataclasses, two levels deep, standard library only.

Nothing here is computed (that is `plan.py`), nothing imports torch, and an unknown name is an error. Units are in
the names: `_tokens`, `_pixels`, `_seconds`; counts start with `num_` or end in `_per_...`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "fp8_mxfp8"]
Correction = Literal["auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Preserving = Literal["color_jitter", "perspective", "rotation"]
Removing = Literal["occlusion", "zoom_crop", "blacken"]


class UserError(ValueError):
    """Something of the user's that cannot work; the text says what, what was got, and how to mend it."""


class ConfigError(UserError):
    """A choice in the config, or a folder that it names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Where the policy starts."""

    path: str = ""
    """Hugging Face checkpoint folder (config.json, tokenizer, image processor, safetensors)."""
    min_pixels: int = 56 * 56
    """Images are scaled up to at least this many pixels."""
    max_pixels: int = 1280 * 28 * 28
    """Images are scaled down to at most this many pixels."""
    train_vision: bool = True
    """Train the vision tower too (the releases do); otherwise it is frozen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which rows become prompts. Parquet in verl's layout: data_source, prompt, images, reward_model."""

    train: tuple[str, ...] = ()
    """Parquet files to train on."""
    evaluation: tuple[str, ...] = ()
    """Parquet files that are never trained on."""
    instruction: str = ""
    """Appended to the last user message of every row (think first, then the boxed answer)."""
    max_prompt_tokens: int = 1024
    """Longer prompts, image tokens included, are filtered out and counted."""
    max_image_pixels: int = 64_000_000
    """An image whose header says more than this is refused before it is decoded."""
    shuffle: bool = True
    """Draw the rows in a new seeded order each epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgorithmConfig:
    """The objective: L_policy + beta * KL + lambda * CPL - entropy coefficient * H (arXiv 2601.00501)."""

    objective: Literal["cppo", "grpo", "supervised"] = "cppo"
    """cppo: everything; grpo: no perturbed views; supervised: log-likelihood of the rows' own responses."""
    normalize_std: bool = True
    """Divide group advantages by the group's standard deviation (False: Dr.GRPO)."""
    clip_low: float = 0.2
    """The token ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The token ratio is clipped from above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Bound on the loss of negative advantages (3.0 in DAPO's code); 0 turns it off."""
    aggregation: Literal["token_mean", "sample_mean", "sum_over_length"] = "token_mean"
    """Mean over tokens (DAPO), over samples of token means (GRPO's paper), or Dr.GRPO's constant divisor."""
    beta: float = 0.01
    """Weight of the KL to the frozen reference; 0 means that no reference exists."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL on the sampled tokens."""
    entropy_coefficient: float = 0.0
    """Weight of the policy's entropy bonus."""
    correction: Correction = "auto"
    """Weight each token's policy loss by old policy over engine, of the token or of its whole answer, to make up for an
    engine that computes otherwise: truncated at the bound, or masked outside of it. auto: none in fp32, else
    token_truncate."""
    correction_bound: float = 2.0
    """Largest such weight; masks also drop those below 1 / bound."""
    reward_tolerance: float = 1e-6
    """Groups whose rewards span no more than this get exactly zero advantage."""
    rewards: tuple[str, ...] = ("accuracy=0.9", "format=0.1")
    """name=weight, or package.module:function=weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerceptionConfig:
    """The perception mask, its contrastive loss, and the views behind both."""

    coefficient: float = 0.01
    """Lambda, the weight of CPL."""
    temperature: float = 0.1
    """Tau of the softplus."""
    top_fraction: float = 0.5
    """Share of the candidate tokens of a sample that the mask keeps."""
    min_entropy_shift: float = 0.0
    """Absolute floor, in nats, on a candidate's entropy shift; 0 is the published rule."""
    rank_by: Literal["relative", "absolute"] = "relative"
    """Rank candidates by shift over the removing view's entropy (published), or by the shift itself."""
    divergence: Literal["k3", "k1", "exact"] = "k3"
    """Between original and view: an estimate on the sampled token, or the exact KL over the vocabulary."""
    aggregation: Literal["sample", "microbatch", "global"] = "sample"
    """Mean per gated sample; per microbatch (parity with the releases); over all masked tokens."""
    stop_gradient_views: bool = False
    """Treat the perturbed views as constants."""
    preserving: tuple[Preserving, ...] = ("color_jitter", "perspective", "rotation")
    """Perturbations that keep the information; one is drawn per image."""
    removing: tuple[Removing, ...] = ("occlusion", "zoom_crop")
    """Perturbations that remove it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How answers are sampled."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """embedded: Hugging Face's model in the trainer's processes, slow and without needs; vllm: servers, see [vllm]."""
    samples_per_prompt: int = 5
    """n, the size of a group."""
    max_response_tokens: int = 4096
    """Longer answers are cut; they keep their tokens and their (usually zero) reward."""
    temperature: float = 1.0
    """Of sampling, and of every log-prob and entropy in the losses."""
    max_sequences: int = 256
    """Answers decoded at once by one embedded engine."""
    max_logp_gap: float = 0.0
    """Largest mean |log-prob of engine - of policy| at a check, in nats, of image prompts and of text prompts alike;
    0: by precision (1e-4 in fp32)."""
    check_every_steps: int = 0
    """Period at which engine and policy are compared again, on the tokens that the current weights sampled; the run
    stops where they differ. 0: at the first step only (trainer.self_check)."""
    max_staleness: int = 0
    """Versions by which the weights that sampled a token may be older than those that train on it. 0: rollouts and
    updates take turns; else rollouts of this many steps are ahead, and run during updates where the engine can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmConfig:
    """The vLLM servers of rollout.engine "vllm". Colocated: started on the trainer's own GPUs (as many as these hold),
    where they sleep during updates. Separate: found at `addresses`, on machines of their own."""

    python: str = "python3"
    """Colocated: the interpreter of an environment with vLLM, of which the trainer imports nothing."""
    addresses: tuple[str, ...] = ()
    """Separate: http://host:port of running servers, which tools/serve_rollouts.py starts."""
    tensor_parallel: int = 1
    """GPUs of one server."""
    host: str = "127.0.0.1"
    """The interface that servers listen on; a run on several machines needs 0.0.0.0. Every route asks for a key."""
    arguments: tuple[str, ...] = ()
    """More of the servers' command line, each `name` or `name=value` of vLLM's, without its dashes:
    gpu-memory-utilization=0.6, for one, is what holds if it is not here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """The layout of the trained model, and its memory."""

    tensor_parallel: int = 1
    """Ranks that share every layer (TP)."""
    sequence_parallel: bool = False
    """Split the activations between layers over the TP ranks (SP)."""
    context_parallel: int = 1
    """Ranks that share every sequence (CP), for long ones; any model and any other axis."""
    pipeline_parallel: int = 1
    """Stages (PP): the decoder's layers are cut over them; the vision tower is on the first, the head on the last."""
    virtual_pipeline: int = 1
    """Chunks of layers on each stage, interleaved (VPP): a smaller bubble for more messages. Needs several stages."""
    layers_per_stage: tuple[int, ...] = ()
    """Decoder layers of each stage, first to last (of each chunk, in the order of the model, with virtual_pipeline);
    empty: the same number on each. Fewer on the first and the last make up for the vision tower and the head."""
    expert_parallel: int = 1
    """Ranks that share the experts of a layer (EP), among those of TP x CP x DP; each expert is then whole on one."""
    precision: Precision = "bf16"
    """Of parameters and activations; all statistics are fp32. fp8_...: parameters in bf16, and the products of the
    decoder's layers in FP8 by Transformer Engine, scaled by that recipe (docs/fp8.md)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: attention only, or whole layers."""
    recompute_vision: bool = False
    """Compute the vision tower's blocks again in backward."""
    max_tokens_per_microbatch: int = 8192
    """Capacity of one packed row, over all segments (samples and views)."""
    oversized_samples: Literal["refuse", "drop"] = "refuse"
    """When max_tokens_per_microbatch cannot hold every possible sample under all of its views: refuse the config, or
    leave such samples out of the update and count them in data/oversized_samples."""
    distributed_optimizer: bool = True
    """Split the optimizer's state over the data-parallel ranks."""
    reference: Literal["device", "host"] = "device"
    """Where the reference's weights live while they are not used (only with beta > 0)."""
    attention: Literal["default", "torch"] = "default"
    """default: Transformer Engine's on cuda, PyTorch's on cpu; torch: PyTorch's everywhere, which is slower."""
    head_backend: Literal["fused", "torch", "compiled", "triton"] = "fused"
    """What computes token statistics from hidden rows. fused: a tile of the vocabulary at a time, so that logits never
    exist (on cuda by Triton's kernels); torch, compiled (by torch.compile), triton: some rows at a time."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu runs the same Megatron-Core code on gloo."""
    megatron_overrides: tuple[str, ...] = ()
    """name=value for Megatron-Core's TransformerConfig; names are checked, and may not repeat a field above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with a warm-up."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Floor of the decay."""
    warmup_updates: int = 0
    """Optimizer updates of linear warm-up."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Schedule after the warm-up, to the end of the run."""
    weight_decay: float = 0.01
    """Decoupled weight decay (none on biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """What Adam's first and second moments keep of themselves in an update."""
    state_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the two moments; master weights are fp32. bf16 saves 4 bytes a parameter, and needs smaller betas."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """How long, how much, and what is kept."""

    run_dir: str = "runs/default"
    """Everything that the run writes."""
    num_gpus: int = 1
    """Ranks of the trainer (processes; on cpu, too)."""
    num_steps: int = 100
    """Steps: one rollout each (supervised: one update each)."""
    prompts_per_step: int = 512
    """Prompts of one rollout."""
    updates_per_step: int = 1
    """Mini-batches that a rollout is cut into."""
    seed: int = 0
    """Of data order, views, sampling and initialisation."""
    save_every_steps: int = 0
    """Checkpoint period; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Older ones are deleted, once a newer one is whole."""
    keep_every_steps: int = 0
    """Checkpoints of these steps are never deleted; 0: of none."""
    save_in_background: bool = True
    """Write checkpoints while the next rollouts are sampled; what is not written when the weights change is copied."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (a full disk): stop, or go on and count it."""
    max_skipped_updates: int = 3
    """An update whose loss or gradient is not finite is skipped on all ranks, and its batch saved to run_dir/skipped;
    the run stops when, at the end of a step, this many in a row were."""
    hang_minutes: float = 20.0
    """A rank that makes no progress for this long is named, every rank's stack is shown, and the run ends; 0: never."""
    export: bool = True
    """Write the final weights as a Hugging Face folder, run_dir/export."""
    evaluate_every_steps: int = 0
    """Evaluation period; 0 evaluates before the first and after the last step only."""
    evaluation_samples: int = 4
    """k of avg@k."""
    evaluation_temperature: float = 1.0
    """Temperature of the evaluation's samples."""
    evaluation_rows: int = 0
    """Rows of data.evaluation to use; 0 means all."""
    grader_processes: int = 1
    """Worker processes that grade answers, per rank."""
    grader_timeout_seconds: float = 10.0
    """A sample whose grading takes longer is worth zero and counted."""
    keep_samples_every_steps: int = 1
    """Period at which every sample's tokens and statistics are written."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project (package wandb must be installed)."""
    self_check: bool = True
    """At the first step: ratio one, KL zero, and engine and policy agree; else stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Half of a step alone, or one update again. At most one of rollout_only, train_on and replay."""

    save_rollouts: bool = False
    """Write every step's graded groups, exactly as the update gets them, to run_dir/rollouts."""
    rollout_only: bool = False
    """Sample and grade with the starting weights (or the newest checkpoint's) and save the rollouts; no update."""
    train_on: str = ""
    """A folder of saved rollouts: its steps are trained on, nothing is sampled or graded, and evaluated only where
    data.evaluation is given. Rollouts of other weights than the starting ones need --trainer.self_check False."""
    replay: str = ""
    """A folder of a skipped update (run_dir/skipped/...): compute it again and say where it stops being finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def type_problems(config: Config) -> list[str]:
    """Values of another type than their field's, or none of its choices; a Python recipe may give anything."""
    problems = []
    for section in dataclasses.fields(config):
        fields = getattr(config, section.name)
        kind = typing.get_type_hints(Config)[section.name]
        if not isinstance(fields, kind):
            problems.append(f"{section.name}: must be a {kind.__name__}, got {fields!r}")
            continue
        for name, wanted in typing.get_type_hints(kind).items():
            value = getattr(fields, name)
            if not _is(value, wanted):
                problems.append(f"{section.name}.{name}: must be {_words(wanted)}, got {value!r}")
    return problems


def _is(value: object, wanted: Any) -> bool:
    if typing.get_origin(wanted) is Literal:
        return value in typing.get_args(wanted)
    if typing.get_origin(wanted) is tuple:
        kind, *rest = typing.get_args(wanted)
        fits = isinstance(value, tuple) and (Ellipsis in rest or len(value) == 1 + len(rest))
        return fits and all(_is(item, kind) for item in value)
    if wanted is bool or isinstance(value, bool):
        return wanted is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if wanted is float else wanted)


def _words(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(wanted)))}"
    if typing.get_origin(wanted) is tuple:
        kind, *rest = typing.get_args(wanted)
        return f"a tuple{'' if Ellipsis in rest else f' of {1 + len(rest)}'}, each item {_words(kind)}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}[wanted]


def save(config: Config, path: Path) -> None:
    """Write `config` as JSON; `flags` of the same file gives an equal config through the same parser."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def flags(saved: Any) -> list[str]:
    """The command-line flags that say what a saved config.json says, so that one strict parser reads both.

    Raises ConfigError when the JSON is not two levels of sections and fields, with all fields that do not exist.
    """
    if not isinstance(saved, dict):
        raise ConfigError(f"config.json: must be an object of sections, got {saved!r}")
    words: list[str] = []
    problems: list[str] = []
    known = {section.name: _field_names(section.name) for section in dataclasses.fields(Config)}
    for section, fields in saved.items():
        if not isinstance(fields, dict):
            raise ConfigError(f"config.json: section '{section}' must be an object of fields, got {fields!r}")
        for name, value in fields.items():
            if name not in known.get(section, ()):
                problems.append(_unknown_field(f"{section}.{name}", known))
            elif not all(
                isinstance(item, str | int | float) for item in (value if isinstance(value, list) else [value])
            ):
                problems.append(f"config.json: {section}.{name} must be a text, a number, true or false, got {value!r}")
            flag = f"--{section}.{name}"
            # With "=", a text that looks like a flag is still a text.
            words += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    if problems:
        raise ConfigError("\n".join(problems))
    return words


def _field_names(section: str) -> list[str]:
    return [field.name for field in dataclasses.fields(getattr(Config(), section))]


def _unknown_field(name: str, known: dict[str, list[str]]) -> str:
    names = [f"{section}.{field}" for section, fields in known.items() for field in fields]
    close = difflib.get_close_matches(name, names, n=1)
    return f"config.json: there is no field {name}; " + (f"did you mean {close[0]}?" if close else "remove it")
