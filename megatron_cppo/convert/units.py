"""Work that survives its process: units, each of which becomes one file, done once whatever kills whom.

    TARGET.partial/plan.json       what is being made, of what; another plan is refused
    TARGET.partial/units/*.json    a finished unit: its file, size and XXH3, and what else its maker tells
    TARGET.partial/files/          the files; renamed to TARGET when all is there

A file is written under another name, synced and renamed, and only then its record is published, by a rename too. So a
record means a whole file; it is believed when the file still has its hash. Knows nothing of what the files hold.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_cppo.config import UserError
from megatron_cppo.convert import workers
from megatron_cppo.storage import checkpoint_files, durable
from megatron_cppo.storage.durable import Contents

Task = TypeVar("Task")
Setting = TypeVar("Setting")
_BEGUN = ".begun_"
_SPARE_BYTES = 2**22


class ConvertError(UserError):
    """A conversion cannot begin, or go on; what is finished is kept."""


@dataclass(frozen=True, slots=True)
class Unit(Generic[Task]):
    """A file to be made, how large it will be, and of what its maker makes it."""

    file: str
    num_bytes: int
    task: Task


@dataclass(frozen=True, slots=True)
class Done:
    """A finished unit: its file, what its maker told, whether it was there already, the peak memory of its worker."""

    file: str
    contents: Contents
    told: Any
    was_there: bool = False
    peak_bytes: int = 0


Write = Callable[[Setting, Path, Unit[Any]], tuple[Contents, Any]]
"""Writes a unit's file under the path it is given, through to the disk; returns what it holds, and what to tell."""


class Workplace:
    """The folder in which one target is made. A context manager: no other process works there meanwhile."""

    def __init__(self, target: Path, plan: Mapping[str, str], *, overwrite: bool) -> None:
        self.target, self._plan, self._overwrite = target, dict(plan), overwrite
        self.folder = target.with_name(target.name + ".partial")
        self.files, self.records = self.folder / "files", self.folder / "units"
        self._lock = -1

    def __enter__(self) -> Workplace:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            durable.restore_replaced(self.target.parent)
            if self.target.exists() and not self.target.is_dir():
                raise ConvertError(f"{self.target} is a file; give another TARGET")
            if self.target.exists() and not self._overwrite and not self.is_published:
                raise ConvertError(f"{self.target} is there already; give another TARGET, or --overwrite")
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin()
        except BlockingIOError as error:
            self._release()
            raise ConvertError(f"another process is at work in {self.folder}; wait until it ends, or end it") from error
        except OSError as error:
            self._release()
            raise ConvertError(f"{durable.describe(error, self.target.parent)}; choose another TARGET") from error
        except ConvertError:
            self._release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def is_published(self) -> bool:
        """Whether this plan's target was published, and its maker ended before it had cleaned up."""
        return self.target.exists() and not self.files.exists() and self._plan_there() == self._plan

    def _plan_there(self) -> dict[str, str] | None:
        """The plan of what is in the folder; None where there is none, or none that can be read."""
        try:
            return json.loads((self.folder / "plan.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _begin(self) -> None:
        there = self._plan_there()
        if there is not None and there != self._plan:
            if not self._overwrite:
                differing = [name for name in self._plan if there.get(name) != self._plan[name]]
                what = ", ".join(f"{name} was {there.get(name)}, is {self._plan[name]}" for name in differing)
                raise ConvertError(
                    f"{self.folder} was begun otherwise ({what}); give the same source and options, or --overwrite to "
                    "begin anew, or delete it"
                )
            there = None
        if there is None:
            # A plan without files means that they were published, so it comes after them.
            (self.folder / "plan.json").unlink(missing_ok=True)
            for folder in (self.files, self.records):
                durable.remove(folder)
            self.files.mkdir()
            _publish(self.folder / "plan.json", json.dumps(self._plan, indent=1).encode())
        self.records.mkdir(exist_ok=True)
        for folder in (self.folder, self.files, self.records):
            for left in folder.glob(_BEGUN + "*"):
                left.unlink()

    def run(
        self,
        units: Sequence[Unit[Any]],
        make: Callable[[], Setting],
        write: Write[Setting],
        *,
        num_workers: int,
        other_bytes: int,
        advance: Callable[[int], None],
    ) -> list[Done]:
        """Do all units, or see that they are done, in `num_workers` processes; `advance` hears the bytes.

        `other_bytes` is what else the target will hold.

        Raises ConvertError when there is no room for them, or when the disk refuses; what is finished stays.
        """
        sizes = {unit.file: unit.num_bytes for unit in units}
        found: list[Done] = []
        try:
            there = sum(record.contents.size for unit in units if (record := self._record(unit.file)) is not None)
            checkpoint_files.room(
                self.folder, wanted_bytes=max(0, sum(sizes.values()) - there) + other_bytes + _SPARE_BYTES
            )
            work = _Work(self, write)
            for done in workers.each(make, work, units, workers=num_workers):
                found.append(done)
                advance(sizes[done.file])
        except OSError as error:
            raise ConvertError(self.refused(error, f"{len(found)} of {len(units)} files are finished")) from error
        order = {unit.file: number for number, unit in enumerate(units)}
        return sorted(found, key=lambda done: order[done.file])

    def refused(self, error: OSError, state: str) -> str:
        """What to say of a file system's refusal."""
        cure = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend that"
        told = durable.describe(error, self.folder)
        return f"{told}; {state} and kept in {self.folder}: {cure} and run the same command again"

    def finish(self, unit: Unit[Any], write: Callable[[Path, Unit[Any]], tuple[Contents, Any]]) -> Done:
        """The unit as it is recorded, if its file is still so; else written anew. Raises OSError."""
        record, path = self._record(unit.file), self.files / unit.file
        if record is not None and not checkpoint_files.find_fault(path, record.contents):
            return dataclasses.replace(record, was_there=True, peak_bytes=workers.peak_bytes())
        begun = self.files / f"{_BEGUN}{os.getpid()}_{unit.file}"
        try:
            contents, told = write(begun, unit)
            begun.rename(path)
        except OSError:
            begun.unlink(missing_ok=True)
            raise
        durable.sync_folder(self.files)
        record = {"file": unit.file, "contents": dataclasses.asdict(contents), "told": told}
        _publish(self.records / f"{unit.file}.json", json.dumps(record).encode())
        return Done(unit.file, contents, told, peak_bytes=workers.peak_bytes())

    def _record(self, file: str) -> Done | None:
        try:
            told = json.loads((self.records / f"{file}.json").read_bytes())
            return Done(told["file"], Contents(**told["contents"]), told["told"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def publish(self, keep: Iterable[str]) -> None:
        """Give the files their name, all at once; of `files` only those that are named `keep` (or in folders) stay.

        Raises ConvertError.
        """
        wanted = set(keep)
        try:
            for path in self.files.iterdir():
                if path.is_file() and path.name not in wanted:
                    path.unlink()
            durable.publish(self.files, self.target)
            self.clean()
        except OSError as error:
            raise ConvertError(self.refused(error, "all files are finished")) from error

    def clean(self) -> None:
        """Remove what is left after the target was published."""
        durable.remove(self.folder)


@dataclass(frozen=True, slots=True)
class _Work:
    """Does one unit, in a worker process."""

    place: Workplace
    write: Callable[..., tuple[Contents, Any]]

    def __call__(self, setting: Any, unit: Unit[Any]) -> Done:
        return self.place.finish(unit, lambda path, unit: self.write(setting, path, unit))


def _publish(path: Path, data: bytes) -> None:
    """Write a small file that is whole or absent, or as it was."""
    begun = path.with_name(f"{_BEGUN}{os.getpid()}_{path.name}")
    durable.write(begun, data)
    begun.rename(path)
    durable.sync_folder(path.parent)
