"""The gated loss on packed rows equals the whole three-view objective of every sample, in float64, to 1e-6
(measured: 1e-7, the rounding of the per-token weights, which are fp32).

Hidden states are Hugging Face's, so nothing but the objective, the mask and the vocabulary statistics is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.algo import vocab_parallel
from megatron_cppo.algo.objective import Counts, Tokens, cppo
from megatron_cppo.config import PerceptionConfig
from megatron_cppo.types import VIEWS, Sample, View
from tests.distributed import dense_reference, tiny_model
from tests.distributed.layouts import VOCAB, checkpoint

VARIANTS = {
    "published": PerceptionConfig(coefficient=0.5),
    "absolute with floor": PerceptionConfig(coefficient=0.5, rank_by="absolute", min_entropy_shift=0.01),
    "exact": PerceptionConfig(coefficient=0.5, divergence="exact", top_fraction=0.3),
    "k1, all masked tokens alike": PerceptionConfig(coefficient=0.5, divergence="k1", aggregation="global"),
}


class DenseHead:
    """A head over hidden rows that already exist, whole vocabulary, one rank."""

    def __init__(self, hidden_TH: Tensor, weight_VH: Tensor) -> None:
        self.hidden_TH, self.weight_VH = hidden_TH, weight_VH
        self.settings: dict[str, Any] = {"group": None, "vocab_size": VOCAB, "banned_ids": tiny_model.BANNED}

    def statistics(self, rows_N: Tensor, targets_N: Tensor, *, num_constant: int = 0) -> tuple[Tensor, Tensor]:
        return vocab_parallel.linear_statistics(
            self.hidden_TH[rows_N], self.weight_VH, targets_N, num_constant=num_constant, **self.settings
        )

    def divergences(self, rows_N: Tensor, others: Sequence[Tensor], *, constant_others: bool) -> Tensor:
        hiddens = [self.hidden_TH[rows] for rows in (rows_N, *others)]
        function = vocab_parallel.linear_view_statistics
        no_targets = torch.full_like(rows_N, -1)
        given = function(hiddens, self.weight_VH, no_targets, stop_gradient_views=constant_others, **self.settings)
        return given.kl_KN


def hidden_rows(model: Any, sample: Sample, view: View) -> Tensor:
    """The hidden states [tokens, H] that predict the response, by a hook on Hugging Face's head."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dense_reference.response_logits(model, sample, view)
    hook.remove()
    return seen[0][0, len(sample.prompt.token_ids) - 1 : -1]


def gated_loss(model: Any, samples: list[Sample], perception: PerceptionConfig, algorithm: Any) -> Tensor:
    """All samples in one row: original rows of all, perturbed rows of gated ones only."""
    hidden: list[Tensor] = []
    rows: dict[View, list[Tensor]] = {view: [] for view in VIEWS}
    used = 0
    for sample in samples:
        for view in VIEWS:
            count = len(sample.token_ids)
            if view != "original" and not sample.gated:
                rows[view].append(torch.full((count,), -1))
                continue
            hidden.append(hidden_rows(model, sample, view))
            rows[view].append(used + torch.arange(count))
            used += count
    lengths = torch.tensor([len(sample.token_ids) for sample in samples])
    owner_N = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    tokens = Tokens(
        targets_N=torch.tensor([token for sample in samples for token in sample.token_ids]),
        sample_N=owner_N,
        weight_N=torch.ones(len(owner_N), dtype=torch.float64),
        length_N=lengths[owner_N],
        advantage_N=torch.tensor([sample.advantage for sample in samples], dtype=torch.float64)[owner_N],
        rows_original_N=torch.cat(rows["original"]),
        rows_preserving_N=torch.cat(rows["preserving"]),
        rows_removing_N=torch.cat(rows["removing"]),
    )
    counts = Counts(
        num_tokens=len(owner_N),
        num_samples=len(samples),
        num_gated_samples=sum(sample.gated for sample in samples),
        num_microbatches=1,
        max_response_tokens=8,
    )
    head = DenseHead(torch.cat(hidden), model.lm_head.weight)
    if perception.aggregation == "global":
        with torch.no_grad():
            mask = cppo(tokens, head, counts, algorithm, PerceptionConfig()).mask_N
        assert mask is not None
        counts = Counts(
            **{name: getattr(counts, name) for name in counts.__slots__} | {"num_masked_tokens": int(mask.sum())}
        )
    return cppo(tokens, head, counts, algorithm, perception).loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_gated_equals_all_three_views(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("hf"))
    model = dense_reference.load(folder, torch.float64)
    algorithm = tiny_model.make_config(folder, 1).algorithm
    groups = tiny_model.make_groups(5, 3, vocab_size=VOCAB)
    samples = [sample for group in groups for sample in group.samples]
    assert 3 <= sum(sample.gated for sample in samples) < len(samples)
    wanted = dense_reference.objective(model, samples, algorithm, VARIANTS[variant])
    wanted_gradients = dense_reference.gradients(model, wanted)
    found = gated_loss(model, samples, VARIANTS[variant], algorithm)
    found_gradients = dense_reference.gradients(model, found)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    worst = max(
        (found_gradients[name] - gradient).norm().item() / max(gradient.norm().item(), 1e-12)
        for name, gradient in wanted_gradients.items()
        if gradient.norm() > 1e-12
    )
    print(f"{variant}: loss {found.item():.12f}, dense {wanted.item():.12f}, gradients {worst:.1e}")
    assert worst <= 1e-6
