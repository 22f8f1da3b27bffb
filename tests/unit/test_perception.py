"""The perception mask against a plain loop over samples, on many random inputs, ties and edge cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.algo.perception import mask_margin, perception_mask, perception_scores

RELATIVE: dict[str, Any] = {"rank_by": "relative"}
ABSOLUTE: dict[str, Any] = {"rank_by": "absolute"}


def loop_mask(
    original: list[float],
    removing: list[float],
    sample_id: list[int],
    top_fraction: float,
    min_entropy_shift: float,
    rank_by: str,
) -> list[bool]:
    """Steps 1 to 4 of the algorithm, one sample after the other, in Python's float64."""
    mask = [False] * len(original)
    for sample in set(sample_id):
        scores = {}
        for i, owner in enumerate(sample_id):
            shift = removing[i] - original[i]
            if owner == sample and shift > 0 and shift >= min_entropy_shift:
                scores[i] = shift / (removing[i] + 1e-6) if rank_by == "relative" else shift
        if scores:
            num_kept = max(1, math.floor(top_fraction * len(scores)))
            threshold = sorted(scores.values(), reverse=True)[num_kept - 1]
            for i, score in scores.items():
                mask[i] = score >= threshold
    return mask


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Interleaved samples of 0 to 40 tokens with arbitrary ids; a third of the seeds have many equal entropies."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_samples = (int(torch.randint(1, n, (), generator=generator)) for n in (80, 7))
    original, removing = 3 * torch.rand(2, num_tokens, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        original, removing = (4 * original).round() / 4, (4 * removing).round() / 4
    ids = torch.randperm(1000, generator=generator)[:num_samples] - 500
    sample_id = ids[torch.randint(num_samples, (num_tokens,), generator=generator)]
    options = {
        "top_fraction": (0.5, 0.3, 1.0, 0.01)[seed % 4],
        "min_entropy_shift": (0.0, 0.5, 1.0)[seed % 3],
        "rank_by": ("relative", "absolute")[seed % 2],
    }
    return original, removing, sample_id, options


@pytest.mark.parametrize("first_seed", range(0, 300, 50))
def test_mask_equals_the_loop_over_samples(first_seed: int) -> None:
    kept = 0
    for seed in range(first_seed, first_seed + 50):
        original, removing, sample_id, options = random_case(seed)
        expected = loop_mask(original.tolist(), removing.tolist(), sample_id.tolist(), **options)
        assert perception_mask(original, removing, sample_id, **options).tolist() == expected, seed
        kept += sum(expected)
    assert kept > 0


@pytest.mark.parametrize("first_seed", range(0, 60, 20))
def test_no_change_below_the_margin_flips_a_token(first_seed: int) -> None:
    margins = []
    for seed in range(first_seed, first_seed + 20):
        original, removing, sample_id, options = random_case(seed)
        margin = mask_margin(original, removing, sample_id, **options).item()
        mask = perception_mask(original, removing, sample_id, **options)
        margins.append(margin)
        for attempt in range(10):
            torch.manual_seed(attempt)
            # The corners of the allowed cube are the hardest changes.
            signs = torch.randint(2, (2, len(original)), dtype=torch.float64) * 2 - 1
            moved_original, moved_removing = original + 0.999 * margin * signs[0], removing + 0.999 * margin * signs[1]
            assert torch.equal(perception_mask(moved_original, moved_removing, sample_id, **options), mask), seed
    assert max(margins) > 1e-3


@pytest.mark.parametrize("options", [RELATIVE, ABSOLUTE])
def test_the_margin_is_tight(options: dict[str, Any]) -> None:
    """Moving the two tokens at the boundary against each other by a little more than the margin does flip them."""
    original = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    removing = torch.tensor([2.0, 2.01, 0.2], dtype=torch.float64)
    sample_id = torch.zeros(3).long()
    margin = mask_margin(original, removing, sample_id, **options)
    push = 1.02 * margin * torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    before = perception_mask(original, removing, sample_id, **options)
    after = perception_mask(original + push, removing - push, sample_id, **options)
    assert before.tolist() == [False, True, False]
    assert after.tolist() == [True, False, False]


def test_a_tie_at_the_kth_place_keeps_all_and_has_no_margin() -> None:
    original, removing = torch.zeros(4), torch.tensor([0.5, 0.5, 0.5, 0.1])
    sample_id = torch.tensor([3, 3, 3, 3])
    assert perception_mask(original, removing, sample_id, rank_by="absolute").tolist() == [True, True, True, False]
    assert mask_margin(original, removing, sample_id, rank_by="absolute") == 0


def test_a_single_candidate_is_kept_and_no_candidate_keeps_none() -> None:
    original, removing = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.2, 0.9, 1.0])
    assert perception_mask(original, removing, torch.tensor([7, 7, 9])).tolist() == [True, False, False]
    # Nothing is ranked here: the margin is the candidates' own, half of 0.05 on either view's entropy.
    margin = mask_margin(torch.tensor([1.0, 1.0]), torch.tensor([1.2, 0.95]), torch.tensor([7, 7]))
    torch.testing.assert_close(margin, torch.tensor(0.025))


def test_the_floor_admits_a_shift_equal_to_it() -> None:
    original, removing = torch.zeros(3), torch.tensor([0.25, 0.24, 0.5])
    mask = perception_mask(original, removing, torch.zeros(3).long(), top_fraction=1.0, min_entropy_shift=0.25)
    assert mask.tolist() == [True, False, True]


def test_no_tokens() -> None:
    empty, no_ids = torch.zeros(0), torch.zeros(0).long()
    assert perception_mask(empty, empty, no_ids).shape == (0,)
    assert mask_margin(empty, empty, no_ids) == torch.inf


def test_scores() -> None:
    original, removing = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([2.0, 0.5, 0.0])
    torch.testing.assert_close(perception_scores(original, removing), torch.tensor([0.75, 0.0, 0.0]), atol=1e-6, rtol=0)
    assert perception_scores(original, removing, rank_by="absolute").tolist() == [1.5, 0.0, 0.0]


def test_the_mask_carries_no_gradient() -> None:
    original = torch.rand(5, requires_grad=True)
    assert not perception_scores(original, original + 1).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_fraction": 0.0}, r"top_fraction must be in \(0, 1\], got 0.0"),
        ({"top_fraction": 1.5}, "got 1.5"),
        ({"min_entropy_shift": -0.1}, "min_entropy_shift must be ≥ 0 nats, got -0.1"),
        ({"rank_by": "size"}, "unknown rank_by 'size'; choose one of relative, absolute"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    entropy = torch.rand(3)
    for function in (perception_mask, mask_margin):
        with pytest.raises(ValueError, match=message):
            function(entropy, entropy, torch.zeros(3).long(), **options)
