"""One safetensors file: its header, runs of rows read without mapping the file, and the header of a new one.

A mapped file counts as memory of whoever has read it; here only what was asked for is held. Knows no tensor's meaning.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cppo.config import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The format's names of dtypes."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8


class SafetensorsError(UserError):
    """A file is no safetensors file, or not all of it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file, and where it begins there, in bytes.

    Example: Stored("model.norm.weight", "BF16", (8192,), start=1024)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file in the order of their bytes, and what its writer noted."""

    tensors: tuple[Stored, ...]
    notes: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a file, whose size must be what it says. Raises SafetensorsError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"{size} bytes that do not begin with a header")
            told = json.loads(file.read(length))
        return _parsed(told, first=8 + length, size=size)
    except OSError as error:
        raise SafetensorsError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SafetensorsError(f"{path} is damaged ({error}); copy the checkpoint again") from error


def _parsed(told: dict[str, Any], *, first: int, size: int) -> Header:
    notes = told.pop("__metadata__", {})
    tensors, ends = [], [first]
    for name, entry in told.items():
        start, stop = entry["data_offsets"]
        stored = Stored(name, entry["dtype"], tuple(entry["shape"]), first + start)
        if stored.dtype not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {stored.dtype!r}")
        if stop - start != stored.num_bytes:
            raise ValueError(f"{name} has {stop - start} bytes, its shape needs {stored.num_bytes}")
        tensors.append(stored)
        ends.append(first + stop)
    if size != max(ends):
        raise ValueError(f"{size} bytes, its header says {max(ends)}")
    return Header(tuple(sorted(tensors, key=lambda stored: stored.start)), notes)


def header_bytes(tensors: Iterable[Stored], notes: Mapping[str, str]) -> bytes:
    """The beginning of a new file, whose tensors follow in this order without gaps; byte for byte as the library's."""
    told: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for stored in tensors:
        offsets = [end, end + stored.num_bytes]
        told[stored.name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_rows(descriptor: int, stored: Stored, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor of the open file. Raises OSError, SafetensorsError when the file ends early."""
    rows = torch.empty((stop - start, *stored.shape[1:]), dtype=DTYPES[stored.dtype])
    first = stored.start + start * math.prod(stored.shape[1:]) * rows.itemsize
    room, got = bytes_of(rows), 0
    while got < len(room):
        count = os.preadv(descriptor, [room[got:]], first + got)
        if not count:
            raise SafetensorsError(f"the file of {stored.name} has become shorter; copy the checkpoint again")
        got += count
    return rows


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, which are its own."""
    return tensor.view(-1).view(torch.uint8).numpy().data
