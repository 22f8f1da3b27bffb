"""One rank's data file of a checkpoint, written while training goes on.

Between a step's save and the next update no weight changes: rollouts are sampled, graded and scored. A thread writes
from the live tensors meanwhile; only what is not written when they are about to change is copied to host memory
(`detach`). Knows neither the other ranks nor what becomes of the file.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cppo.storage import torch_dist
from megatron_cppo.storage.durable import Contents
from megatron_cppo.storage.torch_dist import Chunk

BYTES_PER_PIECE = 4096
"""Room for a piece's header, in a file of torch.save, and for its line in the index."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle to write, `rounded_to` a type if given: of the tensor `key`, of `size` as a whole, at `offset`."""

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    rounded_to: torch.dtype | None = None

    def numbers(self) -> Tensor:
        """As they are written; the tensor itself where nothing is rounded."""
        return self.tensor if self.rounded_to is None else self.tensor.to(self.rounded_to)


@dataclass(frozen=True, slots=True)
class Written:
    """A data file that is on the disk."""

    name: str
    contents: Contents
    chunks: list[Chunk]


class Saving:
    """A data file that is being written by a thread of its own; with `background` false, it is written at once."""

    def __init__(self, pieces: Iterable[Piece], folder: Path, name: str, *, background: bool) -> None:
        self._pieces = deque(pieces)
        self._name = name
        self._lock = threading.Lock()
        self.copied_bytes = 0
        """Host memory that `detach` has taken."""
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._written = thread.submit(self._write, folder, name)
        thread.shutdown(wait=not background)

    @property
    def is_done(self) -> bool:
        """Whether it is on the disk, or has failed."""
        return self._written.done()

    def detach(self) -> None:
        """Let the tensors change from now on: copy what is not written yet. Waits for at most one piece."""
        with self._lock:
            for number, piece in enumerate(self._pieces):
                copy = piece.numbers().detach().to("cpu", copy=piece.rounded_to is None)
                self.copied_bytes += copy.nbytes
                self._pieces[number] = Piece(piece.key, piece.size, piece.offset, copy)

    def result(self) -> Written:
        """The file; waits for it. Raises OSError where the file system refused, or memory ran out."""
        try:
            return self._written.result()
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), self._name) from error

    def _write(self, folder: Path, name: str) -> Written:
        try:
            with torch_dist.data_file(folder, name) as file:
                while self._write_one(file):
                    pass
        finally:
            with self._lock:  # where writing failed, nothing more is to be copied
                self._pieces.clear()
        return Written(file.name, file.contents, file.chunks)

    def _write_one(self, file: torch_dist.DataFile) -> bool:
        with self._lock:  # while it is written, the tensor must not change
            if not self._pieces:
                return False
            piece = self._pieces.popleft()
            file.add(piece.key, piece.numbers(), size=piece.size, offset=piece.offset)
        return True
