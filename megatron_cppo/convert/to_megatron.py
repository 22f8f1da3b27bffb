"""A Hugging Face folder becomes a Megatron checkpoint: one data file for the embedding, each layer, and the rest.

Keys are those of Megatron-Core with Transformer Engine, the names without it are aliases in the index. The source's
side files and the layout of its tensors go along in a folder, so that the way back needs nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_cppo.config import ConfigError
from megatron_cppo.convert import conversion, layout
from megatron_cppo.convert.checkpoints import SIDE_FOLDER, HFCheckpoint, Model, Opening, misfits
from megatron_cppo.convert.conversion import Options, Report, listener
from megatron_cppo.convert.layout import row_blocks
from megatron_cppo.convert.units import ConvertError, Done, Unit, Workplace
from megatron_cppo.families.rules import Mapped
from megatron_cppo.storage import checkpoint_files, durable, torch_dist
from megatron_cppo.storage.durable import Contents
from megatron_cppo.storage.hf_folder import side_files
from megatron_cppo.storage.torch_dist import Chunk, DataFile

COMMON = {"iteration": 0, "checkpoint_version": 3.0}
"""What Megatron-LM wants to know of a checkpoint besides its tensors."""
_CHUNK_OVERHEAD = 2048


def plan_units(model: Model, dtypes: dict[str, torch.dtype]) -> list[Unit[tuple[Mapped, ...]]]:
    """The data files: the embedding, each decoder layer, and vision tower, last norm and head together."""
    parameters: dict[str, list[Mapped]] = {"embedding": []}
    parameters |= {f"layer {number}": [] for number in range(model.shape.num_layers)}
    parameters["rest"] = []
    for parameter in model.parameters():
        index = parameter.place.index
        is_embedding = parameter.hf_names == ("model.embed_tokens.weight",)
        name = f"layer {index[0]}" if index else "embedding" if is_embedding else "rest"
        parameters[name].append(parameter)
    return [
        Unit(f"__{number}_0.distcp", _num_bytes(mine, model, dtypes), tuple(mine))
        for number, mine in enumerate(parameters.values())
    ]


def _num_bytes(parameters: Sequence[Mapped], model: Model, dtypes: dict[str, torch.dtype]) -> int:
    names = [name for parameter in parameters for name in parameter.hf_names]
    return sum(torch.Size(model.sizes[name]).numel() * dtypes[name].itemsize + _CHUNK_OVERHEAD for name in names)


@dataclass(frozen=True, slots=True)
class _Setting:
    source: HFCheckpoint
    model: Model
    cast: torch.dtype | None


def _setting(source: Path, model: Model, cast: torch.dtype | None) -> _Setting:
    return _Setting(HFCheckpoint(source), model, cast)


def write_unit(setting: _Setting, path: Path, unit: Unit[tuple[Mapped, ...]]) -> tuple[Contents, list[list[object]]]:
    """Write a data file; tells its chunks."""
    name = unit.file.removesuffix(".distcp")
    with torch_dist.data_file(path.parent, name, written_as=path.name) as file:
        for parameter in unit.task:
            _write_parameter(setting, file, parameter)
    # JSON knows lists only, and it is Chunk's own order of fields that they come back in.
    return file.contents, [[c.key, c.size, c.dtype, c.offset, c.shape, c.file, c.start, c.length] for c in file.chunks]


def _chunk(told: list[object]) -> Chunk:
    return Chunk(*(tuple(value) if isinstance(value, list) else value for value in told))  # pyrefly: ignore[bad-argument-type]


def _write_parameter(setting: _Setting, file: DataFile, parameter: Mapped) -> None:
    source, model, index = setting.source, setting.model, parameter.place.index
    size = (*parameter.place.sizes(model.shape), *model.parameter_shape(parameter))

    def add(block: torch.Tensor, row: int) -> None:
        block = block if setting.cast is None else block.to(setting.cast)
        offset = [*index, row, *[0] * (block.dim() - 1)]
        file.add(parameter.place.key, block[(None,) * len(index)], size=size, offset=offset)

    if not parameter.rule.stacks_rows:
        pieces = [source.rows(name, 0, model.sizes[name][0]) for name in parameter.hf_names]
        add(parameter.rule.join(pieces, model.shape), 0)
        return
    above = 0
    for name in parameter.hf_names:
        for start, stop in row_blocks(model.sizes[name], source.dtype(name)):
            add(source.rows(name, start, stop), above + start)
        above += model.sizes[name][0]


def to_megatron(source: Path, target: Path, options: Options) -> Report:
    """Convert, compare with the source, publish. Raises UserError; what is finished then is used by the next call."""
    conversion.check_apart(target, source)
    model = Model.of(source)
    checkpoint = HFCheckpoint(source)
    problems = misfits(checkpoint.sizes, model)
    if problems:
        raise ConfigError(
            f"{source} does not fit its config.json: {'; '.join(problems)}; use an unmodified checkpoint of a "
            "supported family"
        )
    units = plan_units(model, {name: options.cast or checkpoint.dtype(name) for name in model.sizes})
    plan = {"what": "Megatron from Hugging Face", "source": _identity(source, checkpoint), "dtype": options.dtype}
    with Workplace(target, plan, overwrite=options.overwrite) as place:
        if place.is_published:
            place.clean()
            return conversion.report([], seconds=0.0, compared=None, verify_seconds=0.0)
        began = time.monotonic()
        total = sum(unit.num_bytes for unit in units)
        done = place.run(
            units,
            partial(_setting, source, model, options.cast),
            write_unit,
            num_workers=options.workers,
            other_bytes=sum(path.stat().st_size for path in side_files(source)),
            advance=listener("converting", total, options.told),
        )
        try:
            files = _complete(place.files, source=source, checkpoint=checkpoint, model=model, done=done)
        except OSError as error:
            raise ConvertError(place.refused(error, "all data files are finished")) from error
        seconds, began = time.monotonic() - began, time.monotonic()
        made = Opening(place.files, model)
        compared = conversion.verified(Opening(source, None), made, options) if options.verify else None
        verify_seconds = time.monotonic() - began
        place.publish(files)
    return conversion.report(done, seconds=seconds, compared=compared, verify_seconds=verify_seconds)


def _identity(source: Path, checkpoint: HFCheckpoint) -> str:
    tensors = {name: (size, checkpoint.dtype(name)) for name, size in checkpoint.sizes.items()}
    return conversion.fingerprint(tensors, [*(source / file for file in checkpoint.layout.files), *side_files(source)])


def _complete(folder: Path, *, source: Path, checkpoint: HFCheckpoint, model: Model, done: list[Done]) -> list[str]:
    """Write all but the data files; returns the names of all. Raises OSError."""
    files = {unit.file: unit.contents for unit in done}
    side = folder / SIDE_FOLDER
    durable.remove(side)
    side.mkdir()
    for path in side_files(source):
        if path.name != layout.FILE:
            files[f"{SIDE_FOLDER}/{path.name}"] = conversion.copy(path, side / path.name)
    text = layout.to_json(checkpoint.layout)
    files[f"{SIDE_FOLDER}/{layout.FILE}"] = durable.write(side / layout.FILE, text.encode())
    durable.sync_folder(side)
    aliases = {other: p.place.key for p in model.parameters() for other in p.place.aliases}
    chunks = [_chunk(told) for unit in done for told in unit.told]
    files |= torch_dist.write_index(folder, chunks, common=COMMON, aliases=aliases)
    checkpoint_files.write_manifest(folder, files)
    return [*files, checkpoint_files.MANIFEST]
