"""Checkpoint folders: what is written is what is read, in the source's own style; damage is named, never half used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cppo.config import ConfigError
from megatron_cppo.storage import hf_folder
from megatron_cppo.storage.hf_folder import Reader, disk_name, write
from tests.distributed.tiny_model import make_checkpoint

SIDE_FILES = {
    "tokenizer.json": b'{"a": 1}\n',
    "chat_template.jinja": "{{ messages }} \u00e9\r\n".encode(),
    "merges.txt": b"\x00\xff binary too",
}
STALE_FILES = ("pytorch_model.bin", "optimizer.pt", "weights.pth", "model.safetensors.index.json")


def module_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of `state_dict()`."""

    def name_in_module(name: str) -> str:
        if name.startswith("visual."):
            return "model." + name
        return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name

    return {name_in_module(name): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint as transformers writes it, with more files than weights and config."""
    folder = Path(make_checkpoint(tmp_path_factory.mktemp("hf") / "official"))
    for name, content in SIDE_FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def in_module_style(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "module-style"
    folder.mkdir()
    save_file(module_names(load_file(official / "model.safetensors")), folder / "model.safetensors")
    (folder / "config.json").write_bytes((official / "config.json").read_bytes())
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    with Reader(str(folder)) as reader:
        return {name: reader.read(name) for name in reader.names}


def names_on_disk(folder: Path) -> set[str]:
    found: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found += file.keys()
    assert len(found) == len(set(found)), "a tensor is in two shards"
    return set(found)


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("style", ["official", "in_module_style"])
def test_round_trip_keeps_bits_names_and_side_files(style: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(style)
    tensors = read_all(source)
    assert all(
        name.startswith(("model.layers.", "model.embed", "model.norm", "visual.", "lm_head")) for name in tensors
    )
    changed = {name: (tensor * 1.5 + 0.25).to(torch.bfloat16) for name, tensor in tensors.items()}
    target = tmp_path / "out" / "export"
    write(changed.items(), source=str(source), target=str(target))
    assert_equal(read_all(target), changed)
    assert names_on_disk(target) == names_on_disk(source)
    copied = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert {path.name for path in target.iterdir()} == copied | {"model.safetensors"}
    for name in copied:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_both_styles_read_alike(official: Path, in_module_style: Path) -> None:
    assert_equal(read_all(in_module_style), read_all(official))
    assert names_on_disk(official).isdisjoint(names_on_disk(in_module_style) - {"lm_head.weight"})
    for name in names_on_disk(in_module_style) | names_on_disk(official):
        assert disk_name(disk_name(name)) == disk_name(name)


@pytest.mark.parametrize("style", ["official", "in_module_style"])
def test_shards_are_bounded_and_indexed_and_transformers_reads_them(
    style: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    source: Path = request.getfixturevalue(style)
    tensors = {name: tensor + 1 for name, tensor in read_all(source).items()}
    bound = 40_000
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", bound)
    write(tensors.items(), source=str(source), target=str(tmp_path / "export"))
    shards = sorted(path.name for path in (tmp_path / "export").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names_on_disk(source)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for shard in shards:
        held = load_file(tmp_path / "export" / shard)
        assert set(held) == {name for name, file in index["weight_map"].items() if file == shard}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= bound
    assert_equal(read_all(tmp_path / "export"), tensors)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert_equal({disk_name(name): parameter.data for name, parameter in model.named_parameters()}, tensors)


def test_a_sharded_source_and_its_stale_weight_files_are_not_copied(official: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = read_all(official)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, source / file)
    for stale in STALE_FILES:
        (source / stale).write_bytes(b"old")
    weight_map = {name: file for file, held in files.items() for name in held}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "config.json").write_text("{}")
    (source / "a folder").mkdir()
    write(tensors.items(), source=str(source), target=str(tmp_path / "export"))
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["config.json", "model.safetensors"]
    assert_equal(read_all(tmp_path / "export"), tensors)


def test_views_of_one_storage_are_written_whole(official: Path, tmp_path: Path) -> None:
    """Streamed tensors may be slices of one buffer, or strided."""
    buffer = torch.arange(24.0).view(4, 6)
    tensors = {"model.a": buffer[:2], "model.b": buffer[2:], "visual.c": buffer.t(), "lm_head.weight": buffer[:, ::2]}
    write(tensors.items(), source=str(official), target=str(tmp_path / "export"))
    assert_equal(read_all(tmp_path / "export"), tensors)


def failing(tensors: dict[str, Tensor], after: int) -> Iterator[tuple[str, Tensor]]:
    for number, pair in enumerate(tensors.items()):
        if number == after:
            raise OSError("no space left on device")
        yield pair


@pytest.mark.parametrize("bound", [40_000, 2**30])
def test_an_interrupted_write_publishes_nothing(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", bound)
    tensors, target = read_all(official), tmp_path / "export"
    with pytest.raises(OSError, match="no space left"):
        write(failing(tensors, len(tensors) - 1), source=str(official), target=str(target))
    assert not target.exists()
    write(tensors.items(), source=str(official), target=str(target))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(OSError, match="no space left"):
        write(failing(newer, len(newer) // 2), source=str(official), target=str(target))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    write(newer.items(), source=str(official), target=str(target))
    assert_equal(read_all(target), newer)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(official: Path, tmp_path: Path, share: float) -> None:
    content = (official / "model.safetensors").read_bytes()
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"model\.path: .*model\.safetensors is damaged .*copy the checkpoint again"):
        Reader(str(tmp_path))


def test_a_missing_shard_is_told_from_the_index(official: Path, tmp_path: Path) -> None:
    tensors = read_all(official)
    absent = sorted(tensors)[:2]
    save_file({name: tensor for name, tensor in tensors.items() if name not in absent}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "one.safetensors")}))
    with pytest.raises(
        ConfigError, match=rf"lacks 2 tensors that its index lists, first '{absent[0]}'; a shard is mis"
    ):
        Reader(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(official: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((official / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is damaged"):
        Reader(str(tmp_path))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file; convert the checkpoint first"):
        Reader(str(tmp_path))
    with pytest.raises(ConfigError, match="holds no"):
        Reader(str(tmp_path / "absent"))


def test_slices_are_read_alone(official: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    whole = read_all(official)[name]
    with Reader(str(official)) as reader:
        assert reader.shape(name) == tuple(whole.shape)
        assert torch.equal(reader.read(name, axis=0, start=3, stop=9), whole[3:9])
        assert torch.equal(reader.read(name, axis=1, start=10, stop=11), whole[:, 10:11])
        assert reader.read(name, axis=0, start=5, stop=5).shape == (0, whole.shape[1])
