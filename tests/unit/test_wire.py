"""What is said to vLLM's servers, and what of their replies is believed: what is no plain answer is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest

from megatron_cppo.rollout import wire
from megatron_cppo.rollout.wire import Answer, Part, Question, Rules, WireError
from megatron_cppo.types import ImageGrid, Prompt

IMAGE, END, BANNED = 90, 91, 92
RULES = Rules(max_response_tokens=6, banned_ids=(IMAGE, BANNED), end_ids=(END,), vocab_size=100)
VERSIONS = {"run-3": 3}


def prompt(*grids: ImageGrid) -> Prompt:
    """Tokens 1 2, then each image between 5 and 6, then 7."""
    tokens, slots = [1, 2], []
    for grid in grids:
        tokens.append(5)
        slots += range(len(tokens), len(tokens) + grid.num_tokens)
        tokens += [IMAGE] * grid.num_tokens + [6]
    tokens.append(7)
    row = tuple(range(len(tokens)))
    return Prompt("train", 4, 0, "", "", "", tuple(tokens), (row, row, row), len(tokens), grids, tuple(slots))


def question(count: int = 2, parts: tuple[Part, ...] = (), index: int = 0) -> Question:
    return Question(0, prompt(ImageGrid(1, 4, 6, 2)), ("data:,x",), index, count, 0.7, 11, parts)


def choice(index: int, tokens: list[int], reason: str, version: str = "run-3") -> dict[str, Any]:
    return {
        "index": index,
        "token_ids": tokens,
        "finish_reason": reason,
        "logprobs": {"content": [{"token_id": token, "logprob": -0.5 - index} for token in tokens]},
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
    }


def reply(asked: Question, *choices: dict[str, Any]) -> dict[str, Any]:
    partial = [token for part in asked.parts for token in part.token_ids]
    return {"prompt_token_ids": [*asked.prompt.token_ids, *partial], "choices": list(choices)}


@pytest.mark.parametrize("seed", range(20))
def test_every_image_is_one_placeholder(seed: int) -> None:
    draw = random.Random(seed)
    grids = tuple(ImageGrid(1, 2 * draw.randint(1, 4), 2 * draw.randint(1, 4), 2) for _ in range(draw.randint(0, 4)))
    short = wire.short_ids(prompt(*grids))
    assert short == [1, 2, *(token for _ in grids for token in (5, IMAGE, 6)), 7]


def test_a_partial_answer_follows_the_prompt_and_is_not_asked_for_again() -> None:
    asked = question(1, (Part(1, (8, 9), (-1.0, -1.0)), Part(2, (10,), (-1.0,))), index=3)
    body = wire.request(asked, RULES)
    assert body["token_ids"] == [1, 2, 5, IMAGE, 6, 7, 8, 9, 10]
    sampling = body["sampling_params"]
    assert (sampling["n"], sampling["max_tokens"], sampling["temperature"]) == (1, 3, 0.7)
    assert sampling["logit_bias"] == {"90": -100.0, "92": -100.0}
    assert sampling["stop_token_ids"] == [END]
    assert sampling["ignore_eos"] is True
    assert body["content_parts"] == [{"type": "image_url", "url": "data:,x"}]
    found = wire.answers(reply(asked, choice(0, [11, 12, 13], "length")), asked, RULES, versions=VERSIONS)
    assert found == [Answer(3, Part(3, (11, 12, 13), (-0.5, -0.5, -0.5)), "length")]


def test_answers_come_in_order_whatever_the_reply_s() -> None:
    asked = question(3)
    told = reply(asked, choice(2, [], "abort"), choice(0, [8, END], "stop"), choice(1, [8] * 6, "length"))
    found = wire.answers(told, asked, RULES, versions=VERSIONS)
    assert [(answer.index, answer.reason, len(answer.part.token_ids)) for answer in found] == [
        (0, "stop", 2),
        (1, "length", 6),
        (2, "abort", 0),
    ]


def _change(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        for key in path[:-1]:
            told = told[key]
        told[path[-1]] = value

    return change


GARBAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no choices": (lambda told: told.pop("choices"), "no choices"),
    "another prompt": (_change(("prompt_token_ids", 0), 3), "they differ from token 0"),
    "a larger image": (lambda told: told["prompt_token_ids"].insert(4, IMAGE), "another grid"),
    "no prompt": (lambda told: told.pop("prompt_token_ids"), "says nothing of the prompt"),
    "one answer too few": (lambda told: told["choices"].pop(), "2 answers were asked for"),
    "one twice": (_change(("choices", 1, "index"), 0), "2 answers were asked for"),
    "no log-probs": (_change(("choices", 0, "logprobs"), None), "0 log-probs for 2 tokens"),
    "a log-prob too few": (lambda told: told["choices"][0]["logprobs"]["content"].pop(), "1 log-probs for 2"),
    "NaN": (_change(("choices", 0, "logprobs", "content", 0, "logprob"), float("nan")), "that are none"),
    "positive": (_change(("choices", 0, "logprobs", "content", 0, "logprob"), 0.1), "that are none"),
    "impossible": (_change(("choices", 0, "logprobs", "content", 0, "logprob"), -9999.0), "that are none"),
    "a banned id": (_change(("choices", 0, "token_ids", 0), BANNED), r"banned ids \[92\]"),
    "an id that is none": (_change(("choices", 0, "token_ids", 0), 100), "ids below 100"),
    "a text for an id": (_change(("choices", 0, "token_ids", 0), "8"), "ids below 100"),
    "on after the end": (_change(("choices", 0, "token_ids", 0), END), "goes on after the end"),
    "no end": (_change(("choices", 0, "token_ids", 1), 8), "ended with"),
    "cut early": (_change(("choices", 0, "finish_reason"), "length"), "cut at 2 tokens, not at 6"),
    "another end": (_change(("choices", 0, "finish_reason"), "error"), "ended by 'error'"),
    "other weights": (_change(("choices", 0, "weight_versions", 0, "version"), "run-2"), "run-2"),
    "no version": (_change(("choices", 0, "weight_versions"), None), "expected those of"),
    "a choice that is none": (_change(("choices", 0), 7), "a choice lacks"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused(name: str) -> None:
    asked = question()
    told = reply(asked, choice(0, [8, END], "stop"), choice(1, [8, 9, END], "stop"))
    assert len(wire.answers(copy.deepcopy(told), asked, RULES, versions=VERSIONS)) == 2
    change, says = GARBAGE[name]
    change(told)
    with pytest.raises(WireError, match=says):
        wire.answers(told, asked, RULES, versions=VERSIONS)


@pytest.mark.parametrize("told", [None, [], "choices", {"choices": {}}])
def test_no_object_is_refused(told: Any) -> None:
    with pytest.raises(WireError, match="no choices"):
        wire.answers(told, question(), RULES, versions=VERSIONS)


def test_more_tokens_than_asked_for_are_refused() -> None:
    asked = question(1)
    with pytest.raises(WireError, match="at most 6 ids"):
        wire.answers(reply(asked, choice(0, [8] * 7, "length")), asked, RULES, versions=VERSIONS)
