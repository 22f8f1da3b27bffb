"""Which run may go on in a run folder: the same one, but for what changes none of its numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_cppo.config import Config, ConfigError

PACKING = frozenset(
    {
        "trainer.num_gpus",
        "policy.tensor_parallel",
        "policy.sequence_parallel",
        "policy.context_parallel",
        "policy.pipeline_parallel",
        "policy.virtual_pipeline",
        "policy.expert_parallel",
        "policy.max_tokens_per_microbatch",
    }
)
"""The fields on which it depends how samples are packed into rows, and which are too long for one."""
LAYOUT = PACKING | frozenset(
    {
        "policy.layers_per_stage",
        "policy.recompute",
        "policy.recompute_vision",
        "policy.distributed_optimizer",
        "policy.reference",
    }
)
"""The fields that say who computes what, and when: the numbers are the same but for rounding (see `_resumable`)."""
RESUMABLE = LAYOUT | frozenset(
    {
        "rollout.check_every_steps",
        "rollout.max_logp_gap",
        "vllm.python",  # servers move; which of vLLM's arguments change no number is not known here
        "vllm.addresses",
        "vllm.host",
        "vllm.tensor_parallel",
        "trainer.run_dir",  # the folder may have been moved, or be spelled in another way
        "trainer.keep_checkpoints",
        "trainer.keep_every_steps",
        "trainer.save_in_background",
        "trainer.on_save_failure",
        "trainer.max_skipped_updates",
        "trainer.hang_minutes",
        "trainer.wandb_project",
        "debug.save_rollouts",
        "debug.replay",
    }
)
"""The fields in which a run may be resumed with other values. Not rollout.max_staleness: which weights sample an answer
depends on it, and with them every number."""


def _resumable(config: Config) -> frozenset[str]:
    """The fields in which a run of `config` may be resumed with other values.

    Not those of packing, where the loss itself depends on the rows: on which samples fit, or on what shares a row.
    """
    if config.policy.oversized_samples == "drop" or config.perception.aggregation == "microbatch":
        return RESUMABLE - PACKING
    return RESUMABLE


def refuse_other_config(run_dir: Path, config: Config) -> None:
    """Raise ConfigError when `run_dir` holds steps or checkpoints of a run of another config than `config`.

    `RESUMABLE` may differ. A folder whose run failed before its first step may be used again.
    """
    path = run_dir / "config.json"
    metrics = run_dir / "metrics.jsonl"
    started = (metrics.exists() and metrics.stat().st_size) or any((run_dir / "checkpoints").glob("step_*"))
    if not path.exists() or not started:
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); fix: delete it, or choose another trainer.run_dir") from error
    if not isinstance(saved, dict) or not all(isinstance(fields, dict) for fields in saved.values()):
        raise ConfigError(f"{path} is no saved config; fix: delete it, or choose another trainer.run_dir")
    # A field that is younger than the run had what is now its default.
    defaults, there = _flat(json.loads(json.dumps(dataclasses.asdict(Config())))), _flat(saved)
    there = {name: value for name, value in defaults.items() if name not in there} | there
    here = _flat(json.loads(json.dumps(dataclasses.asdict(config))))
    names = sorted(there.keys() | here.keys())
    may_differ = _resumable(config)
    differing = [name for name in names if name not in may_differ and there.get(name) != here.get(name)]
    if differing:
        lines = [
            f"  {name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here" for name in differing
        ]
        raise ConfigError(
            f"{path.parent} holds a run of another config:\n" + "\n".join(lines) + "\n"
            f"fix: choose another --trainer.run_dir, or resume that run with its own config ({path}), "
            "or delete the folder"
        )


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
