"""The table of layouts in which every family must give the same numbers, and one run of a family in a layout.

docs/parallelism.md shows this table with the errors that `test_matrix.py` measured. A run brings back logits and the
likelihood's gradients for a comparison with Hugging Face's model, the whole objective's gradients for a comparison with
a dense one and with one rank, and how far three updates of gradient descent moved each parameter.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.algo.perception import mask_margin
from megatron_cppo.data.packing import build_batch
from megatron_cppo.types import Batch, Group, SampleStatistics
from tests.distributed import layouts, tiny_model

VOCAB = layouts.VOCAB
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
NUM_LAYERS = 5
TIED = {"qwen3_vl": True}
"""The dense Qwen3-VL is tied, as its small sizes are; the others have a head of their own."""
FIRST_ROWS = (60, 48, 12)
"""Of each step's prompts: rows whose masks are clear in every family."""


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and options; what is left of `ranks` is data-parallel."""

    ranks: int = 1
    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    recompute: str = "none"
    recompute_vision: bool = False
    distributed_optimizer: bool = False
    tokens: int = 640

    @property
    def name(self) -> str:
        """As the documentation calls it."""
        sizes = {"TP": self.tp, "CP": self.cp, "PP": self.pp, "VPP": self.vpp, "EP": self.ep}
        sizes["DP"] = self.ranks // (self.tp * self.cp * self.pp)
        words = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] or ["one rank"]
        text = "x".join(words) + ("+SP" if self.sp else "")
        text += ", distributed optimizer" if self.distributed_optimizer else ""
        text += f", recompute {self.recompute}" if self.recompute != "none" else ""
        text += ", recompute vision" if self.recompute_vision else ""
        return text + (f", rows of {self.tokens}" if self.tokens != 640 else "")

    def fields(self) -> dict[str, Any]:
        """The config's fields. Five layers are never cut evenly; the first chunk has those that deepstack needs."""
        cut = {(1, 1): (), (2, 1): (3, 2), (4, 1): (2, 1, 1, 1), (2, 2): (2, 1, 1, 1), (3, 1): (2, 2, 1)}
        return {
            "policy__tensor_parallel": self.tp,
            "policy__sequence_parallel": self.sp,
            "policy__context_parallel": self.cp,
            "policy__pipeline_parallel": self.pp,
            "policy__virtual_pipeline": self.vpp,
            "policy__layers_per_stage": cut[self.pp, self.vpp],
            "policy__expert_parallel": self.ep,
            "policy__recompute": self.recompute,
            "policy__recompute_vision": self.recompute_vision,
            "policy__distributed_optimizer": self.distributed_optimizer,
            "policy__max_tokens_per_microbatch": self.tokens,
        }

    def suits(self, family: str) -> bool:
        """Whether the family can be trained so: experts need SP beside TP, and only they can be dealt out."""
        if family != "qwen3_vl_moe":
            return self.ep == 1
        return self.tp == 1 or self.sp


FAST = (
    Layout(tokens=20_000),
    Layout(tokens=320),
    Layout(recompute="full", recompute_vision=True),
    Layout(recompute="selective"),
    Layout(2, tp=2),
    Layout(2, tp=2, sp=True),
    Layout(2, tp=2, sp=True, recompute="full", recompute_vision=True),
    Layout(2, cp=2),
    Layout(2, cp=2, recompute="full"),
    Layout(2, pp=2),
    Layout(2, pp=2, vpp=2),
    Layout(2, pp=2, vpp=2, recompute="full", tokens=320),
    Layout(2),
    Layout(2, distributed_optimizer=True),
    Layout(2, ep=2),
    Layout(2, ep=2, distributed_optimizer=True),
    Layout(2, tp=2, sp=True, ep=2),
    Layout(2, cp=2, ep=2),
    Layout(3, pp=3),
    Layout(4, cp=4),
    Layout(4, tp=2, sp=True, cp=2),
    Layout(4, tp=2, sp=True, pp=2, vpp=2),
    Layout(4, cp=2, pp=2, vpp=2, recompute="full"),
    Layout(4, cp=2, distributed_optimizer=True),
    Layout(4, pp=2, vpp=2, distributed_optimizer=True),
    Layout(4, tp=2, sp=True, cp=2, ep=4),
    Layout(4, tp=2, sp=True, ep=4),
    Layout(4, pp=2, vpp=2, ep=2),
    Layout(4, tp=2, sp=True, pp=2, ep=2, recompute="full"),
)
"""Up to four ranks: part of `make test`."""
SLOW = (
    Layout(4, tp=2, cp=2),
    Layout(4, tp=2, sp=True, pp=2),
    Layout(4, cp=2, pp=2),
    Layout(4, tp=2, sp=True),
    Layout(8, tp=2, sp=True, cp=2, pp=2),
    Layout(8, tp=2, sp=True, cp=2, pp=2, vpp=2, recompute="full", recompute_vision=True),
    Layout(8, tp=2, sp=True, cp=2, distributed_optimizer=True),
    Layout(8, pp=4, cp=2),
    Layout(8, cp=4, pp=2, vpp=2),
    Layout(8, tp=2, sp=True, pp=2, vpp=2, distributed_optimizer=True),
    Layout(8, tp=2, sp=True, cp=2, pp=2, ep=4),
    Layout(8, tp=2, sp=True, cp=2, ep=4),
    Layout(8, tp=2, sp=True, pp=2, vpp=2, ep=4, distributed_optimizer=True),
    Layout(8, cp=2, pp=2, ep=2, distributed_optimizer=True),
    Layout(6, pp=3, cp=2),
)
"""More, with up to eight ranks: `make test-all`."""
DESCENT: dict[str, Any] = {
    # Adam with a first beta of 0 and an epsilon far above every gradient is gradient descent, at a rate of one.
    "optimizer__learning_rate": 1e6,
    "optimizer__epsilon": 1e6,
    "optimizer__betas": (0.0, 0.999),
    "optimizer__weight_decay": 0.0,
    "optimizer__max_grad_norm": 0.0,
    "trainer__num_steps": len(FIRST_ROWS),
    "algorithm__beta": 0.1,
    "perception__coefficient": 2.0,
    "perception__divergence": "exact",
    "perception__temperature": 1.0,  # at the published 0.1 the loss is ten times as sensitive to rounding
}


@dataclass(frozen=True)
class Found:
    """What a layout computed, on rank 0; without gradients where the optimizer has cut them up."""

    logits: list[Tensor]
    likelihood: dict[str, Tensor]
    losses: list[float]
    metrics: list[dict[str, float]]
    gradients: dict[str, Tensor]
    masks: list[list[tuple[bool, ...] | None]]
    margin: float
    displacement: dict[str, Tensor]


def groups(step: int) -> list[Group]:
    """Prompts of no, one and two images; two of them text only."""
    return tiny_model.make_groups(5, 3, vocab_size=VOCAB, first_row=FIRST_ROWS[step])


def run_all(rank: int, world_size: int, cases: list[tuple[str, Layout, str]]) -> dict[tuple[str, str], Found | None]:
    """All (family, layout, folder) in one process group; top-level, for `run_distributed`."""
    return {
        (family, layout.name): found if rank == 0 else None
        for family, layout, folder in cases
        for found in [run(layout, folder, world_size)]
    }


def run(layout: Layout, folder: str, world_size: int) -> Found:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy import step
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(folder, world_size, **layout.fields(), **DESCENT)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    whole = not layout.distributed_optimizer

    def planned(number: int, objective: str) -> Batch:
        return build_batch(
            groups(number),
            views_for=OBJECTIVES[objective].views_for,
            num_updates=1,
            packing=plan.packing,
            score=True,
        )

    likelihood = planned(0, "supervised")
    logits = layouts.sample_logits(policy, likelihood)
    supervised = dataclasses.replace(policy.settings, objective=OBJECTIVES["supervised"])
    step.gradients(policy.trained, likelihood, likelihood.updates[0], supervised)
    likelihood_gradients = _copies(policy.gradients()) if whole else {}
    before, losses, metrics, gradients, statistics = _copies(policy.weights()), [], [], {}, []
    for number in range(len(FIRST_ROWS)):
        batch = layouts.with_drifted_scores(policy.score(planned(number, "cppo"), old=True, reference=False))
        metrics.append(policy.update(batch))
        losses.append(total_loss(policy))
        statistics.append(policy.statistics())
        if number == 0 and whole:
            gradients = _copies(policy.gradients())
    after = _copies(policy.weights())
    displacement = {name: tensor - before[name] for name, tensor in after.items()}
    _check_tied_copy(policy, after)
    process_groups.destroy()
    masks = [[sample.mask for sample in seen] for seen in statistics]
    margin = min(margin_of(seen) for seen in statistics)
    return Found(logits, likelihood_gradients, losses, metrics, gradients, masks, margin, displacement)


def _check_tied_copy(policy: Any, weights: dict[str, Tensor]) -> None:
    """The last stage's copy of a tied embedding is the first stage's tensor to the bit, after updates too."""
    last = policy.trained.chunks[-1]
    if last.shape.tied and last.post_process:
        shard, rank = last.head_weight(), policy.groups.tensor.rank()
        rows = weights["model.embed_tokens.weight"][rank * len(shard) : (rank + 1) * len(shard)]
        assert torch.equal(shard[: len(rows)], rows), "the copies of the embedding have parted"


def total_loss(policy: Any) -> float:
    """The whole objective of the last update: all rows' contributions, of all replicas."""
    every = policy.groups.from_last_stages([float(outcome.loss) for _, outcome in policy._seen])
    return sum(loss for replica in every for loss in replica)


def _copies(stream: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stream}


def margin_of(seen: list[SampleStatistics]) -> float:
    """How far, in nats, an update's masks are from flipping."""
    gated = [sample for sample in seen if sample.entropy_removing is not None]
    entropy = torch.tensor([value for sample in gated for value in sample.entropy])
    removing = torch.tensor([value for sample in gated for value in sample.entropy_removing or ()])
    owner = torch.tensor([sample.sample_id for sample in gated for _ in sample.entropy])
    return float(mask_margin(entropy, removing, owner))
