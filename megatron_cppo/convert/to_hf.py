"""A Megatron checkpoint becomes a Hugging Face folder: files, spellings, order and side files of the one it is like.

A converted checkpoint carries them; of a training checkpoint they are those of the folder that its run began with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cppo import pretrained
from megatron_cppo.config import ConfigError
from megatron_cppo.convert import conversion, layout
from megatron_cppo.convert.checkpoints import (
    Checkpoint,
    MegatronCheckpoint,
    Model,
    Opening,
    is_megatron,
    layout_of,
    misfits,
    side_folder,
)
from megatron_cppo.convert.conversion import Options, Report, listener
from megatron_cppo.convert.layout import Layout, row_blocks
from megatron_cppo.convert.units import ConvertError, Unit, Workplace
from megatron_cppo.families import experts
from megatron_cppo.storage import durable
from megatron_cppo.storage.durable import Contents
from megatron_cppo.storage.hf_folder import disk_name, side_files
from megatron_cppo.storage.safetensors_file import DTYPES, Header, Stored, bytes_of, header_bytes


@dataclass(frozen=True, slots=True)
class _Task:
    """A file's header, and the order in which the experts of its stacks multiply: True from the right, by name."""

    header: Header
    right: dict[str, bool]


def plan_units(form: Layout) -> list[Unit[_Task]]:
    """The files of a layout."""
    stored = form.stored
    units = []
    for file, header in form.files.items():
        stacks = [name for t in header.tensors if _is_stack(name := disk_name(t.name), t)]
        right = {name: layout.multiplies_right(name, stored) for name in stacks}
        size = len(header_bytes(header.tensors, header.notes)) + sum(t.num_bytes for t in header.tensors)
        units.append(Unit(file, size, _Task(header, right)))
    return units


def _is_stack(name: str, stored: Stored) -> bool:
    return len(stored.shape) == 3 and bool(experts.matrices(name, 1))


def write_unit(source: Checkpoint, path: Path, unit: Unit[_Task]) -> tuple[Contents, None]:
    """Write a file of safetensors, block by block."""
    with durable.writing(path) as stream:
        stream.write(header_bytes(unit.task.header.tensors, unit.task.header.notes))
        for stored in unit.task.header.tensors:
            for block in _blocks(source, stored, unit.task.right):
                stream.write(bytes_of(block.to(DTYPES[stored.dtype]).contiguous()))
    return stream.contents, None


def _blocks(source: Checkpoint, stored: Stored, right: dict[str, bool]) -> Iterator[Tensor]:
    """The tensor of a file, from its first row to its last."""
    name = disk_name(stored.name)
    if name not in right:
        for start, stop in row_blocks(stored.shape, source.dtype(name)):
            yield source.rows(name, start, stop)
        return
    matrices = experts.matrices(name, stored.shape[0])
    share = len(matrices) // stored.shape[0]
    for first in range(0, len(matrices), share):
        parts = [source.rows(each, 0, source.sizes[each][0]) for each in matrices[first : first + share]]
        yield torch.cat([part.t() for part in parts], dim=1) if right[name] else torch.cat(parts)


def to_hf(source: Path, target: Path, options: Options, *, like: Path | None = None) -> Report:
    """Convert, compare with the source, publish. Raises UserError; what is finished then is used by the next call."""
    side, checkpoint, form, opening = open_source(source, options, like=like)
    conversion.check_apart(target, source, side)
    units = plan_units(form)
    tensors = {name: (size, checkpoint.dtype(name)) for name, size in checkpoint.sizes.items()}
    files = [*source.glob("*.distcp"), *source.glob("*.metadata"), *side_files(side)]
    plan = {
        "what": "Hugging Face from Megatron",
        "source": conversion.fingerprint(tensors, files),
        "dtype": options.dtype,
        "layout": conversion.text_digest(layout.to_json(form)),
    }
    with Workplace(target, plan, overwrite=options.overwrite) as place:
        if place.is_published:
            place.clean()
            return conversion.report([], seconds=0.0, compared=None, verify_seconds=0.0)
        began = time.monotonic()
        done = place.run(
            units,
            opening.open,
            write_unit,
            num_workers=options.workers,
            other_bytes=sum(path.stat().st_size for path in side_files(side)),
            advance=listener("converting", sum(unit.num_bytes for unit in units), options.told),
        )
        try:
            names = _complete(place.files, side=side, form=form)
        except OSError as error:
            raise ConvertError(place.refused(error, "all weights are finished")) from error
        seconds, began = time.monotonic() - began, time.monotonic()
        compared = conversion.verified(opening, Opening(place.files, None), options) if options.verify else None
        verify_seconds = time.monotonic() - began
        place.publish([*names, *(unit.file for unit in units)])
    return conversion.report(done, seconds=seconds, compared=compared, verify_seconds=verify_seconds)


def open_source(source: Path, options: Options, *, like: Path | None) -> tuple[Path, Checkpoint, Layout, Opening]:
    """The side files' folder, the checkpoint, the layout to be written, and how to open the checkpoint elsewhere.

    Raises UserError with all tensors that do not fit.
    """
    if not is_megatron(source):
        raise ConfigError(f"{source} is a Hugging Face folder already; give a Megatron checkpoint")
    side = side_folder(source, like)
    model = Model.of(side)
    checkpoint = MegatronCheckpoint(source, model)
    form = layout_of(side)
    problems = misfits({name: location.shape for name, location in form.locations().items()}, model)
    if problems:
        raise ConfigError(
            f"{side} does not fit its config.json: {'; '.join(problems)}; give an unmodified one as --like"
        )
    form = layout.with_dtypes(form, {name: options.cast or checkpoint.dtype(name) for name in model.sizes})
    return side, checkpoint, form, Opening(source, model)


def _complete(folder: Path, *, side: Path, form: Layout) -> list[str]:
    """Write all but the weights; returns the names. Raises OSError."""
    names = []
    for path in side_files(side):
        if path.name != layout.FILE:
            conversion.copy(path, folder / path.name)
            names.append(path.name)
    index = layout.index_text(form)
    if index is not None:
        durable.write(folder / pretrained.INDEX, index.encode())
        names.append(pretrained.INDEX)
    return names
