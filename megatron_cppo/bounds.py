"""Which values a field of the config may have by itself. Standard library only; `plan` reports these problems."""

from __future__ import annotations

import dataclasses
import math

from megatron_cppo.config import Config

BOUNDS: tuple[tuple[str, str, float, float], ...] = (
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
    ("vllm", "tensor_parallel", 1, math.inf),
    ("rollout", "check_every_steps", 0, math.inf),
    ("rollout", "max_staleness", 0, math.inf),
    ("policy", "tensor_parallel", 1, math.inf),
    ("policy", "pipeline_parallel", 1, math.inf),
    ("policy", "virtual_pipeline", 1, math.inf),
    ("policy", "context_parallel", 1, math.inf),
    ("policy", "expert_parallel", 1, math.inf),
    ("optimizer", "learning_rate", 0, math.inf),
    ("optimizer", "max_grad_norm", 0, math.inf),
    ("trainer", "num_gpus", 1, math.inf),
    ("trainer", "num_steps", 1, math.inf),
    ("trainer", "prompts_per_step", 1, math.inf),
    ("trainer", "updates_per_step", 1, math.inf),
    ("trainer", "keep_checkpoints", 1, math.inf),
    ("trainer", "keep_every_steps", 0, math.inf),
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
    ("optimizer", "epsilon", 1e-30, math.inf),
    ("data", "max_prompt_tokens", 1, math.inf),
    ("data", "max_image_pixels", 1, math.inf),
    ("model", "min_pixels", 1, math.inf),
)


def problems(config: Config) -> list[str]:
    """Numbers outside their bounds, and fields that contradict each other, one text for each."""
    found = [
        f"{section}.{name}: {value} is not a finite number; give one"
        for section, fields in dataclasses.asdict(config).items()
        for name, values in fields.items()
        for value in (values if isinstance(values, tuple) else (values,))
        if isinstance(value, float) and not math.isfinite(value)
    ]
    for section, name, low, high in BOUNDS:
        value = getattr(getattr(config, section), name)
        if math.isfinite(value) and not low <= value <= high:
            found.append(f"{section}.{name}: {value} is outside [{low}, {high}]; use {min(max(value, low), high)}")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas if math.isfinite(beta)):
        found.append(f"optimizer.betas: {config.optimizer.betas} must be in [0, 1); (0.9, 0.999) is usual")
    if config.algorithm.dual_clip and config.algorithm.dual_clip <= 1:
        found.append(
            f"algorithm.dual_clip: {config.algorithm.dual_clip} must exceed 1, or be 0 to turn it off; 3.0 is usual"
        )
    if config.algorithm.correction_bound <= 1:
        found.append(f"algorithm.correction_bound: {config.algorithm.correction_bound} must exceed 1; 2.0 is usual")
    if config.algorithm.objective == "supervised" and config.algorithm.correction not in ("auto", "none"):
        found.append(f"algorithm.correction: {config.algorithm.correction}, but supervised has no engine; use none")
    if config.model.min_pixels > config.model.max_pixels:
        found.append(
            f"model.min_pixels: {config.model.min_pixels} exceeds model.max_pixels {config.model.max_pixels}; lower it"
        )
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        found.append(
            f"optimizer.min_learning_rate: {config.optimizer.min_learning_rate} exceeds learning_rate "
            f"{config.optimizer.learning_rate}; lower it"
        )
    found += [
        f"policy.megatron_overrides: {pair!r} is no name=value; write for instance layernorm_epsilon=1e-5"
        for pair in config.policy.megatron_overrides
        if not pair.partition("=")[2]
    ]
    if not config.perception.preserving or not config.perception.removing:
        found.append("perception.preserving and perception.removing need at least one perturbation each")
    return found
