"""What both directions of a conversion have in common: what the user chooses, who hears of progress, what is reported.

Owns the order of its end: files, comparison with the source, and only then the name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from megatron_cppo.convert.checkpoints import Opening
from megatron_cppo.convert.compare import Comparison, How, compare
from megatron_cppo.convert.units import ConvertError, Done
from megatron_cppo.progress import Progress
from megatron_cppo.storage import durable
from megatron_cppo.storage.durable import Contents

DTYPES: dict[str, torch.dtype | None] = {
    "keep": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_SAMPLE_BYTES, _NUM_SAMPLES = 2**14, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to convert; `workers` 0 does all in this process. `told` hears of progress, by lines."""

    dtype: str = "keep"
    workers: int = 1
    verify: bool = True
    overwrite: bool = False
    told: TextIO | None = None

    @property
    def cast(self) -> torch.dtype | None:
        """The dtype to convert to; None keeps each tensor's."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did: files and bytes, those of them that were there from before, and its times and memory."""

    num_files: int
    num_bytes: int
    num_kept: int
    seconds: float
    peak_bytes: int
    verify_seconds: float | None
    verify_peak_bytes: int

    def lines(self) -> list[str]:
        """For people."""
        rate = self.num_bytes / max(1e-9, self.seconds) / 1e6
        kept = f" ({self.num_kept} were finished before)" if self.num_kept else ""
        told = [
            f"{self.num_files} files{kept}, {durable.brief_bytes(self.num_bytes)} in {self.seconds:.1f} s "
            f"({rate:.0f} MB/s), at most {durable.brief_bytes(self.peak_bytes)} of memory in a worker"
        ]
        if self.verify_seconds is not None:
            told.append(f"compared with the source in {self.verify_seconds:.1f} s: equal")
        return told


def listener(name: str, total_bytes: int, told: TextIO | None) -> Callable[[int], None]:
    """Who hears of bytes that are done, and tells of them in MiB."""
    if told is None:
        return lambda num_bytes: None
    progress = Progress(f"{name} MiB", total_bytes >> 20, told, time.monotonic)
    heard = 0

    def advance(num_bytes: int) -> None:
        nonlocal heard
        before = heard >> 20
        heard += num_bytes
        progress.advance((heard >> 20) - before)
        if heard >= total_bytes:
            progress.close()

    return advance


def fingerprint(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], files: Iterable[Path]) -> str:
    """What identifies a source wherever it lies: its tensors, and size and samples of each of its files.

    All of its bytes would take as long as the conversion; two trainings of one model differ in every sample.
    """
    digest = hashlib.sha256()
    listed = sorted((name, list(size), str(dtype)) for name, (size, dtype) in tensors.items())
    digest.update(json.dumps(listed).encode())
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(_NUM_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_apart(target: Path, *sources: Path) -> None:
    """Raise ConvertError when a target would replace what it is made of, or lie in it."""
    for source in sources:
        here, there = target.resolve(), source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise ConvertError(
                f"{target} and {source} are the same folder, or one is in the other; give another TARGET"
            )


def copy(source: Path, target: Path) -> Contents:
    """Copy a file, through to the disk. Raises OSError."""
    with source.open("rb") as file, durable.writing(target) as stream:
        while data := file.read(durable.CHUNK_BYTES):
            stream.write(data)
    return stream.contents


def verified(source: Opening, made: Opening, options: Options) -> Comparison:
    """Compare what was made with its source, bit by bit. Raises ConvertError when they differ."""
    try:
        found = compare(
            source,
            made,
            how=How(cast=options.cast),
            num_workers=options.workers,
            begin=lambda total: listener("comparing", total, options.told),
        )
    except OSError as error:
        raise ConvertError(f"{error}, while the result was compared; run the same command again") from error
    if not found.equal:
        raise ConvertError(
            "what was written is not what was read, A being the source: "
            + "; ".join(found.lines())
            + f"; delete {made.folder.parent} and convert again; should it recur, test this machine's memory and disk"
        )
    return found


def report(done: list[Done], *, seconds: float, compared: Comparison | None, verify_seconds: float) -> Report:
    """The report of finished units."""
    return Report(
        num_files=len(done),
        num_bytes=sum(unit.contents.size for unit in done),
        num_kept=sum(unit.was_there for unit in done),
        seconds=seconds,
        peak_bytes=max((unit.peak_bytes for unit in done), default=0),
        verify_seconds=None if compared is None else verify_seconds,
        verify_peak_bytes=0 if compared is None else compared.peak_bytes,
    )


def text_digest(text: str) -> str:
    """What identifies a text."""
    return hashlib.sha256(text.encode()).hexdigest()
