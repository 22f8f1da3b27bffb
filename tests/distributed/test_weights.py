"""Weights in and out of the policy: load then stream is the identity, what does not fit is named, and what is exported
or sent to the engine answers as the policy does.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.config import ConfigError
from megatron_cppo.data.packing import build_batch
from megatron_cppo.types import Batch, Group, Prompt, Sample
from tests.distributed import dense_reference, layouts, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import LAYOUTS, VOCAB, WORLD, checkpoint

VARIANTS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tied": True}}
CHECKED = ("TP1", "TP2", "TP2+SP", "DP2", "PP2", "TP2xPP2+SP")
AGREEING = ("TP1", "TP2+SP", "PP2", "TP2xPP2+SP")
NUM_TOKENS = 6
TEMPERATURE = 0.7
PROMPT_ROWS = (1, 2, 3, 5)
"""Rows with one image, two, none and two."""


@dataclass(frozen=True)
class Answer:
    """What one rank saw in one layout."""

    loaded: dict[str, Tensor]
    visual_buffers: dict[str, Tensor] | None
    trained: dict[str, Tensor]
    greedy: list[tuple[int, ...]]
    logits: list[Tensor]
    gap_before_sync: float
    gap_after_sync: float
    num_sampled: int


@dataclass(frozen=True)
class Case:
    """A source folder, a layout, and where the trained weights are exported (with greedy answers) when given."""

    model: str
    layout: str
    export: Path | None


def run_cases(rank: int, world_size: int, cases: dict[Any, Case], broken: dict[str, str]) -> dict[str, Any]:
    """All layouts of one world size, then the loads that must fail; top-level, for `run_distributed`."""
    platform = check_platform(cases[next(iter(cases))].model, inside=world_size > 1)
    answers = {name: run_case(case, world_size) for name, case in cases.items()}
    return {"platform": platform, "answers": answers, "errors": load_errors(cases, world_size, broken)}


@dataclass(frozen=True)
class Platform:
    """Devices of tensors made in `torch.device` contexts and for "cuda", and what `from_pretrained` gives."""

    devices: list[str]
    cuda: list[str]
    tensors: dict[str, Tensor]


def check_platform(folder: str, *, inside: bool) -> Platform:
    """What Hugging Face loads, and where tensors are made: in a fresh process, or in one that begins on the platform.

    Not both in one process: whatever torch and transformers remember of the first would hide what the second does.
    """
    from megatron_cppo.policy import platform

    if inside:
        platform.activate("cpu")
    with torch.device("meta"):
        made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.full((2,), 3.0), torch.arange(2)]
        made += [torch.tensor([1.0]), torch.rand(2), torch.randn(2)]
    with torch.device("cpu"):
        made.append(torch.arange(3))
    made.append(torch.arange(3))
    cuda = [torch.zeros(2, device="cuda"), torch.empty(2, device=0), torch.ones(2).cuda()] if inside else []
    model = dense_reference.load(folder)
    return Platform(
        devices=[tensor.device.type for tensor in made],
        cuda=[tensor.device.type for tensor in cuda],
        tensors={name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
    )


def run_case(case: Case, world_size: int) -> Answer:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    fields = {
        "optimizer__learning_rate": 1e-2,
        "rollout__temperature": TEMPERATURE,
        "rollout__max_response_tokens": NUM_TOKENS,
        **LAYOUTS[case.layout],
    }
    config = tiny_model.make_config(case.model, world_size, **fields)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    loaded = {name: tensor.clone() for name, tensor in policy.weights()}
    model = policy.trained.chunks[0]
    visual_buffers = None
    if model.pre_process:
        visual_buffers = {name: buffer.clone() for name, buffer in model.visual.named_buffers()}
    padding_is_zero(policy)
    # Trained far enough that neither the export nor the engine can pass with the source's weights.
    policy.update(planned(config, plan, tiny_model.make_groups(4, 2, vocab_size=VOCAB)))
    trained = {name: tensor.clone() for name, tensor in policy.weights()}
    greedy, logits = greedy_answers(policy, config, plan) if case.export else ([], [])
    before, after, count = engine_gaps(policy, config, plan) if case.layout in AGREEING else (0.0, 0.0, 0)
    if case.export:
        policy.export(case.export)
    process_groups.destroy()
    return Answer(loaded, visual_buffers, trained, greedy, logits, before, after, count)


def planned(config: Any, plan: Any, groups: list[Group]) -> Batch:
    return build_batch(
        groups,
        views_for=OBJECTIVES[config.algorithm.objective].views_for,
        num_updates=1,
        packing=plan.packing,
        score=True,
    )


def padding_is_zero(policy: Any) -> None:
    """Megatron's vocabulary padding starts as zeros, on the last TP rank only, in the embedding and in the head."""
    group, model = policy.groups.tensor, policy.trained.chunks[0]
    weights = [model.language_model.embedding.word_embeddings.weight] if model.pre_process else []
    weights += [model.head_weight()] if model.post_process else []
    share = -(-VOCAB // group.size())
    inside = min(VOCAB - group.rank() * share, share)
    assert inside == (share if group.rank() < group.size() - 1 else VOCAB - (group.size() - 1) * share)
    for weight in weights:
        assert weight.shape[0] == share
        assert not weight[inside:].any()
        assert weight[:inside].any(dim=1).all()


def plain_sample(prompt: Prompt, index: int, token_ids: tuple[int, ...]) -> Sample:
    return Sample(prompt, index=index, token_ids=token_ids, logp=(), text="", truncated=False, version=0)


def prompts() -> list[Prompt]:
    return [tiny_model.make_prompt(row, vocab_size=VOCAB) for row in PROMPT_ROWS]


def greedy_answers(policy: Any, config: Any, plan: Any) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """The policy's own greedy answers, one full forward a token, and the logits that chose their tokens."""
    answers: list[tuple[int, ...]] = [() for _ in PROMPT_ROWS]
    logits: list[Tensor] = []
    for _ in range(NUM_TOKENS):
        # What stands at the last place is not read: its row predicts it.
        groups = [Group(p, (plain_sample(p, 0, (*ids, 10)),)) for p, ids in zip(prompts(), answers, strict=True)]
        logits = layouts.sample_logits(policy, planned(config, plan, groups))
        answers = [(*ids, int(rows[-1].argmax())) for ids, rows in zip(answers, logits, strict=True)]
    return answers, logits


def engine_gaps(policy: Any, config: Any, plan: Any) -> tuple[float, float, int]:
    """Largest |log-prob of the engine - of the policy| over sampled tokens, before and after the weights are sent."""
    from megatron_cppo.rollout.transformers import TransformersEngine

    engine = TransformersEngine(
        config.model.path,
        pixels=tiny_model.pixels,
        banned_ids=tiny_model.BANNED,
        decode=str,
        max_response_tokens=NUM_TOKENS,
        max_sequences=5,
        seed=1,
        group=policy.groups.world,
    )
    gaps, count = [], 0
    for version in (0, 1):
        if version:
            engine.load_weights(policy.weights(), version=version)
        groups = engine.generate(prompts(), samples_per_prompt=4, temperature=TEMPERATURE)
        scored = policy.score(planned(config, plan, groups), old=True, reference=False)
        assert scored.old_logp is not None
        pairs = zip(scored.samples, scored.old_logp, strict=True)
        gaps.append(max((logp - torch.tensor(sample.logp)).abs().max().item() for sample, logp in pairs))
        count += sum(len(sample.token_ids) for sample in scored.samples)
    return gaps[0], gaps[1], count


def load_errors(cases: dict[Any, Case], world_size: int, broken: dict[str, str]) -> dict[str, str]:
    """What a policy's load says of each broken folder; the model itself is built of the whole one."""
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy import weights
    from megatron_cppo.policy.policy import Policy

    layout = LAYOUTS[{1: "TP1", 2: "TP2", 4: "TP2xPP2"}[world_size]]
    config = tiny_model.make_config(cases[next(iter(cases))].model, world_size, **layout)
    policy = Policy(config, tiny_model.make_plan(config), pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    said = {}
    for name, folder in broken.items():
        with pytest.raises(ConfigError) as caught:
            weights.load(policy.trained.chunks, folder)
        said[name] = str(caught.value)
    process_groups.destroy()
    return said


def break_folders(source: str, root: Path) -> dict[str, str]:
    """Copies of the checkpoint with one thing wrong each."""
    whole = load_file(Path(source) / "model.safetensors")
    proj, norm = "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"
    down, bias = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.bias"
    query, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    changes = {
        "missing": {key: value for key, value in whole.items() if key not in (norm, bias)},
        "unknown": {**whole, "model.layers.2.input_layernorm.weight": whole[norm].clone()},
        "shape": {**whole, proj: whole[proj][:30].clone()},
        "rows": {**whole, "model.embed_tokens.weight": whole["model.embed_tokens.weight"][:, :16].clone()},
        "fewer rows": {**whole, "lm_head.weight": whole["lm_head.weight"][:130].clone()},
        "more rows": {**whole, "model.embed_tokens.weight": whole["model.embed_tokens.weight"].repeat(2, 1)},
        "flat": {**whole, query: whole[query].flatten()},
        "columns": {**whole, gate: whole[gate][:, :31].clone()},
        "indivisible": {**whole, down: whole[down][:, :63].clone()},
    }
    folders = {}
    for name, tensors in changes.items():
        folder = root / name
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors")
        folders[name] = str(folder)
    return folders


@dataclass(frozen=True)
class Runs:
    """Every rank's answers by (layout, variant), and the source and export folders."""

    answers: dict[tuple[str, str], list[Answer]]
    platform: list[Platform]
    errors: dict[int, list[dict[str, str]]]
    sources: dict[str, str]
    exports: dict[tuple[str, str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("weights")
    sources = {variant: checkpoint(root / variant, **fields) for variant, fields in VARIANTS.items()}
    broken = break_folders(sources["untied"], tmp_path_factory.mktemp("broken"))
    exports = {(layout, variant): root / f"export {layout} {variant}" for layout in AGREEING for variant in VARIANTS}
    answers: dict[tuple[str, str], list[Answer]] = {}
    platform: list[Platform] = []
    errors: dict[int, list[dict[str, str]]] = {}
    for world in (1, 2, 4):
        cases = {
            (layout, variant): Case(sources[variant], layout, exports.get((layout, variant)))
            for layout in CHECKED
            for variant in VARIANTS
            if WORLD[layout] == world
        }
        results = run_distributed(run_cases, world, cases, broken, timeout_seconds=300)
        answers |= {name: [result["answers"][name] for result in results] for name in cases}
        platform += [result["platform"] for result in results]
        errors[world] = [result["errors"] for result in results]
    return Runs(answers, platform, errors, sources, exports)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", CHECKED)
def test_load_then_stream_is_the_identity(layout: str, variant: str, runs: Runs) -> None:
    source = load_file(Path(runs.sources[variant]) / "model.safetensors")
    assert ("lm_head.weight" in source) == (variant == "untied")
    for answer in runs.answers[layout, variant]:
        assert answer.loaded.keys() == source.keys()
        assert [name for name in source if not torch.equal(answer.loaded[name], source[name])] == []
        assert {name: tensor.dtype for name, tensor in answer.loaded.items()} == {
            name: tensor.dtype for name, tensor in source.items()
        }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", CHECKED)
def test_the_towers_buffers_are_hugging_faces(layout: str, variant: str, runs: Runs) -> None:
    wanted = dict(dense_reference.load(runs.sources[variant]).model.visual.named_buffers())
    assert any(name.endswith("inv_freq") for name in wanted)
    ranks = runs.answers[layout, variant]
    towers = [answer.visual_buffers for answer in ranks if answer.visual_buffers is not None]
    assert len(towers) == len(ranks) // (2 if "PP2" in layout else 1)
    for buffers in towers:
        assert buffers.keys() == wanted.keys()
        assert all(torch.equal(buffers[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", AGREEING)
def test_an_export_reloaded_by_transformers_answers_as_the_policy(layout: str, variant: str, runs: Runs) -> None:
    answer = runs.answers[layout, variant][0]
    folder = runs.exports[layout, variant]
    on_disk = load_file(folder / "model.safetensors")
    assert on_disk.keys() == answer.trained.keys()
    assert all(torch.equal(on_disk[name], answer.trained[name]) for name in on_disk)
    moved = [name for name in on_disk if not torch.equal(on_disk[name], answer.loaded[name])]
    assert len(moved) > 0.9 * len(on_disk), "the update changed too little to tell the export from the source"
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (Path(runs.sources[variant]) / name).read_bytes()
    model = dense_reference.load(str(folder))
    for prompt, ids, logits in zip(prompts(), answer.greedy, answer.logits, strict=True):
        assert greedy_by_transformers(model, prompt) == ids
        with torch.no_grad():
            wanted = dense_reference.response_logits(model, plain_sample(prompt, 0, ids), "original")
        gap = (logits - wanted).abs().max().item()
        bound = 2e-5 * max(1.0, wanted.abs().max().item())
        print(f"{layout:8} {variant:8} row {prompt.row}: {ids}, logits {gap:.1e}, bound {bound:.1e}")
        assert gap <= bound
    assert len(set(answer.greedy)) == len(PROMPT_ROWS)


def greedy_by_transformers(model: Any, prompt: Prompt) -> tuple[int, ...]:
    ids = torch.tensor([prompt.token_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.grids:
        inputs |= {
            "pixel_values": torch.cat([tiny_model.pixels(key) for key in prompt.images("original")]),
            "image_grid_thw": torch.tensor([(grid.frames, grid.height, grid.width) for grid in prompt.grids]),
            "mm_token_type_ids": (ids == tiny_model.IMAGE_ID).long(),
        }
    with torch.no_grad():
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0)
    return tuple(answer[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", AGREEING)
def test_engine_and_policy_agree_on_what_was_sampled(layout: str, variant: str, runs: Runs) -> None:
    for answer in runs.answers[layout, variant]:
        print(f"{layout} {variant}: {answer.gap_after_sync:.1e} over {answer.num_sampled} tokens")
        assert answer.num_sampled > 100
        assert answer.gap_before_sync > 0.1, "before the weights are sent the two must differ"
        assert answer.gap_after_sync <= 1e-5


def test_the_platform_leaves_devices_and_hugging_faces_loads_as_they_were(runs: Runs) -> None:
    outside, *inside = runs.platform
    assert len(inside) == 2 + 4
    assert any(name.endswith("inv_freq") for name in outside.tensors)
    for seen in inside:
        assert seen.devices == outside.devices == ["meta"] * 8 + ["cpu"] * 2
        assert seen.cuda == ["cpu"] * 3
        assert seen.tensors.keys() == outside.tensors.keys()
        differing = [name for name in seen.tensors if not torch.equal(seen.tensors[name], outside.tensors[name])]
        assert differing == []


EXPECTED: dict[str, list[str]] = {
    "missing": ["2 tensors missing ['model.layers.0.self_attn.k_proj.bias', 'model.norm.weight']", "0 unknown []"],
    "unknown": ["0 tensors missing []", "1 unknown ['model.layers.2.input_layernorm.weight']"],
    "shape": ["model.layers.1.self_attn.o_proj.weight", "(30, 32)", "(32, 32)", "do not match"],
    "rows": ["model.embed_tokens.weight", "(131, 16)", "(131, 32)", "do not match"],
    "fewer rows": ["lm_head.weight", "(130, 32)", "(131, 32)", "do not match"],
    "more rows": ["model.embed_tokens.weight", "(262, 32)", "(131, 32)", "do not match"],
    "flat": ["model.layers.0.self_attn.q_proj.weight", "(1024,)", "(32, 32)", "do not match"],
    "columns": ["model.layers.1.mlp.gate_proj.weight", "(64, 31)", "(64, 32)", "do not match"],
    "indivisible": ["model.layers.0.mlp.down_proj.weight", "(32, 63)", "(32, 64)", "do not match"],
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("what", EXPECTED)
def test_what_does_not_fit_is_named_on_all_ranks(what: str, world: int, runs: Runs) -> None:
    assert len(runs.errors[world]) == world
    for said in runs.errors[world]:
        assert said[what].startswith("model.path: ")
        for text in EXPECTED[what]:
            assert text in said[what], said[what]
