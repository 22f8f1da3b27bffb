"""Training checkpoints as folders: which are whole, which are damaged and where, which may go.

    checkpoints/step_000012/            published: it was whole when it got this name
        manifest.json                   size and XXH3 of every other file; written last
    checkpoints/damaged_step_000011/    found to be damaged, and kept for inspection
    checkpoints/.partial_*, .deleted_*, .replaced_*    of a process that ended before it was done

Plain files, read and written by one process; `checkpoint.py` knows the ranks, and what the files hold.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_cppo.config import UserError
from megatron_cppo.storage import durable
from megatron_cppo.storage.durable import Contents

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{6,})")
_PARTIAL, _DELETED, _DAMAGED = ".partial_", ".deleted_", "damaged_"


class SaveError(UserError):
    """A checkpoint could not be written; those before it are as they were."""


class CheckpointError(UserError):
    """There are checkpoints, and none that can be used."""


# What a file system says of a file whose contents are lost; other refusals (permissions) say nothing of them.
_OF_CONTENTS = (errno.EIO,)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A published checkpoint before it is verified: what its manifest promises, or why that says nothing."""

    path: Path
    files: dict[str, Contents]
    fault: str = ""


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is published.

    >>> folder_of(Path("checkpoints"), 12).name
    'step_000012'
    """
    return folder / f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step of a published checkpoint's folder.

    >>> step_of(Path("checkpoints/step_000012"))
    12
    """
    return int(path.name.removeprefix("step_"))


def partial_of(final: Path) -> Path:
    """Where the checkpoint `final` is written before it is published."""
    return final.with_name(_PARTIAL + final.name)


def published(folder: Path) -> list[Path]:
    """The published checkpoints of `folder`, oldest first; whole ones, or not yet verified."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def set_aside(folder: Path) -> list[Path]:
    """The damaged checkpoints that were set aside in `folder`."""
    return sorted(folder.glob(_DAMAGED + "step_*"))


def clean(folder: Path) -> None:
    """Finish or undo what a process that was ended left half done in `folder`."""
    durable.restore_replaced(folder)
    for prefix in (_PARTIAL, _DELETED):
        for path in folder.glob(prefix + "*"):
            durable.remove(path)


def write_manifest(folder: Path, files: Mapping[str, Contents]) -> None:
    """Write what the files of `folder` (names -> contents) must be, and a hash of that."""
    listed = {name: dataclasses.asdict(contents) for name, contents in sorted(files.items())}
    text = json.dumps({"files": listed, "xxh3_128": _digest(listed)}, indent=1)
    durable.write(folder / MANIFEST, (text + "\n").encode())


def survey(folder: Path) -> list[Candidate]:
    """The published checkpoints of `folder`, newest first, with what can be said without reading their files."""
    return [_candidate(path) for path in reversed(published(folder))]


def _candidate(path: Path) -> Candidate:
    try:
        told = json.loads((path / MANIFEST).read_bytes())
        files = {name: Contents(**contents) for name, contents in told["files"].items()}
        if told["xxh3_128"] != _digest(told["files"]):
            return Candidate(path, {}, f"{MANIFEST} is not as it was written")
    except FileNotFoundError:
        return Candidate(path, {}, f"{MANIFEST} is missing")
    except NotADirectoryError:
        return Candidate(path, {}, "it is a file, not a folder")
    except OSError as error:
        if error.errno not in _OF_CONTENTS:
            raise
        return Candidate(path, {}, f"{MANIFEST} cannot be read ({error.strerror})")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Candidate(path, {}, f"{MANIFEST} cannot be read ({error!r})")
    faults = [size_fault(path / name, contents) for name, contents in files.items()]
    return Candidate(path, files, "; ".join(fault for fault in faults if fault))


def size_fault(path: Path, promised: Contents) -> str:
    """What is wrong with a file, without reading it."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    return "" if size == promised.size else f"{path.name} has {size} bytes, expected {promised.size}"


def find_fault(path: Path, promised: Contents) -> str:
    """What is wrong with a file, by reading all of it; "" when it is what was written.

    Raises OSError when it cannot be read for a reason that says nothing of its contents.
    """
    try:
        found = durable.read_contents(path)
    except OSError as error:
        if error.errno not in (*_OF_CONTENTS, errno.ENOENT):
            raise
        return f"{path.name} cannot be read ({error.strerror})"
    if found.size != promised.size:
        return f"{path.name} has {found.size} bytes, expected {promised.size}"
    if found != promised:
        return f"{path.name} has XXH3 {found.xxh3_128[:12]}..., expected {promised.xxh3_128[:12]}..."
    return ""


def put_aside(damaged: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts no more; an earlier one of its step is deleted."""
    aside = damaged.with_name(_DAMAGED + damaged.name)
    if aside.is_dir():
        doomed = aside.with_name(_DELETED + aside.name)
        durable.remove(doomed)
        aside.rename(doomed)
        durable.remove(doomed)
    damaged.rename(aside)
    durable.sync_folder(aside.parent)
    return aside


def prune(folder: Path, *, keep: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints, and those of every `keep_every`th step (0: of none).

    One with a visible fault counts for nothing and is left. A doomed one is renamed first, so that no part of one is
    ever seen under its name. What cannot be deleted is warned of.
    """
    try:
        sound = [candidate.path for candidate in survey(folder) if not candidate.fault]
    except OSError as error:  # the new one is published: nothing of it failed
        log.warning("the old checkpoints of %s could not be looked at: %s", folder, error)
        return
    for path in sound[keep:]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        try:
            doomed = path.with_name(_DELETED + path.name)
            durable.remove(doomed)
            path.rename(doomed)
            durable.remove(doomed)
        except OSError as error:
            log.warning("the old checkpoint %s could not be deleted: %s", path, error)


def room(folder: Path, *, wanted_bytes: int) -> None:
    """Raise OSError (ENOSPC) when the file system of `folder` says that it cannot take `wanted_bytes` more."""
    free = durable.free_bytes(folder)
    if free is not None and free < wanted_bytes:
        raise OSError(errno.ENOSPC, f"it takes {durable.brief_bytes(wanted_bytes)}", str(folder))


def _digest(listed: object) -> str:
    return xxhash.xxh3_128(json.dumps(listed, sort_keys=True).encode()).hexdigest()
