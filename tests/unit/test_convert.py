"""Converters: there and back is the identity, byte by byte, for every family and every way to lay tensors out; what is
made loads in transformers; sizes of the published models; options, and what does not fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cppo.config import UserError
from megatron_cppo.convert import checkpoints, forecast
from megatron_cppo.convert.checkpoints import Model, Opening
from megatron_cppo.convert.compare import Comparison, How, compare
from megatron_cppo.convert.conversion import Options
from megatron_cppo.convert.to_hf import to_hf
from megatron_cppo.convert.to_megatron import to_megatron
from megatron_cppo.families import FAMILIES
from megatron_cppo.storage.hf_folder import disk_name
from megatron_cppo.storage.torch_dist import Folder
from tests.distributed.tiny_model import make_checkpoint
from tests.published_models import CONFIGS, PUBLISHED

ROOT = Path(__file__).parents[2]
HERE = Options(workers=0)
SIDE_FILES = {
    "tokenizer.json": b'{"a": 1}\n',
    "chat_template.jinja": "{{ messages }} \u00e9\r\n".encode(),
    "merges.txt": b"\x00\xff binary too",
}
WEIGHT_FILES = ("pytorch_model.bin", "optimizer.pt", "weights.pth")


def random_bits(tensor: Tensor, seed: int) -> Tensor:
    """bf16 of any bits and this shape, NaN of all kinds too."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, tuple(tensor.shape), generator=generator, dtype=torch.int16)
    return bits.view(torch.bfloat16)


def style(name: str, prefix: str) -> str:
    """A tensor's name in the prefix style of official Qwen2.5-VL ("short") or of Qwen3-VL ("long")."""
    name = disk_name(name)
    if prefix == "short" or name == "lm_head.weight":
        return name
    return "model." + name if name.startswith("visual.") else "model.language_model." + name.removeprefix("model.")


def make_source(
    folder: Path, family: str, *, tied: bool = False, prefix: str = "short", shards: int = 1, experts: str = ""
) -> Path:
    """A folder of random bits; `experts` is the order of the stacks, "official", "transformers 5" or "single"."""
    make_checkpoint(folder, family=family, tied=tied)
    (folder / "rows.parquet").unlink()
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(sorted(found.items())):
        kind = name.rpartition(".")[2]
        own, bits = style(name, prefix), random_bits(tensor, seed)
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")) or experts == "transformers 5":
            tensors[own] = bits
        elif experts == "official":
            tensors[own] = bits.mT.contiguous()
        else:
            stem = own.removesuffix(kind)
            for e, matrix in enumerate(bits):
                parts = matrix.chunk(2) if kind == "gate_up_proj" else (matrix,)
                names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                tensors |= {f"{stem}{e}.{n}.weight": p.contiguous() for n, p in zip(names, parts, strict=True)}
    for name, content in SIDE_FILES.items():
        (folder / name).write_bytes(content)
    for name in WEIGHT_FILES:
        (folder / name).write_bytes(b"stale")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items(), reverse=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=3))  # as nobody writes it by himself
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def without_stale(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name not in WEIGHT_FILES}


def compared(a: Path, b: Path, tolerance: float | None = None, like: Path | None = None) -> Comparison:
    return compare(
        checkpoints.opening(a, like),
        checkpoints.opening(b, like),
        how=How(tolerance=tolerance),
        num_workers=0,
        begin=lambda total: lambda count: None,
    )


CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_5_vl", {}),
    ("qwen2_5_vl", {"tied": True, "prefix": "long"}),
    ("qwen2_5_vl", {"shards": 3}),
    ("qwen3_vl", {"prefix": "long", "shards": 2}),
    ("qwen3_vl", {"tied": True}),
    ("qwen3_vl_moe", {"prefix": "long", "experts": "official", "shards": 2}),
    ("qwen3_vl_moe", {"prefix": "long", "experts": "transformers 5"}),
    ("qwen3_vl_moe", {"experts": "single", "shards": 3}),
    ("qwen3_vl_moe", {"experts": "official", "tied": True}),
]


@pytest.mark.parametrize(("family", "how"), CASES, ids=[f"{f} {h}" for f, h in CASES])
@pytest.mark.parametrize("block_bytes", [200, 2**24])
def test_there_and_back_is_the_identity(
    family: str, how: dict[str, Any], block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes of all files, with blocks smaller than most tensors, and larger than all."""
    monkeypatch.setattr("megatron_cppo.convert.layout.BLOCK_BYTES", block_bytes)
    source = make_source(tmp_path / "source", family, **how)
    report = to_megatron(source, tmp_path / "megatron", HERE)
    assert report.num_files == 2 + 2
    assert report.verify_seconds is not None
    assert compared(source, tmp_path / "megatron").equal
    moved = tmp_path / "elsewhere"
    (tmp_path / "megatron").rename(moved)
    before = contents(source)
    source.rename(tmp_path / "gone")
    to_hf(moved, tmp_path / "back", HERE)
    assert contents(tmp_path / "gone") == before
    assert contents(tmp_path / "back") == without_stale(tmp_path / "gone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "elsewhere", "gone"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source of each family, in float32 as transformers writes it."""
    root = tmp_path_factory.mktemp("sources")
    return {family: Path(make_checkpoint(root / family, family=family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_are_megatrons_with_the_unfused_names_beside(
    family: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    to_megatron(sources[family], tmp_path / "m", HERE)
    folder, side = Folder(tmp_path / "m"), tmp_path / "m" / "hf"
    layers = "language_model.decoder.layers."
    same = [("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")]
    same.append(("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"))
    for a, b in same:
        size = folder.size(layers + a)
        assert size == folder.size(layers + b) == (2, 32)
        found = [folder.read(layers + name, offset=(0, 0), shape=size) for name in (a, b)]
        assert torch.equal(*found)
    shape = Model.of(sources[family]).shape
    assert folder.size("language_model.embedding.word_embeddings.weight") == (131, 32)
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size
    assert folder.size(layers + "self_attention.linear_qkv.weight") == (2, rows, 32)
    if shape.num_experts:
        assert folder.size(layers + "mlp.experts.experts.linear_fc1.weight") == (2, 4, 40, 32)
        assert folder.size(layers + "mlp.router.weight") == (2, 4, 32)
    else:
        assert folder.size(layers + "mlp.linear_fc1.weight") == (2, 128, 32)
    common = torch.load(tmp_path / "m" / "common.pt", weights_only=True)
    assert common == {"iteration": 0, "checkpoint_version": 3.0}
    assert {path.name for path in side.iterdir()} == {
        "config.json",
        "generation_config.json",
        "rows.parquet",
        "tensor_layout.json",
    }
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())["files"]
    files = [path for path in (tmp_path / "m").rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert {str(path.relative_to(tmp_path / "m")) for path in files} == manifest.keys()
    for path in files:
        told = manifest[str(path.relative_to(tmp_path / "m"))]
        assert told == {"size": path.stat().st_size, "xxh3_128": xxhash.xxh3_128(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_loads_in_transformers(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    to_megatron(sources[family], tmp_path / "m", HERE)
    to_hf(tmp_path / "m", tmp_path / "back", HERE)
    wanted, found = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (sources[family], tmp_path / "back")
    )
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cast_is_torchs_in_both_directions(
    dtype: str, wanted: torch.dtype, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["qwen3_vl_moe"]
    to_megatron(source, tmp_path / "m", Options(workers=0, dtype=dtype))
    to_hf(tmp_path / "m", tmp_path / "back", HERE)
    to_megatron(source, tmp_path / "whole", HERE)
    to_hf(tmp_path / "whole", tmp_path / "late", Options(workers=0, dtype=dtype))
    tensors = load_file(source / "model.safetensors")
    for folder in ("back", "late"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor.to(wanted)) for name, tensor in tensors.items())
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert {d[1:] for d in compared(source, tmp_path / "back").dtypes} == {("torch.float32", str(wanted))}
    assert compared(source, tmp_path / "back", tolerance=0.02).equal


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dry_run_knows_the_published_models(name: str, tmp_path: Path) -> None:
    """From config.json alone: tensors as transformers' own module has them, and the published count of parameters."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    model = Model.of(tmp_path)
    told = forecast.of_folder(tmp_path, Options(workers=2))
    assert told.num_parameters == (PUBLISHED[name] or told.num_parameters)
    assert 2 * told.num_parameters < told.num_bytes < 2.01 * told.num_parameters
    assert len(told.files) == model.shape.num_layers + 2
    assert told.peak_bytes < 1.5 * 2**30 + 2 * max(size for _, size in told.files)
    assert told.peak_bytes < 1.5 * 2**30
    with torch.device("meta"):
        module = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    wanted: dict[str, tuple[int, ...]] = {}
    for own, parameter in module.named_parameters():
        official, size = disk_name(own), tuple(parameter.shape)
        if official.endswith(".experts.gate_up_proj"):  # [E, 2I, H]
            half = (size[1] // 2, size[2])
            stem = official.removesuffix("gate_up_proj")
            wanted |= {f"{stem}{e}.{kind}_proj.weight": half for e in range(size[0]) for kind in ("gate", "up")}
        elif official.endswith(".experts.down_proj"):
            stem = official.removesuffix("down_proj")
            wanted |= {f"{stem}{e}.down_proj.weight": size[1:] for e in range(size[0])}
        else:
            wanted[official] = size
    assert dict(model.sizes) == wanted
    assert sum(math.prod(size) for size in wanted.values()) == told.num_parameters
    text = "\n".join(told.lines(workers=2, rate=4e8))
    assert f"{told.num_parameters:,} parameters" in text
    assert "at 400 MB/s" in text


def damage(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "qwen2_5_vl")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(32)
        tensors["lm_head.weight"] = torch.ones(130, 32)

    damage(source, change)
    with pytest.raises(UserError) as refused:
        to_megatron(source, tmp_path / "m", HERE)
    for text in (
        "lm_head.weight is (130, 32), the model needs (131, 32)",
        "1 tensors are missing ['model.norm.weight']",
        "1 are unknown ['model.layers.2.input_layernorm.weight']",
        "use an unmodified checkpoint",
    ):
        assert text in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_converted_is_told(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["qwen2_5_vl"]
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there is there already; give another TARGET, or --overwrite"):
        to_megatron(source, tmp_path / "there", HERE)
    with pytest.raises(UserError, match=r"holds neither \*\.safetensors nor metadata\.json"):
        to_hf(tmp_path / "there", tmp_path / "x", HERE)
    with pytest.raises(UserError, match="is no folder"):
        to_hf(tmp_path / "absent", tmp_path / "x", HERE)
    with pytest.raises(UserError, match="is a Hugging Face folder already"):
        to_hf(source, tmp_path / "x", HERE)
    to_megatron(source, tmp_path / "there", Options(workers=0, overwrite=True))
    assert compared(source, tmp_path / "there").equal
    for inside in (source, source / "x", source.parent):
        with pytest.raises(UserError, match="are the same folder, or one is in the other"):
            to_megatron(source, inside, Options(workers=0, overwrite=True))
    with pytest.raises(UserError, match=r"config\.json is a file; give another TARGET"):
        to_megatron(source, tmp_path / "there" / "hf" / "config.json", Options(workers=0, overwrite=True))
    (tmp_path / "there" / "hf").rename(tmp_path / "side")
    with pytest.raises(UserError, match="give them with --like HF_FOLDER"):
        to_hf(tmp_path / "there", tmp_path / "x", HERE)
    to_hf(tmp_path / "there", tmp_path / "x", HERE, like=source)
    assert contents(tmp_path / "x") == contents(source)
    with pytest.raises(UserError, match=r"does not fit its config\.json"):
        to_hf(tmp_path / "there", tmp_path / "y", HERE, like=sources["qwen3_vl"])


def test_a_training_checkpoint_is_exported_as_its_run_began(sources: dict[str, Path], tmp_path: Path) -> None:
    """No side files, optimizer state beside the weights, a padded vocabulary: as a run on two ranks writes it."""
    from megatron_cppo.storage import torch_dist

    source = sources["qwen2_5_vl"]
    to_megatron(source, tmp_path / "m", HERE)
    made, folder = Folder(tmp_path / "m"), tmp_path / "run" / "checkpoints" / "step_000012"
    folder.mkdir(parents=True)
    with torch_dist.data_file(folder, "__0_0") as file:
        for key in made.keys:
            size = made.size(key)
            tensor = made.read(key, offset=[0] * len(size), shape=size)
            if "word_embeddings" in key or "output_layer" in key:
                tensor = torch.cat([tensor, tensor.new_zeros(1, 32)])
            for prefix in ("", "optimizer.state.exp_avg."):
                file.add(prefix + key, tensor, size=tensor.shape, offset=[0] * tensor.dim())
    torch_dist.write_index(folder, file.chunks, common={"schedule": 1})
    with pytest.raises(UserError, match="--like"):
        to_hf(folder, tmp_path / "export", HERE)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"path": str(source)}}))
    to_hf(folder, tmp_path / "export", HERE)
    assert contents(tmp_path / "export") == contents(source)
    assert compared(folder, source).equal
    assert compared(source, folder).num_tensors == len(load_file(source / "model.safetensors"))


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_what_differs_is_told_worst_first(kind: str, tmp_path: Path) -> None:
    source = Path(make_checkpoint(tmp_path / "a"))
    other = Path(make_checkpoint(tmp_path / "b"))
    nan = torch.tensor([float("nan")])

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_proj.weight"][3, 4] += 0.5
        tensors["model.layers.1.mlp.up_proj.weight"][:, 7] += 2.0
        tensors["visual.blocks.0.norm1.weight"][1] = nan
        tensors["model.norm.weight"][0] = -0.0

    damage(source, lambda tensors: tensors["model.norm.weight"].zero_())
    damage(other, lambda tensors: (tensors["model.norm.weight"].zero_(), change(tensors)))
    if kind == "megatron":
        to_megatron(other, tmp_path / "m", HERE)
        other = tmp_path / "m"
    found = compared(source, other).differing
    assert [(d.name, d.num_differing) for d in found] == [
        ("visual.blocks.0.norm1.weight", 1),
        ("model.layers.1.mlp.up_proj.weight", 64),
        ("model.layers.0.self_attn.k_proj.weight", 1),
        ("model.norm.weight", 1),
    ]
    assert [d.max_gap for d in found] == [math.inf, pytest.approx(2.0, abs=1e-5), pytest.approx(0.5, abs=1e-5), 0.0]
    assert [d.name for d in compared(source, other, tolerance=1.0).differing] == [d.name for d in found[:2]]
    assert not compared(other, other).differing


def test_the_commands_say_what_they_did(tmp_path: Path) -> None:
    """As a user calls them: exit statuses, worker processes, and no import of Megatron-Core."""
    source = make_source(tmp_path / "source", "qwen3_vl_moe", experts="official", shards=2)

    def call(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        program = (
            "import sys, runpy; sys.path.insert(0, '.'); sys.argv = sys.argv[1:]\n"
            "import atexit; atexit.register(lambda: print('megatron.core' in sys.modules))\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [sys.executable, "-c", program, f"tools/{tool}.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)

    dry = call("hf_to_megatron", source, tmp_path / "m", "--dry-run")
    assert "parameters" in dry.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    there = call("hf_to_megatron", source, tmp_path / "m", "--workers", 2)
    assert (there.returncode, there.stdout.splitlines()[-1]) == (0, "False"), there.stderr
    assert "compared with the source in" in there.stdout
    back = call("megatron_to_hf", tmp_path / "m", tmp_path / "h", "--workers", 2, "--no-verify")
    assert (back.returncode, back.stdout.splitlines()[-1]) == (0, "False"), back.stderr
    assert "compared" not in back.stdout
    assert contents(tmp_path / "h") == without_stale(source)
    same = call("verify_checkpoint", tmp_path / "m", tmp_path / "h", "--workers", 2)
    assert (same.returncode, "all equal" in same.stdout) == (0, True), same.stderr
    other = make_source(tmp_path / "other", "qwen3_vl_moe", experts="single", prefix="long")
    (shard,) = other.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.language_model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = 3.0
    save_file(tensors, shard)
    differs = call("verify_checkpoint", tmp_path / "m", other)
    assert differs.returncode == 1
    assert "differs: model.layers.1.mlp.experts.2.up_proj.weight: 1 of 640 numbers" in differs.stdout
    wrong = call("verify_checkpoint", tmp_path / "m", tmp_path / "absent")
    assert (wrong.returncode, wrong.stderr.startswith("error: ")) == (2, True)
    refused = call("hf_to_megatron", source, tmp_path / "m")
    assert (refused.returncode, "--overwrite" in refused.stderr) == (2, True)


def test_opening_needs_the_model_for_megatrons_only(sources: dict[str, Path]) -> None:
    assert checkpoints.opening(sources["qwen2_5_vl"]) == Opening(sources["qwen2_5_vl"], None)
