"""The process groups of a layout; the only module that touches Megatron-Core's `parallel_state`.

Rank order is Megatron's: TP fastest, then CP, DP, PP; EP is cut out of TP x CP x DP. Everything else receives groups as
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_cppo.config import PolicyConfig


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of this rank.

    `data` has one rank per replica, `pipeline` one per stage, `world` all of the trainer. `tensor` shares every layer,
    `context` every sequence, `tensor_context` both; `expert` shares the experts of a layer, and `expert_tensor` each
    expert.
    """

    collection: ProcessGroupCollection
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor_context: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    world: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which replica this rank belongs to."""
        return self.data.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the vision tower and the embedding."""
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so sees losses and log-probs."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    def from_last_stages(self, mine: Any) -> list[Any]:
        """What the last stage's rank of every replica holds as `mine`, in the order of the replicas, on all ranks.

        Communicates over `data` on the last stage, then over `pipeline`. `mine` of other stages is not looked at; the
        ranks of a replica's last stage hold the same.
        """
        every: list[Any] = [mine]
        if self.data.size() > 1 and self.is_last_stage:
            every = [None] * self.data.size()
            dist.all_gather_object(every, mine, group=self.data)
        if self.pipeline.size() > 1:
            holder = [every]
            dist.broadcast_object_list(holder, group=self.pipeline, group_src=self.pipeline.size() - 1)
            every = holder[0]
        return every


def make(config: PolicyConfig, *, seed: int) -> Groups:
    """Build the groups of `config`'s layout over the initialised world. Called once, by all ranks."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context_parallel,
        expert_model_parallel_size=config.expert_parallel,
        expert_tensor_parallel_size=expert_tensor_parallel(config),
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    assert dist.group.WORLD is not None, "torch.distributed must be initialised before the groups"
    return Groups(
        collection=collection,
        tensor=collection.tp,
        context=collection.cp,
        tensor_context=collection.tp_cp,
        expert=collection.ep,
        expert_tensor=collection.expt_tp,
        pipeline=collection.pp,
        data=collection.dp,
        world=dist.group.WORLD,
    )


def expert_tensor_parallel(config: PolicyConfig) -> int:
    """Ranks that share each expert: one where the experts themselves are dealt out, else those of TP.

    Megatron-Core 0.16.1 takes experts for dealt out only where EP > 1. With one rank per expert and EP 1 it would
    reduce their gradients like those of the attention, and leave out the other TP ranks' tokens.
    """
    return 1 if config.expert_parallel > 1 else config.tensor_parallel


def gathered_sequences() -> list[Tensor]:
    """The buffers that Megatron-Core gathers sequences into, in all layers alike; for as long as the groups live."""
    return list(parallel_state.get_global_memory_buffer().buffer.values())


def destroy() -> None:
    """Take the groups down, so that a process (a test) can build another layout. Called by all ranks.

    Megatron-Core forgets its groups, and leaves each one's threads and connections.
    """
    dist.barrier()  # no rank may still be in a collective of one of them
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
