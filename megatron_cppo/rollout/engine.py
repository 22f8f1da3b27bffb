"""What the loop asks of whatever samples answers: the protocol that every rollout engine satisfies.

Owns the contract only. An engine knows prompts, weights and versions; it must not know rewards, advantages, or how
the policy that sends the weights is laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_cppo.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cppo.types import Group, Prompt


class EngineError(UserError):
    """The engine cannot do what was asked; the text says what, what was got, and how to mend it."""


class Engine(Protocol):
    """Samples answers from a policy whose weights it is sent.

    With several ranks every method is collective: all ranks call it with the same arguments, in the same order.
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        temperature: float,
        salt: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """One group of `samples_per_prompt` answers for each prompt, in the order of the prompts, on every rank.

        The same (seed of the engine, `salt`, prompt, sample index) gives the same answer whatever else is in the
        batch; another `salt` gives other answers. `Sample.logp` is per token, in nats, of the distribution that was
        sampled from. `advance(n)` hears of n more answers of this rank's share. Raises EngineError while the weights
        are incomplete or the engine is asleep. It is `collect` of `submit`.
        """
        ...

    def submit(self, prompts: Sequence[Prompt], *, samples_per_prompt: int, temperature: float, salt: int = 0) -> int:
        """Begin what `generate` does; returns a ticket for `collect`, perhaps before anything is sampled.

        Raises EngineError as `generate` does.
        """
        ...

    def collect(self, ticket: int, *, advance: Callable[[int], None] | None = None) -> list[Group]:
        """Wait for the groups of a ticket, which `generate` would have returned. A ticket is collected once."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replace all weights by these (name as in a Hugging Face checkpoint, whole tensor); stamp later samples.

        Tickets may be outstanding: an answer that is cut by this goes on under the new weights, and `Sample.earlier`
        tells of its parts. Raises EngineError on an unknown name, a repeated one, a wrong shape, or a missing one, and
        then refuses to generate until a complete load.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory to someone else until `wake`; no ticket may be outstanding.

        The weights may go with it: `load_weights` comes between `wake` and the next answers.
        """
        ...

    def wake(self) -> None:
        """Take the device's memory back."""
        ...

    def close(self) -> None:
        """End what the engine has started; nothing is asked of it any more."""
        ...
