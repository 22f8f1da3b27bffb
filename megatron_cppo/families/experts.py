"""Stacked experts: the tensor of a layer in which checkpoints and transformers' modules hold many experts' matrices.

The rest of the package names each matrix: `mlp.experts.7.gate_proj.weight` and `up_proj` [I, H], `down_proj` [H, I].
Two orders are in use under the same names. Official checkpoints, transformers 4.x and vLLM multiply from the right:
`gate_up_proj` [E, H, 2I], `down_proj` [E, I, H]. Transformers 5.x holds, and saves, [E, 2I, H] and [E, H, I].
Legend: E experts, I an expert's inner size, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_MATRIX = re.compile(r"(.+\.mlp\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACK = re.compile(r".+\.mlp\.experts\.(gate_up_proj|down_proj)")
_PLACES = {"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2), "down_proj": ("down_proj", 0, 1)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one expert's matrix is: in the stack of this name, at this expert, part `part` of `parts` of its rows."""

    stack: str
    expert: int
    part: int
    parts: int

    def of(self, stack_EXY: Tensor, *, right: bool) -> Tensor:
        """The matrix, as a view of its stack, which multiplies from the `right` or not."""
        matrix = stack_EXY[self.expert].t() if right else stack_EXY[self.expert]
        return matrix.chunk(self.parts)[self.part]

    def shape(self, stack_shape: Sequence[int], *, right: bool) -> tuple[int, int]:
        """The matrix' shape, from its stack's."""
        rows, columns = reversed(stack_shape[1:]) if right else stack_shape[1:]
        return rows // self.parts, columns


def place(name: str) -> Place | None:
    """Where the matrix `name` is stacked; None when it is no expert's.

    >>> place("model.layers.2.mlp.experts.7.up_proj.weight")
    Place(stack='model.layers.2.mlp.experts.gate_up_proj', expert=7, part=1, parts=2)
    """
    found = _MATRIX.fullmatch(name)
    if not found:
        return None
    stack, part, parts = _PLACES[found[3]]
    return Place(found[1] + stack, int(found[2]), part, parts)


def matrices(stack: str, num_experts: int) -> list[str]:
    """The names of the matrices in the tensor `stack`; empty when it is no stack.

    >>> matrices("model.layers.2.mlp.experts.down_proj", 2)
    ['model.layers.2.mlp.experts.0.down_proj.weight', 'model.layers.2.mlp.experts.1.down_proj.weight']
    """
    found = _STACK.fullmatch(stack)
    if not found:
        return []
    kinds = [kind for kind, (name, _, _) in _PLACES.items() if name == found[1]]
    return [f"{stack.removesuffix(found[1])}{e}.{kind}.weight" for e in range(num_experts) for kind in kinds]


def multiplies_right(gate_up_shape: Sequence[int], down_shape: Sequence[int]) -> bool | None:
    """Whether a layer's stacks multiply from the right (official), told by both shapes; None when they fit no order.

    One shape alone cannot tell where 2I = H, or I = H.

    >>> multiplies_right((128, 2048, 1536), (128, 768, 2048)), multiplies_right((128, 1536, 2048), (128, 2048, 768))
    (True, False)
    """
    (_, a, b), (_, c, d) = gate_up_shape, down_shape
    if gate_up_shape[0] == down_shape[0] and (a, b) == (d, 2 * c):
        return True
    if gate_up_shape[0] == down_shape[0] and (a, b) == (2 * d, c):
        return False
    return None
