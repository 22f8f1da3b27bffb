"""Megatron's `torch_dist` folders, written and read chunk by chunk: no model, no process group, no Megatron-Core.

    __3_0.distcp      any number of data files: chunks of tensors, each a file of torch.save, one after the other
    .metadata         a pickle: of every tensor size and dtype, and the place of each of its chunks
    common.pt         what is no tensor
    metadata.json     the format's name; Megatron-Core takes a folder without it for unfinished, so it is written last

A chunk is a rectangle of a tensor; chunks may have any sizes, and whoever loads reads those that it needs. What is
written here is read by megatron.core.dist_checkpointing (0.16.1), and the other way round. Of a pickle, which could be
a program, only the names of the format's own classes are looked up: anything else in it is an error.
"""

from __future__ import annotations

import enum
import io
import json
import math
import os
import pickle
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_cppo.config import UserError
from megatron_cppo.storage import durable
from megatron_cppo.storage.durable import Contents, HashingStream

INDEX, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
CHUNK_BYTES = 2**28
"""Larger chunks are written as several, so that nobody needs memory for more."""
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {
        "Size",
        *(str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}

_IGNORED = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")


class TorchDistError(UserError):
    """A folder is no torch_dist checkpoint, is damaged, or lacks something; the text says which file, and why."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of the tensor `key`, which is of `size` as a whole, and where its bytes are.

    Example: Chunk("language_model.decoder.final_layernorm.weight", (8192,), "bfloat16", (0,), (8192,), "__0_0.distcp",
    start=0, length=17542)
    """

    key: str
    size: tuple[int, ...]
    dtype: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class DataFile:
    """A data file that is being written."""

    def __init__(self, name: str, stream: HashingStream) -> None:
        self.name, self._stream = name, stream
        self.chunks: list[Chunk] = []

    def add(self, key: str, tensor: Tensor, *, size: Sequence[int], offset: Sequence[int]) -> None:
        """Append `tensor`, which lies at `offset` in the tensor `key` of `size`. Raises OSError."""
        for dim, start, stop in _runs(tensor):
            part, at = tensor, list(offset)
            if tensor.dim():
                part = tensor.narrow(dim, start, stop - start)
                at[dim] += start
            part = part.detach().cpu().contiguous()
            if part.untyped_storage().nbytes() != part.nbytes:
                part = part.clone()  # torch.save writes all of a storage
            start = self._stream.tell()
            torch.save(part, cast(IO[bytes], self._stream))
            length = self._stream.tell() - start
            dtype = str(part.dtype).removeprefix("torch.")
            place = (self.name, start, length)
            self.chunks.append(Chunk(key, tuple(size), dtype, tuple(at), tuple(part.shape), *place))

    @property
    def contents(self) -> Contents:
        """What has been written so far."""
        return self._stream.contents


def _runs(tensor: Tensor) -> Iterator[tuple[int, int, int]]:
    """(dimension, start, stop) of parts of at most CHUNK_BYTES (or of a single row).

    The dimension is the first that can be cut: those of a stack of layers, and experts, are one.
    """
    dim = next((dim for dim, size in enumerate(tensor.shape) if size > 1), 0)
    count = tensor.shape[dim] if tensor.dim() else 1
    rows = max(1, CHUNK_BYTES * count // max(1, tensor.nbytes))
    for start in range(0, max(1, count), rows):
        yield dim, start, min(start + rows, count)


def incomplete(chunks: Iterable[Chunk]) -> list[str]:
    """The tensors of which `chunks` are not all, or more than that."""
    found: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for chunk in chunks:
        found[chunk.key, chunk.size] += math.prod(chunk.shape)
    return sorted(key for (key, size), count in found.items() if count != math.prod(size))


@contextmanager
def data_file(folder: Path, name: str, *, written_as: str = "") -> Iterator[DataFile]:
    """Write the new data file `name` (its ending .distcp is added) of `folder`; on the disk at the end of the block.

    Until the caller renames it, it is called `written_as`, where that is given.
    """
    with durable.writing(folder / (written_as or f"{name}.distcp")) as stream:
        yield DataFile(f"{name}.distcp", stream)


def write_index(
    folder: Path,
    chunks: Iterable[Chunk],
    *,
    common: Mapping[str, Any],
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Contents]:
    """Write what makes data files a checkpoint; returns the files. `aliases` {other key: key} cost no bytes.

    `common` must hold plain values. Raises OSError.
    """
    stacked: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        stacked[chunk.key].append(chunk)
    for other, key in (aliases or {}).items():
        if key in stacked:
            stacked[other] = stacked[key]
    sizes, places, once = {}, {}, _Once()
    for key, parts in stacked.items():
        first = parts[0]
        assert all((part.size, part.dtype) == (first.size, first.dtype) for part in parts), f"{key} has several sizes"
        sizes[once.text(key)] = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, first.dtype)),
            once.size(first.size),
            [ChunkStorageMetadata(once.size(part.offset), once.size(part.shape)) for part in parts],
        )
        for part in parts:
            place = _StorageInfo(once.text(part.file), part.start, part.length)
            places[MetadataIndex(once.text(key), once.size(part.offset))] = place
    buffer = io.BytesIO()
    torch.save(dict(common), buffer)
    return {
        INDEX: durable.write(folder / INDEX, pickle.dumps(Metadata(sizes, None, places))),
        COMMON: durable.write(folder / COMMON, buffer.getvalue()),
        FORMAT: durable.write(folder / FORMAT, json.dumps(_FORMAT).encode()),
    }


class _Ignored:
    """In place of what an index says of how it was saved: takes anything, and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _Once:
    """Equal values as one object: a pickle names an object that it has had, so its bytes depend on who is who."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._sizes: dict[tuple[int, ...], torch.Size] = {}

    def text(self, value: str) -> str:
        return self._texts.setdefault(value, value)

    def size(self, value: Sequence[int]) -> torch.Size:
        return self._sizes.setdefault(tuple(value), torch.Size(value))


def _member(kind: Any, name: str, *default: Any) -> Any:
    """A member of one of the format's enumerations, or of what is ignored; nothing else has attributes here."""
    if kind is _Ignored:
        return _Ignored()
    if not default and isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {kind!r}, which is not of this format")


class _Index(pickle.Unpickler):
    """Looks up the format's own classes, and nothing else: what a pickle names is imported and called.

    The plan of a save, which Megatron-Core leaves in the index, is not even looked up.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # how some versions of Python 3.11 pickle an enumeration's member
        if module.startswith(_IGNORED):
            return _Ignored
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not of this format")


class Folder:
    """A finished torch_dist folder: its tensors, any rectangle of which can be read. Raises TorchDistError."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        told = self._read_json()
        if told.get("sharded_backend") != "torch_dist":
            raise TorchDistError(
                f"{folder / FORMAT}: its format is {told}, only torch_dist is supported; save it as such"
            )
        index: Any = self._read_index()
        self._chunks: dict[str, list[Chunk]] = defaultdict(list)
        for key, tensor in index.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):
                continue  # an object of the program that wrote it
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            for part in tensor.chunks:
                where = index.storage_data.get(MetadataIndex(key, part.offsets))
                if where is None:
                    raise TorchDistError(f"{folder / INDEX}: a chunk of {key} at {tuple(part.offsets)} has no place")
                place = (where.relative_path, where.offset, where.length)
                self._chunks[key].append(
                    Chunk(key, tuple(tensor.size), dtype, tuple(part.offsets), tuple(part.sizes), *place)
                )
        self._reach: dict[str, int] = {}
        for key, chunks in self._chunks.items():
            chunks.sort(key=lambda chunk: chunk.offset)
            self._reach[key] = max((chunk.shape[0] for chunk in chunks if chunk.shape), default=0)
        self._last: tuple[Chunk, Tensor] | None = None

    def _read_json(self) -> dict[str, Any]:
        try:
            told = json.loads((self.path / FORMAT).read_text())
        except FileNotFoundError as error:
            raise TorchDistError(
                f"{self.path} holds no {FORMAT}: it is no Megatron checkpoint, or unfinished; give a finished one"
            ) from error
        except (ValueError, OSError) as error:
            raise TorchDistError(f"{self.path / FORMAT} cannot be read ({error}); copy the checkpoint again") from error
        return told if isinstance(told, dict) else {}

    def _read_index(self) -> Any:
        try:
            with (self.path / INDEX).open("rb") as file:
                return _Index(file).load()
        except (
            OSError,
            EOFError,
            pickle.UnpicklingError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
        ) as error:
            raise TorchDistError(f"{self.path / INDEX} cannot be read ({error}); copy the checkpoint again") from error

    @property
    def keys(self) -> set[str]:
        """The names of all tensors."""
        return set(self._chunks)

    def size(self, key: str) -> tuple[int, ...]:
        """A tensor's size as a whole. Raises KeyError."""
        return self._chunks[key][0].size if key in self._chunks else self._absent(key)

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype. Raises KeyError."""
        return getattr(torch, self._chunks[key][0].dtype) if key in self._chunks else self._absent(key)

    def _absent(self, key: str) -> Any:
        raise TorchDistError(f"{self.path} holds no tensor {key}; use a checkpoint of the same model")

    @property
    def num_bytes(self) -> int:
        """Of all chunks, as the index has them; those of several keys count once."""
        places = {(chunk.file, chunk.start): chunk.length for chunks in self._chunks.values() for chunk in chunks}
        return sum(places.values())

    def read(self, key: str, *, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The rectangle of `shape` at `offset` of a tensor; reads the chunks that it touches, one at a time.

        What comes from one chunk is a view of it: do not write into it. Raises TorchDistError when chunks do not cover
        the rectangle, or are damaged.
        """
        wanted, covered = math.prod(shape), 0
        found: Tensor | None = None
        for chunk in self._near(key, offset, shape):
            overlap = _overlap(offset, shape, chunk)
            if overlap is None:
                continue
            here, there = overlap
            part = self._load(chunk)[there]
            if part.numel() == wanted:
                return part
            if found is None:
                found = torch.empty(tuple(shape), dtype=self.dtype(key))
            found[here] = part
            covered += part.numel()
        if covered != wanted:
            raise TorchDistError(
                f"{self.path}: {key} {tuple(offset)} + {tuple(shape)}: its chunks hold {covered} of {wanted} "
                "numbers; copy the checkpoint again"
            )
        return torch.empty(tuple(shape), dtype=self.dtype(key)) if found is None else found

    def _near(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> Sequence[Chunk]:
        """The chunks that may touch a rectangle: by the first dimension, which are the layers where they are stacked.

        A folder may hold ten thousands of chunks of one key, of which a reader of it asks as often.
        """
        chunks: list[Chunk] = self._chunks[key] if key in self._chunks else self._absent(key)
        if not offset:
            return chunks
        low = bisect_left(chunks, offset[0] - self._reach[key] + 1, key=lambda chunk: chunk.offset[0])
        return chunks[low : bisect_left(chunks, offset[0] + shape[0], key=lambda chunk: chunk.offset[0])]

    def _load(self, chunk: Chunk) -> Tensor:
        if self._last is not None and self._last[0] == chunk:
            return self._last[1]
        self._last = None  # before the next one takes memory
        path = self.path / chunk.file
        if path.parent != self.path:
            raise TorchDistError(f"{self.path / INDEX}: the data file {chunk.file!r} is not in its folder")
        try:
            with path.open("rb") as file:
                part = cast(IO[bytes], _Part(file.fileno(), chunk.start, chunk.length))
                tensor = torch.load(part, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            told = str(error).splitlines()[0] if str(error) else repr(error)
            raise TorchDistError(
                f"{path}: {chunk.key} at byte {chunk.start} is damaged ({told}); copy it again"
            ) from error
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.shape:
            raise TorchDistError(f"{path}: {chunk.key} at byte {chunk.start} is not what the index says; copy it again")
        self._last = (chunk, tensor)
        return tensor


def _overlap(
    offset: Sequence[int], shape: Sequence[int], chunk: Chunk
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a rectangle shares with a chunk: its place in the rectangle, and in the chunk; None when nothing."""
    here, there = [], []
    for at, length, start, size in zip(offset, shape, chunk.offset, chunk.shape, strict=True):
        low, high = max(at, start), min(at + length, start + size)
        if low >= high:
            return None
        here.append(slice(low - at, high - at))
        there.append(slice(low - start, high - start))
    return tuple(here), tuple(there)


class _Part(io.RawIOBase):
    """Some bytes of an open file, as a file; nothing is copied but what is asked for."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")
        wanted = max(0, min(len(room), self._length - self._at))
        got = 0
        while got < wanted:
            count = os.preadv(self._descriptor, [room[got:wanted]], self._start + self._at + got)
            if not count:
                break
            got += count
        self._at += got
        return got
