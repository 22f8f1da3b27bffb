"""Counts the bytes of the tensors that live while something runs, and their peak.

Knows storages and nothing of models. What a kernel takes for itself is not seen, and neither is memory that is taken
without an operation of torch's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(slots=True)
class Span:
    """Bytes above those that lived at the start: at the highest point, and at the end."""

    peak: int = 0
    kept: int = 0


class Allocations(TorchDispatchMode):
    """Within this context every tensor that an operation makes is counted from its birth to its end, by storage.

    What was there before is not, nor its views. The same for real and for fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self._sizes: dict[int, int] = {}
        self._open: list[tuple[Span, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(id(tensor.untyped_storage()) not in self._sizes for tensor in made):
            given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            before = {id(storage) for storage in given} - self._sizes.keys()
            made = [tensor for tensor in made if id(tensor.untyped_storage()) not in before]
        for tensor in made:
            self._count(tensor)
        return result

    @contextmanager
    def span(self) -> Iterator[Span]:
        """What lives above what lives now, until the end of the context; spans may lie within each other."""
        span = Span()
        self._open.append((span, self.live_bytes))
        try:
            yield span
        finally:
            _, before = self._open.pop()
            span.kept = self.live_bytes - before

    def _count(self, tensor: Tensor) -> None:
        # A storage has one Python object for as long as it lives, whoever holds it.
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._sizes:
            ended: Any = weakref.finalize(storage, self._forget, key)
            ended.atexit = False
        self.live_bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        for span, before in self._open:
            span.peak = max(span.peak, self.live_bytes - before)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
