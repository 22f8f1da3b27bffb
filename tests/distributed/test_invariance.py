"""One mini-batch, one number: loss, metrics and gradients in every micro-batch cut and packing order, and objective.

`test_matrix.py` has every layout; here the rows are cut and ordered in other ways, in some of them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_cppo.algo.perception import mask_margin
from tests.distributed import dense_reference, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import (
    LAYOUTS,
    WORLD,
    Answer,
    Case,
    checkpoint,
    drifted,
    engine_logp,
    groups_of,
    relative_l2,
    run_cases,
)

OBJECTIVES: dict[str, dict[str, Any]] = {
    "k3": {"algorithm__beta": 0.1},
    "exact, global": {"perception__divergence": "exact", "perception__aggregation": "global", "algorithm__beta": 0.1},
    "constant views": {"perception__stop_gradient_views": True, "algorithm__beta": 0.1},
    "constant views, exact, global": {
        "perception__stop_gradient_views": True,
        "perception__divergence": "exact",
        "perception__aggregation": "global",
        "algorithm__beta": 0.1,
    },
    "sequence mask": {"algorithm__beta": 0.1, "algorithm__correction": "sequence_mask"},
    "k1, entropy bonus, sample mean": {
        "perception__divergence": "k1",
        "algorithm__entropy_coefficient": 0.05,
        "algorithm__aggregation": "sample_mean",
        "algorithm__dual_clip": 1.5,
    },
}
# name -> (layout, tokens of a row, reversed order)
CUTS = {
    "one row": ("TP1", 20_000, False),
    "small rows": ("TP1", 213, False),
    "small rows, reversed": ("TP1", 213, True),
    "medium rows, reversed": ("TP1", 500, True),
    **{layout: (layout, 600, False) for layout in LAYOUTS if layout != "TP1"},
    "CP2, small rows, reversed": ("CP2", 240, True),
    "DP2, small rows, reversed": ("DP2", 213, True),
    "TP2+SP, small rows": ("TP2+SP", 214, False),
    "PP2, small rows, reversed": ("PP2", 213, True),
    "TP2xPP2+SP, small rows": ("TP2xPP2+SP", 214, False),
}
FEW_CUTS = {  # others that are like these are cut in every way
    "constant views": ("one row", "small rows, reversed", "CP2, small rows, reversed"),
    "sequence mask": (
        *("one row", "small rows, reversed", "CP2, small rows, reversed"),
        *("DP2, small rows, reversed", "TP2xPP2+SP, small rows"),
    ),
}
CASES = [(objective, cut) for objective in OBJECTIVES for cut in FEW_CUTS.get(objective, tuple(CUTS))]
MASK_NOISE = 1e-4
"""No mask may hang on less than this many nats; fp32 entropies of two layouts differ by about 1e-6."""


def _case(folder: str, objective: str, cut: str) -> Case:
    layout, tokens, reverse = CUTS[cut]
    fields = {**OBJECTIVES[objective], **LAYOUTS[layout], "policy__max_tokens_per_microbatch": tokens}
    return Case(folder, fields, reverse=reverse, scores=True, engine="algorithm__correction" in fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def answers(folder: str) -> dict[tuple[str, str], Answer]:
    cases: dict[int, dict[Any, Case]] = {1: {}, 2: {}, 4: {}}
    for objective, cut in CASES:
        cases[WORLD[CUTS[cut][0]]][objective, cut] = _case(folder, objective, cut)
    found: dict[tuple[str, str], Answer] = {}
    for world, chosen in cases.items():
        found |= run_distributed(run_cases, world, chosen, timeout_seconds=300)[0]
    return found


def _by_sample(answer: Answer, reverse: bool) -> dict[tuple[int, int], Any]:
    samples = [s for group in groups_of(Case("", {}, reverse=reverse)) for s in group.samples]
    return {(samples[s.sample_id].prompt.row, samples[s.sample_id].index): s for s in answer.statistics}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masks_do_not_hang_on_rounding(objective: str, answers: Any) -> None:
    gated = [s for s in answers[objective, "one row"].statistics if s.mask is not None]
    assert len(gated) >= 5
    assert sum(sum(s.mask) for s in gated) >= 10
    entropy = torch.tensor([h for s in gated for h in s.entropy])
    removing = torch.tensor([h for s in gated for h in s.entropy_removing])
    owner = torch.tensor([s.sample_id for s in gated for _ in s.entropy])
    margin = mask_margin(entropy, removing, owner)
    print(f"margin {margin:.1e} nat over {len(owner)} tokens of {len(gated)} gated samples")
    assert margin > MASK_NOISE


def test_corrections_do_not_hang_on_rounding() -> None:
    """And some samples are masked, and some not."""
    samples = [sample for group in groups_of(Case("", {})) for sample in group.samples]
    zeros = [torch.zeros(len(sample.token_ids)) for sample in samples]
    pairs = zip(drifted(samples, zeros)[0], engine_logp(samples, zeros), strict=True)
    sums = torch.stack([(old - engine).sum() for old, engine in pairs]).abs()
    assert (sums - math.log(2)).abs().min() > MASK_NOISE
    assert 4 <= (sums > math.log(2)).sum() <= len(samples) - 4


@pytest.mark.parametrize(("objective", "cut"), [case for case in CASES if case[1] != "one row"])
def test_update_does_not_depend_on_the_cut(objective: str, cut: str, answers: Any) -> None:
    wanted, found = answers[objective, "one row"], answers[objective, cut]
    assert found.num_rows > wanted.num_rows or CUTS[cut][1] > 500
    masks = {name: s.mask for name, s in _by_sample(found, CUTS[cut][2]).items()}
    assert masks == {name: s.mask for name, s in _by_sample(wanted, False).items()}
    same = wanted.metrics.keys() - {"tokens/segments", "tokens/vision", "tokens/vision_unshared", "policy/loss"}
    metric = max(same, key=lambda m: abs(found.metrics[m] - wanted.metrics[m]) / max(1e-3, abs(wanted.metrics[m])))
    loss = abs(found.metrics["policy/loss"] - wanted.metrics["policy/loss"])
    errors = {name: relative_l2(found.gradients[name], wanted.gradients[name]) for name in found.gradients}
    worst = max(errors, key=errors.__getitem__) if errors else ""
    print(
        f"{objective:32} {cut:28} {found.num_rows:3} rows  loss {loss:.1e}  {metric} "
        f"{abs(found.metrics[metric] - wanted.metrics[metric]):.1e}  gradients {errors.get(worst, 0):.1e} {worst}"
    )
    assert loss <= 1e-5 * abs(wanted.metrics["policy/loss"])
    assert found.metrics[metric] == pytest.approx(wanted.metrics[metric], rel=1e-5, abs=1e-7)
    assert bool(errors) == ("distributed optimizer" not in cut)
    assert errors.get(worst, 0.0) <= 1e-5


@pytest.mark.parametrize(
    "objective", ["k3", "exact, global", "constant views", "constant views, exact, global", "sequence mask"]
)
def test_gated_update_equals_all_three_views_dense_in_float64(objective: str, folder: str, answers: Any) -> None:
    """Drifted old and reference log-probs too: clipping, KL and CPL together, against loops over whole vocabularies."""
    answer = answers[objective, "one row"]
    model = dense_reference.load(folder, torch.float64)
    config = tiny_model.make_config(folder, 1, **OBJECTIVES[objective])
    samples = [sample for group in groups_of(Case(folder, {})) for sample in group.samples]
    logp = _logp(model, samples)
    old, reference = drifted(samples, logp)
    engine = engine_logp(samples, logp) if config.algorithm.correction == "sequence_mask" else None
    loss = dense_reference.objective(model, samples, config.algorithm, config.perception, old, reference, engine)
    wanted = dense_reference.gradients(model, loss)
    errors = {name: relative_l2(answer.gradients[name], wanted[name]) for name in wanted if wanted[name].norm() > 0}
    worst = max(errors, key=errors.__getitem__)
    total = answer.metrics["policy/loss"] + 0.1 * answer.metrics["policy/kl"]
    # What is logged is the mean over masked tokens, which is the loss's own term under "global" only.
    total += config.perception.coefficient * answer.metrics["perception/cpl"]
    print(f"{objective}: loss {total:.9f} dense {loss.item():.9f}, gradients {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= 2e-5
    if objective.endswith("global"):
        assert total == pytest.approx(loss.item(), rel=1e-6)


def _logp(model: Any, samples: Any) -> list[torch.Tensor]:
    """Log-probs of the samples' tokens, from Hugging Face's logits."""
    found = []
    for sample in samples:
        with torch.no_grad():
            logits = dense_reference.response_logits(model, sample, "original")
        logp_NV = dense_reference.log_softmax(logits, tiny_model.BANNED)
        found.append(logp_NV.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0].float())
    return found
