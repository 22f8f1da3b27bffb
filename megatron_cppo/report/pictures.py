"""The pictures of a run, rebuilt from what its config.json names, by the same seeded perturbations as in training."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_cppo.config import ConfigError, DataConfig, ModelConfig, PerceptionConfig
from megatron_cppo.types import ImageKey


def rebuild_images(run_dir: Path) -> Callable[[ImageKey], Image.Image]:
    """The pictures of the run's training rows, under each view; the data is opened when the first is asked for.

    What cannot be opened is a ConfigError then.
    """

    @functools.cache
    def source() -> Callable[[ImageKey], Image.Image]:
        # They take seconds to import, and a report without pictures needs none of them.
        from megatron_cppo.data.prompts import PromptSource
        from megatron_cppo.data.rows import DataError
        from megatron_cppo.data.tokenizer import CheckpointError

        saved = json.loads((run_dir / "config.json").read_text())
        data = _section(DataConfig, saved["data"])
        try:
            return PromptSource(
                data.train,
                split="train",
                model_path=saved["model"]["path"],
                data=data,
                model=_section(ModelConfig, saved["model"]),
                perception=_section(PerceptionConfig, saved["perception"]),
                seed=saved["trainer"]["seed"],
                supervised=saved["algorithm"]["objective"] == "supervised",
            ).image
        except (DataError, CheckpointError) as error:
            raise ConfigError(f"{error}\n(or use --no-images, which opens neither data nor checkpoint)") from error

    return lambda key: source()(key)


def _section(kind: type[Any], saved: dict[str, Any]) -> Any:
    """A section of the config from its JSON, where tuples are lists."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = saved.keys() - known
    if unknown:
        raise ConfigError(f"config.json: {kind.__name__} has no {', '.join(sorted(unknown))}; fix: use --no-images")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
