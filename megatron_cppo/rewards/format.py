r"""The format reward: the response thinks first, then gives a boxed answer.

Owns: the shape of a response. Must not know: whether the answer is right.
"""


def format_reward(response_text: str, ground_truth: str = "", data_source: str = "") -> float:
    r"""1.0 if the whole response matches `<think>.*</think>.*\\boxed\{.*\}.*` (dot matches newline), else 0.0.

    The same language as that regular expression, which the releases of CPPO use, but found in linear time: on a
    response that repeats itself up to the length limit, the expression backtracks for seconds.
    """
    position = 0 if response_text.startswith("<think>") else -1
    for mark in ("<think>", "</think>", r"\boxed{", "}"):
        position = response_text.find(mark, position) if position >= 0 else -1
        if position < 0:
            return 0.0
        position += len(mark)
    return 1.0
