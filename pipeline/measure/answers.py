"""The answer that a response gives, and intervals for what is measured."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

from pipeline.align.roles import families

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = r"(?<!\d)-?(?:\d+(?:\.\d+)?|\.\d+)"
FRACTION = r"(?P<minus>-?)\s*\\[dtc]?frac\s*(?:\{(?P<over>[^{}]*)\}|(?P<o>\d))\s*(?:\{(?P<under>[^{}]*)\}|(?P<u>\d))"
QUOTIENT = r"(?P<a>(?<!\d)-?\d+(?:\.\d+)?)\s*/\s*(?P<b>\d+(?:\.\d+)?)"
NUMERIC = re.compile(f"{FRACTION}|{QUOTIENT}|{NUMBER}")
WITHIN = re.compile(r"(?:[\^_]\s*\{?|\\(?!boxed|fbox|text|mathrm|mathbf)[A-Za-z]+\s*\{|\}\s*\{)\s*$")
"""What stands before a number that is part of an expression: an exponent, an index, the argument of a LaTeX command."""
GOES_ON = re.compile(r"\s*(?:\^(?!\s*\{?\s*\\circ)|\\(?:sqrt|pi|cdot|times|frac|sin|cos|tan|log|ln|pm|infty))")
"""What stands after one."""

LETTERS = "ABCDEFGHIJ"
ANSWER_IS = re.compile(
    r"(?i:\b(?:answer|correct\s+(?:option|choice)|choose|select|pick)\b(?:\s+(?:is|was|would\s+be|should\s+be|option|choice|letter))*)"
    r"\s*[:=]?[*_(\[{\"'`$\s]*([B-HJ]|[AI](?!\s+(?!because|since|as\b|and\b)[a-z])|[a-j](?=\)))(?![A-Za-z'’])"
)
ALONE = re.compile(r"(?<![A-Za-z\d'’\\])([A-J])(?![A-Za-z\d'’])")
ARTICLE = re.compile(r"\s+[a-z]")
FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)", re.DOTALL | re.MULTILINE)


@cache
def thinking_ends() -> tuple[str, ...]:
    """What parts a response's thinking from its answer, in any family (roles.yaml), and as prompts ask for it."""
    known = (
        family["roles"].get(name, ()) for family in families().values() for name in ("end_thinking", "begin_answer")
    )
    return tuple({"</thinking>", *(text.strip() for spelled in known for text in spelled)})


def final(response: str) -> str:
    """What of a response is its answer: all after the last end of thinking (`thinking_ends`); without one, all of it."""
    return response[max(response.rfind(end) + len(end) if end in response else 0 for end in thinking_ends()) :]


def extract(response: str, how: Literal["last_number", "whole"]) -> str:
    """The answer that a response gives: its last number, or all of it without outer space; empty when there is none.

    A minus between digits subtracts (`10-4` ends in 4); commas are dropped where they part thousands. A fraction is one number,
    `3/4`, also as `\\frac{3}{4}`. A number that is part of another expression (`3\\sqrt{2}`, `2^{10}`) is none.
    """
    if how == "whole":
        return response.strip()
    text = THOUSANDS.sub("", response)
    *_, last = (None, *NUMERIC.finditer(text))
    if last is None:
        return ""
    if last["a"]:
        return f"{last['a']}/{last['b']}"
    if (over := last["over"] or last["o"]) and (under := last["under"] or last["u"]):
        return f"{last['minus']}{over.strip()}/{under.strip()}"
    return "" if WITHIN.search(text[: last.start()]) or GOES_ON.match(text, last.end()) else last[0]


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, braces within it balanced; None where there is no whole one."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    depth, first = 1, text.index("{", start) + 1
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[first:place]
    return None


def choice(response: str, options: Sequence[str], letters: str) -> str:
    """The letter that a response to a multiple-choice question chooses; empty where it chooses none.

    The first of these that there is: the last `\\boxed{...}`; the last "the answer is (B)"; the only option whose text the last
    line holds; the last letter that stands alone, if it isn't an article.

    Args:
        options: their texts, in order, where they are known.
        letters: those that there are.
    """
    box = boxed(response)
    if box is not None and (found := named(box, options, letters)):
        return found
    said = [match[1].upper() for match in ANSWER_IS.finditer(response)]
    if found := next((letter for letter in reversed(said) if letter in letters), ""):
        return found
    *_, line = ("", *filter(None, map(str.strip, response.splitlines())))
    if found := named(line, options, letters):
        return found
    held = [letter for letter, text in zip(letters, options, strict=False) if _holds(line, text)]
    if len(held) == 1:
        return held[0]
    alone = [match[1] for match in ALONE.finditer(response) if not _is_word(response, match)]
    return next((letter for letter in reversed(alone) if letter in letters), "")


def named(text: str, options: Sequence[str], letters: str) -> str:
    """The letter that a text is, `B`, `(b)`, `B. Paris`, or whose option's text it is; empty for any other text."""
    bare = plain(re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text))
    for letter, option in zip(letters, options, strict=False):
        if bare.casefold() == plain(option).casefold():
            return letter
    match = re.match(r"[(\[]?([A-Ja-j])(?:[)\].:]|$)", bare)
    return match[1].upper() if match and match[1].upper() in letters else ""


def plain(text: str) -> str:
    """A text with single spaces, without outer Markdown, quotes, dollar signs and full stops."""
    return " ".join(text.split()).strip("*_`\"'$ .")


def _holds(line: str, text: str) -> bool:
    return bool(plain(text)) and bool(re.search(rf"(?<!\w){re.escape(plain(text))}(?!\w)", line, re.IGNORECASE))


def _is_word(text: str, letter: re.Match[str]) -> bool:
    """Whether a letter that stands alone is the article `A` or the pronoun `I`."""
    return (
        letter[1] in "AI"
        and text[letter.end() : letter.end() + 1] not in (")", ".")
        and bool(ARTICLE.match(text, letter.end()))
    )


def code(response: str) -> str:
    """The program in a response: its last fenced block of Python, else its last fenced block, else all of it.

    A block that isn't closed, as in a response that was cut, ends with the text.
    """
    blocks = FENCE.findall(response)
    python = [text for tag, text in blocks if tag.lower() in ("python", "python3", "py")]
    return (python or [text for _, text in blocks] or [response])[-1]


def wilson(right: float, total: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    p, zz = right / total, z * z
    middle = (p + zz / (2 * total)) / (1 + zz / total)
    half = z * ((p * (1 - p) + zz / (4 * total)) / total) ** 0.5 / (1 + zz / total)
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # p is in it, whatever the rounding


def bootstrap_ratio(sums: np.ndarray, counts: np.ndarray, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of sum(sums) / sum(counts) when the pairs (responses) are drawn anew."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(sums), (draws, len(sums)))
    ratios = sums[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
