"""The vision tower over TP x CP ranks: ranks without an image, rows without one, several per prompt, a frozen tower.

Every case is compared with one rank that encodes everything itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from megatron_cppo.types import Group
from tests.distributed import layouts, matrix, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import relative_l2
from tests.distributed.matrix import Layout

LAYOUTS = {
    "one rank": Layout(),
    "TP2": Layout(2, tp=2),
    "TP2+SP": Layout(2, tp=2, sp=True),
    "CP2": Layout(2, cp=2),
    "DP2": Layout(2, tokens=320),
    "TP2xCP2+SP": Layout(4, tp=2, sp=True, cp=2),
    "TP2xCP2": Layout(4, tp=2, cp=2),
}
ROWS = {
    "one image for all ranks": (1,),
    "text only": (0, 3),
    "two images in a prompt": (2,),
    "mixed": (0, 1, 2, 3),
}
"""Prompt r of the tiny model has r modulo 3 images."""
FROZEN = "mixed, frozen"


@dataclass(frozen=True)
class Found:
    """What a rank saw: the loss, gradients by name, how many images its tower encoded in a step, and of how many."""

    loss: float
    gradients: dict[str, Tensor]
    num_encoded: int
    num_distinct: int
    trained: set[str]


def groups_of(rows: tuple[int, ...]) -> list[Group]:
    return [tiny_model.make_groups(1, 3, vocab_size=matrix.VOCAB, first_row=row)[0] for row in rows]


def run_cases(rank: int, world_size: int, cases: list[tuple[str, str, str]]) -> dict[tuple[str, str], Found]:
    """All (layout, case, folder) of a number of ranks; top-level, for `run_distributed`."""
    return {(layout, case): run(layout, case, folder, world_size) for layout, case, folder in cases}


def run(layout: str, case: str, folder: str, world_size: int) -> Found:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    fields = LAYOUTS[layout].fields() | {
        "model__train_vision": case != FROZEN,
        "optimizer__learning_rate": 0.0,
        "perception__temperature": 1.0,  # at the published 0.1 the loss is ten times as sensitive to rounding
    }
    config = tiny_model.make_config(folder, world_size, **fields)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    encoded: list[int] = []
    tower = policy.trained.chunks[0].visual
    tower.register_forward_hook(lambda _m, args, kwargs, _o: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True)
    batch = build_batch(
        groups_of(ROWS[case.removesuffix(", frozen")]),
        views_for=OBJECTIVES["cppo"].views_for,
        num_updates=1,
        packing=plan.packing,
        score=True,
    )
    policy.update(layouts.with_drifted_scores(policy.score(batch, old=True, reference=False)))
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    # A frozen parameter has no gradient buffer.
    gradients = {} if case == FROZEN else {name: tensor.clone() for name, tensor in policy.gradients()}
    if case == FROZEN:
        gradients = {
            name: parameter.main_grad.clone()
            for name, parameter in policy.trained.chunks[0].named_parameters()
            if name.endswith("layernorm.weight") and parameter.requires_grad
        }
    rows = [row for mini in batch.updates for replica in mini.microbatches for row in replica]
    distinct = {key for row in rows for key in row.images}
    found = Found(matrix.total_loss(policy), gradients, sum(encoded), len(distinct), trained)
    process_groups.destroy()
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Found]]:
    folder = tiny_model.make_checkpoint(
        tmp_path_factory.mktemp("hf"), family="qwen3_vl", num_layers=matrix.NUM_LAYERS, vocab_size=matrix.VOCAB
    )
    found: dict[tuple[str, str], list[Found]] = {}
    for ranks in (1, 2, 4):
        names = [name for name, layout in LAYOUTS.items() if layout.ranks == ranks]
        cases = [(name, case, folder) for name in names for case in (*ROWS, FROZEN)]
        every = run_distributed(run_cases, ranks, cases, timeout_seconds=300)
        found |= {(name, case): [rank[name, case] for rank in every] for name, case, _ in cases}
    return found


@pytest.mark.parametrize("case", [*ROWS, FROZEN])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
def test_gradients_are_those_of_one_rank(layout: str, case: str, answers: Any) -> None:
    (one,) = answers["one rank", case]
    for found in answers[layout, case]:
        assert found.loss == pytest.approx(one.loss, rel=1e-5)
        assert found.gradients.keys() == one.gradients.keys()
        errors = {
            name: relative_l2(found.gradients[name], wanted)
            for name, wanted in one.gradients.items()
            if wanted.norm() > 0
        }
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-5, (worst, errors[worst])
        zero = [name for name, wanted in one.gradients.items() if not wanted.norm()]
        assert all(not found.gradients[name].any() for name in zero), "a gradient where one rank has none"
    print(f"{layout:10} {case:24} worst of {len(errors)}: {errors[worst]:.1e} ({worst})")


def test_text_alone_leaves_the_tower_without_gradient(answers: Any) -> None:
    (one,) = answers["one rank", "text only"]
    assert one.num_encoded == 0
    assert not any(tensor.any() for name, tensor in one.gradients.items() if name.startswith("visual."))
    (mixed,) = answers["one rank", "mixed"]
    assert all(tensor.any() for name, tensor in mixed.gradients.items() if name.startswith("visual."))


def test_one_image_is_encoded_by_one_rank_a_pass(answers: Any) -> None:
    """Three samples under three views: the original is encoded once, as are the perturbed ones, whoever needs them."""
    for layout in ("TP2", "TP2+SP", "CP2", "TP2xCP2+SP"):
        counts = [found.num_encoded for found in answers[layout, "one image for all ranks"]]
        (alone,) = answers["one rank", "one image for all ranks"]
        assert sum(counts) == alone.num_encoded
        assert min(counts) < max(counts), "no rank was without an image in some pass"


@pytest.mark.parametrize("layout", ["one rank", "TP2xCP2+SP"])
def test_a_frozen_tower_is_not_trained_and_encodes_each_image_once_a_step(layout: str, answers: Any) -> None:
    frozen, trained = answers[layout, FROZEN], answers[layout, "mixed"]
    assert all(found.trained == set() for found in frozen)
    assert sum(found.num_encoded for found in frozen) == frozen[0].num_distinct
    assert sum(found.num_encoded for found in trained) > frozen[0].num_distinct


def test_patches_as_a_product_are_the_convolution() -> None:
    from megatron_cppo.families.towers import PatchProduct

    torch.manual_seed(0)
    proj = nn.Conv3d(3, 16, (2, 14, 14), stride=(2, 14, 14)).double()
    pixels_PC = torch.randn(9, 3 * 2 * 14 * 14, dtype=torch.float64)
    wanted = proj(pixels_PC.view(-1, 3, 2, 14, 14)).view(-1, 16)
    product = PatchProduct(proj)
    assert [name for name, _ in product.named_parameters()] == ["proj.weight", "proj.bias"]
    assert torch.allclose(product(pixels_PC), wanted, atol=1e-12)
