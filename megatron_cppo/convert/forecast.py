"""What a conversion will take, before it begins: files, bytes, memory and time. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cppo.convert import to_hf, to_megatron
from megatron_cppo.convert.checkpoints import Model
from megatron_cppo.convert.conversion import Options
from megatron_cppo.convert.layout import BLOCK_BYTES
from megatron_cppo.convert.units import Unit
from megatron_cppo.progress import duration
from megatron_cppo.storage.durable import brief_bytes

BASE_BYTES = 450 * 2**20
"""A worker that holds no tensor: Python and torch."""
_COPIES = 3
"""A block as it was read, as it is laid out or cast, and as it is written."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The files with their bytes, the numbers of the model, and the most memory of a worker."""

    files: tuple[tuple[str, int], ...]
    num_parameters: int
    peak_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)

    def lines(self, *, workers: int, rate: float) -> list[str]:
        """For people; `rate` in bytes a second."""
        file, largest = max(self.files, key=lambda pair: pair[1])
        return [
            *(f"  {name}  {brief_bytes(size)}" for name, size in self.files),
            f"{self.num_parameters:,} parameters, {brief_bytes(self.num_bytes)} in {len(self.files)} files, "
            f"the largest {brief_bytes(largest)} ({file})",
            f"memory: at most {brief_bytes(self.peak_bytes)} in each of {workers} workers",
            f"time: {duration(self.num_bytes / rate)} at {rate / 1e6:.0f} MB/s, and about as long to compare "
            "(unless --no-verify)",
        ]


def of_folder(source: Path, options: Options) -> Forecast:
    """Of a Hugging Face folder to be converted, from its config.json alone. Raises ConfigError."""
    model = Model.of(source)
    dtype = options.cast or _dtype(source)
    return _forecast(to_megatron.plan_units(model, dict.fromkeys(model.sizes, dtype)), model, dtype)


def of_checkpoint(source: Path, options: Options, *, like: Path | None) -> Forecast:
    """Of a Megatron checkpoint to be converted, from its index and the folder it is like. Raises UserError."""
    _, checkpoint, form, opening = to_hf.open_source(source, options, like=like)
    assert opening.model is not None, "a Megatron checkpoint has a model"
    dtypes = {checkpoint.dtype(name) for name in checkpoint.sizes} | ({options.cast} if options.cast else set())
    return _forecast(to_hf.plan_units(form), opening.model, max(dtypes, key=lambda dtype: dtype.itemsize))


def _forecast(units: Sequence[Unit[Any]], model: Model, dtype: torch.dtype) -> Forecast:
    # A parameter that interleaves its tensors is held whole: as its pieces, joined, and being written.
    joined = [model.parameter_shape(p) for p in model.parameters() if not p.rule.stacks_rows]
    block = max([BLOCK_BYTES, *(torch.Size(size).numel() * dtype.itemsize for size in joined)])
    count = sum(torch.Size(size).numel() for size in model.sizes.values())
    return Forecast(tuple((unit.file, unit.num_bytes) for unit in units), count, BASE_BYTES + _COPIES * block)


def _dtype(folder: Path) -> torch.dtype:
    """What config.json says the weights are; transformers 5 has another name for it than 4."""
    told = json.loads((folder / "config.json").read_text())
    name = told.get("dtype") or told.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
