"""How a Hugging Face folder lays out its tensors: which file holds which, spelt how, in which dtype and order.

From it, and from tensors under official names, the same files can be written again. A Megatron checkpoint that was made
of a folder keeps that folder's layout as JSON, next to its side files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cppo import pretrained
from megatron_cppo.config import ConfigError
from megatron_cppo.families import experts
from megatron_cppo.storage.hf_folder import disk_name
from megatron_cppo.storage.safetensors_file import DTYPES, NAMES, Header, Stored, read_header

FILE = "tensor_layout.json"
"""Its name in a Megatron checkpoint's folder of side files."""
BLOCK_BYTES = 2**24
"""What passes through memory at once: rows of a tensor, no more than this together."""


def row_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in blocks of BLOCK_BYTES (or of a single row).

    >>> list(row_blocks((5, 2**22), torch.bfloat16))
    [(0, 2), (2, 4), (4, 5)]
    """
    row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor of official name is: the tensor of a file, and of an expert's matrix its place in that stack."""

    file: str
    stored: Stored
    place: experts.Place | None = None
    right: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor of official name."""
        return self.stored.shape if self.place is None else self.place.shape(self.stored.shape, right=self.right)


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a folder and their tensors, and what is said of them in its index; None where there is no index.

    `text` is that index as it was written, "" where it is not known.
    """

    files: Mapping[str, Header]
    index: Mapping[str, Any] | None
    text: str = ""

    @property
    def stored(self) -> dict[str, tuple[str, Stored]]:
        """By official name (of stacks, the stack's): the file, and the tensor there."""
        return {
            disk_name(stored.name): (file, stored) for file, header in self.files.items() for stored in header.tensors
        }

    def locations(self) -> dict[str, Location]:
        """By official name, each expert's matrix by itself. Raises ConfigError for stacks that fit no known order."""
        stored, found = self.stored, {}
        for name, (file, tensor) in stored.items():
            names = experts.matrices(name, tensor.shape[0]) if len(tensor.shape) == 3 else []
            if not names:
                found[name] = Location(file, tensor)
                continue
            right = multiplies_right(name, stored)
            found |= {each: Location(file, tensor, experts.place(each), right) for each in names}
        return found


def multiplies_right(stack: str, stored: Mapping[str, tuple[str, Stored]]) -> bool:
    """The order of the stacked experts of the layer that `stack` belongs to."""
    layer = stack.rpartition(".")[0]
    pair = [stored.get(f"{layer}.{kind}") for kind in ("gate_up_proj", "down_proj")]
    shapes = [found[1].shape for found in pair if found is not None]
    right = experts.multiplies_right(*shapes) if [len(shape) for shape in shapes] == [3, 3] else None
    if right is None:
        raise ConfigError(
            f"the stacked experts {layer} have the shapes {shapes}, which fit neither transformers 4's order nor 5's; "
            "copy the checkpoint again"
        )
    return right


def of_folder(folder: Path) -> Layout:
    """The layout of a folder, from the headers of its files.

    Raises UserError: no file, a damaged one, tensors that the index lists and no file has, or that two files have.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{folder} holds no *.safetensors file; give a Hugging Face folder in that format")
    files = {path.name: read_header(path) for path in paths}
    found = [stored for header in files.values() for stored in header.tensors]
    wrong = pretrained.untrainable({stored.name: stored.dtype for stored in found})
    if wrong:
        raise ConfigError(f"{folder}: {wrong}")
    names = [disk_name(stored.name) for stored in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{folder}: {len(twice)} tensors are in it twice, first {twice[0]}; remove the stale files")
    index = _index(folder)
    if index is None:
        return Layout(files, None)
    absent = sorted({disk_name(name) for name in index["weight_map"]} - set(names))
    if absent:
        raise ConfigError(
            f"{folder} lacks {len(absent)} tensors that its index lists, first {absent[0]!r}; a shard is missing, "
            "copy the checkpoint again"
        )
    return Layout(files, index.get("metadata", {}), (folder / pretrained.INDEX).read_text())


def _index(folder: Path) -> dict[str, Any] | None:
    path = folder / pretrained.INDEX
    try:
        told = json.loads(path.read_text())
        if not isinstance(told["weight_map"], dict) or not isinstance(told.get("metadata", {}), dict):
            raise ValueError("it holds no weight_map")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); copy the checkpoint again") from error
    return told


def to_json(layout: Layout) -> str:
    """The text that `from_json` reads."""
    files = {
        file: {
            "notes": dict(header.notes),
            "tensors": {stored.name: [stored.dtype, list(stored.shape)] for stored in header.tensors},
        }
        for file, header in layout.files.items()
    }
    return json.dumps({"files": files, "index": layout.index, "text": layout.text}, indent=1) + "\n"


def from_json(path: Path) -> Layout:
    """The layout that was written into `path`. Raises ConfigError."""
    try:
        told = json.loads(path.read_text())
        files = {
            str(file): Header(
                tuple(Stored(name, dtype, tuple(shape)) for name, (dtype, shape) in entry["tensors"].items()),
                entry["notes"],
            )
            for file, entry in told["files"].items()
        }
        outside = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
        unknown = {stored.dtype for header in files.values() for stored in header.tensors} - DTYPES.keys()
        if outside or unknown:
            raise ValueError(f"files {outside[:3]}, dtypes {sorted(unknown)[:3]}")
        json.loads(told["text"] or "{}")
        return Layout(files, told["index"], str(told["text"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); copy the checkpoint again") from error


def with_dtypes(layout: Layout, dtypes: Mapping[str, torch.dtype]) -> Layout:
    """The layout with the dtypes that its tensors shall have, by official name (of a stack, any of its matrices')."""

    def changed(stored: Stored) -> Stored:
        name = disk_name(stored.name)
        matrices = experts.matrices(name, stored.shape[0]) if len(stored.shape) == 3 else []
        return Stored(stored.name, NAMES[dtypes[matrices[0] if matrices else name]], stored.shape)

    return Layout(
        {
            file: Header(tuple(changed(stored) for stored in header.tensors), header.notes)
            for file, header in layout.files.items()
        },
        layout.index,
        layout.text,
    )


def index_text(layout: Layout) -> str | None:
    """The index of a folder in this layout: as it was written, where that is still true; None when it needs none."""
    if layout.index is None and len(layout.files) == 1:
        return None
    stored = layout.stored.values()
    total = {"total_size": sum(tensor.num_bytes for _, tensor in stored)}
    weight_map = {tensor.name: file for file, tensor in stored}
    index = {"metadata": {**(layout.index or {}), **total}, "weight_map": dict(sorted(weight_map.items()))}
    if layout.text and json.loads(layout.text) == index:
        return layout.text
    return json.dumps(index, indent=2) + "\n"
