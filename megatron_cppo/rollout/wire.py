"""What a vLLM server is asked, and what it answers, as JSON: tokens in, tokens out.

Owns the form of `/inference/v1/generate` (vLLM 0.32), and mistrusts every reply: an answer that is not plainly one to
this question under these weights is an error, never a sample. Knows neither servers nor connections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cppo.types import Prompt

MODEL = "policy"
"""The name under which servers serve the policy."""
MAX_LOGP = 1e-3
"""Log-probs above 0 by more than rounding are no log-probs."""
MIN_LOGP = -1000.0
"""vLLM sends -9999 for what has no probability: such a token cannot have been sampled."""
BANNED_BIAS = -100.0
"""The least that vLLM takes: e^-100 of the mass, which no draw finds and no fp32 sum sees."""


class WireError(ValueError):
    """A reply that is no answer to what was asked."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all requests of a run."""

    max_response_tokens: int
    banned_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of an answer that one version of the weights sampled, with their log-probs."""

    version: int
    token_ids: tuple[int, ...]
    logp: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """Samples of one prompt that one request asks for: `count` of them, from `index` on.

    `place` is the prompt's among those that are asked together. `parts` is what earlier weights have sampled of the
    answer; there is one sample then. `images` are data URLs.
    """

    place: int
    prompt: Prompt
    images: tuple[str, ...]
    index: int
    count: int
    temperature: float
    seed: int
    parts: tuple[Part, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer that are there."""
        return sum(len(part.token_ids) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample, or what there was of it when it was aborted (`reason`: stop, length, abort)."""

    index: int
    part: Part
    reason: str


def short_ids(prompt: Prompt) -> list[int]:
    """The prompt's ids with one placeholder for each image, as vLLM wants them: it expands them by itself.

    Ids that are expanded already would be silently expanded again.
    """
    dropped, start = set(), 0
    for grid in prompt.grids:
        dropped.update(prompt.image_slots[start + 1 : start + grid.num_tokens])
        start += grid.num_tokens
    return [token for place, token in enumerate(prompt.token_ids) if place not in dropped]


def request(question: Question, rules: Rules) -> dict[str, Any]:
    """The body of the request. A partial answer follows the prompt, and is not asked for again."""
    partial = [token for part in question.parts for token in part.token_ids]
    body: dict[str, Any] = {
        "model": MODEL,
        "token_ids": short_ids(question.prompt) + partial,
        "return_token_ids": True,
        "sampling_params": {
            "n": question.count,
            "temperature": question.temperature,
            "max_tokens": rules.max_response_tokens - len(partial),
            "seed": question.seed,
            "logprobs": 0,
            "stop_token_ids": list(rules.end_ids),
            "ignore_eos": True,
            "logit_bias": {str(token): BANNED_BIAS for token in rules.banned_ids},
            "detokenize": False,
            "skip_special_tokens": False,
        },
    }
    if question.images:
        body["content_parts"] = [{"type": "image_url", "url": image} for image in question.images]
    return body


def answers(reply: Any, question: Question, rules: Rules, *, versions: Mapping[str, int]) -> list[Answer]:
    """The answers of a reply, in order. Raises WireError.

    `versions` maps the labels that weights may have had while the request ran to their versions.
    """
    if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list):
        raise WireError(f"no choices in the reply {_brief(reply)}")
    expected = [*question.prompt.token_ids, *(token for part in question.parts for token in part.token_ids)]
    if reply.get("prompt_token_ids") != expected:
        raise WireError(_prompt_difference(reply.get("prompt_token_ids"), expected))
    found = [_answer(choice, question, rules, versions) for choice in reply["choices"]]
    indices = sorted(answer.index for answer in found)
    if indices != list(range(question.index, question.index + question.count)):
        raise WireError(f"{question.count} answers were asked for from {question.index} on, got {indices}")
    return sorted(found, key=lambda answer: answer.index)


def _answer(choice: Any, question: Question, rules: Rules, versions: Mapping[str, int]) -> Answer:
    try:
        index, tokens, reason = choice["index"], choice["token_ids"] or [], choice["finish_reason"]
        logp = [entry["logprob"] for entry in (choice["logprobs"] or {"content": []})["content"] or ()]
        labels = [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"] or ()]
    except (KeyError, TypeError) as error:
        raise WireError(f"a choice lacks {error}: {_brief(choice)}") from error
    limit = rules.max_response_tokens - question.num_tokens
    version = _version(labels, len(tokens), versions)
    _check_tokens(tokens, rules, limit)
    if len(logp) != len(tokens) or not all(
        isinstance(value, float | int) and math.isfinite(value) and MIN_LOGP < value <= MAX_LOGP for value in logp
    ):
        raise WireError(f"{len(logp)} log-probs for {len(tokens)} tokens, or some that are none: {_brief(logp)}")
    if reason == "stop" and (not tokens or tokens[-1] not in rules.end_ids):
        raise WireError(f"an answer ended with {tokens[-1:]}, not with one of {rules.end_ids}")
    if reason == "length" and len(tokens) != limit:
        raise WireError(f"an answer was cut at {len(tokens)} tokens, not at {limit}")
    if reason not in ("stop", "length", "abort"):
        raise WireError(f"an answer ended by {reason!r}")
    return Answer(question.index + index, Part(version, tuple(tokens), tuple(min(0.0, v) for v in logp)), reason)


def _check_tokens(tokens: Sequence[Any], rules: Rules, limit: int) -> None:
    if len(tokens) > limit or not all(isinstance(token, int) and 0 <= token < rules.vocab_size for token in tokens):
        raise WireError(f"at most {limit} ids below {rules.vocab_size} were asked for, got {_brief(tokens)}")
    banned = set(tokens).intersection(rules.banned_ids)
    if banned:
        raise WireError(f"the banned ids {sorted(banned)} were sampled")
    early = set(tokens[:-1]).intersection(rules.end_ids)
    if early:
        raise WireError(f"an answer goes on after the end token {sorted(early)}")


def _version(labels: Sequence[tuple[str, int, int]], num_tokens: int, versions: Mapping[str, int]) -> int:
    """The version that sampled all tokens; a request is never kept across a change of the weights."""
    names = {label for label, start, end in labels if end > start}
    unknown = sorted(names - versions.keys())
    if unknown or len(names) > 1 or (num_tokens and not names):
        raise WireError(f"tokens of weights {sorted(names)}, expected those of one of {sorted(versions)}")
    return versions[names.pop()] if names else max(versions.values())


def _prompt_difference(found: Any, expected: Sequence[int]) -> str:
    if not isinstance(found, list):
        return f"the server says nothing of the prompt that it has read: {_brief(found)}"
    pairs = enumerate(zip(found, expected, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
    return (
        f"the server has read a prompt of {len(found)} tokens, the policy's has {len(expected)} (they differ from "
        f"token {place} on): its image processor makes another grid, or its tokenizer is another"
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
