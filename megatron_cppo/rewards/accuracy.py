"""Is the boxed answer right? String equality where that settles it, else math-verify.

Owns: the verdict on one pair of answers, and the limits on what may reach sympy.
Must not know: processes and deadlines (`grader`): a pair within the limits may still take for ever.
"""

import functools
import importlib
import logging
import re
from typing import Any, Literal

from megatron_cppo.rewards.boxed import extract_boxed
from megatron_cppo.rewards.normalize import choice_letter, normalize, squeeze

Refusal = Literal["capped", "none_gold"]
"""Why a pair is not judged: an answer beyond the limits below, or no ground truth to judge by."""

MAX_LENGTH_CHARS = 256
MAX_DEPTH = 20
# Sympy evaluates these at once, however large the result: 40 digits in a row, a power or factorial in Python's
# spelling, an exponent of 5 digits or more, a tower of powers.
_EXPENSIVE = re.compile(r"\d{41}|\*\*|!|\^\s*\{?\s*[-+]?\s*\d{5}|\d\s*\}?\s*\^\s*\{?\s*\d+\s*\}?\s*\^")
_INTEGER = re.compile(r"[-+]?\d+")
# Three letters or more, not all capitals: to sympy `act` and `cat` are one product of three variables.
_WORDS = re.compile(r"(?=.*[a-z])[A-Za-z][A-Za-z' -]+[A-Za-z]")


def accuracy_reward(response_text: str, ground_truth: str, data_source: str = "") -> float:
    """1.0 if the response's last boxed answer equals the ground truth, else 0.0. May hang: see `grader`."""
    return float(equivalent(extract_boxed(response_text), ground_truth))


def equivalent(prediction: str | None, ground_truth: str) -> bool:
    """Whether two answers are the same mathematically; False without a prediction or ground truth, or when refused."""
    if prediction is None or refusal(prediction, ground_truth) is not None:
        return False
    prediction, gold = normalize(prediction), normalize(ground_truth)
    if squeeze(prediction) == squeeze(gold):
        return True
    if gold_letter := _gold_letter(gold):
        return choice_letter(prediction) == gold_letter
    if _INTEGER.fullmatch(prediction) and _INTEGER.fullmatch(gold):
        return int(prediction) == int(gold)
    if _WORDS.fullmatch(prediction) and _WORDS.fullmatch(gold):
        return prediction.casefold() == gold.casefold()
    return _same_value(prediction, gold)


def refusal(prediction: str | None, ground_truth: str) -> Refusal | None:
    """Why this pair is not judged, or None; cheap. Equal strings need no sympy and are never refused."""
    gold = normalize(ground_truth)
    if not gold:
        return "none_gold"
    if prediction is None:
        return None
    prediction = normalize(prediction)
    if squeeze(prediction) == squeeze(gold) or _gold_letter(gold):
        return None
    return "capped" if _exceeds_limits(prediction) or _exceeds_limits(gold) else None


def warm_up() -> None:
    """Load sympy and the LaTeX grammar now (about a second), so that no sample pays for it."""
    assert equivalent(r"\frac{2}{4}", r"\frac{1}{\sqrt{4}}"), "math-verify does not find 2/4 equal to 1/sqrt(4)"


def _gold_letter(gold: str) -> str | None:
    """The letter of a multiple-choice ground truth: a capital alone, `(A)`, or `A.`."""
    match = re.fullmatch(r"\(?([A-Z])\)?[.:]?", gold)
    return match[1] if match else None


def _exceeds_limits(answer: str) -> bool:
    if len(answer) > MAX_LENGTH_CHARS or _EXPENSIVE.search(answer):
        return True
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


@functools.lru_cache(maxsize=4096)
def _same_value(prediction: str, gold: str) -> bool:
    """math-verify's comparison, cached: the samples of a group share the gold, and often the mistake."""
    return _math_verify().verify(list(_parse(gold)), list(_parse(prediction)), timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _parse(answer: str) -> tuple[Any, ...]:
    """Sympy expressions of the answer as one LaTeX formula; none if it is not one. No part of a text counts."""
    math_verify = _math_verify()
    box_only = (math_verify.LatexExtractionConfig(boxed_match_priority=0),)
    return tuple(
        math_verify.parse(
            rf"\boxed{{{answer}}}",
            extraction_config=box_only,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )
    )


@functools.cache
def _math_verify() -> Any:
    """The library, imported late as it loads sympy; its own timeouts stay off: a signal cannot stop C code."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn about just that
    return importlib.import_module("math_verify")
