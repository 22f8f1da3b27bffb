"""Advantages of samples relative to their group (GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783).

Owns the step from rewards to advantages. It must not know what a reward is made of, nor tokens.

Shapes: S samples in any order; `group_id_S` says of which group, by any integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


@torch.no_grad()
def group_advantages(
    rewards_S: Tensor, group_id_S: Tensor, *, normalize_std: bool = True, tolerance: float = 1e-6
) -> Tensor:
    """(r − mean of the group)/(unbiased standard deviation of the group + 1e-6), [S], float32.

    `normalize_std=False` leaves the division out (Dr. GRPO). Groups of one sample, and groups whose rewards span no
    more than `tolerance`, get exactly 0: r − mean is a rounding error there, and its sign would open the gate.
    """
    rewards_S = rewards_S.float()
    _, group_S, size_G = torch.unique(group_id_S, return_inverse=True, return_counts=True)
    zeros_G = torch.zeros_like(size_G, dtype=torch.float32)
    centred_S = rewards_S - (zeros_G.index_add(0, group_S, rewards_S) / size_G)[group_S]
    highest_G = zeros_G.scatter_reduce(0, group_S, rewards_S, "amax", include_self=False)
    lowest_G = zeros_G.scatter_reduce(0, group_S, rewards_S, "amin", include_self=False)
    advantage_S = centred_S
    if normalize_std:
        variance_G = zeros_G.index_add(0, group_S, centred_S.square()) / (size_G - 1).clamp(min=1)
        advantage_S = centred_S / (variance_G.sqrt() + EPSILON)[group_S]
    return advantage_S.where((highest_G - lowest_G > tolerance)[group_S], 0.0)
