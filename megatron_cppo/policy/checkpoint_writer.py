"""Writes a sharded state into a folder, in the format that Megatron-Core's dist_checkpointing loads.

Owns the way to the disk; what the state is made of is known to `checkpoint.py`. Megatron-Core 0.16.1 says which rank
writes what, and torch's distributed checkpoint writes it, because Megatron-Core's own saver cannot be relied on when a
write fails:

- rank 0 writes common.pt, .metadata and metadata.json unguarded: an OSError there leaves all other ranks in the next
  collective for ever;
- the data are written by forked processes of a process with threads (gloo, CUDA), which daemons may not have; one that
  is killed is waited for without end, and a manager process outlives its rank;
- files are synced before their last buffer is flushed, common.pt and the folder not at all.

One thread writes one file per rank: torch swallows an error in any further thread and publishes what is incomplete.
"""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from megatron_cppo.storage import durable
from megatron_cppo.storage.durable import Contents

_FORMAT = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)
# Of each tensor: its header, in a file of torch.save, and its line in .metadata.
_BYTES_PER_ENTRY = 4096


@dataclass(frozen=True, slots=True)
class Prepared:
    """One rank's share of a state: what it alone writes, as torch wants it, and what all ranks have in common."""

    shards: dict[str, Any]
    common: dict[str, Any]
    num_bytes: int


def prepare(state: dict[str, Any]) -> Prepared:
    """Divide `state`, a tree with Megatron-Core's sharded tensors and objects, among the ranks. Called by all ranks."""
    sharded, common = save_preprocess(state)
    mine, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(sharded, True)
    tensors = [part.data for parts in mine.values() for part in parts if isinstance(part, ShardedTensor)]
    shards = torch_strategy.mcore_to_pyt_state_dict(mine, False)
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    num_bytes += sum(value.getbuffer().nbytes for value in shards.values() if isinstance(value, io.BytesIO))
    return Prepared(shards, common, num_bytes + _BYTES_PER_ENTRY * len(shards))


def write_common(prepared: Prepared, folder: Path) -> dict[str, Contents]:
    """Write what is the same on all ranks, and the format's name; called by one. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(prepared.common, buffer)
    told = json.dumps(dataclasses.asdict(_FORMAT)).encode()
    return {
        COMMON_STATE_FNAME: durable.write(folder / COMMON_STATE_FNAME, buffer.getvalue()),
        CONFIG_FNAME: durable.write(folder / CONFIG_FNAME, told),
    }


def write_shards(prepared: Prepared, folder: Path) -> dict[str, Contents]:
    """Write this rank's shards (rank 0: and the index of all); returns the files that it wrote. Called by all ranks.

    Raises OSError where the file system refused. Where it refused another rank nothing is raised here, and the caller
    has to ask.
    """
    files = _Files()
    writer = torch_checkpoint.FileSystemWriter(folder, thread_count=1, sync_files=False)
    writer.fs = files
    planner = torch_strategy.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    try:
        torch_checkpoint.save(prepared.shards, storage_writer=writer, planner=planner)
    except CheckpointException as error:  # on all ranks alike
        causes = {rank: failure[0] for rank, failure in error.failures.items()}
        if not all(isinstance(cause, OSError) for cause in causes.values()):
            raise
        mine = causes.get(dist.get_rank())
        if mine is not None:
            raise mine from None
    return files.contents


class _Files(torch_checkpoint.filesystem.FileSystem):
    """torch's file system, which hashes what it writes and has it on the disk when the file is closed."""

    def __init__(self) -> None:
        self.contents: dict[str, Contents] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb", f"{path} opened as {mode}"
        with durable.writing(Path(path)) as stream:
            yield stream
        self.contents[Path(path).name] = stream.contents

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.contents[Path(new_path).name] = self.contents.pop(Path(path).name)
