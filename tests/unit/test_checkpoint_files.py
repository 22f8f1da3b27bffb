"""Checkpoint folders: every kind of damage is named, whole ones are never lost, whenever a process ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_cppo.storage import checkpoint_files as files
from megatron_cppo.storage import durable
from megatron_cppo.storage.durable import Contents

DATA = {
    "__0_0.distcp": b"\x00weights\xff" * 400,
    "__1_0.distcp": b"more",
    ".metadata": b"index",
    "progress.json": b"{}",
}


def make(folder: Path, step: int, *, salt: bytes = b"") -> Path:
    """Publish a checkpoint as a save does."""
    final = files.folder_of(folder, step)
    partial = files.partial_of(final)
    partial.mkdir(parents=True)
    written = {name: durable.write(partial / name, data + salt) for name, data in DATA.items()}
    files.write_manifest(partial, written)
    durable.publish(partial, final)
    return final


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fault_of(path: Path) -> str:
    """All that is wrong with a checkpoint, as the ranks together find it."""
    (candidate,) = (one for one in files.survey(path.parent) if one.path == path)
    if candidate.fault:
        return candidate.fault
    found = [files.find_fault(path / name, contents) for name, contents in candidate.files.items()]
    return "; ".join(fault for fault in found if fault)


def test_what_is_written_is_whole(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    assert names(tmp_path) == ["step_000003"]
    assert names(path) == sorted([*DATA, "manifest.json"])
    assert fault_of(path) == ""
    assert {name: (path / name).read_bytes() for name in DATA} == DATA
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert listed["__1_0.distcp"]["size"] == 4


@pytest.mark.parametrize("name", [*DATA, "manifest.json"])
def test_every_flipped_byte_is_named(name: str, tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    content = (path / name).read_bytes()
    step = max(1, len(content) // 50)
    for position in range(0, len(content), step):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (path / name).write_bytes(damaged)
        same = name == "manifest.json" and _equal_json(damaged, content)
        assert fault_of(path) == "" if same else fault_of(path).startswith(name), (position, fault_of(path))
    (path / name).write_bytes(content)
    assert fault_of(path) == ""


def _equal_json(one: bytes | bytearray, other: bytes) -> bool:
    """Whether a flip has changed nothing that is said (a space between two words of it)."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", [*DATA, "manifest.json"])
def test_truncated_and_missing_files_are_named(name: str, tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    size = (path / name).stat().st_size
    for kept in (size - 2, 0):
        os.truncate(path / name, kept)
        expected = "manifest.json" if name == "manifest.json" else f"{name} has {kept} bytes, expected {size}"
        assert fault_of(path).startswith(expected)
    (path / name).unlink()
    assert fault_of(path) == f"{name} is missing"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 3, "xxh3_128": ""}', '{"files": {"a": {"size": 1}}}', "\0"]
)
def test_a_manifest_that_says_nothing_is_a_fault(text: str, tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    (path / "manifest.json").write_text(text)
    assert fault_of(path).startswith("manifest.json cannot be read (")


def test_what_is_no_folder_or_has_no_manifest_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000002").write_text("a file")
    assert [one.fault for one in files.survey(tmp_path)] == ["it is a file, not a folder", "manifest.json is missing"]


def test_the_order_is_that_of_the_steps(tmp_path: Path) -> None:
    assert files.published(tmp_path / "absent") == []
    for name in ("step_000002", "step_000010", "step_1000000", ".partial_step_000011", "damaged_step_000001", "step_x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in files.published(tmp_path)] == ["step_000002", "step_000010", "step_1000000"]
    assert [path.name for path in files.set_aside(tmp_path)] == ["damaged_step_000001"]


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    os.truncate(tmp_path / "step_000003" / "__0_0.distcp", 10)
    files.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000004"]
    aside = files.put_aside(tmp_path / "step_000003")
    assert (
        names(tmp_path) == [aside.name, "step_000002", "step_000004"] == ["damaged_step_000003", *names(tmp_path)[1:]]
    )


def test_a_step_damaged_again_replaces_what_was_set_aside(tmp_path: Path) -> None:
    for salt in (b"first", b"second"):
        files.put_aside(make(tmp_path, 3, salt=salt))
    assert names(tmp_path) == ["damaged_step_000003"]
    assert (tmp_path / "damaged_step_000003" / "progress.json").read_bytes() == b"{}second"


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 3, salt=b"old")
    path = make(tmp_path, 3, salt=b"new")
    assert names(tmp_path) == ["step_000003"]
    assert (path / "progress.json").read_bytes() == b"{}new"


class Killed(BaseException):
    """Ends a process in the middle: nothing may catch it."""


def end_before(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end before its `number`th change of names or deletion, counted from 0."""
    left = [number]

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **named: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return change(*arguments, **named)

        return wrapped

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(os, "unlink", counted(os.unlink))
    monkeypatch.setattr(os, "rmdir", counted(os.rmdir))


@pytest.mark.parametrize("step", [3, 5])
def test_whenever_a_process_ends_the_next_one_finds_whole_ones(step: int, tmp_path: Path) -> None:
    """A save that replaces (step 3) or adds (step 5) and deletes old ones, ended before each of its changes."""
    number, seen = 0, set()
    while True:
        folder = tmp_path / str(number)
        for old in (1, 2, 3):
            make(folder, old, salt=b"old")
        with pytest.MonkeyPatch.context() as patch:
            end_before(number, patch)
            try:
                make(folder, step, salt=b"new")
                files.prune(folder, keep=2)
                ended = True
            except Killed:
                ended = False
        if not ended:
            assert any(not fault_of(path) for path in files.published(folder)), "there is no whole one meanwhile"
        files.clean(folder)
        left = files.published(folder)
        assert names(folder) == [path.name for path in left], "something half done was left"
        assert [fault_of(path) for path in left] == [""] * len(left)
        assert int(left[-1].name.removeprefix("step_")) >= 3
        seen.add((left[-1].name, (left[-1] / "progress.json").read_bytes()))
        shutil.rmtree(folder)
        if ended:
            break
        number += 1
    assert number > 10
    assert seen == {("step_000003", b"{}old"), (f"step_{step:06d}", b"{}new")}


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def sync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        happened.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        real(descriptor)

    def rename(path: Path, target: Path, real: Callable[..., Path] = Path.rename) -> None:
        happened.append(f"rename to {target.name}")
        real(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    make(tmp_path, 3)
    at = happened.index("rename to step_000003")
    assert sorted(happened[:at]) == sorted([*DATA, "manifest.json", ".partial_step_000003"])
    assert happened[at - 2 : at] == ["manifest.json", ".partial_step_000003"], "the manifest is the last"
    assert happened[at + 1 :] == [tmp_path.name]


def test_what_cannot_be_deleted_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        make(tmp_path, step)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    files.prune(tmp_path, keep=1)
    assert "step_000001 could not be deleted: [Errno 13] Permission denied" in caplog.text
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_room_is_what_the_file_system_says(tmp_path: Path) -> None:
    free = durable.free_bytes(tmp_path)
    assert free is not None
    assert free > 0
    files.room(tmp_path, wanted_bytes=free // 2)
    with pytest.raises(OSError, match=r"it takes [0-9.]+ GiB") as caught:
        files.room(tmp_path, wanted_bytes=free + 2**34)
    assert caught.value.errno == errno.ENOSPC
    assert "are free)" in durable.describe(caught.value, tmp_path)


def test_a_stream_says_what_was_written(tmp_path: Path) -> None:
    with durable.writing(tmp_path / "a") as stream:
        torch.save(torch.arange(10_000), stream)
        stream.write(memoryview(bytes(70_000)))
        assert stream.tell() == stream.contents.size
    assert durable.read_contents(tmp_path / "a") == stream.contents
    assert stream.contents.size == (tmp_path / "a").stat().st_size


def test_a_refused_write_names_the_file_and_the_reason() -> None:
    """/dev/full answers every write as a full disk does."""
    for content in (lambda stream: torch.save(torch.zeros(10_000), stream), lambda stream: stream.write(b"short")):
        with (
            pytest.raises(OSError, match="No space left on device") as caught,
            durable.writing(Path("/dev/full")) as stream,
        ):
            content(stream)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


class FullAfter:
    """A file of a disk that is full at one write, and had room again for the next."""

    def __init__(self, number: int) -> None:
        self.left = number

    def write(self, data: bytes) -> None:
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        """There is nothing to hand on."""


def test_a_writer_that_hides_the_reason_does_not(tmp_path: Path) -> None:
    """torch.save goes on after a write that failed, and then complains of its own position in the file."""

    def write(number: int) -> None:
        with durable.writing(tmp_path / "a") as stream:
            stream._file = FullAfter(number)
            torch.save(torch.zeros(10_000), stream)

    for number in range(20):
        with pytest.raises(OSError, match="No space left on device"):
            write(number)


def test_other_errors_of_the_writer_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not the disk's"), durable.writing(tmp_path / "a"):
        raise RuntimeError("not the disk's")


def test_an_unreadable_file_is_no_damage(tmp_path: Path) -> None:
    """What says nothing of the contents must not set a checkpoint aside."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.find_fault(tmp_path / "folder", Contents(1, ""))
