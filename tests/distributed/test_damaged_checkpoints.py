"""Damage to any file of any checkpoint: all ranks choose the same whole one or raise the same error."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_cppo.storage import checkpoint_files as files
from megatron_cppo.storage import durable
from tests.distributed.launch import run_distributed

NAMES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "progress.json")
DATA = {name: name.encode() * 1000 for name in NAMES}


@dataclass(frozen=True)
class Found:
    """What a rank made of a folder: the checkpoint that it would load, or the error's text; the names left; log."""

    chosen: str
    names: list[str]
    warned: list[str]


def look(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, Found]:
    return {case: look_at(folder) for case, folder in folders.items()}


def look_at(folder: Path) -> Found:
    import torch.distributed as dist

    from megatron_cppo.policy.checkpoint import newest_whole

    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("megatron_cppo.policy").addHandler(handler)
    try:
        path = newest_whole(folder)
        chosen = path.name if path else "none"
    except files.CheckpointError as error:
        chosen = str(error)
    logging.getLogger("megatron_cppo.policy").removeHandler(handler)
    dist.barrier()
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    dist.barrier()
    return Found(chosen, names, warned)


def make(folder: Path, *steps: int) -> Path:
    for step in steps:
        final = files.folder_of(folder, step)
        partial = files.partial_of(final)
        partial.mkdir(parents=True)
        files.write_manifest(partial, {name: durable.write(partial / name, data) for name, data in DATA.items()})
        durable.publish(partial, final)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "remove": Path.unlink}
CASES = [(damage, name) for damage in DAMAGES for name in (*DATA, files.MANIFEST)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    root = tmp_path_factory.mktemp("damaged")
    folders = {}
    for damage, name in CASES:
        case = f"{damage} {name}"
        folders[case] = make(root / case, 1, 2, 3)
        DAMAGES[damage](folders[case] / "step_000003" / name)
    folders["whole"] = make(root / "whole", 1, 2)
    folders["absent"] = root / "absent"
    folders["empty"] = root / "empty"
    folders["empty"].mkdir()
    folders["old"] = make(root / "old", 1, 2, 3)
    flip(folders["old"] / "step_000002" / ".metadata")
    folders["none"] = make(root / "none", 1, 2)
    flip(folders["none"] / "step_000001" / "__0_0.distcp")
    truncate(folders["none"] / "step_000002" / "__1_0.distcp")
    folders["set aside"] = make(root / "set aside", 1)
    files.put_aside(folders["set aside"] / "step_000001")
    folders["half done"] = make(root / "half done", 1, 2)
    (folders["half done"] / ".partial_step_000003").mkdir()
    (folders["half done"] / "step_000001").rename(folders["half done"] / ".deleted_step_000001")
    (folders["half done"] / "step_000002").rename(folders["half done"] / ".replaced_step_000002")
    folders["refused"] = make(root / "refused", 1)
    # A link to itself says nothing of what was written, and no checkpoint is moved for it.
    (folders["refused"] / "step_000001" / "common.pt").unlink()
    (folders["refused"] / "step_000001" / "common.pt").symlink_to("common.pt")
    ranks = run_distributed(look, 3, folders)
    assert ranks[0] == ranks[1] == ranks[2]
    shutil.rmtree(root)
    return ranks[0]


@pytest.mark.parametrize(("damage", "name"), CASES)
def test_the_newest_whole_one_is_chosen(damage: str, name: str, found: dict[str, Found]) -> None:
    seen = found[f"{damage} {name}"]
    assert seen.chosen == "step_000002"
    assert seen.names == ["damaged_step_000003", "step_000001", "step_000002"]
    (text,) = seen.warned
    fault = {
        "flip": f"{name} is not as it was written" if name == files.MANIFEST else f"{name} has XXH3 ",
        "truncate": f"{name} cannot be read (" if name == files.MANIFEST else f"{name} has ",
        "remove": f"{name} is missing",
    }[damage]
    assert f"step_000003 is damaged: {fault}" in text or (name == files.MANIFEST and "manifest.json cannot" in text)
    assert text.endswith("; it is not used, and kept as damaged_step_000003")


def test_nothing_is_said_of_whole_ones(found: dict[str, Found]) -> None:
    assert found["whole"] == Found("step_000002", ["step_000001", "step_000002"], [])
    assert found["absent"] == found["empty"] == Found("none", [], [])


def test_an_old_one_is_set_aside_too(found: dict[str, Found]) -> None:
    """Else it would count as one of those that are kept, and a whole one be deleted in its stead."""
    assert found["old"].chosen == "step_000003"
    assert found["old"].names == ["damaged_step_000002", "step_000001", "step_000003"]


def test_without_a_whole_one_nothing_starts(found: dict[str, Found]) -> None:
    none = found["none"]
    lines = none.chosen.splitlines()
    assert lines[0].startswith("none of the checkpoints of ")
    assert lines[1].startswith("  step_000002: __1_0.distcp has 6000 bytes, expected 12000")
    assert lines[2].startswith("  step_000001: __0_0.distcp has XXH3 ")
    assert lines[3].startswith("fix: put a whole copy of one of them back; or move ")
    assert none.names == ["step_000001", "step_000002"], "what is left must be found again by the next start"
    assert "damaged_step_000001: found to be damaged by an earlier start" in found["set aside"].chosen


def test_what_a_killed_process_left_is_finished_or_undone(found: dict[str, Found]) -> None:
    assert found["half done"] == Found("step_000002", ["step_000002"], [])


def test_a_file_that_cannot_be_looked_at_is_no_damage(found: dict[str, Found]) -> None:
    seen = found["refused"]
    assert "could not be checked:\n  rank 0: " in seen.chosen
    assert seen.names == ["step_000001"]
