"""Layouts: what is refused, in which words, and that what is proposed instead is accepted as it stands."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from megatron_cppo import layout, plan
from megatron_cppo.config import Config
from tests.unit.layout_case import CONFIGS, changed, make_configs, problems


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    return make_configs(tmp_path_factory.mktemp("models"))


def proposals(said: str) -> Iterator[dict[str, object]]:
    """The changes that a problem's text proposes, each by itself."""
    subject, _, cure = said.partition(": ")
    cure = cure.rpartition(";")[2]
    if "another trainer.num_gpus" in cure:  # no change by itself
        return
    if "turn it off" in cure:
        yield {subject.replace(".", "__"): False}
    for name, words in re.findall(r"--(\w+\.\w+) ([\w ]+)", cure):
        yield {name.replace(".", "__"): value_of(name, words)}
    number = re.search(r"use ((?:\d+ ?)+)", cure)
    if number:
        yield {subject.replace(".", "__"): value_of(subject, number[1])}


def value_of(name: str, words: str) -> object:
    if name.endswith("layers_per_stage"):
        return tuple(map(int, words.split()))
    return {"True": True, "fp32": "fp32"}.get(words) or int(words)


# Name -> (family, wrong choice, what is said).
REFUSALS: dict[str, tuple[str, dict[str, object], str]] = {
    "SP without TP": (
        "qwen3_vl",
        {"policy__sequence_parallel": True},
        "policy.sequence_parallel: splits over TP ranks, but tensor_parallel is 1; turn it off",
    ),
    "VPP without PP": (
        "qwen2_5_vl",
        {"policy__virtual_pipeline": 2},
        "policy.virtual_pipeline: 2 chunks interleave several stages, but pipeline_parallel is 1; use 1",
    ),
    "VPP without PP, with experts": (
        "qwen3_vl_moe",
        {"policy__virtual_pipeline": 2},
        "policy.virtual_pipeline: 2 chunks interleave several stages, but pipeline_parallel is 1; use 1",
    ),
    "bf16 on cpu": (
        "qwen3_vl_moe",
        {"policy__device": "cpu"},
        "policy.precision: the cpu platform computes in fp32; use --policy.precision fp32",
    ),
    "recompute of a frozen tower": (
        "qwen3_vl",
        {"policy__recompute_vision": True, "model__train_vision": False},
        "policy.recompute_vision: the vision tower is frozen, nothing of it is kept; turn it off",
    ),
    "CP in the ranks": (
        "qwen2_5_vl",
        {"policy__context_parallel": 2, "trainer__num_gpus": 7},
        "trainer.num_gpus: 7 ranks cannot be cut into replicas of 2 (TP 1 x CP 2 x PP 1); use 8",
    ),
    "CP, TP and PP in the ranks": (
        "qwen3_vl",
        {
            "policy__context_parallel": 3,
            "policy__tensor_parallel": 2,
            "policy__pipeline_parallel": 2,
            "trainer__num_gpus": 8,
        },
        "trainer.num_gpus: 8 ranks cannot be cut into replicas of 12 (TP 2 x CP 3 x PP 2); use 12",
    ),
    "no CP in the ranks' text": (
        "qwen3_vl",
        {"policy__tensor_parallel": 2, "policy__pipeline_parallel": 2, "trainer__num_gpus": 9},
        "trainer.num_gpus: 9 ranks cannot be cut into replicas of 4 (TP 2 x PP 2); use 8",
    ),
    "TP of a dense model": (
        "qwen3_vl",
        {"policy__tensor_parallel": 8},
        "policy.tensor_parallel: 8 does not divide the model's 12 attention heads, 4 key/value heads, "
        "60 feed-forward channels; use 4",
    ),
    "TP of whole experts": (
        "qwen3_vl_moe",
        {"policy__tensor_parallel": 8, "policy__sequence_parallel": True, "policy__expert_parallel": 3},
        "policy.tensor_parallel: 8 does not divide the model's 12 attention heads, 4 key/value heads; use 4",
    ),
    "TP of cut experts": (
        "qwen3_vl_moe",
        {"policy__tensor_parallel": 8, "policy__sequence_parallel": True},
        "policy.tensor_parallel: 8 does not divide the model's 12 attention heads, 4 key/value heads, "
        "20 feed-forward channels; use 4",
    ),
    "EP of Qwen2.5-VL": (
        "qwen2_5_vl",
        {"policy__expert_parallel": 2},
        "policy.expert_parallel: 2, but the model has no experts; use 1",
    ),
    "EP of a dense Qwen3-VL": (
        "qwen3_vl",
        {"policy__expert_parallel": 4},
        "policy.expert_parallel: 4, but the model has no experts; use 1",
    ),
    "EP that divides the ranks only": (
        "qwen3_vl_moe",
        {"policy__expert_parallel": 8},
        "policy.expert_parallel: 8 must divide the model's 12 experts and the 24 ranks of a stage (TP x CP x DP); "
        "use 6",
    ),
    "EP that divides the experts only": (
        "qwen3_vl_moe",
        {"policy__expert_parallel": 12, "policy__pipeline_parallel": 2, "trainer__num_gpus": 16},
        "policy.expert_parallel: 12 must divide the model's 12 experts and the 8 ranks of a stage (TP x CP x DP); "
        "use 4",
    ),
    "EP over CP ranks": (
        "qwen3_vl_moe",
        {"policy__expert_parallel": 5, "policy__context_parallel": 3, "trainer__num_gpus": 3},
        "policy.expert_parallel: 5 must divide the model's 12 experts and the 3 ranks of a stage (TP x CP x DP); use 3",
    ),
    "experts and TP without SP": (
        "qwen3_vl_moe",
        {"policy__tensor_parallel": 4, "policy__expert_parallel": 2},
        "policy.sequence_parallel: with experts and tensor_parallel 4 Megatron-Core trains under sequence parallelism "
        "only; use --policy.sequence_parallel True",
    ),
    "stages that do not divide the layers": (
        "qwen2_5_vl",
        {"policy__pipeline_parallel": 3},
        "policy.pipeline_parallel: 3 does not divide the model's 8 layers; use 2, or cut them yourself: "
        "--policy.layers_per_stage 3 3 2",
    ),
    "stages that do not divide the layers, with deepstack": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 6},
        "policy.pipeline_parallel: 6 does not divide the model's 8 layers; use 2, or cut them yourself: "
        "--policy.layers_per_stage 3 1 1 1 1 1",
    ),
    "chunks that do not divide the layers": (
        "qwen2_5_vl",
        {"policy__pipeline_parallel": 3, "policy__virtual_pipeline": 2},
        "policy.pipeline_parallel: 6 chunks (3 stages x virtual_pipeline) does not divide the model's 8 layers; use "
        "others whose product does, or cut them yourself: --policy.layers_per_stage 2 2 1 1 1 1",
    ),
    "more stages than layers": (
        "qwen2_5_vl",
        {"policy__pipeline_parallel": 12},
        "policy.pipeline_parallel: 12 stages, but the model has 8 layers; use fewer",
    ),
    "more chunks than layers": (
        "qwen3_vl_moe",
        {"policy__pipeline_parallel": 3, "policy__virtual_pipeline": 3},
        "policy.pipeline_parallel: 9 chunks (3 stages x virtual_pipeline), but the model has 8 layers; use fewer",
    ),
    "layers of too few stages": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 3, "policy__layers_per_stage": (4, 4)},
        "policy.layers_per_stage: 4 4 are 2 stages with 8 layers; pipeline_parallel is 3, the model has 8 layers, and "
        "each stage needs one; use 3 3 2",
    ),
    "layers of stages instead of chunks": (
        "qwen2_5_vl",
        {"policy__pipeline_parallel": 2, "policy__virtual_pipeline": 2, "policy__layers_per_stage": (4, 4)},
        "policy.layers_per_stage: 4 4 are 2 chunks with 8 layers; pipeline_parallel is 2, virtual_pipeline 2, the "
        "model has 8 layers, and each chunk needs one; use 2 2 2 2",
    ),
    "layers of stages instead of chunks, with deepstack": (
        "qwen3_vl_moe",
        {"policy__pipeline_parallel": 2, "policy__virtual_pipeline": 2, "policy__layers_per_stage": (4, 4)},
        "policy.layers_per_stage: 4 4 are 2 chunks with 8 layers; pipeline_parallel is 2, virtual_pipeline 2, the "
        "model has 8 layers, and each chunk needs one; use 3 2 2 1",
    ),
    "a chunk without layers": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 2, "policy__virtual_pipeline": 2, "policy__layers_per_stage": (4, 4, 0, 0)},
        "policy.layers_per_stage: 4 4 0 0 are 4 chunks with 8 layers; pipeline_parallel is 2, virtual_pipeline 2, the "
        "model has 8 layers, and each chunk needs one; use 3 2 2 1",
    ),
    "layers of another model": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 2, "policy__layers_per_stage": (4, 5)},
        "policy.layers_per_stage: 4 5 are 2 stages with 9 layers; pipeline_parallel is 2, the model has 8 layers, and "
        "each stage needs one; use 4 4",
    ),
    "a first stage without the deepstack layers": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 2, "policy__layers_per_stage": (2, 6)},
        "policy.layers_per_stage: the first stage has 2 layers, but vision features are added after each of the first "
        "3 layers, where the tower is; use 4 4",
    ),
    "even stages without the deepstack layers": (
        "qwen3_vl_moe",
        {"policy__pipeline_parallel": 4},
        "policy.layers_per_stage: the first stage has 2 layers, but vision features are added after each of the first "
        "3 layers, where the tower is; use 3 2 2 1",
    ),
    "a first chunk without the deepstack layers": (
        "qwen3_vl",
        {"policy__pipeline_parallel": 2, "policy__virtual_pipeline": 2},
        "policy.layers_per_stage: the first chunk has 2 layers, but vision features are added after each of the first "
        "3 layers, where the tower is; use 3 2 2 1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_what_is_wrong_and_its_cure_is_accepted(name: str, good: dict[str, Config]) -> None:
    family, fields, said = REFUSALS[name]
    config = changed(good[family], **fields)
    assert problems(config) == [said]
    cures = list(proposals(said))
    assert len(cures) == (0 if said.endswith("use fewer") else 1 + said.count("use 2, or"))
    for cure in cures:
        assert problems(changed(config, **cure)) == [], cure


@pytest.mark.parametrize("field", ["tensor", "context", "pipeline", "virtual", "expert"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_size_below_one_is_said_once(field: str, sequence_parallel: bool, good: dict[str, Config]) -> None:
    name = "virtual_pipeline" if field == "virtual" else f"{field}_parallel"
    sizes = {"policy__tensor_parallel": 2, "policy__sequence_parallel": sequence_parallel} | {f"policy__{name}": 0}
    assert problems(changed(good["qwen3_vl"], **sizes)) == [f"policy.{name}: 0 is outside [1, inf]; use 1"]


def test_without_a_checkpoint_the_problems_of_its_sizes_are_left_out(good: dict[str, Config]) -> None:
    sizes = {"policy__tensor_parallel": 7, "policy__pipeline_parallel": 3, "policy__expert_parallel": 5}
    config = changed(good["qwen3_vl"], **sizes, policy__layers_per_stage=(1,), policy__recompute_vision=True)
    config = changed(config, model__train_vision=False)
    assert layout.problems(config, None) == [
        "trainer.num_gpus: 24 ranks cannot be cut into replicas of 21 (TP 7 x PP 3); use 21",
        "policy.recompute_vision: the vision tower is frozen, nothing of it is kept; turn it off",
    ]
    assert len(layout.problems(config, plan.resolve(good["qwen3_vl"]).shape)) == 5


def layouts() -> Iterator[dict[str, object]]:
    """Every combination of small sizes, whether the model can be cut so or not."""
    sizes = ((1, 2, 3, 8), (1, 2, 3), (1, 2, 3, 4, 6, 7, 8, 9), (1, 2, 3, 4), (1, 3, 4, 8), (12, 24, 28))
    for tensor, context, pipeline, virtual, expert, ranks in itertools.product(*sizes):
        yield {
            "policy__tensor_parallel": tensor,
            "policy__sequence_parallel": tensor > 1,
            "policy__context_parallel": context,
            "policy__pipeline_parallel": pipeline,
            "policy__virtual_pipeline": virtual,
            "policy__expert_parallel": expert,
            "trainer__num_gpus": ranks,
        }


Cured = tuple[dict[str, object], str, dict[str, object], list[str]]


@pytest.fixture(scope="module")
def cured(good: dict[str, Config]) -> dict[str, list[Cured]]:
    """Of each family's layouts with a single problem: the layout, the problem, a cure, and what is then still wrong."""
    found: dict[str, list[Cured]] = {family: [] for family in CONFIGS}
    shapes = {family: plan.resolve(config).shape for family, config in good.items()}
    for family, fields in itertools.product(CONFIGS, layouts()):
        shape, asked = shapes[family], changed(good[family], **fields)
        said = layout.problems(asked, shape)
        if len(said) == 1:
            found[family] += [
                (fields, said[0], cure, layout.problems(changed(asked, **cure), shape)) for cure in proposals(said[0])
            ]
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layout_that_is_proposed_fits_the_model(family: str, cured: dict[str, list[Cured]]) -> None:
    """With all other sizes as they are; of the number of ranks, see the next test."""
    proposed = {name for _, _, cure, _ in cured[family] for name in cure}
    wanted = {"tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel", "layers_per_stage"}
    assert proposed == {f"policy__{name}" for name in wanted} | {"trainer__num_gpus"}
    wrong = [case for case in cured[family] if [text for text in case[3] if not text.startswith("trainer.num_gpus")]]
    assert not wrong, f"{len(wrong)} of {len(cured[family])}, first {wrong[0]}"


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layout_that_is_proposed_fits_the_number_of_ranks(family: str, cured: dict[str, list[Cured]]) -> None:
    wrong = [case for case in cured[family] if any(text.startswith("trainer.num_gpus") for text in case[3])]
    assert not wrong, f"{len(wrong)} of {len(cured[family])}, first {wrong[0]}"
