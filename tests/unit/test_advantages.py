"""Group-relative advantages against Python's own statistics module."""

from __future__ import annotations

import statistics

import pytest
import torch

from megatron_cppo.algo.advantages import group_advantages


def loop_advantages(rewards: list[float], group_ids: list[int], normalize_std: bool) -> list[float]:
    advantages = []
    for reward, group in zip(rewards, group_ids, strict=True):
        members = [r for r, g in zip(rewards, group_ids, strict=True) if g == group]
        if len(members) == 1 or max(members) - min(members) <= 1e-6:
            advantages.append(0.0)
        else:
            scale = statistics.stdev(members) + 1e-6 if normalize_std else 1.0
            advantages.append((reward - statistics.mean(members)) / scale)
    return advantages


@pytest.mark.parametrize("normalize_std", [True, False])
def test_interleaved_groups_of_any_size(normalize_std: bool) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        num_samples = int(torch.randint(1, 40, (), generator=generator))
        # Rewards of a few levels, as graders give them, so that some groups agree.
        levels = torch.tensor([0.0, 0.1, 0.9, 1.0])
        rewards = levels[torch.randint(len(levels), (num_samples,), generator=generator)]
        group_ids = torch.randint(-3, 7, (num_samples,), generator=generator) * 1000
        given = group_advantages(rewards, group_ids, normalize_std=normalize_std)
        expected = loop_advantages(rewards.tolist(), group_ids.tolist(), normalize_std)
        torch.testing.assert_close(given, torch.tensor(expected), rtol=1e-5, atol=1e-5)
        assert given.dtype == torch.float32


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("size", [1, 5, 7])
def test_groups_that_agree_get_exactly_zero(reward: float, size: int) -> None:
    """r − mean is 1e-8 for some of these in float32; a positive one would open the gate."""
    rewards = torch.cat([torch.full((size,), reward), torch.tensor([0.0, 1.0])])
    group_ids = torch.cat([torch.zeros(size), torch.ones(2)]).long()
    given = group_advantages(rewards, group_ids)
    assert (given[:size] == 0).all()
    torch.testing.assert_close(given[size:], torch.tensor([-(0.5**0.5), 0.5**0.5]), rtol=1e-5, atol=0)


def test_the_tolerance_decides_which_groups_agree() -> None:
    rewards, group_ids = torch.tensor([0.5, 0.51]), torch.tensor([1, 1])
    assert (group_advantages(rewards, group_ids, tolerance=0.02) == 0).all()
    assert (group_advantages(rewards, group_ids, tolerance=0.005) != 0).all()


def test_no_samples() -> None:
    assert group_advantages(torch.zeros(0), torch.zeros(0).long()).shape == (0,)
