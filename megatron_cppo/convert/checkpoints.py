"""Checkpoints of either kind as one thing: tensors under official Hugging Face names, read row by row.

Owns how a tensor of official name is found in a folder of safetensors files, and through the family's mapping in
Megatron's torch_dist folders. Knows nothing of who reads, and why.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_cppo import families
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ConfigError, UserError
from megatron_cppo.convert import layout
from megatron_cppo.convert.layout import Location
from megatron_cppo.families import inventory
from megatron_cppo.families.rules import Mapped, mapped
from megatron_cppo.storage import torch_dist
from megatron_cppo.storage.safetensors_file import DTYPES, read_rows
from megatron_cppo.storage.torch_dist import Folder

SIDE_FOLDER = "hf"
"""In a Megatron checkpoint that was made of a Hugging Face folder: that one's side files, and its layout."""
_NO_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine", "optim")
_LISTED = 4


@dataclass(frozen=True, slots=True)
class Model:
    """What a config.json promises: the shape, and all tensors by official name with their sizes, in its order."""

    shape: ModelShape
    sizes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(folder: Path) -> Model:
        """From config.json alone. Raises ConfigError."""
        shape = families.read_shape(str(folder))
        return Model(shape, inventory.tensors(shape, str(folder)))

    def parameters(self) -> list[Mapped]:
        """Megatron's parameters, which these tensors make."""
        return mapped(self.sizes, families.part(self.shape.family, "mapping").RULES)

    def parameter_shape(self, parameter: Mapped) -> tuple[int, ...]:
        """Of one layer, and of one expert."""
        first = self.sizes[parameter.hf_names[0]]
        return (sum(self.sizes[name][0] for name in parameter.hf_names), *first[1:])


class Checkpoint(Protocol):
    """A checkpoint's tensors by official name."""

    @property
    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; not to be written into. Raises UserError, OSError."""
        ...


class HFCheckpoint:
    """A Hugging Face folder. Raises UserError for one that is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.layout = layout.of_folder(folder)
        self._locations: dict[str, Location] = self.layout.locations()
        self.sizes = {name: location.shape for name, location in self._locations.items()}
        self._descriptors: dict[str, int] = {}
        self._last: tuple[tuple[str, int], Tensor] | None = None

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return DTYPES[self._locations[name].stored.dtype]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; of an expert's, its whole part of the stack is read, and kept."""
        location = self._locations[name]
        if location.place is None:
            return read_rows(self._descriptor(location.file), location.stored, start, stop)
        which = (location.stored.name, location.place.expert)
        if self._last is None or self._last[0] != which:
            expert = location.place.expert
            part = read_rows(self._descriptor(location.file), location.stored, expert, expert + 1)[0]
            self._last = (which, part.t() if location.right else part)
        return self._last[1].chunk(location.place.parts)[location.place.part][start:stop]

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._folder / file, os.O_RDONLY)
        return self._descriptors[file]


class MegatronCheckpoint:
    """A torch_dist folder, whose tensors must be those of `model`. Raises UserError with all that does not fit."""

    def __init__(self, folder: Path, model: Model) -> None:
        self._model, self._folder = model, Folder(folder)
        self.sizes = model.sizes
        parameters = model.parameters()
        self._keys = {parameter.place.key: self._key(parameter) for parameter in parameters}
        self._check(folder, parameters)
        self._where = {name: (parameter, i) for parameter in parameters for i, name in enumerate(parameter.hf_names)}
        self._joined: OrderedDict[str, list[Tensor]] = OrderedDict()

    def _key(self, parameter: Mapped) -> str:
        """The name under which the folder has a parameter: whoever wrote it may have had other modules."""
        keys = (parameter.place.key, *parameter.place.aliases)
        return next((key for key in keys if key in self._folder.keys), keys[0])

    def _check(self, folder: Path, parameters: list[Mapped]) -> None:
        problems, shape = [], self._model.shape
        known = {key for parameter in parameters for key in (parameter.place.key, *parameter.place.aliases)}
        unknown = sorted(
            key
            for key in self._folder.keys - known
            if not key.startswith(_NO_WEIGHTS) and not key.endswith("_extra_state")
        )
        missing = sorted(set(self._keys.values()) - self._folder.keys)
        seen: set[str] = set()
        for parameter in parameters:
            key = self._keys[parameter.place.key]
            if key in seen or key not in self._folder.keys:
                continue
            seen.add(key)
            found = self._folder.size(key)
            wanted = (*parameter.place.sizes(shape), *self._model.parameter_shape(parameter))
            padded = parameter.rule.vocab and found[1:] == wanted[1:] and found[0] >= wanted[0]
            if found != wanted and not padded:
                problems.append(f"{key} is {found}, the model of its config.json needs {wanted}")
        if missing:
            problems.append(f"{len(missing)} tensors are missing {missing[:_LISTED]}")
        if unknown:
            problems.append(f"{len(unknown)} are unknown {unknown[:_LISTED]}")
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise ConfigError(
                f"{folder} does not fit its config.json: {'; '.join(problems[-_LISTED:])}{more}; take both from the "
                "same model"
            )

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._folder.dtype(self._keys[self._where[name][0].place.key])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; where its parameter interleaves several, that is read whole."""
        parameter, number = self._where[name]
        if not parameter.rule.stacks_rows:
            return self._pieces(parameter)[number][start:stop]
        above = sum(self.sizes[other][0] for other in parameter.hf_names[:number])
        return self._read(parameter, above + start, (stop - start, *self.sizes[name][1:]))

    def _read(self, parameter: Mapped, first: int, shape: tuple[int, ...]) -> Tensor:
        index = parameter.place.index
        offset = (*index, first, *[0] * (len(shape) - 1))
        stacked = (*[1] * len(index), *shape)
        return self._folder.read(self._keys[parameter.place.key], offset=offset, shape=stacked).reshape(shape)

    def _pieces(self, parameter: Mapped) -> list[Tensor]:
        """The tensors of a parameter that interleaves them; weight and bias of the last one are kept."""
        if parameter.name not in self._joined:
            whole = self._read(parameter, 0, self._model.parameter_shape(parameter))
            while len(self._joined) > 1:
                self._joined.popitem(last=False)
            self._joined[parameter.name] = list(parameter.rule.split(whole, self._model.shape))
        return self._joined[parameter.name]


def is_megatron(folder: Path) -> bool:
    """Whether a folder is Megatron's, finished or not, and not Hugging Face's. Raises UserError when neither."""
    if any((folder / name).is_file() for name in (torch_dist.FORMAT, torch_dist.INDEX)):
        return True
    if any(folder.glob("*.safetensors")) or (folder / "config.json").is_file():
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a Hugging Face folder or a Megatron checkpoint")
    raise UserError(
        f"{folder} holds neither *.safetensors nor {torch_dist.FORMAT}; give a Hugging Face folder, or a Megatron "
        "checkpoint like RUN/checkpoints/step_000012"
    )


def side_folder(checkpoint: Path, like: Path | None) -> Path:
    """The Hugging Face files that belong to a Megatron checkpoint: `like`, its own, or those that its run began with.

    Raises UserError when there are none.
    """
    if like is not None:
        return like
    if (checkpoint / SIDE_FOLDER).is_dir():
        return checkpoint / SIDE_FOLDER
    config = checkpoint.resolve().parent.parent / "config.json"
    try:
        path = json.loads(config.read_text())["model"]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint} has no folder {SIDE_FOLDER}, and is in no run with a config.json ({error!r}): what "
            "config.json and tokenizer belong to it is not known; give them with --like HF_FOLDER"
        ) from error
    if not Path(path).is_dir():
        raise UserError(
            f"{config} says that the run began with {path!r}, which is no folder here; give a copy with "
            "--like HF_FOLDER"
        )
    return Path(path)


def layout_of(side: Path) -> layout.Layout:
    """How the Hugging Face folder that belongs to a Megatron checkpoint lays out its tensors. Raises UserError."""
    stored = side / layout.FILE
    return layout.from_json(stored) if stored.is_file() else layout.of_folder(side)


@dataclass(frozen=True, slots=True)
class Opening:
    """How to open a checkpoint, which another process may do: its folder, and for Megatron's the model."""

    folder: Path
    model: Model | None

    def open(self) -> Checkpoint:
        """Open it. Raises UserError."""
        return HFCheckpoint(self.folder) if self.model is None else MegatronCheckpoint(self.folder, self.model)


def opening(folder: Path, like: Path | None = None) -> Opening:
    """How to open the checkpoint in `folder`, of either kind. Raises UserError."""
    return Opening(folder, Model.of(side_folder(folder, like)) if is_megatron(folder) else None)


def misfits(sizes: Mapping[str, tuple[int, ...]], model: Model) -> list[str]:
    """What a set of tensors has missing, unknown or misshapen for a model, in words."""
    missing, unknown = sorted(model.sizes.keys() - sizes.keys()), sorted(sizes.keys() - model.sizes.keys())
    problems = [
        f"{name} is {sizes[name]}, the model needs {size}"
        for name, size in model.sizes.items()
        if name in sizes and sizes[name] != size
    ]
    if len(problems) > _LISTED:
        problems = [*problems[:_LISTED], f"and {len(problems) - _LISTED} more sizes differ"]
    if missing:
        problems.append(f"{len(missing)} tensors are missing {missing[:_LISTED]}")
    if unknown:
        problems.append(f"{len(unknown)} are unknown {unknown[:_LISTED]}")
    return problems
