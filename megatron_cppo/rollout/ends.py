"""Which ids end a response, as the checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_cppo.rollout.engine import EngineError


def end_ids(model_path: Path | str) -> tuple[int, ...]:
    """The ids of generation_config.json that end a response. Raises EngineError where it names none."""
    path = Path(model_path) / "generation_config.json"
    try:
        told = json.loads(path.read_text())
        ends = told.get("eos_token_id") if isinstance(told, dict) else None
    except (OSError, ValueError):
        ends = None
    found = (ends,) if isinstance(ends, int) else tuple(ends or ())
    if not found:
        raise EngineError(f"{model_path}: generation_config.json names no eos_token_id; add the ids that end an answer")
    return found
