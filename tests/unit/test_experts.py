"""Stacked experts on disk: each matrix by its name whatever the stacks' order, and back in that order, bit by bit.

Legend: E experts, I an expert's inner size, H hidden size.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cppo.config import ConfigError
from megatron_cppo.families import experts
from megatron_cppo.storage.hf_folder import Reader, write
from tests.distributed.tiny_model import make_checkpoint

# E, I, H; in the last four a stack's shape alone does not tell its order.
SIZES = ((3, 5, 8), (1, 3, 4), (4, 7, 2), (4, 4, 8), (3, 6, 6), (2, 3, 6), (6, 6, 6))
ORDERS = ("official", "transformers 5", "expert by expert")
LAYERS = (0, 11)
OTHERS = {
    "model.language_model.embed_tokens.weight": (7, 4),
    "model.language_model.layers.0.mlp.gate.weight": (3, 4),
    "model.visual.merger.mlp.weight": (5,),
    "lm_head.weight": (7, 4),
}
PREFIX = "model.layers.{}.mlp.experts."
DISK_PREFIX = "model.language_model.layers.{}.mlp.experts."


def random_bits(*size: int, seed: int) -> Tensor:
    """bf16 of any bits, infinities and not-a-numbers too: what moves weights must not look at them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, size, generator=generator, dtype=torch.int16).view(torch.bfloat16)


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(
        found.contiguous().view(torch.int16), wanted.contiguous().view(torch.int16)
    )


def expert_matrices(sizes: tuple[int, int, int], layer: int, seed: int = 0) -> dict[str, Tensor]:
    """The matrices of one layer under their own names: gate and up [I, H], down [H, I]."""
    num_experts, inner, hidden = sizes
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {
        f"{PREFIX.format(layer)}{e}.{kind}.weight": random_bits(*shape, seed=1000 * seed + 100 * layer + 3 * e + i)
        for e in range(num_experts)
        for i, (kind, shape) in enumerate(shapes.items())
    }


def on_disk(sizes: tuple[int, int, int], layer: int, order: str, matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as a checkpoint holds them, number by number."""
    num_experts, inner, hidden = sizes
    mine, theirs = PREFIX.format(layer), DISK_PREFIX.format(layer)
    if order == "expert by expert":
        return {theirs + name.removeprefix(mine): tensor for name, tensor in matrices.items()}
    gate_up = torch.empty(num_experts, 2 * inner, hidden, dtype=torch.bfloat16)
    down = torch.empty(num_experts, hidden, inner, dtype=torch.bfloat16)
    for e, i, h in itertools.product(range(num_experts), range(inner), range(hidden)):
        gate_up[e, i, h] = matrices[f"{mine}{e}.gate_proj.weight"][i, h]
        gate_up[e, inner + i, h] = matrices[f"{mine}{e}.up_proj.weight"][i, h]
        down[e, h, i] = matrices[f"{mine}{e}.down_proj.weight"][h, i]
    if order == "official":
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    return {theirs + "gate_up_proj": gate_up, theirs + "down_proj": down}


def write_source(folder: Path, sizes: tuple[int, int, int], order: str, seed: int = 0) -> dict[str, Tensor]:
    """A folder of two shards, gate_up and down in different ones; returns its tensors by official name."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    shards: list[dict[str, Tensor]] = [{}, {}]
    for number, (name, size) in enumerate(OTHERS.items()):
        tensor = random_bits(*size, seed=number + 50)
        shards[number % 2][name] = tensor
        tensors[official(name)] = tensor
    for layer in LAYERS:
        matrices = expert_matrices(sizes, layer, seed)
        tensors |= matrices
        for number, (name, tensor) in enumerate(on_disk(sizes, layer, order, matrices).items()):
            shards[number % 2][name] = tensor
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number + 1:05d}-of-00002.safetensors")
    return tensors


def official(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def disk_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


CASES = [(sizes, order) for sizes in SIZES for order in ORDERS]


@pytest.mark.parametrize(("sizes", "order"), CASES)
def test_every_matrix_is_read_by_its_name(sizes: tuple[int, int, int], order: str, tmp_path: Path) -> None:
    tensors = write_source(tmp_path / "hf", sizes, order)
    with Reader(str(tmp_path / "hf")) as reader:
        assert reader.names == tensors.keys()
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape), name
            assert same_bits(reader.read(name), tensor), name


@pytest.mark.parametrize(("sizes", "order"), CASES)
def test_slices_are_those_of_the_whole_matrices(sizes: tuple[int, int, int], order: str, tmp_path: Path) -> None:
    tensors = write_source(tmp_path / "hf", sizes, order)
    with Reader(str(tmp_path / "hf")) as reader:
        for name, tensor in tensors.items():
            for axis in range(tensor.dim()):
                size = tensor.shape[axis]
                for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
                    found = reader.read(name, axis=axis, start=start, stop=stop)
                    wanted = tensor.narrow(axis, start, stop - start)
                    assert found.shape == wanted.shape, (name, axis, start, stop)
                    assert same_bits(found, wanted), (name, axis, start, stop)


@pytest.mark.parametrize(("sizes", "order"), CASES)
def test_writing_keeps_the_sources_order_bit_by_bit(sizes: tuple[int, int, int], order: str, tmp_path: Path) -> None:
    """Matrices come in any order, those of one stack apart from each other, as slices or transposed."""
    write_source(tmp_path / "hf", sizes, order)
    newer = write_source(tmp_path / "newer", sizes, order, seed=1)
    names = random.Random(0).sample(sorted(newer), len(newer))

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = newer[name]
            yield name, tensor.t().contiguous().t() if tensor.dim() == 2 else tensor

    write(stream(), source=str(tmp_path / "hf"), target=str(tmp_path / "out"))
    found, wanted = disk_tensors(tmp_path / "out"), disk_tensors(tmp_path / "newer")
    assert found.keys() == wanted.keys() == disk_tensors(tmp_path / "hf").keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert same_bits(found[name], tensor), name


def test_the_stacks_have_the_dtype_of_what_comes(tmp_path: Path) -> None:
    tensors = write_source(tmp_path / "hf", SIZES[0], "official")
    write(((n, t.float()) for n, t in tensors.items()), source=str(tmp_path / "hf"), target=str(tmp_path / "out"))
    assert {tensor.dtype for tensor in disk_tensors(tmp_path / "out").values()} == {torch.float32}


def test_a_stack_that_lacks_an_expert_is_not_written(tmp_path: Path) -> None:
    tensors = write_source(tmp_path / "hf", SIZES[0], "official")
    del tensors[PREFIX.format(11) + "2.up_proj.weight"]
    with pytest.raises(AssertionError, match=r"experts are missing of \['model\.layers\.11\.mlp\.experts\.gate_up_pr"):
        write(tensors.items(), source=str(tmp_path / "hf"), target=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", SIZES)
def test_the_order_is_told_by_both_shapes(sizes: tuple[int, int, int]) -> None:
    num_experts, inner, hidden = sizes
    gate_up, down = (num_experts, hidden, 2 * inner), (num_experts, inner, hidden)
    assert experts.multiplies_right(gate_up, down) is True
    assert experts.multiplies_right(swapped(gate_up), swapped(down)) is False
    if gate_up != swapped(gate_up) and down != swapped(down):  # else these are of one order, too
        assert experts.multiplies_right(swapped(gate_up), down) is None
        assert experts.multiplies_right(gate_up, swapped(down)) is None


def swapped(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    return shape[0], shape[2], shape[1]


# Shapes of gate_up_proj and down_proj; None: the tensor is not there.
MISFITS: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = {
    "one order each": ((3, 8, 10), (3, 8, 5)),
    "different numbers of experts": ((3, 8, 10), (4, 5, 8)),
    "different inner sizes": ((3, 8, 10), (3, 6, 8)),
    "different hidden sizes": ((3, 8, 10), (3, 5, 9)),
    "gate without up": ((3, 8, 5), (3, 5, 8)),
    "no down": ((3, 8, 10), None),
    "no gate_up": (None, (3, 5, 8)),
    "down of two dimensions": ((3, 8, 10), (5, 8)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_stacks_that_fit_no_order_are_refused(name: str, tmp_path: Path) -> None:
    layer = DISK_PREFIX.format(4)
    kinds = dict(zip(("gate_up_proj", "down_proj"), MISFITS[name], strict=True))
    save_file(
        {layer + kind: torch.zeros(shape) for kind, shape in kinds.items() if shape}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ConfigError) as caught:
        Reader(str(tmp_path))
    shapes = [shape for shape in kinds.values() if shape]
    assert str(caught.value) == (
        f"model.path: the stacked experts model.layers.4.mlp.experts have the shapes {shapes}, which fit neither "
        "transformers 4's order nor 5's; copy the checkpoint again"
    )


def test_names_of_matrices_and_places_are_inverse() -> None:
    for stack, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        name = f"model.layers.5.mlp.experts.{stack}"
        matrices = experts.matrices(name, 12)
        places = [experts.place(matrix) for matrix in matrices]
        assert places == [experts.Place(name, e, part, parts) for e in range(12) for part in range(parts)]
    for name in ("model.layers.5.mlp.gate_proj.weight", "lm_head.weight", "model.layers.5.mlp.experts.1.bias"):
        assert experts.place(name) is None
        assert experts.matrices(name, 12) == []


@pytest.mark.parametrize("order", ["official", "transformers 5"])
def test_transformers_reads_the_same_experts(order: str, tmp_path: Path) -> None:
    """A real checkpoint, its stacks turned to the official order: both read it as the module's own matrices."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    folder = Path(make_checkpoint(tmp_path / "hf", family="qwen3_vl_moe"))
    if order == "official":
        tensors = load_file(folder / "model.safetensors")
        turned = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if ".experts." in name}
        assert len(turned) == 4
        save_file(tensors | turned, folder / "model.safetensors", metadata={"format": "pt"})
    module: Any = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    seen = 0
    with Reader(str(folder)) as reader:
        assert {right for _, right in reader.stacks.values()} == {order == "official"}
        for own_name, parameter in module.named_parameters():
            stack = official(own_name)
            for name in experts.matrices(stack, parameter.shape[0]):
                place = experts.place(name)
                assert place is not None
                whole = parameter.data[place.expert]  # of the module: gate over up [2I, H], or down [H, I]
                rows = whole.shape[0] // place.parts
                assert torch.equal(reader.read(name), whole[place.part * rows : (place.part + 1) * rows]), name
                seen += 1
    assert seen == 2 * 4 * 3


def test_a_module_gets_every_experts_matrices() -> None:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    from megatron_cppo.rollout.engine import EngineError
    from megatron_cppo.rollout.module_weights import load_every_weight

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "vocab_size": 20, "num_experts": 3, "moe_intermediate_size": 5, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 1, "out_hidden_size": 16}
    options: dict[str, Any] = {"text_config": text, "vision_config": {**vision, "deepstack_visual_indexes": []}}
    module = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**options))
    matrices = {name: tensor.float().nan_to_num() for name, tensor in expert_matrices((3, 5, 16), 0).items()}
    rest = {
        official(name): torch.full_like(parameter, 0.5)
        for name, parameter in module.named_parameters()
        if ".experts." not in name
    }
    load_every_weight(module, (matrices | rest).items())
    held = module.state_dict()
    for e in range(3):
        gate_up, down = (held[f"{DISK_PREFIX.format(0)}{stack}"][e] for stack in ("gate_up_proj", "down_proj"))
        assert torch.equal(gate_up[:5], matrices[f"{PREFIX.format(0)}{e}.gate_proj.weight"])
        assert torch.equal(gate_up[5:], matrices[f"{PREFIX.format(0)}{e}.up_proj.weight"])
        assert torch.equal(down, matrices[f"{PREFIX.format(0)}{e}.down_proj.weight"])
    del matrices[f"{PREFIX.format(0)}1.up_proj.weight"]
    with pytest.raises(EngineError, match=r"1 weights were not sent \(model\.layers\.0\.mlp\.experts\.1\.up_proj"):
        load_every_weight(module, (matrices | rest).items())
