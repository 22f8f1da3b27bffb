"""Megatron's torch_dist folders: every rectangle is read back, whatever the chunks; what is damaged or hostile is named
and not run.
"""

from __future__ import annotations

import enum
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_cppo.storage import torch_dist
from megatron_cppo.storage.torch_dist import Chunk, Folder, TorchDistError, data_file, write_index

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
SEEDS = range(25)


def random_tensor(numbers: random.Random) -> Tensor:
    size = [numbers.randint(1, 7) for _ in range(numbers.randint(1, 4))]
    generator = torch.Generator().manual_seed(numbers.randint(0, 10**6))
    return torch.randint(-1000, 1000, size, generator=generator).to(numbers.choice(DTYPES))


def cut(numbers: random.Random, size: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """(offset, shape) of rectangles that cover a tensor exactly: cut along a random dimension, again and again."""
    pieces = [([0] * len(size), list(size))]
    for _ in range(numbers.randint(0, 6)):
        offset, shape = pieces.pop(numbers.randrange(len(pieces)))
        axis = numbers.randrange(len(size))
        low = numbers.randint(0, shape[axis])
        for start, length in ((0, low), (low, shape[axis] - low)):
            if length:
                at, part = offset.copy(), shape.copy()
                at[axis] += start
                part[axis] = length
                pieces.append((at, part))
    numbers.shuffle(pieces)
    return pieces


def rectangle(tensor: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(at, at + length) for at, length in zip(offset, shape, strict=True))]


def write(folder: Path, tensors: dict[str, Tensor], numbers: random.Random, **index: Any) -> list[Chunk]:
    """Write tensors in random chunks over three data files."""
    folder.mkdir(exist_ok=True)
    work = [(key, *piece) for key, tensor in tensors.items() for piece in cut(numbers, tensor.shape)]
    chunks: list[Chunk] = []
    for number in range(3):
        with data_file(folder, f"__{number}_0") as file:
            for key, offset, shape in work[number::3]:
                file.add(key, rectangle(tensors[key], offset, shape), size=tensors[key].shape, offset=offset)
        chunks += file.chunks
    write_index(folder, chunks, common={"iteration": 0}, **index)
    return chunks


@pytest.mark.parametrize("seed", SEEDS)
def test_every_rectangle_is_read_from_any_chunks(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random.Random(seed)
    monkeypatch.setattr(torch_dist, "CHUNK_BYTES", numbers.choice([16, 100, 2**28]))
    tensors = {f"key.{i}": random_tensor(numbers) for i in range(4)}
    write(tmp_path / "c", tensors, numbers, aliases={"other": "key.1", "of nothing": "absent"})
    folder = Folder(tmp_path / "c")
    assert folder.keys == {*tensors, "other"}
    assert folder.num_bytes == sum(path.stat().st_size for path in (tmp_path / "c").glob("*.distcp"))
    for key, tensor in {**tensors, "other": tensors["key.1"]}.items():
        assert (folder.size(key), folder.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(folder.read(key, offset=[0] * tensor.dim(), shape=tensor.shape), tensor)
        for _ in range(20):
            offset = [numbers.randrange(size) for size in tensor.shape]
            shape = [numbers.randint(1, size - at) for size, at in zip(tensor.shape, offset, strict=True)]
            found = folder.read(key, offset=offset, shape=shape)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, rectangle(tensor, offset, shape)), (key, offset, shape)


def test_chunks_are_no_larger_than_allowed_and_hold_their_own_numbers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_dist, "CHUNK_BYTES", 4096)
    tensor = torch.randn(100, 64)
    with data_file(tmp_path, "__0_0", written_as="begun") as file:
        file.add("a", tensor[:, ::2], size=(100, 32), offset=(0, 0))
    assert (tmp_path / "begun").is_file()
    assert not (tmp_path / "__0_0.distcp").exists()
    assert [chunk.shape for chunk in file.chunks] == [(32, 32)] * 3 + [(4, 32)]
    assert all(chunk.length < 4096 + 2048 for chunk in file.chunks)
    assert {chunk.file for chunk in file.chunks} == {"__0_0.distcp"}


@pytest.mark.parametrize("outside", [((0, 0), (3, 3)), ((2, 1), (1, 1)), ((0, 2), (1, 1))])
def test_a_missing_chunk_is_told(outside: tuple[Any, Any], tmp_path: Path) -> None:
    """Chunks cover the left upper 2 x 2 of a tensor of 3 x 3."""
    with data_file(tmp_path, "__0_0") as file:
        file.add("a", torch.ones(2, 2), size=(3, 3), offset=(0, 0))
    write_index(tmp_path, file.chunks, common={})
    folder = Folder(tmp_path)
    assert torch.equal(folder.read("a", offset=(0, 1), shape=(2, 1)), torch.ones(2, 1))
    with pytest.raises(TorchDistError, match=r"its chunks hold \d of \d numbers; copy the checkpoint again"):
        folder.read("a", offset=outside[0], shape=outside[1])
    with pytest.raises(TorchDistError, match="holds no tensor b"):
        folder.read("b", offset=(0,), shape=(1,))


class Hostile:
    """Runs a command when it is unpickled by whoever looks up every name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _raised(function: Any) -> Exception:
    try:
        function()
    except TorchDistError as error:
        return error
    raise AssertionError("nothing was raised")


class ByName(pickle.Pickler):
    """Pickles an enumeration's member as some versions of Python 3.11 do: getattr(Kind, "NAME")."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, enum.Enum):
            return getattr, (type(obj), obj.name)
        return NotImplemented


def test_an_index_whose_members_were_pickled_by_name_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(3)}, random.Random(0))
    index = tmp_path / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    with index.open("wb") as file:
        ByName(file).dump(metadata)
    assert b"getattr" in index.read_bytes(), "the index holds no enumeration's member"
    assert torch.equal(Folder(tmp_path).read("a", offset=(0,), shape=(3,)), torch.ones(3))


@pytest.mark.parametrize("name", ["os.system", "eval", "open", "subprocess", "getattr", "attribute", "torch.load"])
def test_an_index_that_is_a_program_is_not_run(name: str, tmp_path: Path) -> None:
    import subprocess

    write(tmp_path / "c", {"a": torch.ones(3)}, random.Random(0))
    mark = tmp_path / "executed"
    hostile = {
        "os.system": Hostile(os.system, f"touch {mark}"),
        "eval": Hostile(eval, f"open({str(mark)!r}, 'w')"),
        "open": Hostile(open, str(mark), "w"),
        "subprocess": Hostile(subprocess.call, ["touch", str(mark)]),
        "getattr": Hostile(getattr, "os", "system", None),
        "attribute": Hostile(getattr, Metadata, "__init__"),
        "torch.load": Hostile(torch.load, str(mark)),
    }[name]
    index = tmp_path / "c" / ".metadata"
    index.write_bytes(pickle.dumps(hostile))
    assert "which is not of this format" in str(_raised(lambda: Folder(tmp_path / "c")))
    assert not mark.exists()
    if name != "torch.load":
        pickle.loads(index.read_bytes())  # what is refused works
        assert mark.exists() or name in ("getattr", "attribute")


def test_a_data_file_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (chunk,) = write(tmp_path / "c", {"a": torch.ones(3)}, random.Random(3))
    path = tmp_path / "c" / chunk.file
    torch.save(Hostile(os.system, f"touch {mark}"), path)
    write_index(
        tmp_path / "c",
        [Chunk(chunk.key, chunk.size, chunk.dtype, chunk.offset, chunk.shape, chunk.file, 0, path.stat().st_size)],
        common={},
    )
    folder = Folder(tmp_path / "c")
    assert "is damaged" in str(_raised(lambda: folder.read("a", offset=(0,), shape=(3,))))
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_data_file_is_named(share: float, tmp_path: Path) -> None:
    tensor = torch.randn(50, 50)
    with data_file(tmp_path, "__0_0") as file:
        file.add("a", tensor, size=tensor.shape, offset=(0, 0))
    write_index(tmp_path, file.chunks, common={})
    path = tmp_path / "__0_0.distcp"
    os.truncate(path, int(share * path.stat().st_size))
    told = str(_raised(lambda: Folder(tmp_path).read("a", offset=(0, 0), shape=(50, 50))))
    assert str(path) in told
    assert "a at byte 0 is damaged" in told
    assert "copy it again" in told


@pytest.mark.parametrize("file", ["../outside.distcp", "/etc/passwd", "sub/x.distcp"])
def test_data_files_are_those_of_the_folder(file: str, tmp_path: Path) -> None:
    (chunk,) = write(tmp_path / "c", {"a": torch.ones(3)}, random.Random(3))
    (tmp_path / "c" / chunk.file).rename(tmp_path / "outside.distcp")
    moved = Chunk(chunk.key, chunk.size, chunk.dtype, chunk.offset, chunk.shape, file, chunk.start, chunk.length)
    write_index(tmp_path / "c", [moved], common={})
    told = str(_raised(lambda: Folder(tmp_path / "c").read("a", offset=(0,), shape=(3,))))
    assert "is not in its folder" in told


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps(3)[:-1]])
def test_a_damaged_index_is_named(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "c", {"a": torch.ones(3)}, random.Random(0))
    (tmp_path / "c" / ".metadata").write_bytes(content)
    assert str(tmp_path / "c" / ".metadata") in str(_raised(lambda: Folder(tmp_path / "c")))


def test_an_unfinished_folder_and_another_format_are_told(tmp_path: Path) -> None:
    write(tmp_path / "c", {"a": torch.ones(3)}, random.Random(0))
    told = tmp_path / "c" / "metadata.json"
    told.write_text('{"sharded_backend": "zarr"}')
    assert "only torch_dist is supported" in str(_raised(lambda: Folder(tmp_path / "c")))
    told.unlink()
    assert "it is no Megatron checkpoint, or unfinished" in str(_raised(lambda: Folder(tmp_path / "c")))


def test_large_chunks_are_cut_also_in_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's matrix has one row of the stack: it is its own rows that are cut."""
    monkeypatch.setattr(torch_dist, "CHUNK_BYTES", 1000)
    stack = torch.arange(2 * 3 * 50 * 10.0).view(2, 3, 50, 10)
    with torch_dist.data_file(tmp_path, "__0_0") as file:
        for layer in range(2):
            for expert in range(3):
                part = stack[layer : layer + 1, expert : expert + 1]
                file.add("stack", part, size=stack.shape, offset=(layer, expert, 0, 0))
        file.add("number", torch.tensor(3.0), size=(), offset=())
    assert {chunk.shape for chunk in file.chunks if chunk.key == "stack"} == {(1, 1, 25, 10)}
    assert torch_dist.incomplete(file.chunks) == []
    assert torch_dist.incomplete(file.chunks[1:]) == ["stack"]
    torch_dist.write_index(tmp_path, file.chunks, common={})
    folder = torch_dist.Folder(tmp_path)
    assert torch.equal(folder.read("stack", offset=(0, 1, 20, 3), shape=(2, 2, 10, 4)), stack[:, 1:3, 20:30, 3:7])
    assert folder.read("number", offset=(), shape=()) == 3.0
