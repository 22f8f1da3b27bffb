"""The process groups of a layout; the only module that touches Megatron-Core's `parallel_state`.

Rank order is Megatron's: TP fastest, then CP, DP, PP. Everything else receives groups as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_cppo.config import PolicyConfig


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of this rank. `data` has one rank per replica, `world` all ranks of the trainer."""

    collection: ProcessGroupCollection
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    world: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which replica this rank belongs to."""
        return self.data.rank()


def make(config: PolicyConfig, *, seed: int) -> Groups:
    """Build the groups of `config`'s layout over the initialised world. Called once, by all ranks."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    assert dist.group.WORLD is not None, "torch.distributed must be initialised before the groups"
    return Groups(collection=collection, tensor=collection.tp, data=collection.dp_cp, world=dist.group.WORLD)


def destroy() -> None:
    """Forget the groups, so that a process (a test) can build another layout."""
    parallel_state.destroy_model_parallel()
