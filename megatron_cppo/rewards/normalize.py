r"""One spelling for answers, before they are compared.

Owns: wrappers ($..$, \text{..}, a trailing period), Unicode mathematics, units with a power, multiple-choice letters.
Must not know: sympy, or what is right.
"""

import re

from megatron_cppo.rewards.boxed import extract_boxed

_UNICODE = {
    "°": r"^{\circ}",
    "π": r"\pi ",
    "∞": r"\infty ",
    "∠": r"\angle ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "θ": r"\theta ",
    "²": "^{2}",
    "³": "^{3}",
    "−": "-",
    "–": "-",
    "—": "-",
    "。": ".",
    "\N{NO-BREAK SPACE}": " ",
}
_FULL_WIDTH = {chr(code + 0xFEE0): chr(code) for code in range(ord("!"), ord("~") + 1)}
_TRANSLATION = str.maketrans({**_FULL_WIDTH, **_UNICODE})

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
_WRAPPERS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\\\((.*)\\\)",
        r"\\\[(.*)\\\]",
        r"\*\*([^*]*)\*\*",
        _TEXT.pattern,
        r"(.*[^.\s])\s*\.",
    )
)
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_MIXED_NUMBER = re.compile(r"(-?\d+) +(\d+)\s*/\s*(\d+)")
_POWER_OF_UNIT = re.compile(r"(?<=[\d\s}])(?:\\(?:text|mathrm)\s*\{\s*)?(mm|cm|dm|km)\s*\}?\s*\^\s*\{?\s*([23])\s*\}?$")
_SPACING = re.compile(r"\\[!,;:]|\\ |~|\\(?:displaystyle|left|right)(?![A-Za-z])")
_DOLLAR = re.compile(r"(?<!\\)\$")
_IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")

_CHOICE = re.compile(r"\(\s*([A-Za-z])\s*\)(.*)|([A-Za-z])(?:\s*[.:)](.*))?", re.DOTALL)
_SECOND_CHOICE = re.compile(r"[\s,;&]*(?:and\b|or\b)?\s*\(?[A-Z]\b(?!')\s*[).]?\s*(?:[.:)].*)?", re.DOTALL)


def normalize(answer: str) -> str:
    r"""The answer without its wrappers, in ASCII and LaTeX: `**$17°$.**` → `17^{\circ}`, `√(2)` → `\sqrt{2}`."""
    boxed = extract_boxed(answer)
    text = (answer if boxed is None else boxed).strip()
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text).translate(_TRANSLATION)
    text = _unwrap(_DOLLAR.sub("", _SPACING.sub(" ", text)).strip())
    if mixed := _MIXED_NUMBER.fullmatch(text):
        text = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    return _POWER_OF_UNIT.sub(r"\\text{ \1}^\2", text)


def squeeze(answer: str) -> str:
    r"""Drop the white space that separates nothing: `2 \sqrt { 3 }` → `2\sqrt{3}`, but `\pi r` and `1 2` stay."""
    return _IDLE_SPACE.sub("", answer)


def choice_letter(answer: str) -> str | None:
    """The letter, upper case, of a multiple-choice answer (`A`, `(a)`, `A.`, `A: 12 cm`); None unless it is one."""
    match = _CHOICE.fullmatch(_TEXT.sub(r"\1", answer))
    if match is None:
        return None
    rest = match[2] or match[4] or ""
    return None if _SECOND_CHOICE.fullmatch(rest) else (match[1] or match[3]).upper()


def _unwrap(text: str) -> str:
    """Peel wrappers that enclose the whole text until none does."""
    while True:
        match = next((match for wrapper in _WRAPPERS if (match := wrapper.fullmatch(text))), None)
        if match is None:
            return text
        text = match[1].strip()
