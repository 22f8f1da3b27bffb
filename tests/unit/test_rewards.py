"""Rewards: the box, the format, the verdict on pairs of answers, names in a config, and the weighted sum."""

import random
import re
import subprocess
import sys
import time

import pytest

from megatron_cppo.rewards import REWARDS, RewardError, RewardTerm, combine, parse_terms, resolve
from megatron_cppo.rewards.accuracy import accuracy_reward, equivalent, refusal
from megatron_cppo.rewards.boxed import extract_boxed
from megatron_cppo.rewards.format import format_reward
from megatron_cppo.rewards.normalize import choice_letter, normalize

RELEASED_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {  x + 1 }", "x + 1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{a \\} b", r"a \\"),
        ("\\boxed{1\n2}", "1\n2"),
        (r"\\boxed{3}", "3"),
        (r"line \\\boxed{3}", "3"),
        (r"} \boxed{3} {", "3"),
        (r"set { and \boxed{3}", "3"),
        (r"\boxed{3} then \boxed{4", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{None}", "None"),
        (r"\boxed{4", None),
        (r"\boxed{ {4}", None),
        (r"\boxed{4\}", None),
        (r"\boxed 4", None),
        (r"\fbox{4} boxed{4}", None),
        ("", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


def test_extract_boxed_is_linear_in_the_response():
    start = time.perf_counter()
    assert extract_boxed("\\boxed{" * 50_000) is None
    assert extract_boxed("\\boxed{" * 50_000 + "7}") == "7"
    assert time.perf_counter() - start < 2.0


def test_format_reward_is_the_released_expression():
    pieces = ["<think>", "</think>", "\\boxed{", "}", "x", "\n", " ", "\\boxed {", "<think"]
    rng = random.Random(0)
    outcomes = []
    for _ in range(20_000):
        text = rng.choice(("", "<think>")) + "".join(rng.choices(pieces, k=rng.randrange(20)))
        expected = RELEASED_FORMAT.fullmatch(text) is not None
        assert format_reward(text) == float(expected), text
        outcomes.append(expected)
    assert 500 < sum(outcomes) < 19_500


def test_format_reward_does_not_backtrack():
    start = time.perf_counter()
    assert format_reward("<think>" + "</think>\\boxed{" * 30_000) == 0.0
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("$5$.", "5"),
        (r"\(5\)", "5"),
        (r"\[ 5 \]", "5"),
        ("**5**", "5"),
        (r"\text{Yes.}", "Yes"),
        ("17°", r"17^{\circ}"),
        ("2√3", r"2\sqrt{3}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("9π", r"9\pi"),
        ("3×4", r"3\times 4"),
        ("−5", "-5"),
        ("１２", "12"),
        ("-1 1/2", r"-1\frac{1}{2}"),
        ("12 cm^2", r"12 \text{ cm}^2"),
        (r"\left( 1,\, 2 \right)", "( 1,  2  )"),
        (r"\boxed{7}", "7"),
        ("3.", "3"),
        ("3.5", "3.5"),
        ("...", "..."),
    ],
)
def test_normalize(answer, expected):
    assert normalize(answer) == expected


@pytest.mark.parametrize(
    "answer", ["A", "(A)", "( a )", "A.", "A. 30°", "A: 12", "A) 12 cm", "(A) the left one", r"\text{A}. 3"]
)
def test_choice_letter(answer):
    assert choice_letter(answer) == "A"


@pytest.mark.parametrize("answer", ["AB", "A, B", "A and B", "A. B", "A. A", "A: C.", "30", "A'", "Area", "", "(A)(B)"])
def test_no_choice_letter(answer):
    assert choice_letter(answer) is None


EQUAL = [
    ("5", "5"),
    ("+5", "5"),
    ("17°", "17"),
    (r"17^\circ", "17"),
    (r"\angle ABC = 17^\circ", "17"),
    ("2√3", r"2\sqrt{3}"),
    (r"2 \sqrt { 221 }", r"2\sqrt{221}"),
    (r"9π", r"9 \pi"),
    (r"\frac{1}{2}", "0.5"),
    ("2/4", r"\dfrac{1}{2}"),
    ("1 1/2", "3/2"),
    (r"50\%", "0.5"),
    ("12 cm^2", "12"),
    ("12cm", "12"),
    (r"12\text{m}", "12"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("2,3", "3,2"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,234", "1234"),
    ("10^{3}", "1000"),
    ("3:4", r"\frac34"),
    (r"6.02\times10^{23}", r"6.02 × 10^{23}"),
    ("2x+1=y", "y=2x+1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("0.333333", r"\frac{1}{3}"),
    ("A. 30°", "A"),
    ("(b)", "B"),
    ("C", "(C)"),
    ("Yes.", "yes"),
    (r"\text{Increase}", "increase"),
    ("12平方厘米", "$12平方厘米$"),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}}"),
    ("AB", "BA"),
]
DIFFERENT = [
    (None, "5"),
    (None, "None"),
    ("", "5"),
    ("6", "5"),
    ("3.46", r"2\sqrt{3}"),
    ("28.27", r"9\pi"),
    ("[1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("act", "cat"),
    ("left", "felt"),
    ("2", r"2\sqrt{3}"),
    ("2", "2 of the three @ %"),
    ("B", "A"),
    ("AB", "A"),
    ("30", "A"),
    ("11/2", "1 1/2"),
    ("x", "y"),
    (r"\frac{", r"\frac{1}{2}"),
    ("})({", "5"),
]


@pytest.mark.parametrize(("prediction", "gold"), EQUAL)
def test_equal_answers(prediction, gold):
    assert equivalent(prediction, gold)
    assert refusal(prediction, gold) is None


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT)
def test_different_answers(prediction, gold):
    assert not equivalent(prediction, gold)
    assert refusal(prediction, gold) is None


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9",
        "(x+1)**9999",
        "99999999!",
        "9^{9^{9}}",
        "9^9^9",
        "10^{10^{10}}",
        "2^{123456}",
        "1" * 41,
        "x+" * 130 + "x",
        "(" * 21 + "x" + ")" * 21,
    ],
)
def test_expensive_answers_are_capped_at_once(answer):
    start = time.perf_counter()
    assert refusal(answer, "7.5") == refusal("7.5", answer) == "capped"
    assert not equivalent(answer, "7.5")
    assert equivalent(answer, answer), "equal strings need no sympy"
    assert refusal(answer, answer) is None
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("answer", ["1" * 40, "2^{9999}", "x^{2}+y^{10}", "(" * 20 + "x" + ")" * 20, r"5\!", "x" * 256])
def test_answers_at_the_limit_are_not_capped(answer):
    assert refusal(answer, "7.5") is None


def test_a_missing_ground_truth_is_not_judged():
    for gold in ("", "  ", "$$", r"\boxed{}"):
        assert refusal("5", gold) == "none_gold"
        assert not equivalent("5", gold)
        assert not equivalent("", gold)


def test_accuracy_reward_reads_the_last_box():
    assert accuracy_reward(r"<think>\boxed{3}</think> \boxed{\frac{2}{4}}", "0.5") == 1.0
    assert accuracy_reward(r"\boxed{4} and then \boxed{5}", "4") == 0.0
    assert accuracy_reward("the answer is 4", "4") == 0.0
    assert accuracy_reward("None", "None") == 0.0


def exclamations(response_text: str, ground_truth: str, data_source: str) -> float:
    """A reward of one's own, for `resolve`."""
    return float(response_text.count("!"))


def no_reward(response_text: str) -> float:
    return 0.0


def test_resolve_finds_registered_and_own_functions():
    assert resolve("accuracy") is REWARDS["accuracy"] is accuracy_reward
    own = resolve("tests.unit.test_rewards:exclamations")
    assert own("a!!", "", "") == 2.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "got 'acuracy'; did you mean 'accuracy'"),
        ("zzz", "choose from accuracy, format"),
        ("no.such.module:f", "cannot import the module of reward 'no.such.module:f'"),
        (f"{__name__}:exclamation", "did you mean 'exclamations'"),
        (f"{__name__}:EQUAL", "no such function"),
        (
            f"{__name__}:no_reward",
            r"must take \(response_text, ground_truth, data_source\): got \(response_text: str\)",
        ),
        ("__main__:f", "move the function out of the main script"),
    ],
)
def test_resolve_explains_what_is_wrong(name, message):
    with pytest.raises(RewardError, match=message):
        resolve(name)


def test_parse_terms():
    assert parse_terms(("accuracy=0.9", " format = 1e-1 ", "my.rewards:brevity=-0.5")) == (
        RewardTerm("accuracy", 0.9),
        RewardTerm("format", 0.1),
        RewardTerm("my.rewards:brevity", -0.5),
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("accuracy",), "name=weight: got 'accuracy'"),
        (("accuracy=high",), "got 'accuracy=high'"),
        (("accuracy=nan",), "got 'accuracy=nan'"),
        (("=1",), "got '=1'"),
        ((), "empty list"),
        (("format=1", "format=2"), "'format' is given 2 times"),
    ],
)
def test_parse_terms_explains_what_is_wrong(texts, message):
    with pytest.raises(RewardError, match=message):
        parse_terms(texts)


def test_combine_is_the_weighted_sum():
    terms = parse_terms(("accuracy=0.9", "format=0.1"))
    assert combine((("accuracy", 1.0), ("format", 1.0)), terms) == 1.0
    assert combine((("accuracy", 0.0), ("format", 1.0)), terms) == 0.1
    with pytest.raises(AssertionError, match="do not match"):
        combine((("format", 1.0), ("accuracy", 1.0)), terms)


def test_rewards_are_light_to_import():
    program = (
        "import sys, megatron_cppo.rewards.grader; print(sorted({'torch', 'transformers', 'sympy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
