"""Training checkpoints: everything that the next step depends on, written so that none that can be loaded is a lie.

A checkpoint holds the model, the optimizer's state as sharded by it, the learning-rate schedule, random states, and a
small JSON of the caller's (step, data position); a manifest says what each file must be. It is written beside its place
and published by rename. Before one is loaded every byte of it is hashed, because what is loaded are pickles, and a
damaged pickle is not an error but a program; against someone who may write in the folder no hash helps. The layout
(every parallel size) must be the same when it is loaded.

Here the ranks act together: what stops one of them stops all, with the same error.
`storage/checkpoint_files.py` owns the folders, `checkpoint_writer.py` the format.
"""

from __future__ import annotations

import errno
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_cppo.policy import checkpoint_writer
from megatron_cppo.policy.agreement import together
from megatron_cppo.policy.build import Trained
from megatron_cppo.storage import checkpoint_files as files
from megatron_cppo.storage import durable
from megatron_cppo.storage.checkpoint_files import Candidate, CheckpointError, SaveError
from megatron_cppo.storage.durable import Contents

log = logging.getLogger(__name__)
PROGRESS = "progress.json"
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "dp_reshardable"}
# Beside the shards: the index, the common state, the manifest, and what a file system needs for folders.
_MARGIN_BYTES = 2**20


def save(trained: Trained, folder: Path, *, step: int, progress: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step` and delete all but the newest `keep`. Called by all ranks; returns its folder.

    Raises SaveError, the same on all ranks, when the file system refuses on any of them: nothing is left of the new
    checkpoint then, and those before it are untouched.
    """
    final = files.folder_of(folder, step)
    partial = files.partial_of(final)
    prepared = checkpoint_writer.prepare(_sharded_state(trained, loading=False))
    first = dist.get_rank() == 0

    def failure(lines: list[str]) -> SaveError:
        return _save_error(final, lines)

    wanted = sum(together(lambda: prepared.num_bytes, folder, failure))
    text = json.dumps({"step": step, **progress}) + "\n"

    def begin() -> dict[str, Contents]:
        folder.mkdir(parents=True, exist_ok=True)
        files.clean(folder)
        files.room(folder, wanted_bytes=wanted + _MARGIN_BYTES)
        partial.mkdir()
        return checkpoint_writer.write_common(prepared, partial) | {
            PROGRESS: durable.write(partial / PROGRESS, text.encode())
        }

    def publish(written: dict[str, Contents]) -> None:
        # Another rank may have written elsewhere: into a folder of its own machine, or of another run_dir.
        faults = [files.size_fault(partial / name, contents) for name, contents in written.items()]
        if any(faults):
            told = "; ".join(fault for fault in faults if fault)
            raise OSError(errno.EIO, f"{told}: do all ranks see the same folder?", str(partial))
        files.write_manifest(partial, written)
        durable.publish(partial, final)
        files.prune(folder, keep=keep)

    try:
        common = together(lambda: begin() if first else {}, folder, failure)[0]
        shards = together(lambda: checkpoint_writer.write_shards(prepared, partial), folder, failure)
        written = common | {name: contents for mine in shards for name, contents in mine.items()}
        together(lambda: publish(written) if first else None, folder, failure)
    except SaveError:
        if first:
            _discard(partial)
        raise
    return final


def _save_error(final: Path, lines: Sequence[str]) -> SaveError:
    before = [path.name for path in files.published(final.parent)]
    return SaveError(
        f"checkpoint {final} could not be written:\n"
        + "\n".join(f"  {line}" for line in lines)
        + f"\nthose before it are untouched: {', '.join(before) or 'there is none'}\n"
        "fix: make room there (or mend what is refused) and start the same command again; with "
        "--trainer.on_save_failure continue a run goes on without the checkpoint"
    )


def _discard(partial: Path) -> None:
    try:
        durable.remove(partial)
        durable.restore_replaced(partial.parent)
    except OSError as error:
        log.warning("the unfinished checkpoint %s could not be deleted: %s", partial, error)


def load(trained: Trained, folder: Path) -> dict[str, Any] | None:
    """Restore the newest whole checkpoint of `folder` into `trained`; returns its progress, or None if there is none.

    Damaged ones are named in the log and set aside. Called by all ranks. Raises CheckpointError, the same on all
    ranks, when there are checkpoints and none is whole.
    """
    newest = newest_whole(folder)
    if newest is None:
        return None
    state = dist_checkpointing.load(_sharded_state(trained, loading=True), str(newest))
    for number, chunk in enumerate(trained.chunks):
        chunk.load_state_dict(state[f"model{number}"], strict=True)
    trained.schedule.load_state_dict(state["schedule"])
    if trained.schedule.num_steps:  # before any update Adam is what it is when made, and Megatron-Core cannot load it
        with torch.no_grad():  # the distributed optimizer copies into views of parameters
            trained.optimizer.load_state_dict(state["optimizer"])
    restore_adam_steps(trained)
    random = state["random"]
    torch.set_rng_state(random["torch"])
    get_cuda_rng_tracker().set_states(random["megatron"])
    log.info("resumed from %s", newest)
    return json.loads((newest / PROGRESS).read_text())


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of `folder` every byte of which is as it was written; None when there never was one.

    All are verified, so that no damaged one counts when old ones are deleted; the ranks share the reading. Damaged
    ones are set aside. Called by all ranks; raises CheckpointError as `load` does.
    """
    first = dist.get_rank() == 0

    def failure(lines: list[str]) -> CheckpointError:
        told = "\n".join(f"  {line}" for line in lines)
        return CheckpointError(
            f"the checkpoints of {folder} could not be checked:\n{told}\nfix: mend this, start again"
        )

    def look() -> tuple[list[Candidate], list[Path]]:
        files.clean(folder)
        return files.survey(folder), files.set_aside(folder)

    candidates, aside = together(lambda: look() if first else ([], []), folder, failure)[0]
    shares = together(lambda: _faults(candidates), folder, failure)
    faults = {candidate.path: candidate.fault for candidate in candidates if candidate.fault}
    for share in shares:
        for path, fault in share:
            faults[path] = f"{faults[path]}; {fault}" if path in faults else fault
    whole = [candidate.path for candidate in candidates if candidate.path not in faults]
    if not whole and (faults or aside):
        raise _none_whole(folder, faults, aside)
    moved = together(lambda: [files.put_aside(path) for path in faults] if first else [], folder, failure)[0]
    for (path, fault), there in zip(faults.items(), moved, strict=True):
        log.warning("checkpoint %s is damaged: %s; it is not used, and kept as %s", path, fault, there.name)
    return whole[0] if whole else None


def _faults(candidates: Sequence[Candidate]) -> list[tuple[Path, str]]:
    """The faults that this rank finds in its share of the files."""
    every = [(candidate, name) for candidate in candidates if not candidate.fault for name in sorted(candidate.files)]
    mine = every[dist.get_rank() :: dist.get_world_size()]
    found = [
        (candidate.path, files.find_fault(candidate.path / name, candidate.files[name])) for candidate, name in mine
    ]
    return [(path, fault) for path, fault in found if fault]


def _none_whole(folder: Path, faults: dict[Path, str], aside: Sequence[Path]) -> CheckpointError:
    lines = [f"  {path.name}: {fault}" for path, fault in faults.items()]
    lines += [f"  {path.name}: found to be damaged by an earlier start" for path in aside]
    return CheckpointError(
        f"none of the checkpoints of {folder} is whole:\n" + "\n".join(lines) + "\n"
        f"fix: put a whole copy of one of them back; or move {folder} away, to start from step 0"
    )


def _sharded_state(trained: Trained, *, loading: bool) -> dict[str, Any]:
    model = {
        f"model{number}": _without_extra_state(chunk.sharded_state_dict())
        for number, chunk in enumerate(trained.chunks)
    }
    rank = dist.get_rank()
    random = {"torch": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    return {
        **model,
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
    with what the fresh optimizer had. A skipped update moves neither Adam nor the schedule, so the schedule has counted
    them.
    """
    for inner in _inner_optimizers(trained):
        for state in _torch_adam_states(inner):
            state["step"] = torch.tensor(float(trained.schedule.num_steps))


def _inner_optimizers(trained: Trained) -> list[Any]:
    return getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])


def _torch_adam_states(inner: Any) -> list[dict[str, Any]]:
    """Every parameter's state, where the optimizer is torch's Adam; TE's and Apex's keep no step in there."""
    return list(inner.optimizer.state.values()) if isinstance(inner.optimizer, torch.optim.Adam) else []
