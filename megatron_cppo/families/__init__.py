"""The model families that can be trained: one folder each, and one line here.

A folder holds what differs between families, in modules of the same names and functions in each:

- `shape`      config.json -> `ModelShape` (standard library only: the plan reads it)
- `positions`  tokens and grids -> m-rope positions (numpy)
- `vision`     the Hugging Face vision tower, and its features
- `decoder`    what Megatron-Core's TransformerConfig must say, and which axis each rotary frequency follows
- `mapping`    Megatron-Core's parameters <-> Hugging Face's tensors

docs/adding-a-model.md says how another one is added. This package must not know layouts, batches or losses.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ConfigError

FAMILIES = (
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
)
"""The `model_type` of each family's config.json, which is its folder's name too."""


def part(family: str, name: str) -> Any:
    """The module `name` (shape, positions, vision, decoder, mapping) of a family; loaded at its first use."""
    assert family in FAMILIES, f"unknown family {family!r}"
    return importlib.import_module(f"megatron_cppo.families.{family}.{name}")


def read_shape(folder: str) -> ModelShape:
    """The shape of the checkpoint in `folder`, from its config.json.

    Raises one ConfigError with all that is wrong: no checkpoint, a family or a variant that this package does not
    know, or fields that are missing or make no sense.
    """
    path = Path(folder) / "config.json"
    try:
        top: Any = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"model.path: {folder!r} holds no config.json; give a Hugging Face checkpoint folder"
        ) from error
    except OSError as error:
        raise ConfigError(f"model.path: {path} cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(top, dict):
        raise ConfigError(f"model.path: {path} is not a JSON object; copy the checkpoint again")
    if top.get("model_type") not in FAMILIES:
        raise ConfigError(
            f"model.path: model_type {top.get('model_type')!r} is not one of {', '.join(FAMILIES)}; "
            "use a checkpoint of such a family"
        )
    family, problems = part(top["model_type"], "shape"), []
    shape = family.read(top, problems)
    if problems:
        raise ConfigError(f"model.path: {path} {'; '.join(problems)}; copy the checkpoint again")
    problems = family.unknown_variants(top)
    contradictions = shape.contradictions()
    if contradictions:
        problems += [*contradictions, "take config.json and weights from the same checkpoint"]
    if problems:
        raise ConfigError(f"model.path: {path}: {'; '.join(problems)}")
    return shape
