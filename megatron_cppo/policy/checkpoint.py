"""Training checkpoints by Megatron-Core's dist_checkpointing: everything that the next step depends on.

A checkpoint is written beside its place and published by rename, so a folder `step_*` is a whole one. It holds the
model, the optimizer's state as sharded by it, the learning-rate schedule, random states, and a small JSON of the
caller's (step, data position). The layout (TP, DP) must be the same when it is loaded.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_cppo.policy.build import Trained

log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{6,})")
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "dp_reshardable"}


def published(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    found = [
        path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / "progress.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def save(trained: Trained, folder: Path, *, step: int, progress: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step` and delete all but the newest `keep`. Called by all ranks; returns its folder.

    Raises OSError (on the rank that met it) when the file system refuses; a published checkpoint is never touched
    before the new one is whole.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".partial_{step:06d}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    keep_write_results_in_this_process()
    dist_checkpointing.save(_sharded_state(trained, loading=False), str(partial))
    if dist.get_rank() == 0:
        (partial / "progress.json").write_text(json.dumps({"step": step, **progress}) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in published(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(trained: Trained, folder: Path) -> dict[str, Any] | None:
    """Restore the newest whole checkpoint of `folder` into `trained`; returns its progress, or None if there is none.

    Called by all ranks.
    """
    checkpoints = published(folder)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    state = dist_checkpointing.load(_sharded_state(trained, loading=True), str(newest))
    trained.model.load_state_dict(state["model"], strict=True)
    trained.schedule.load_state_dict(state["schedule"])
    if trained.schedule.num_steps:  # before any update Adam is what it is when made, and Megatron-Core cannot load it
        with torch.no_grad():  # the distributed optimizer copies into views of parameters
            trained.optimizer.load_state_dict(state["optimizer"])
    restore_adam_steps(trained)
    random = state["random"]
    torch.set_rng_state(random["torch"])
    get_cuda_rng_tracker().set_states(random["megatron"])
    log.info("resumed from %s", newest)
    return json.loads((newest / "progress.json").read_text())


def _sharded_state(trained: Trained, *, loading: bool) -> dict[str, Any]:
    model = _without_extra_state(trained.model.sharded_state_dict())
    rank = dist.get_rank()
    random = {"torch": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    return {
        "model": model,
        "optimizer": _optimizer_state(trained, model, loading=loading),
        "schedule": trained.schedule.state_dict(),
        "random": ShardedObject("random", random, (dist.get_world_size(),), (rank,)),
    }


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Transformer Engine's `_extra_state` objects are empty without it, and their absence would fail a load."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _optimizer_state(trained: Trained, model: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    initialise_adam(trained)
    return trained.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_OPTIMIZER_FORMAT)


def initialise_adam(trained: Trained) -> None:
    """Make the state that Adam would make at its first update, where it has not come yet; changes nothing else.

    Megatron-Core 0.16.1 makes the moments, but not the `step` of torch's Adam (used without TE and Apex), and then
    fails to save or load it (IndexError, KeyError).
    """
    for inner in _inner_optimizers(trained):
        inner.init_state_fn(inner.optimizer, inner.config)
        for state in _torch_adam_states(inner):
            state.setdefault("step", torch.zeros(()))


def restore_adam_steps(trained: Trained) -> None:
    """After a load, give each parameter of torch's Adam a `step` of its own, the number of updates so far.

    Megatron-Core 0.16.1 loads one tensor for all parameters, which each of them then increments, and overwrites it
    with what the fresh optimizer had. No update is ever skipped, so the schedule has counted them.
    """
    for inner in _inner_optimizers(trained):
        for state in _torch_adam_states(inner):
            state["step"] = torch.tensor(float(trained.schedule.num_steps))


def keep_write_results_in_this_process() -> None:
    """Give Megatron-Core's writer a plain queue for its results: this process puts them in and takes them out.

    Megatron-Core 0.16.1 makes a multiprocessing manager even for synchronous saves: a server process of each rank,
    which imports the main script again, takes seconds to start, and outlives a rank that is killed.
    """
    writer: Any = filesystem_async
    writer._results_queue = queue.Queue()


def _inner_optimizers(trained: Trained) -> list[Any]:
    return getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])


def _torch_adam_states(inner: Any) -> list[dict[str, Any]]:
    """Every parameter's state, where the optimizer is torch's Adam; TE's and Apex's keep no step in there."""
    return list(inner.optimizer.state.values()) if isinstance(inner.optimizer, torch.optim.Adam) else []
