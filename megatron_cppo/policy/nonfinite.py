"""Where an update stops being finite: its passes once more, looked at by hooks, and nothing applied.

Owns what is looked at on a rank, and the exchange of what was found. Must not know where batch and weights come from.
Modules and parameters are named like the weights of the Hugging Face folder; a module without weights by
Megatron-Core's name, with the layer's number in the whole model.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.policy import step, weights
from megatron_cppo.policy.attention import PackedAttention
from megatron_cppo.policy.build import Trained
from megatron_cppo.policy.model import VisionLanguageModel
from megatron_cppo.policy.policy import Policy
from megatron_cppo.types import VIEWS, Batch

SHOWN_PARAMETERS = 4


@dataclass(frozen=True, slots=True)
class RowFinding:
    """One packed row: (replica, row) and what its samples' tokens came to.

    `samples` counts within the step; `images` are "row 17 image 0 (original, removing)". `max_logp` is the largest
    |log-prob|, of the finite ones, and `num_not_finite` counts the others, by what they are: those that the update was
    given ("given old log-probs") and those that it computed.
    """

    replica: int
    row: int
    samples: tuple[int, ...]
    images: tuple[str, ...]
    loss: float
    max_logp: float
    max_entropy: float
    num_not_finite: dict[str, int]


@dataclass(frozen=True, slots=True)
class Place:
    """The first module of a rank whose output was not finite in a row, or the parameters whose gradient was not.

    `started_here`: what the module got was still finite. Parameters are in the order in which backward came to them.
    """

    rank: int
    replica: int
    row: int
    names: tuple[str, ...]
    started_here: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """What one update came to, on all ranks."""

    update: int
    loss: float
    grad_norm: float
    rows: tuple[RowFinding, ...]
    weights: tuple[str, ...]
    modules: tuple[Place, ...]
    gradients: tuple[Place, ...]
    reduced_gradients: tuple[str, ...]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class _Watched:
    """What the hooks of one rank saw: per row, the first module, and the parameters whose gradient is not finite."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._started: Counter[int] = Counter()
        self._row = 0
        self._inside = False
        self.backward_row = 0
        self.modules: dict[int, tuple[str, bool]] = {}
        self.gradients: dict[int, list[str]] = {}

    def start_row(self, chunk: Any, *_: Any) -> None:
        if not torch.is_grad_enabled():  # a pass that comes before the update's own rows
            return
        self._row = self._started[id(chunk)] % self._num_rows
        self._started[id(chunk)] += 1
        self._inside = True

    def end_row(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._inside = False
        if output.requires_grad:
            output.register_hook(partial(self._start_backward, self._row))

    def _start_backward(self, row: int, _: Tensor) -> None:
        self.backward_row = row

    def with_loss(self, settings: step.LossSettings) -> step.LossSettings:
        """`settings` whose losses say when their row's backward starts (the head's is before the hidden states'), and
        whose head's gradient hooks see."""
        plain = settings.objective

        def loss(*args: Any) -> Any:
            outcome = plain.loss(*args)
            if outcome.loss.requires_grad:
                outcome.loss.register_hook(partial(self._start_backward, self._row))
            return outcome

        return dataclasses.replace(
            settings,
            objective=dataclasses.replace(plain, loss=loss),
            head=dataclasses.replace(settings.head, hooked=True),
        )

    def see_output(self, name: str, module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
        # Activations that are computed again in backward were seen before.
        if self._inside and self._row not in self.modules and not _finite(output):
            self.modules[self._row] = (name, _finite(inputs) and _finite(kwargs) and not _sees_other_ranks(module))

    def see_gradient(self, name: str, gradient: Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            self.gradients.setdefault(self.backward_row, []).append(name)


def examine(policy: Policy, batch: Batch, update: int, advance: Callable[[int], None] = step.ignore) -> Finding:
    """Compute update `update` of the scored `batch` without applying it. Called by all ranks; all get the finding.

    The weights must be those that the update is to see; afterwards they are as they were.
    """
    trained, groups = policy.trained, policy.groups
    mini = batch.updates[update]
    rows = mini.microbatches[groups.data_rank]
    with _hooks(trained, len(rows)) as watched:
        kept = step.gradients(trained, batch, mini, watched.with_loss(policy.settings), advance)
    trained.forget_features()
    trained.optimizer.prepare_grads()
    grad_norm = float(trained.optimizer.get_grad_norm())
    corrected = policy.settings.algorithm.correction != "none"
    found_rows = groups.from_last_stages(
        [_row_finding(groups.data_rank, i, row, outcome, batch, corrected) for i, (row, outcome) in enumerate(kept)]
    )
    rank, replica = dist.get_rank(), groups.data_rank
    mine = {
        "weights": [n for n, p in _named_parameters(trained) if not bool(p.isfinite().all())],
        "modules": [Place(rank, replica, row, (n,), here) for row, (n, here) in sorted(watched.modules.items())],
        "gradients": [
            Place(rank, replica, row, tuple(names[:SHOWN_PARAMETERS])) for row, names in watched.gradients.items()
        ],
        "reduced": [n for n, p in _named_parameters(trained) if _bad_gradient(p)],
    }
    every: list[Any] = [None] * groups.world.size()
    dist.all_gather_object(every, mine, group=groups.world)
    flat = tuple(finding for part in found_rows for finding in part)
    return Finding(
        update=update,
        loss=sum(finding.loss for finding in flat),
        grad_norm=grad_norm,
        rows=flat,
        weights=_united(part["weights"] for part in every),
        modules=tuple(place for part in every for place in part["modules"]),
        gradients=tuple(place for part in every for place in part["gradients"]),
        reduced_gradients=_united(part["reduced"] for part in every),
    )


@contextmanager
def _hooks(trained: Trained, num_rows: int) -> Iterator[_Watched]:
    watched = _Watched(num_rows)
    handles: list[Any] = []
    for chunk in trained.chunks:
        names = _module_names(chunk)
        handles += [
            module.register_forward_hook(partial(watched.see_output, names[name]), with_kwargs=True)
            for name, module in chunk.named_modules()
            if name
        ]
        # Before and after those of the modules inside.
        handles.append(chunk.register_forward_pre_hook(watched.start_row))
        handles.append(chunk.register_forward_hook(watched.end_row))
    handles += [
        parameter.register_hook(partial(watched.see_gradient, name))
        for name, parameter in _named_parameters(trained)
        if parameter.requires_grad
    ]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _named_parameters(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """Each parameter with the names of the Hugging Face tensors that it is made of."""
    bound = weights.bindings(trained.chunks)
    return ((" + ".join(binding.hf_names), binding.parameter) for binding in bound)


def _module_names(chunk: VisionLanguageModel) -> dict[str, str]:
    """What each module is called: by the Hugging Face tensors of its own weights, where it has some."""
    hf_names = {id(binding.parameter): binding.hf_names for binding in weights.bindings([chunk])}
    names = {}
    for name, module in chunk.named_modules():
        own = [hf for parameter in module.parameters(recurse=False) for hf in hf_names.get(id(parameter), ())]
        stems = dict.fromkeys(hf.rpartition(".")[0] or hf for hf in own)
        names[name] = " + ".join(stems) or weights.global_name(chunk, name)
    return names


def _row_finding(replica: int, number: int, row: Any, outcome: Any, batch: Batch, corrected: bool) -> RowFinding:
    samples = [i for i in row.sample_ids if i >= 0]
    given = {"given old log-probs": batch.old_logp, "given reference log-probs": batch.reference_logp}
    values = {name: [scores[i] for i in samples] for name, scores in given.items() if scores is not None}
    if corrected:
        values["given engine log-probs"] = [torch.tensor(batch.samples[i].logp) for i in samples]
    values["given advantages"] = [torch.tensor([batch.samples[i].advantage for i in samples])]
    values["log-probs"], values["entropies"] = [outcome.logp_N], [outcome.entropy_N]
    if outcome.entropy_removing_N is not None:
        values["entropies of the removing view"] = [outcome.entropy_removing_N[row.rows_removing_N >= 0]]
    bad = {name: sum(int((~part.isfinite()).sum()) for part in parts) for name, parts in values.items()}
    views: dict[tuple[int, int], list[str]] = {}
    constant = {key for index, view in row.constants for key in batch.samples[index].prompt.images(view)}
    for key in (*row.images, *sorted(constant, key=lambda key: (key.row, key.index, VIEWS.index(key.view)))):
        views.setdefault((key.row, key.index), []).append(key.view)
    return RowFinding(
        replica=replica,
        row=number,
        samples=tuple(samples),
        images=tuple(f"row {row} image {index} ({', '.join(seen)})" for (row, index), seen in views.items()),
        loss=float(outcome.loss),
        max_logp=_largest(outcome.logp_N),
        max_entropy=_largest(outcome.entropy_N),
        num_not_finite={name: count for name, count in bad.items() if count},
    )


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()].abs()
    return float(finite.max()) if finite.numel() else math.nan


def _bad_gradient(parameter: Any) -> bool:
    return parameter.requires_grad and not bool(parameter.main_grad.isfinite().all())


def _sees_other_ranks(module: Any) -> bool:
    """Whether a module's output depends on other ranks' tokens: context parallel attention gathers keys and values."""
    return isinstance(module, PackedAttention) and module.context.size() > 1


def _finite(value: Any) -> bool:
    """Whether every number in a tensor, or in the tensors of nested tuples, lists and dicts, is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(_finite(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(_finite(part) for part in value)
    return True


def _united(parts: Iterator[list[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


def as_dict(finding: Finding) -> dict[str, Any]:
    """For JSON, where numbers that are not finite are text."""
    return _plain(dataclasses.asdict(finding))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
