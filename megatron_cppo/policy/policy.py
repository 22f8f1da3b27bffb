"""The trained model as the loop sees it: score, update, stream weights, save, restore, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.config import Config
from megatron_cppo.plan import Plan
from megatron_cppo.policy import checkpoint, export, groups, platform, step, weights
from megatron_cppo.policy.build import build
from megatron_cppo.policy.head import HeadSettings
from megatron_cppo.policy.reference import Reference
from megatron_cppo.policy.vision import Pixels
from megatron_cppo.types import Batch, MicroBatch, SampleStatistics


class Policy:
    """One rank's share of the policy. Every public method is called by all ranks, in the same order.

    `pixels` gives an image's processed patches; `banned_ids` are what sampling may not produce: one list for the
    engine and for every log-prob and entropy here.
    """

    def __init__(self, config: Config, plan: Plan, *, pixels: Pixels, banned_ids: Sequence[int]) -> None:
        device = platform.activate(config.policy.device)
        platform.require(config.policy.precision, config.policy.device)
        self.groups = groups.make(config.policy, seed=config.trainer.seed)
        self._source = config.model.path
        self.trained = build(
            plan,
            model=config.model,
            policy=config.policy,
            optimizer=config.optimizer,
            pixels=pixels,
            groups=self.groups,
            device=device,
        )
        self.trained.config.finalize_model_grads_func = step.finalize_gradients(self.groups)
        self.settings = loss_settings(config, plan, banned_ids)
        on_host = config.policy.reference == "host"
        self._reference = Reference(self.trained.parameters(), on_host=on_host) if plan.uses_reference else None
        self._save: checkpoint.Unpublished | None = None
        self._seen: list[step.Seen] = []
        self.skipped: tuple[int, ...] = ()
        """The mini-batches of the last `update` that changed nothing, as their loss or gradient was not finite."""

    def score(self, batch: Batch, *, old: bool, reference: bool, advance: Callable[[int], None] = step.ignore) -> Batch:
        """Fill the batch's old log-probs (under the weights as they are) and the reference's, as asked.

        `advance(n)` hears of n more packed rows of this rank, in each pass.
        """
        scores = partial(step.score, self.trained, batch, head=self.settings.head, advance=advance)
        if old:
            batch = dataclasses.replace(batch, old_logp=scores())
        if reference and self._reference is not None:
            self._about_to_change()
            with self._reference.active():
                batch = dataclasses.replace(batch, reference_logp=scores())
        return batch

    def update(self, batch: Batch, advance: Callable[[int], None] = step.ignore) -> dict[str, float]:
        """One optimizer update per mini-batch; returns metrics, averaged over the updates, the same on all ranks.

        An update whose loss or gradient is not finite is skipped on all ranks, and left out of the averages unless
        all were; see `skipped`.
        `advance(n)` hears of n more packed rows of this rank.
        """
        self._about_to_change()
        self._seen = []
        every = []
        for mini in batch.updates:
            metrics, seen = step.update(self.trained, batch, mini, self.settings, advance)
            every.append(metrics)
            self._seen += seen
        self.trained.forget_features()
        self.skipped = tuple(i for i, metrics in enumerate(every) if metrics["optim/skipped_updates"])
        return _averages(every) | {
            "optim/skipped_updates": float(len(self.skipped)),
            "tokens/vision": float(_vision_tokens(batch, once=self.trained.chunks[0].kept is not None)),
            "tokens/vision_unshared": float(sum(row.feature_rows_F.numel() for row in _rows(batch))),
            "tokens/segments": float(_row_tokens(batch)),
            **({"data/oversized_samples": float(len(batch.oversized))} if batch.oversized else {}),
        }

    def statistics(self) -> list[SampleStatistics]:
        """What the last `update` saw of every sample, ordered by sample; on all ranks. Communicates over DP and PP."""
        mine = [item for row, outcome in self._seen for item in step.sample_statistics(row, outcome)]
        every = self.groups.from_last_stages(mine)
        return sorted((item for part in every for item in part), key=lambda item: item.sample_id)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors under official Hugging Face names, on every rank. Communicates over TP and PP."""
        return weights.stream(self.trained.chunks)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients of the last update, named like the weights (needs `distributed_optimizer` off with DP)."""
        return weights.stream(self.trained.chunks, _main_gradient)

    def export(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder; side files are the source checkpoint's, verbatim.

        Raises ExportError, on all ranks, when the disk refuses; a folder that was there before is left as it was.
        """
        export.export(self.weights(), source=self._source, folder=folder)

    def save(
        self,
        folder: Path,
        *,
        at_step: int,
        progress: dict[str, Any],
        keep: int,
        keep_every: int = 0,
        background: bool = False,
    ) -> None:
        """Write a training checkpoint (`policy.checkpoint`). In the `background` it is there after `finish_save`.

        Raises SaveError, on all ranks, when a disk refuses.
        """
        assert self._save is None, "the checkpoint before is still being written: finish_save comes first"
        self._save = checkpoint.begin(
            self.trained,
            folder,
            step=at_step,
            progress=progress,
            keep=keep,
            keep_every=keep_every,
            background=background,
        )
        if not background:
            self.finish_save()

    @property
    def saving_step(self) -> int | None:
        """The step of the checkpoint that is being written."""
        return None if self._save is None else self._save.step

    def finish_save(self, *, wait: bool = True) -> bool:
        """Publish the checkpoint that is being written, once all ranks are done; returns whether none is any more.

        Raises SaveError as `save` does.
        """
        if self._save is None:
            return True
        if not wait and not checkpoint.all_done(self._save, self.groups):
            return False
        save, self._save = self._save, None
        checkpoint.finish(save)
        return True

    def _about_to_change(self) -> None:
        """The weights are: what is still to be saved of them is copied."""
        if self._save is not None:
            self._save.saving.detach()

    def restore(self, folder: Path, *, keep: int | None = None) -> dict[str, Any] | None:
        """Load the newest whole checkpoint of `folder`; its progress, or None when there is none.

        The newest `keep` are verified (None: all).
        """
        return checkpoint.load(self.trained, folder, keep=keep)


def loss_settings(config: Config, plan: Plan, banned_ids: Sequence[int]) -> step.LossSettings:
    """What the loss of `config` needs beside a batch; sampling may not produce `banned_ids`."""
    return step.LossSettings(
        objective=OBJECTIVES[config.algorithm.objective],
        algorithm=dataclasses.replace(config.algorithm, correction=plan.correction),
        perception=config.perception,
        max_response_tokens=config.rollout.max_response_tokens,
        head=HeadSettings(
            # Sampling's temperature belongs to sampled answers; a supervised response has none.
            temperature=1.0 if config.algorithm.objective == "supervised" else config.rollout.temperature,
            banned_ids=tuple(banned_ids),
            backend=config.policy.head_backend,
        ),
    )


def _main_gradient(parameter: Any) -> Tensor:
    """DDP's fp32 gradient of a parameter."""
    return parameter.main_grad


def _averages(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each metric's mean over the updates that have it; skipped ones count only where there is no other."""
    counted = [metrics for metrics in updates if not metrics["optim/skipped_updates"]] or list(updates)
    names = sorted({name for metrics in counted for name in metrics})
    found = {name: [metrics[name] for metrics in counted if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _rows(batch: Batch) -> Iterator[MicroBatch]:
    """Of all passes of the updates, on all data-parallel ranks."""
    passes = (rows for mini in batch.updates for rows in (*mini.constant_views, *mini.counting, *mini.microbatches))
    return (row for rows in passes for row in rows)


def _vision_tokens(batch: Batch, *, once: bool) -> int:
    """Image tokens that the tower encodes in the step's updates; a frozen one's images count `once`."""
    encoded = [(key, grid.num_tokens) for row in _rows(batch) for key, grid in zip(row.images, row.grids, strict=True)]
    return sum(dict(encoded).values()) if once else sum(count for _, count in encoded)


def _row_tokens(batch: Batch) -> int:
    """Tokens of all packed rows of the step's updates."""
    return sum(row.token_ids_T.numel() for row in _rows(batch))
