"""Rewards: what a response earns, given its text, the ground truth, and where the prompt came from.

Owns: the rewards by name, a recipe's own Python functions, and their weighted sum.
Must not know: tensors, groups, advantages. Light to import: no torch, and sympy only once something is graded.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cppo.config import UserError
from megatron_cppo.rewards.accuracy import accuracy_reward
from megatron_cppo.rewards.format import format_reward

RewardFunction = Callable[[str, str, str], float]
"""(response_text, ground_truth, data_source) → reward. Pure: equal arguments, equal reward."""

REWARDS: dict[str, RewardFunction] = {"accuracy": accuracy_reward, "format": format_reward}


class RewardError(UserError):
    """A reward that cannot be used as it is written in the config."""


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """One term of the total reward, e.g. RewardTerm(name="accuracy", weight=0.9)."""

    name: str
    weight: float


def resolve(name: str) -> RewardFunction:
    """The reward of that name: one of `REWARDS`, or any importable function written "package.module:function".

    Raises `RewardError` when there is none, or when it does not take (response_text, ground_truth, data_source).
    """
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        raise RewardError(
            f"no such reward: got {name!r}; {_suggest(name, REWARDS)}, or name a function as 'package.module:function'"
        )
    module_name, function_name = name.split(":", 1)
    if module_name == "__main__":
        raise RewardError(f"a reward must be importable: got {name!r}; move the function out of the main script")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(
            f"cannot import the module of reward {name!r}: {error}; check the spelling, and that PYTHONPATH reaches it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(
            f"no such function: got reward {name!r}; {_suggest(function_name, vars(module))} of module {module_name}"
        )
    try:
        inspect.signature(function).bind("response_text", "ground_truth", "data_source")
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} must take (response_text, ground_truth, data_source): got {inspect.signature(function)}"
        ) from error
    return function


def parse_terms(texts: Sequence[str]) -> tuple[RewardTerm, ...]:
    """The config's ("accuracy=0.9", "format=0.1") as terms. Raises `RewardError` naming the text that is wrong."""
    terms = tuple(_parse_term(text) for text in texts)
    names = [term.name for term in terms]
    if not terms:
        raise RewardError("no reward is configured: got an empty list; write for instance accuracy=0.9 format=0.1")
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"reward {name!r} is given {names.count(name)} times; give it once, with one weight")
    return terms


def combine(parts: Sequence[tuple[str, float]], terms: Sequence[RewardTerm]) -> float:
    """Weighted sum of the unweighted (name, value) parts, which must be those of `terms`, in their order."""
    assert [name for name, _ in parts] == [term.name for term in terms], f"parts {parts} do not match terms {terms}"
    return math.fsum(term.weight * value for term, (_, value) in zip(terms, parts, strict=True))


def _parse_term(text: str) -> RewardTerm:
    name, equals, weight_text = text.rpartition("=")
    try:
        weight = float(weight_text)
    except ValueError:
        weight = math.nan
    if not (equals and name.strip() and math.isfinite(weight)):
        raise RewardError(f"a reward is written name=weight: got {text!r}; write for instance accuracy=0.9")
    return RewardTerm(name.strip(), weight)


def _suggest(name: str, known: Sequence[str] | dict) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    public = sorted(key for key in known if not key.startswith("_"))
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(public[:20])}"
