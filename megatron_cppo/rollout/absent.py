"""The engine of a run that samples nothing: it takes no weights and holds none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from megatron_cppo.rollout.engine import EngineError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cppo.types import Group, Prompt


class NoEngine:
    """An `Engine` that cannot generate."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        temperature: float,
        salt: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """Raises EngineError."""
        raise _absent()

    def submit(self, prompts: Sequence[Prompt], *, samples_per_prompt: int, temperature: float, salt: int = 0) -> int:
        """Raises EngineError."""
        raise _absent()

    def collect(self, ticket: int, *, advance: Callable[[int], None] | None = None) -> list[Group]:
        """Raises EngineError."""
        raise _absent()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Nothing; the weights are not even gathered, on any rank alike."""

    def sleep(self) -> None:
        """Nothing, as it holds no memory."""

    def wake(self) -> None:
        """Nothing, as it holds no memory."""

    def close(self) -> None:
        """Nothing."""


def _absent() -> EngineError:
    return EngineError("a run on saved rollouts samples nothing, and has no engine; give data.evaluation for one")
