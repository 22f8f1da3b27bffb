"""Hugging Face checkpoint folders: read slices of tensors, write whole ones. No pickle, no model class.

Tensor names are normalised to those of official Qwen2.5-VL checkpoints (`model.layers...`, `visual...`); a folder in
the style of `state_dict()`, and of Qwen3-VL (`model.language_model.layers...`, `model.visual...`), is read, and written
back, as such. So are stacked experts, in either order: inside, each matrix has a name of its own.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_cppo import pretrained
from megatron_cppo.config import ConfigError
from megatron_cppo.families import experts
from megatron_cppo.storage import durable

SHARD_BYTES = 4 * 2**30
_STYLES = (("model.language_model.", "model."), ("model.visual.", "visual."))
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")


def disk_name(name: str) -> str:
    """The official checkpoints' name of a tensor.

    >>> disk_name("model.language_model.norm.weight")
    'model.norm.weight'
    """
    for other, official in _STYLES:
        if name.startswith(other):
            return official + name.removeprefix(other)
    return name


def side_files(folder: Path) -> list[Path]:
    """The files of a folder that hold no weights: config, tokenizer, processor, templates and what else there is."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES)
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor is: the file, its name there, and for an expert's matrix its place in the tensor of that name."""

    file: Any
    own_name: str
    place: experts.Place | None = None
    right: bool = False

    @property
    def slice(self) -> Any:
        return self.file.get_slice(self.own_name)


class Reader:
    """The tensors of a folder, by official name, each expert's matrix by itself. A context manager: files stay open.

    Raises ConfigError for a folder that is damaged or cannot be trained.
    """

    def __init__(self, folder: str) -> None:
        self._stack = ExitStack()
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise ConfigError(f"model.path: {folder!r} holds no *.safetensors file; convert the checkpoint first")
        found: dict[str, _Entry] = {}
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as error:
                raise ConfigError(f"model.path: {path} is damaged ({error}); copy the checkpoint again") from error
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                found[disk_name(name)] = _Entry(file, name)
        self._check_index(folder, found)
        wrong = pretrained.untrainable({name: found[name].slice.get_dtype() for name in sorted(found)})
        if wrong:
            raise ConfigError(f"model.path: {folder!r}: {wrong}")
        self.own_names = {entry.own_name for entry in found.values()}
        """Names as this folder spells them."""
        self.stacks: dict[str, tuple[tuple[int, ...], bool]] = {}
        """Shape of each tensor of stacked experts, by official name, and whether it multiplies from the right."""
        self._entries: dict[str, _Entry] = {}
        for name, entry in found.items():
            self._entries |= self._matrices(name, entry, found) or {name: entry}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @staticmethod
    def _check_index(folder: str, found: dict[str, _Entry]) -> None:
        index = Path(folder) / "model.safetensors.index.json"
        if index.is_file():
            try:
                listed = {disk_name(name) for name in json.loads(index.read_text())["weight_map"]}
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"model.path: {index} is damaged ({error!r}); copy the checkpoint again") from error
            absent = sorted(listed - found.keys())
            if absent:
                raise ConfigError(
                    f"model.path: {folder!r} lacks {len(absent)} tensors that its index lists, first {absent[0]!r}; "
                    "a shard is missing, copy the checkpoint again"
                )

    def _matrices(self, name: str, entry: _Entry, found: dict[str, _Entry]) -> dict[str, _Entry]:
        """The matrices in a tensor of stacked experts; empty for any other tensor."""
        shape = tuple(entry.slice.get_shape())
        names = experts.matrices(name, shape[0]) if len(shape) == 3 else []
        if not names:
            return {}
        layer = name.rpartition(".")[0]
        pair = [found.get(f"{layer}.{kind}") for kind in ("gate_up_proj", "down_proj")]
        shapes = [tuple(other.slice.get_shape()) for other in pair if other is not None]
        right = experts.multiplies_right(*shapes) if [len(s) for s in shapes] == [3, 3] else None
        if right is None:
            raise ConfigError(
                f"model.path: the stacked experts {layer} have the shapes {shapes}, which fit neither transformers 4's "
                "order nor 5's; copy the checkpoint again"
            )
        self.stacks[name] = (shape, right)
        return {each: _Entry(entry.file, entry.own_name, experts.place(each), right) for each in names}

    @property
    def names(self) -> set[str]:
        """Official names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        entry = self._entries[name]
        whole = tuple(entry.slice.get_shape())
        return whole if entry.place is None else entry.place.shape(whole, right=entry.right)

    def read(self, name: str, *, axis: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor, or its [start, stop) along `axis`, reading no more than that."""
        entry, shape = self._entries[name], self.shape(name)
        wanted = [slice(0, size) for size in shape]
        if axis is not None:
            wanted[axis] = slice(start, stop)
        if entry.place is None:
            return entry.slice[tuple(wanted)] if wanted else entry.slice[:]
        rows, columns = wanted
        rows = slice(rows.start + entry.place.part * shape[0], rows.stop + entry.place.part * shape[0])
        expert = slice(entry.place.expert, entry.place.expert + 1)
        if entry.right:
            return entry.slice[expert, columns, rows][0].t()
        return entry.slice[expert, rows, columns][0]


@dataclass(frozen=True, slots=True)
class _Style:
    """How a folder spells its tensors: prefixes, official -> its own, and its stacks of experts."""

    prefixes: dict[str, str]
    stacks: dict[str, tuple[tuple[int, ...], bool]]

    @staticmethod
    def of(source: Path) -> _Style:
        with Reader(str(source)) as reader:
            prefixes = {
                official: other
                for other, official in _STYLES
                if any(name.startswith(other) for name in reader.own_names)
            }
            return _Style(prefixes, reader.stacks)

    def spell(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`tensors` (official names) as this style has them, in host memory; experts stacked once all have come."""
        stacks: dict[str, Tensor] = {}
        missing: dict[str, int] = {}
        for name, tensor in tensors:
            where = experts.place(name)
            if where is None or where.stack not in self.stacks:
                yield self._own(name), tensor.detach().to("cpu", copy=True).contiguous()
                continue
            shape, right = self.stacks[where.stack]
            if where.stack not in stacks:
                stacks[where.stack] = torch.empty(shape, dtype=tensor.dtype)
                missing[where.stack] = shape[0] * where.parts
            where.of(stacks[where.stack], right=right).copy_(tensor)
            missing[where.stack] -= 1
            if not missing[where.stack]:
                yield self._own(where.stack), stacks.pop(where.stack)
        assert not stacks, f"experts are missing of {sorted(stacks)}"

    def _own(self, name: str) -> str:
        for official, own in self.prefixes.items():
            if name.startswith(official):
                return own + name.removeprefix(official)
        return name


def write(tensors: Iterable[tuple[str, Tensor]], *, source: str, target: str) -> None:
    """Write `tensors` (official names, whole) as a folder like `source`: its side files are copied verbatim.

    The folder appears under its name only when complete; a previous one of that name is replaced. Raises OSError when
    the file system refuses: nothing is left of the new folder then, and `tensors` is exhausted, as other ranks may
    take part in making them.
    """
    final, stream = Path(target), iter(tensors)
    partial = final.with_name(final.name + ".partial")
    try:
        durable.remove(partial)
        partial.mkdir(parents=True)
        durable.restore_replaced(final.parent)
        _write(stream, origin=Path(source), partial=partial)
        durable.sync_files(partial)
        durable.publish(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        for _ in stream:
            pass
        raise


def _write(tensors: Iterator[tuple[str, Tensor]], *, origin: Path, partial: Path) -> None:
    shard: dict[str, Tensor] = {}
    written: list[tuple[Path, list[str]]] = []
    size = total = 0
    for name, tensor in _Style.of(origin).spell(tensors):
        if size and size + tensor.nbytes > SHARD_BYTES:
            written.append(_flush(partial, len(written), shard))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    written.append(_flush(partial, len(written), shard))
    _name_shards(partial, written, total)
    for path in side_files(origin):
        shutil.copy2(path, partial / path.name)


def _flush(folder: Path, number: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = folder / f"shard-{number}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # of the disk, too
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error
    return path, list(tensors)


def _name_shards(folder: Path, written: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(written, 1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def vocabulary_rows(name_rows: int, *, rank: int, num_ranks: int, padded_rows: int) -> tuple[int, int, int]:
    """(start, stop, padding) of the vocabulary rows that TP rank `rank` reads, and the zero rows that follow."""
    share = padded_rows // num_ranks
    start, stop = min(rank * share, name_rows), min((rank + 1) * share, name_rows)
    return start, stop, share - (stop - start)


def pad_rows(tensor: Tensor, count: int) -> Tensor:
    """`tensor` with `count` zero rows below."""
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) if count else tensor
