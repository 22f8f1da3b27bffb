"""Training checkpoints: everything that the next step depends on, written so that none that can be loaded is a lie.

A checkpoint is a Megatron `torch_dist` folder: the weights, their fp32 masters and Adam's moments, one tensor of each
parameter whatever the layout, of which every rank writes and reads its own rectangles (`held.py`). So it is loaded in
any layout, and saving gathers nothing. Beside it are the learning-rate schedule, random states (of use to the same
layout alone), and a small JSON of the caller's (step, data position); a manifest says what each file must be.

It is written beside its place, while training goes on if so asked, and published by rename. Before one is loaded every
byte of it is hashed; nothing in it is executed when it is read (`storage/torch_dist.py`).

Here the ranks act together: what stops one of them stops all, with the same error.
`storage/checkpoint_files.py` owns the folders, `saving.py` a rank's own file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_cppo.policy import held
from megatron_cppo.policy.agreement import everywhere, together
from megatron_cppo.policy.build import Trained
from megatron_cppo.policy.groups import Groups
from megatron_cppo.policy.quantized import is_quantized
from megatron_cppo.policy.saving import BYTES_PER_PIECE, Piece, Saving, Written
from megatron_cppo.storage import checkpoint_files as files
from megatron_cppo.storage import durable, torch_dist
from megatron_cppo.storage.checkpoint_files import Candidate, CheckpointError, SaveError
from megatron_cppo.storage.durable import Contents

log = logging.getLogger(__name__)
PROGRESS, RANDOM = "progress.json", "random.pt"
# Beside the shards: the index, the common state, the manifest, and what a file system needs for folders.
_MARGIN_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Unpublished:
    """A checkpoint that is being written: this rank's part of it, and what to do when all are done."""

    step: int
    final: Path
    saving: Saving
    common: dict[str, Any]
    written: dict[str, Contents]
    keep: int
    keep_every: int


def begin(
    trained: Trained,
    folder: Path,
    *,
    step: int,
    progress: dict[str, Any],
    keep: int,
    keep_every: int = 0,
    background: bool = False,
) -> Unpublished:
    """Begin to write checkpoint `step`; `finish` publishes it. Called by all ranks, and not while another is written.

    Raises SaveError, the same on all ranks, when the file system refuses on any of them: nothing is left of the new
    checkpoint then, and those before it are untouched.
    """
    final = files.folder_of(folder, step)
    unfinished = files.partial_of(final)
    initialise_adam(trained)
    pieces = list(_pieces(trained))
    failure = _failure_of(final)
    mine = sum(piece.tensor.nbytes for piece in pieces) + BYTES_PER_PIECE * len(pieces)
    wanted = sum(together(lambda: mine, folder, failure))
    random = {"layout": _layout(trained.groups), "states": everywhere(_random_states(), trained.groups.world)}
    text = json.dumps({"step": step, **progress}) + "\n"

    def prepare() -> dict[str, Contents]:
        folder.mkdir(parents=True, exist_ok=True)
        files.clean(folder)
        files.room(folder, wanted_bytes=wanted + _MARGIN_BYTES)
        unfinished.mkdir()
        buffer = io.BytesIO()
        torch.save(random, buffer)
        return {
            PROGRESS: durable.write(unfinished / PROGRESS, text.encode()),
            RANDOM: durable.write(unfinished / RANDOM, buffer.getvalue()),
        }

    def look() -> None:
        # Another rank may look elsewhere: into a folder of its own machine, or of another run_dir.
        if not (unfinished / PROGRESS).is_file():
            raise OSError(errno.ENOENT, "it is not there: do all ranks see the same folder?", str(unfinished))

    first = dist.get_rank() == 0
    with _discarding(unfinished):
        written = together(lambda: prepare() if first else {}, folder, failure)[0]
        together(look, folder, failure)
        saving = Saving(pieces, unfinished, f"__{dist.get_rank()}_0", background=background)
    common = {"iteration": step, "checkpoint_version": 3.0, "schedule": trained.schedule.state_dict()}
    return Unpublished(step, final, saving, common, written, keep, keep_every)


def finish(save: Unpublished) -> Path:
    """Wait until all ranks have written their parts, publish the checkpoint, and delete those too many; its folder.

    Called by all ranks. Raises SaveError as `begin` does.
    """
    folder, unfinished, failure = save.final.parent, files.partial_of(save.final), _failure_of(save.final)
    first = dist.get_rank() == 0

    def publish(parts: Sequence[Written]) -> None:
        chunks = [chunk for part in parts for chunk in part.chunks]
        written = save.written | {part.name: part.contents for part in parts}
        written |= torch_dist.write_index(unfinished, chunks, common=save.common)
        faults = [files.size_fault(unfinished / name, contents) for name, contents in written.items()]
        if any(faults):
            told = "; ".join(fault for fault in faults if fault)
            raise OSError(errno.EIO, f"{told}: something else writes there", str(unfinished))
        incomplete = torch_dist.incomplete(chunks)
        if incomplete:
            raise OSError(errno.EIO, f"numbers are missing of {incomplete[:4]}", str(unfinished))
        files.write_manifest(unfinished, written)
        durable.publish(unfinished, save.final)
        files.prune(folder, keep=save.keep, keep_every=save.keep_every)

    with _discarding(unfinished):
        parts = together(save.saving.result, folder, failure)
        together(lambda: publish(parts) if first else None, folder, failure)
    return save.final


def all_done(save: Unpublished, groups: Groups) -> bool:
    """Whether `finish` would wait for no rank. Called by all ranks."""
    return all(everywhere(save.saving.is_done, groups.world))


def _failure_of(final: Path) -> Callable[[list[str]], SaveError]:
    """What a save of `final` raises, made of the ranks' lines."""
    return lambda lines: _save_error(final, lines)


@contextlib.contextmanager
def _discarding(unfinished: Path) -> Iterator[None]:
    """Where saving fails, rank 0 deletes what there is of it."""
    try:
        yield
    except SaveError:
        if dist.get_rank() == 0:
            _discard(unfinished)
        raise


def _pieces(trained: Trained) -> Iterator[Piece]:
    """What this rank is to write."""
    for item in held.items(trained):
        for piece in item.held.pieces(*item.writes):
            numbers = item.tensor[piece.start - item.start : piece.stop - item.start]
            yield Piece(item.key, item.held.size, piece.offset, numbers.view(piece.shape), item.rounded_to)


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


def load(trained: Trained, folder: Path, *, keep: int | None = None) -> dict[str, Any] | None:
    """Restore the newest whole checkpoint of `folder` into `trained`; returns its progress, or None if there is none.

    Damaged ones are named in the log and set aside. `keep` is as for `newest_whole`. Called by all ranks. Raises
    CheckpointError, the same on all ranks, when there are checkpoints and none is whole.
    """
    newest = newest_whole(folder, keep=keep)
    if newest is None:
        return None
    initialise_adam(trained)
    stored = torch_dist.Folder(newest)
    with torch.no_grad():
        for item in held.items(trained):
            if item.rounded_to is None:
                _fill(item, stored)
        _quantize(trained)
    common = torch.load(newest / torch_dist.COMMON, weights_only=True)
    trained.schedule.load_state_dict(common["schedule"])
    restore_adam_steps(trained)
    random = torch.load(newest / RANDOM, weights_only=True)
    if random["layout"] == _layout(trained.groups):
        states = random["states"][dist.get_rank()]
        torch.set_rng_state(states["torch"])
        get_cuda_rng_tracker().set_states(states["megatron"])
    log.info("resumed from %s", newest)
    return json.loads((newest / PROGRESS).read_text())


def _fill(item: held.Item, stored: torch_dist.Folder) -> None:
    """Read an item's numbers; those that are stored nowhere, a vocabulary's padding, are zero."""
    item.tensor.zero_()
    for piece in item.held.pieces(item.start, item.start + item.tensor.numel()):
        read = stored.read(item.key, offset=piece.offset, shape=piece.shape)
        item.tensor[piece.start - item.start : piece.stop - item.start].copy_(read.reshape(-1))


def _quantize(trained: Trained) -> None:
    """Make the parameters that are kept in FP8 of their master weights, as an update does."""
    if any(is_quantized(parameter) for parameter in trained.parameters()):
        for inner in held.inner_optimizers(trained):
            inner._copy_main_params_to_model_params()
        for chunk in trained.wrapped:
            chunk.start_param_sync(force_sync=True)


def _random_states() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "megatron": dict(get_cuda_rng_tracker().get_states())}


def _layout(groups: Groups) -> list[int]:
    """What tells one layout from another, as far as random numbers are concerned."""
    parts = (groups.tensor, groups.context, groups.expert, groups.expert_tensor, groups.pipeline, groups.data)
    return [group.size() for group in parts]


def newest_whole(folder: Path, *, keep: int | None = None) -> Path | None:
    """The newest checkpoint of `folder` every byte of which is as it was written; None when there never was one.

    The newest `keep` are verified (None: all), so that no damaged one counts when old ones are deleted, and older ones
    one by one if none of them is whole; the ranks share the reading. Damaged ones are set aside. Called by all ranks;
    raises CheckpointError as `load` does.
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
    faults: dict[Path, str] = {}
    whole: list[Path] = []
    left = list(candidates)
    while left and not whole:
        several = len(left) if keep is None else keep if len(left) == len(candidates) else 1
        looked_at, left = left[:several], left[several:]
        found = {candidate.path: candidate.fault for candidate in looked_at if candidate.fault}
        for share in together(partial(_faults, looked_at), folder, failure):
            for path, fault in share:
                found[path] = f"{found[path]}; {fault}" if path in found else fault
        whole = [candidate.path for candidate in looked_at if candidate.path not in found]
        faults |= found
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


def initialise_adam(trained: Trained) -> None:
    """Make the state that Adam would make at its first update, where it has not come yet; changes nothing else.

    Megatron-Core 0.16.1 makes the moments, but not the `step` of torch's Adam (used without TE and Apex), and then
    fails to save or load it (IndexError, KeyError).
    """
    for inner in held.inner_optimizers(trained):
        if inner.config.use_precision_aware_optimizer:
            _initialise_state_of_two_arguments(inner.optimizer)
            continue
        inner.init_state_fn(inner.optimizer, inner.config)
        for state in _torch_adam_states(inner):
            state.setdefault("step", torch.zeros(()))


def _initialise_state_of_two_arguments(adam: Any) -> None:
    """Megatron-Core 0.16.1 calls Transformer Engine's `initialize_state` with one argument, of 2.9 to 2.11 it has two.

    The second is whether master weights are kept as remainders, which they are not (`build.adam_settings`).
    """
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.initialize_state(parameter, False)


def restore_adam_steps(trained: Trained) -> None:
    """After a load, tell Adam the number of updates so far, on which its correction of the moments depends.

    torch's Adam keeps a `step` of each parameter, of which Megatron-Core 0.16.1 loads one tensor for all (each of them
    then increments it) and overwrites that with what the fresh optimizer had; TE's and Apex's keep one of each group. A
    skipped update moves neither Adam nor the schedule, so the schedule has counted them.
    """
    for inner in held.inner_optimizers(trained):
        if isinstance(inner.optimizer, torch.optim.Adam):
            for state in inner.optimizer.state.values():
                state["step"] = torch.tensor(float(trained.schedule.num_steps))
        else:
            for group in inner.optimizer.param_groups:
                group["step"] = trained.schedule.num_steps


def _torch_adam_states(inner: Any) -> list[dict[str, Any]]:
    """Every parameter's state, where the optimizer is torch's Adam; TE's and Apex's keep no step in there."""
    return list(inner.optimizer.state.values()) if isinstance(inner.optimizer, torch.optim.Adam) else []
