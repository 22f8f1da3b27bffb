"""Files that are whole or absent: written through to the disk, and published under their name by one rename.

Knows files and folders alone, nothing of what is in them, of torch or of ranks. Every function raises OSError when the
file system refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

CHUNK_BYTES = 2**22
_REPLACED = ".replaced_"
_BEGIN_BYTES = 2**25
"""So often the disk is told to begin, so that little is left to wait for at the end."""
# What a file system answers that cannot sync a folder, as it does so by itself.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds: its size in bytes and their hash, in hexadecimal (`xxh128sum` prints the same).

    XXH3 finds what a disk, a copy or a killed process damages, at the pace of memory: SHA-256, which is for forgers,
    takes longer than writing the file. Whoever could forge a file could as well forge the list that holds its hash.
    """

    size: int
    xxh3_128: str


class HashingStream:
    """A binary file that is being written from its beginning; it hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._size = self._begun = 0
        self.failure: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`; returns its size in bytes."""
        size = memoryview(data).nbytes
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._size += size
        if self._size - self._begun >= _BEGIN_BYTES:
            self.flush()
            _begin_writing(self.fileno(), self._begun, self._size - self._begun)
            self._begun = self._size
        return size

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Hand everything to the operating system."""
        try:
            self._file.flush()
        except OSError as error:
            self.failure = error
            raise

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    @property
    def contents(self) -> Contents:
        """What has been written so far."""
        return Contents(self._size, self._hash.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[HashingStream]:
    """Write a new file; at the end of the block it is on the disk. An OSError names the file, whoever wrapped it."""
    stream = None
    try:
        with path.open("wb") as file:
            stream = HashingStream(file)
            yield stream
            stream.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError:
        # torch.save reports that its stream failed by an error of its own, which says nothing of why.
        if stream is None or stream.failure is None:
            raise
        raise OSError(stream.failure.errno, stream.failure.strerror, str(path)) from stream.failure


def _begin_writing(descriptor: int, start: int, size: int) -> None:
    """Have the kernel begin to write a range of a file to the disk, without waiting; where it knows how (Linux)."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        WRITE = 2
        begin(ctypes.c_int(descriptor), ctypes.c_int64(start), ctypes.c_int64(size), ctypes.c_uint(WRITE))


def write(path: Path, data: bytes) -> Contents:
    """Write a new file of `data`, through to the disk."""
    with writing(path) as stream:
        stream.write(data)
    return stream.contents


def read_contents(path: Path) -> Contents:
    """Size and hash of a file, by reading it."""
    with path.open("rb") as file:
        digest = xxhash.xxh3_128()
        size = 0
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Contents(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk: what was made, renamed or deleted there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Have the files of `folder` on the disk, whoever wrote them."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def publish(partial: Path, final: Path) -> None:
    """Rename the folder `partial`, whose files are on the disk, to `final`; one of that name is replaced.

    A process that ends in between leaves the old folder aside, whole; `restore_replaced` puts it back.
    """
    sync_folder(partial)
    aside = final.with_name(_REPLACED + final.name)
    if final.exists():
        remove(aside)
        final.rename(aside)
    partial.rename(final)
    sync_folder(final.parent)
    remove(aside)


def restore_replaced(folder: Path) -> None:
    """Finish in `folder` what a process that ended in `publish` had begun, or undo it."""
    for aside in folder.glob(_REPLACED + "*"):
        final = folder / aside.name.removeprefix(_REPLACED)
        if final.exists():
            remove(aside)
        else:
            aside.rename(final)


def remove(folder: Path) -> None:
    """Delete a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def free_bytes(folder: Path) -> int | None:
    """Bytes that may still be written to the file system of `folder`; None when it does not say."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize if state.f_blocks else None


def describe(error: OSError, folder: Path) -> str:
    """One line of what the file system refused, with the free space where that is the reason."""
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = free_bytes(folder)
            text += "" if free is None else f" ({brief_bytes(free)} are free)"
    return text


def brief_bytes(count: int) -> str:
    """A size for people.

    >>> brief_bytes(3 * 2**30), brief_bytes(1536)
    ('3.0 GiB', '1.5 KiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
