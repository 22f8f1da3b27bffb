"""Three updates of plain gradient descent in every layout: how far each parameter moved must not depend on it.

Adam with beta1 = 0 and an epsilon far above every gradient is gradient descent: lr * g / (|g| + epsilon). At usual
settings it would hide errors: it divides a wrong scale out, and turns noise around zero into full steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import (
    LAYOUTS,
    UNEVEN,
    VOCAB,
    WORLD,
    checkpoint,
    relative_l2,
    with_drifted_scores,
)

NUM_STEPS = 3
LEARNING_RATE, EPSILON = 1.0, 1e6
"""Steps so long that the rounding of weights near one (6e-8) is small against what they move by."""
DESCENT: dict[str, Any] = {
    "optimizer__learning_rate": LEARNING_RATE * EPSILON,
    "optimizer__beta1": 0.0,
    "optimizer__epsilon": EPSILON,
    "optimizer__weight_decay": 0.0,
    "optimizer__max_grad_norm": 0.0,
    "algorithm__beta": 0.1,
    "perception__divergence": "exact",
    "trainer__num_steps": NUM_STEPS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "untied, three layers": {"num_layers": 3},
    "tied, three layers": {"tied": True, "num_layers": 3},
}
TWO_LAYERS = (
    "TP1",
    "TP2",
    "TP2+SP",
    "DP2",
    "DP2 distributed optimizer",
    "PP2",
    "PP2xDP2 distributed optimizer",
    "TP2xPP2+SP",
)
LAYOUTS_AND_UNEVEN = {**LAYOUTS, **UNEVEN}
PAIRS = [(layout, variant) for layout in TWO_LAYERS for variant in ("untied", "tied")]
PAIRS += [
    (layout, variant) for layout in ("TP1", *UNEVEN) for variant in ("untied, three layers", "tied, three layers")
]


@dataclass(frozen=True)
class Moved:
    """How far each tensor moved, under its Hugging Face name; the embedding after it, and a last stage's copy of it."""

    displacement: dict[str, Tensor]
    norms: list[float]
    embedding: Tensor
    head: Tensor | None


def run(rank: int, world_size: int, cases: list[tuple[str, str, str]]) -> dict[tuple[str, str], Moved]:
    """All (layout, variant, folder) in one process group; top-level, for `run_distributed`."""
    return {(layout, variant): descend(layout, folder, world_size) for layout, variant, folder in cases}


def descend(layout: str, folder: str, world_size: int) -> Moved:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(folder, world_size, **LAYOUTS_AND_UNEVEN[layout], **DESCENT)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    norms = []
    for step in range(NUM_STEPS):
        batch = build_batch(
            tiny_model.make_groups(4, 3, vocab_size=VOCAB, first_row=3 * step),
            views_for=OBJECTIVES["cppo"].views_for,
            num_updates=1,
            packing=plan.packing,
            score=True,
        )
        norms.append(
            policy.update(with_drifted_scores(policy.score(batch, old=True, reference=False)))["optim/grad_norm"]
        )
    model, after = policy.trained.chunks[-1], {name: tensor.clone() for name, tensor in policy.weights()}
    moved = Moved(
        displacement={name: tensor - before[name] for name, tensor in after.items()},
        norms=norms,
        embedding=after["model.embed_tokens.weight"],
        head=model.head_weight().detach().clone() if model.post_process and model.shape.tied else None,
    )
    process_groups.destroy()
    return moved


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Moved]]:
    folders = {name: checkpoint(tmp_path_factory.mktemp("hf"), **variant) for name, variant in VARIANTS.items()}
    cases: dict[int, list[tuple[str, str, str]]] = {}
    for layout, variant in PAIRS:
        cases.setdefault(WORLD[layout], []).append((layout, variant, folders[variant]))
    found: dict[tuple[str, str], list[Moved]] = {}
    for world, chosen in cases.items():
        ranks = run_distributed(run, world, chosen, timeout_seconds=300)
        found |= {(layout, variant): [rank[layout, variant] for rank in ranks] for layout, variant, _ in chosen}
    return found


@pytest.mark.parametrize(("layout", "variant"), [pair for pair in PAIRS if pair[0] != "TP1"])
def test_displacement_does_not_depend_on_the_layout(layout: str, variant: str, answers: Any) -> None:
    wanted, found = answers["TP1", variant][0], answers[layout, variant][0]
    assert found.displacement.keys() == wanted.displacement.keys()
    errors = {name: relative_l2(found.displacement[name], moved) for name, moved in wanted.displacement.items()}
    worst = max(errors, key=errors.__getitem__)
    norms = max(abs(a - b) / b for a, b in zip(found.norms, wanted.norms, strict=True))
    print(
        f"displacement {layout:29} {variant:20} worst of {len(errors)}: {errors[worst]:.1e} ({worst}), "
        f"gradient norms {norms:.1e}"
    )
    assert all(moved.norm() > 0 for moved in wanted.displacement.values())
    assert errors[worst] <= 1e-4
    assert norms <= 1e-5


@pytest.mark.parametrize("layout", ["PP2", "PP3", "TP2xPP2+SP"])
def test_copies_of_a_tied_embedding_stay_equal(layout: str, answers: Any) -> None:
    """The last stage's copy, after three updates, is the first stage's tensor to the bit."""
    ranks = answers[layout, "tied, three layers" if layout in UNEVEN else "tied"]
    copies = [rank.head for rank in ranks if rank.head is not None]
    assert len(copies) == len(ranks) // LAYOUTS_AND_UNEVEN[layout]["policy__pipeline_parallel"]
    assert torch.equal(torch.cat(copies)[:VOCAB], ranks[0].embedding)
