"""Conversions that are ended by whatever: killed at any moment, a worker dead, a full disk, files damaged meanwhile.

The same command goes on with what is finished, and the end is that of a conversion in one go.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cppo.config import UserError
from megatron_cppo.convert.checkpoints import Model
from megatron_cppo.convert.conversion import Options
from megatron_cppo.convert.to_hf import to_hf
from megatron_cppo.convert.to_megatron import to_megatron
from megatron_cppo.storage.safetensors_file import Stored, bytes_of, header_bytes
from tests.published_models import CONFIGS
from tests.unit.test_convert import contents

ROOT = Path(__file__).parents[2]
HERE = Options(workers=0)
LAYERS = 8
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 120 MB in shards of one layer each: enough to be killed in."""
    folder = tmp_path_factory.mktemp("hf") / "source"
    folder.mkdir()
    config = dict(CONFIGS["Qwen2.5-VL-7B-Instruct"])
    config |= {"num_hidden_layers": LAYERS, "hidden_size": 512, "intermediate_size": 4096, "vocab_size": 8000}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"image_token_id": 7990, "video_token_id": 7991}
    vision = {"depth": 2, "hidden_size": 256, "num_heads": 2, "intermediate_size": 512, "out_hidden_size": 512}
    config["vision_config"] = {**config["vision_config"], **vision, "fullatt_block_indexes": [1]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    groups: dict[str, list[Stored]] = {}
    for name, shape in Model.of(folder).sizes.items():
        group = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        groups.setdefault(group, []).append(Stored(name, "BF16", shape))
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, tensors in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes(tensors, {"format": "pt"}))
            for stored in tensors:
                bits = torch.randint(-(2**15), 2**15, stored.shape, generator=generator, dtype=torch.int16)
                stream.write(bytes_of(bits))
                weight_map[stored.name] = file
    total = sum(stored.num_bytes for tensors in groups.values() for stored in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Megatron checkpoint of the source, made in one go."""
    target = tmp_path_factory.mktemp("whole") / "megatron"
    to_megatron(source, target, HERE)
    return target


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(tool: str, *arguments: object, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """A command in a process group of its own."""
    command = [sys.executable, f"tools/{tool}.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


def records(target: Path) -> dict[str, int]:
    """The finished units of a target, and when their files were written."""
    partial = target.with_name(target.name + ".partial")
    found = {}
    for path in partial.glob("units/*.json"):
        file = partial / "files" / path.name.removesuffix(".json")
        if not path.name.startswith(".") and file.exists():
            found[file.name] = file.stat().st_mtime_ns
    return found


def wait_for(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true() and process.poll() is None:
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.002)


def gone(group: int, seconds: float = 20.0) -> bool:
    """Whether all processes of a group end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


DIRECTIONS = ("hf_to_megatron", "megatron_to_hf")


@pytest.mark.parametrize("tool", DIRECTIONS)
def test_killed_at_random_moments_it_ends_as_in_one_go(tool: str, source: Path, whole: Path, tmp_path: Path) -> None:
    """Kills after some more units, or between them, of the whole process group or of the parent alone."""
    numbers = random.Random(tool)
    origin, target = (source, tmp_path / "out") if tool == "hf_to_megatron" else (whole, tmp_path / "out")
    partial = tmp_path / "out.partial"
    total = LAYERS + 2 if tool == "hf_to_megatron" else LAYERS + 1
    kept: dict[str, int] = {}
    kills = 0
    for number in range(4):
        process = start(tool, origin, target, "--workers", 2)
        wanted = min(total, len(kept) + numbers.randint(0, 3))
        wait_for(process, lambda at=wanted: (partial / "plan.json").exists() and len(records(target)) >= at)
        time.sleep(numbers.uniform(0, 0.08))
        if number % 2:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert gone(process.pid), "workers outlive their parent"
        else:
            os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        kills += process.returncode == -signal.SIGKILL
        if target.exists():
            break
        now = records(target)
        assert kept.items() <= now.items(), "a finished file was written again"
        kept = now
    assert kills >= 3
    assert kept, "no kill left a finished file"
    status, out, err = finish(start(tool, origin, target, "--workers", 2))
    assert status == 0, err
    assert f"({len(kept)} were finished before)" in out
    assert not partial.exists()
    if tool == "hf_to_megatron":
        found, wanted_files = everything(target), everything(whole)
        # Workers finish in any order; the manifest and the index are the same all the same.
        assert found == wanted_files
    else:
        assert contents(target) == contents(source)


def spawned(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes of a command."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_dead_worker_is_told_and_nothing_hangs(source: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = start("hf_to_megatron", source, target, "--workers", 2)
    wait_for(process, lambda: len(records(target)) >= 1)
    os.kill(spawned(process)[0], signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 2, err
    assert "a worker process was killed, mostly because memory ran out" in err
    assert not target.exists()
    assert gone(process.pid)
    assert records(target)
    assert finish(start("hf_to_megatron", source, target))[0] == 0
    assert everything(target) == everything(whole)


def test_a_file_too_large_for_the_disk_leaves_the_finished_ones(source: Path, whole: Path, tmp_path: Path) -> None:
    """The last data file, of tower and head, is the largest but for the layers; no privilege is needed."""
    target, sizes = tmp_path / "out", {path.name: path.stat().st_size for path in whole.glob("*.distcp")}
    limit = max(sizes.values()) - 1
    largest = max(sizes, key=lambda name: sizes[name])
    smaller = sorted(name for name in sizes if sizes[name] <= limit)
    assert smaller

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    status, _, err = finish(start("hf_to_megatron", source, target, before=limited))
    assert status == 2
    assert "File too large" in err
    assert "kept in" in err
    assert "run the same command again" in err
    kept = records(target)
    assert largest not in kept
    assert not list((tmp_path / "out.partial" / "files").glob(".begun_*")), "half a file takes room"
    status, _, err = finish(start("hf_to_megatron", source, target))
    assert status == 0, err
    assert everything(target) == everything(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_foreseen_and_survived(source: Path, whole: Path, small_disk: Path) -> None:
    target, filler = small_disk / "out", small_disk / "filler"
    filler.write_bytes(bytes(2**26))
    with pytest.raises(UserError, match=r"it takes 1\d\d\.\d MiB .* are free\).*make room and run the same"):
        to_megatron(source, target, HERE)
    assert records(target) == {}
    filler.unlink()
    process = start("hf_to_megatron", source, target)
    wait_for(process, lambda: len(records(target)) >= 2)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:  # another program's, in between
        while file.write(bytes(2**20)):
            pass
    status, _, err = finish(process)
    assert status == 2, err
    assert "No space left on device" in err
    kept = records(target)
    assert len(kept) >= 2
    filler.unlink()
    status, out, err = finish(start("hf_to_megatron", source, target))
    assert status == 0, err
    assert f"({len(kept)} were finished before)" in out
    assert everything(target) == everything(whole)


@pytest.fixture(scope="module")
def unpublished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that was killed after its files were finished and before they were published."""
    target = tmp_path_factory.mktemp("unpublished") / "out"
    process = start("hf_to_megatron", source, target)
    wait_for(process, lambda: len(records(target)) >= LAYERS + 2)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not target.exists()
    return target.with_name("out.partial")


def interrupted(unpublished: Path, target: Path) -> Path:
    """Its folder as that of `target`."""
    return Path(shutil.copytree(unpublished, target.with_name(target.name + ".partial")))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_finished_files_are_believed_only_when_they_are_what_was_recorded(
    source: Path, whole: Path, unpublished: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    partial = interrupted(unpublished, target)
    spoils: dict[str, Callable[[Path], Any]] = {
        "__1_0.distcp": flip,
        "__2_0.distcp": lambda path: os.truncate(path, 1000),
        "__3_0.distcp": Path.unlink,
        "__4_0.distcp": lambda path: (partial / "units" / f"{path.name}.json").write_text("{"),
    }
    for name, spoil in spoils.items():
        spoil(partial / "files" / name)
    (partial / "files" / "stray.txt").write_text("not ours")
    report = to_megatron(source, target, HERE)
    assert report.num_kept == LAYERS + 2 - len(spoils)
    assert everything(target) == everything(whole)


def test_another_plan_is_refused_until_it_is_asked_for(
    source: Path, whole: Path, unpublished: Path, tmp_path: Path
) -> None:
    """Other options, and a source of the same names and sizes with other numbers in it."""
    target, other = tmp_path / "out", tmp_path / "other"
    interrupted(unpublished, target)
    with pytest.raises(UserError, match=r"was begun otherwise .dtype was keep, is fp32.; give the same source and opt"):
        to_megatron(source, target, Options(workers=0, dtype="fp32"))
    shutil.copytree(source, other)
    path = other / "model-00002-of-00009.safetensors"
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes(byte ^ 1 for byte in data[half:]))
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    with pytest.raises(UserError, match=r"was begun otherwise .source was "):
        to_megatron(other, target, HERE)
    report = to_megatron(moved, target, HERE)  # the same source, wherever it lies
    assert report.num_kept == LAYERS + 2
    assert everything(target) == everything(whole)
    interrupted(unpublished, tmp_path / "second")
    report = to_megatron(other, tmp_path / "second", Options(workers=0, overwrite=True))
    assert report.num_kept == 0
    assert everything(tmp_path / "second") != everything(whole)


def test_two_at_once_do_not_meet(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = start("hf_to_megatron", source, target)
    wait_for(first, lambda: len(records(target)) >= 1)
    with pytest.raises(UserError, match="another process is at work in"):
        to_megatron(source, target, HERE)
    assert finish(first)[0] == 0


def test_killed_after_the_name_was_given_it_is_done(source: Path, unpublished: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    to_megatron(source, target, HERE)
    before = everything(target)
    partial = interrupted(unpublished, tmp_path / "again")
    shutil.rmtree(partial / "files")
    partial.rename(tmp_path / "out.partial")
    to_megatron(source, target, HERE)
    assert everything(target) == before
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(UserError, match="is there already"):
        to_megatron(source, target, HERE)


def test_a_result_that_is_not_its_source_is_not_published(source: Path, unpublished: Path, tmp_path: Path) -> None:
    """A finished file that was changed together with its record: the comparison reads the tensors themselves."""
    from megatron_cppo.storage import durable

    target = tmp_path / "out"
    partial = interrupted(unpublished, target)
    path, record = partial / "files" / "__3_0.distcp", partial / "units" / "__3_0.distcp.json"
    told = json.loads(record.read_text())
    start_of_chunk = max(chunk[6] for chunk in told["told"] if "linear_fc2" in chunk[0])
    with path.open("r+b") as file:
        file.seek(start_of_chunk + 5000)
        byte = file.read(1)
        file.seek(start_of_chunk + 5000)
        file.write(bytes([byte[0] ^ 64]))
    told["contents"]["xxh3_128"] = durable.read_contents(path).xxh3_128
    record.write_text(json.dumps(told))
    with pytest.raises(UserError) as refused:
        to_megatron(source, target, HERE)
    assert not target.exists()
    for text in ("what was written is not what was read", "model.layers.2.mlp.down_proj.weight: 1 of ", "delete "):
        assert text in str(refused.value)


def test_back_resumes_on_the_same_layout_only(source: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = start("megatron_to_hf", whole, target)
    wait_for(process, lambda: len(records(target)) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not target.exists()
    with pytest.raises(UserError, match=r"was begun otherwise .dtype was keep, is fp32"):
        to_hf(whole, target, Options(workers=0, dtype="fp32"))
    flip(target.with_name("out.partial") / "files" / next(iter(records(target))))
    num_there = len(records(target))
    report = to_hf(whole, target, HERE)
    assert report.num_kept == num_there - 1
    assert contents(target) == contents(source)
