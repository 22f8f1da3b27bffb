"""Weights by their names on disk: what a checkpoint and the Hugging Face module call a tensor, and a strict load.

Checkpoints of Qwen2-VL and Qwen2.5-VL say `model.layers...` and `visual...`; the module that transformers builds says
`model.language_model.layers...` and `model.visual...`. Knows nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron_cppo.families import experts
from megatron_cppo.rollout.engine import EngineError

_VISION = ("visual.", "model.visual.")
_LANGUAGE = ("model.", "model.language_model.")


def module_name(name: str) -> str:
    """The module's name of a tensor; names that are the module's already (Qwen3-VL's on disk, too) stay.

    >>> module_name("model.norm.weight"), module_name("visual.blocks.0.norm1.weight"), module_name("lm_head.weight")
    ('model.language_model.norm.weight', 'model.visual.blocks.0.norm1.weight', 'lm_head.weight')
    """
    if name.startswith((_VISION[1], _LANGUAGE[1])):
        return name
    for on_disk, in_module in (_VISION, _LANGUAGE):
        if name.startswith(on_disk):
            return in_module + name.removeprefix(on_disk)
    return name


def disk_name(name: str) -> str:
    """The name that an official Qwen2.5-VL checkpoint gives to a tensor of the module: the inverse of `module_name`.

    >>> disk_name("model.language_model.norm.weight"), disk_name("model.visual.merger.ln_q.weight")
    ('model.norm.weight', 'visual.merger.ln_q.weight')
    """
    for on_disk, in_module in (_VISION, _LANGUAGE):
        if name.startswith(in_module):
            return on_disk + name.removeprefix(in_module)
    return name


@torch.no_grad()
def load_every_weight(module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy `weights` into `module`, each tensor exactly once, converted to the module's dtype and device.

    Experts come matrix by matrix, and are put where the module stacks them. Tied weights count once, under the
    embedding's name. Raises EngineError at the first unknown or repeated name or wrong shape, and at the end for
    missing names; the module is then partly overwritten.
    """
    missing = _places(module)
    known = set(missing)
    for name, tensor in weights:
        target = module_name(name)
        if target not in known:
            raise EngineError(f"weight '{name}' is unknown to this model; send the names of its own checkpoint")
        if target not in missing:
            raise EngineError(f"weight '{name}' was sent twice in one load; send each once")
        parameter = missing.pop(target)
        if parameter.shape != tensor.shape:
            raise EngineError(
                f"weight '{name}' has shape {tuple(tensor.shape)}, the model's is {tuple(parameter.shape)}; "
                "send whole tensors of the same architecture"
            )
        parameter.copy_(tensor)
    if missing:
        names = ", ".join(sorted(disk_name(name) for name in list(missing)[:5]))
        raise EngineError(f"{len(missing)} weights were not sent ({names}, ...); a load must be complete")


def _places(module: nn.Module) -> dict[str, Tensor]:
    """What each weight is copied into: a parameter, or an expert's part of one (transformers 5's order)."""
    places: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        matrices = experts.matrices(name, parameter.shape[0]) if parameter.dim() == 3 else []
        for matrix in matrices:
            place = experts.place(matrix)
            assert place is not None, matrix
            places[matrix] = place.of(parameter, right=False)
        if not matrices:
            places[name] = parameter
    return places
