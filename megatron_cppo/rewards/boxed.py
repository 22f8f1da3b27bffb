r"""The answer in a response: the content of its last `\boxed{...}`.

Owns: finding the box. Must not know: whether the answer is right.
"""

import re

# A backslash takes the next character along, so \{ and \} are not braces; yet in \\boxed{ the box still counts.
_TOKEN = re.compile(r"(?P<box>\\boxed\s*\{)|\\(?!\\boxed\s*\{).|(?P<open>\{)|(?P<close>\})", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""The stripped content of the last balanced `\boxed{...}`; of nested boxes the inner one; None without a box.

    One pass, linear in the length of the text.
    """
    box_starts: list[int | None] = []  # one entry per open brace; None for a brace that is no box
    answer, answer_start = None, -1
    for token in _TOKEN.finditer(text):
        if token["box"]:
            box_starts.append(token.end())
        elif token["open"]:
            box_starts.append(None)
        elif token["close"] and box_starts:
            start = box_starts.pop()
            if start is not None and start > answer_start:
                answer, answer_start = text[start : token.start()].strip(), start
    return answer
