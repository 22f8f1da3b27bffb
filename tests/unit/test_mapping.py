"""The mapping of names and tensors: inverse in both directions, Megatron's documented layout, no name left over.

Legend: g key/value heads, r queries per key/value head, d head size, H hidden size, F feed-forward size.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_cppo.architecture import ModelShape, VisionShape
from megatron_cppo.families import FAMILIES, part
from megatron_cppo.families.rules import Rule, bind, join_qkv, join_rows, split_halves, split_qkv
from megatron_cppo.storage.hf_folder import pad_rows, vocabulary_rows
from tests.distributed.tiny_model import NUM_EXPERTS, make_checkpoint

SEEDS = range(12)
TENSOR_PARALLEL = (1, 2, 4)
RULES = {rule.megatron: rule for family in FAMILIES for rule in part(family, "mapping").RULES}
LAYER = "language_model.decoder.layers.{layer}."
EXPERT = LAYER + "mlp.experts.local_experts.{expert}."


def random_shape(seed: int) -> ModelShape:
    """Sizes that TP 1, 2 and 4 divide, except the vocabulary, which need not be divisible."""
    numbers = random.Random(seed)
    kv_heads = 4 * numbers.randint(1, 2)
    return ModelShape(
        family="qwen2_5_vl",
        num_layers=numbers.randint(1, 12),
        hidden_size=4 * numbers.randint(1, 5),
        ffn_size=4 * numbers.randint(1, 9),
        num_heads=kv_heads * numbers.randint(1, 4),
        num_kv_heads=kv_heads,
        head_size=2 * numbers.randint(1, 4),
        vocab_size=numbers.randint(9, 70),
        norm_epsilon=1e-6,
        rope_theta=1e4,
        mrope_section=(1, 1, 1),
        tied=False,
        image_token_id=5,
        vision=VisionShape(1, 4, 4, 1, 4, 14, 2, 2, num_parameters=0),
    )


def qkv_tensors(shape: ModelShape, *trailing: int) -> list[Tensor]:
    """q, k and v whose every number tells which tensor, row and column it came from."""
    d, sizes = shape.head_size, (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return [numbered(10_000_000 * (i + 1), heads * d, *trailing) for i, heads in enumerate(sizes)]


def numbered(first: int, *size: int) -> Tensor:
    return first + torch.arange(torch.Size(size).numel(), dtype=torch.float64).view(size)


def megatron_qkv(tensors: list[Tensor], shape: ModelShape, rank: int, num_ranks: int) -> Tensor:
    """The documented layout, head by head: for each key/value head of the rank its queries, its key, its value."""
    q, k, v = tensors
    d, r, share = shape.head_size, shape.num_heads // shape.num_kv_heads, shape.num_kv_heads // num_ranks
    rows = []
    for head in range(rank * share, (rank + 1) * share):
        rows += [q[(head * r + query) * d : (head * r + query + 1) * d] for query in range(r)]
        rows += [k[head * d : (head + 1) * d], v[head * d : (head + 1) * d]]
    return torch.cat(rows)


def slices(tensors: list[Tensor], rank: int, num_ranks: int) -> list[Tensor]:
    return [tensor.chunk(num_ranks)[rank] for tensor in tensors]


@pytest.mark.parametrize("trailing", ["weight", "bias"])
@pytest.mark.parametrize("num_ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("seed", SEEDS)
def test_qkv_slices_make_megatrons_interleaved_shard(seed: int, num_ranks: int, trailing: str) -> None:
    shape = random_shape(seed)
    tensors = qkv_tensors(shape, *([shape.hidden_size] if trailing == "weight" else []))
    whole = join_qkv(tensors, shape)
    for rank in range(num_ranks):
        pieces = slices(tensors, rank, num_ranks)
        shard = join_qkv(pieces, shape)
        assert torch.equal(shard, megatron_qkv(tensors, shape, rank, num_ranks))
        assert torch.equal(shard, whole.chunk(num_ranks)[rank]), "TP cuts the whole parameter between groups"
        for again, piece in zip(split_qkv(shard, shape), pieces, strict=True):
            assert torch.equal(again, piece)


@pytest.mark.parametrize("num_ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("seed", SEEDS)
def test_fc1_shard_is_its_gate_over_its_up(seed: int, num_ranks: int) -> None:
    shape = random_shape(seed)
    gate, up = (numbered(first, shape.ffn_size, shape.hidden_size) for first in (0, 1_000_000))
    share = shape.ffn_size // num_ranks
    for rank in range(num_ranks):
        rows = slice(rank * share, (rank + 1) * share)
        shard = join_rows(slices([gate, up], rank, num_ranks), shape)
        assert torch.equal(shard, torch.cat([gate[rows], up[rows]]))
        again_gate, again_up = split_halves(shard, shape)
        assert torch.equal(again_gate, gate[rows])
        assert torch.equal(again_up, up[rows])
        is_chunk_of_whole = torch.equal(shard, torch.cat([gate, up]).chunk(num_ranks)[rank])
        assert is_chunk_of_whole == (num_ranks == 1), "a chunk of [gate; up] is not a rank's shard"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_vocabulary_shards_cover_it_once_and_end_in_zeros(seed: int, num_ranks: int) -> None:
    size = random_shape(seed).vocab_size
    padded = -(-size // num_ranks) * num_ranks
    table = numbered(1, size, 3)
    shards = []
    for rank in range(num_ranks):
        start, stop, padding = vocabulary_rows(size, rank=rank, num_ranks=num_ranks, padded_rows=padded)
        shards.append(pad_rows(table[start:stop], padding))
        assert shards[-1].shape == (padded // num_ranks, 3)
    joined = torch.cat(shards)
    assert torch.equal(joined[:size], table)
    assert not joined[size:].any()


def test_a_shard_wholly_beyond_the_vocabulary_is_all_zeros() -> None:
    assert vocabulary_rows(9, rank=3, num_ranks=4, padded_rows=16) == (9, 9, 4)
    assert torch.equal(pad_rows(torch.ones(0, 2), 4), torch.zeros(4, 2))


def layer_names(family: str, layer: int, num_experts: int) -> list[str]:
    """Megatron-Core's names of one layer of the local specification, spelled out."""
    parts = [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight",
    ]
    if family == "qwen2_5_vl":
        parts.append("self_attention.linear_qkv.bias")
    else:
        parts += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    networks = ["mlp."]
    if family == "qwen3_vl_moe":
        parts.append("mlp.router.weight")
        networks = [f"mlp.experts.local_experts.{expert}." for expert in range(num_experts)]
    parts += [f"{network}{matrix}.weight" for network in networks for matrix in ("linear_fc1", "linear_fc2")]
    return [f"language_model.decoder.layers.{layer}.{part}" for part in parts]


def megatron_names(family: str, num_layers: int, num_experts: int = NUM_EXPERTS) -> list[str]:
    return [
        "visual.patch_embed.proj.weight",
        "visual.blocks.0.attn.qkv.bias",
        "language_model.embedding.word_embeddings.weight",
        *[name for layer in range(num_layers) for name in layer_names(family, layer, num_experts)],
        "language_model.decoder.final_layernorm.weight",
        "language_model.output_layer.weight",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_has_one_rule_and_every_rule_a_name(family: str) -> None:
    rules = part(family, "mapping").RULES
    # Checkpoints call the norm before experts by another name than that before a dense network.
    plain = {"stored": "", "also": ""}
    assert all(
        dataclasses.replace(RULES[rule.megatron], **plain) == dataclasses.replace(rule, **plain) for rule in rules
    ), "families have different rules for one parameter"
    matching = {
        name: [rule for rule in rules if rule.match(name) is not None] for name in megatron_names(family, 12, 11)
    }
    assert {name: len(found) for name, found in matching.items()} == dict.fromkeys(matching, 1)
    assert {found[0].megatron for found in matching.values()} == {rule.megatron for rule in rules}
    for name in (
        "language_model.decoder.layers.x.mlp.linear_fc1.weight",
        "language_model.decoder.layers.1.mlp.experts.local_experts.x.linear_fc1.weight",
        "xvisual.a",
        "visual.",
        "visual",
    ):
        assert all(rule.match(name) is None for rule in rules), name


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_name_all_tensors_of_a_checkpoint_once(family: str, tmp_path: Path) -> None:
    from megatron_cppo.storage.hf_folder import Reader

    with Reader(make_checkpoint(tmp_path / "hf", family=family)) as reader:
        on_disk = reader.names
    visual = [name for name in on_disk if name.startswith("visual.")]
    others = [name for name in megatron_names(family, 2) if not name.startswith("visual.")]
    rules = part(family, "mapping").RULES
    bindings = bind(((name, nn.Parameter(torch.zeros(1))) for name in [*visual, *others]), rules)
    hf_names = [name for binding in bindings for name in binding.hf_names]
    assert len(visual) > 10
    assert len(hf_names) == len(set(hf_names))
    assert set(hf_names) == on_disk


def test_a_layers_number_reaches_the_hugging_face_names() -> None:
    (binding,) = bind(
        iter([("language_model.decoder.layers.37.self_attention.linear_qkv.bias", nn.Parameter(torch.zeros(1)))]),
        part("qwen2_5_vl", "mapping").RULES,
    )
    assert binding.hf_names == tuple(f"model.layers.37.self_attn.{part}_proj.bias" for part in "qkv")


def test_an_experts_number_reaches_the_hugging_face_names() -> None:
    name = "language_model.decoder.layers.37.mlp.experts.local_experts.101.linear_fc1.weight"
    (binding,) = bind(iter([(name, nn.Parameter(torch.zeros(1)))]), part("qwen3_vl_moe", "mapping").RULES)
    assert binding.hf_names == tuple(f"model.layers.37.mlp.experts.101.{part}_proj.weight" for part in ("gate", "up"))
    assert binding.rule.expert


def test_a_parameter_without_a_rule_is_named() -> None:
    stranger = [("language_model.decoder.layers.0.mlp.router.weight", nn.Parameter(torch.zeros(1)))]
    for family in ("qwen2_5_vl", "qwen3_vl"):
        with pytest.raises(AssertionError, match=r"no mapping rule.*layers\.0\.mlp\.router\.weight"):
            bind(iter(stranger), part(family, "mapping").RULES)


@pytest.mark.parametrize("seed", SEEDS)
def test_cutting_then_joining_is_cutting_megatrons_parameter(seed: int) -> None:
    """Every rule: rank t's shard, put back by `split` and concatenation along `axis`, is the Hugging Face tensors."""
    shape = random_shape(seed)
    h, f, d = shape.hidden_size, shape.ffn_size, shape.head_size
    q, kv = shape.num_heads * d, shape.num_kv_heads * d
    sizes: dict[str, list[tuple[int, ...]]] = {
        LAYER + "self_attention.linear_qkv.weight": [(q, h), (kv, h), (kv, h)],
        LAYER + "self_attention.linear_qkv.bias": [(q,), (kv,), (kv,)],
        LAYER + "self_attention.linear_proj.weight": [(h, q)],
        LAYER + "mlp.linear_fc1.weight": [(f, h), (f, h)],
        LAYER + "mlp.linear_fc2.weight": [(h, f)],
        EXPERT + "linear_fc1.weight": [(f, h), (f, h)],
        EXPERT + "linear_fc2.weight": [(h, f)],
    }
    cut = {name for name, rule in RULES.items() if rule.axis is not None and not rule.vocab}
    assert cut == sizes.keys()
    for name, rule_sizes in sizes.items():
        rule = RULES[name]
        assert rule.axis is not None
        tensors = [numbered(1_000_000 * i, *size) for i, size in enumerate(rule_sizes)]
        for num_ranks in TENSOR_PARALLEL:
            per_rank = [split_again(rule, tensors, shape, rank, num_ranks) for rank in range(num_ranks)]
            for tensor, parts in zip(tensors, zip(*per_rank, strict=True), strict=True):
                assert torch.equal(torch.cat(parts, dim=rule.axis), tensor), (name, num_ranks)


def split_again(rule: Rule, tensors: list[Tensor], shape: ModelShape, rank: int, num_ranks: int) -> Any:
    pieces = [tensor.chunk(num_ranks, dim=rule.axis)[rank] for tensor in tensors]  # pyrefly: ignore[bad-argument-type]
    return rule.split(rule.join(pieces, shape), shape)


def test_one_query_head_per_key_is_no_special_case() -> None:
    shape = dataclasses.replace(random_shape(0), num_heads=4, num_kv_heads=4, head_size=2)
    tensors = qkv_tensors(shape, 3)
    assert torch.equal(join_qkv(tensors, shape), megatron_qkv(tensors, shape, 0, 1))
