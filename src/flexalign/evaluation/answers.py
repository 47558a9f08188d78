"""Finding the answer in a response, and what can be said about it without mathematics."""

import re
from decimal import Decimal

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!\\)\\[{}]|[{}]")
_HASHES = re.compile(r"####\s*(.+)")
_ANNOUNCED = re.compile(r"\banswer\s*(?:is|:)\s*:?\s*(.+)", re.IGNORECASE)
_FORMULA = re.compile(r"\$+([^$]+)\$+|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]")
_COMMAND = re.compile(r"\\[a-zA-Z]")
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_MARKUP = re.compile(r"\\(?:left|right|!|,|;|:|displaystyle)(?![a-zA-Z])|\\?\$|\*\*|`")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}")
_ALL_WRAPPED = re.compile(r"\s*\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}\s*\.?\s*")
_WORDS = re.compile(r"[^\W\d_]{4,}|(?=.*[^\W\d_]{3})[^\W\d_]+(?:[ '-][^\W\d_]+)+")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[\s:.,)].*)?")
_IN_BASE = re.compile(r"(?P<open>\()?(?P<digits>-?\w+?)(?(open)\))_\{?(?P<base>\d+)\}?")
_FACTOR = re.compile(r"(?<![_^\d.])(\d+(?:\.\d+)?)\s*((?:\\left)?\()")
_MIXED = re.compile(r"^\s*(-?\d+)(?:\\[,;:! ]|\s)+(\d+)\s*/\s*(\d+)\s*$")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_BARE_UNIT = re.compile(
    r"(?<=[\d}])\s+(?!pi\b)(?:(?:square|cubic) )?[a-zA-Z]{2,}(?:\^\{?[23]\}?)?$"
)
_EDGES = re.compile(r"^(?:\\displaystyle|\\[,;:! ]|\s)+|(?:\\[,;:! ]|\s|(?<!\.)\.)+$")
_REWRITTEN = (
    (re.compile(r"(?<=\d)\\[,!](?=\d{3})"), ""),
    (re.compile(r"√\s*\(?([\w.]+)\)?"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![a-zA-Z\\])pi\b"), r"\\pi "),
    (re.compile(r"(?<=\d)[eE]([+-]?\d+)"), r" \\cdot 10^{\1}"),
    (re.compile(r"\\mathrm\{i\}"), "i"),
    (re.compile(r"^[a-zA-Z]\s*\\in\b"), ""),
    (_MIXED, r"\1\\frac{\2}{\3}"),
)
_SIGNS = {
    "~": " ",
    "π": "\\pi ",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "−": "-",
    "×": "\\times ",
    "·": "\\cdot ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "°": "^\\circ",
}


def find_boxed(text: str) -> str | None:
    r"""The contents of the last complete ``\boxed{…}``, braces balanced, in one pass."""
    open_boxes: list[int | None] = []
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace == "}":
            start = open_boxes.pop() if open_boxes else None
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
        elif brace == "{":
            open_boxes.append(None)
        elif len(brace) > 2:
            open_boxes.append(match.end())
    return text[last[0] : last[1]].strip() if last else None


def find_stated(answer: str, *, numeric: bool) -> str | None:
    """The answer after an announcement; without one the last number or formula, or a single line.

    Args:
        answer: What follows the thinking.
        numeric: Whether the known answer is a number.
    """
    announced = _HASHES.findall(answer) or _ANNOUNCED.findall(answer)
    text = announced[-1].strip() if announced else answer
    which = 0 if announced else -1
    formulas = ["".join(groups).strip() for groups in _FORMULA.findall(text)]
    if numeric and not (announced and formulas and _COMMAND.search(formulas[0])):
        numbers = _NUMBER.findall(_tidy(text))
        return numbers[which] if numbers else None
    if formulas:
        return formulas[which]
    return text if "\n" not in text else None


def expected_answer(gold: str) -> str:
    """The known answer, taken out of its box or its working, as written."""
    boxed = find_boxed(gold)
    if boxed is not None:
        return boxed
    worked = _HASHES.findall(gold)
    return str(worked[-1]) if worked else gold


def normalise(text: str) -> str:
    """Without markup, superfluous space and a final full stop."""
    text = _tidy(text)
    return text if text.endswith("..") else text.removesuffix(".").rstrip()


def plain_verdict(found: str, expected: str) -> bool | None:
    """Whether two answers agree, as far as that shows without mathematics.

    Numbers are compared as numbers, words as words (what stands in ``\\text{}``, or has four
    letters or more), choices by their letter, and numerals with a base digit by digit: to
    mathematics a word is a product of letters, and a base an index.

    Returns:
        True or False where that decides it; None where mathematics must.
    """
    mine, target = normalise(found), normalise(expected)
    number, known = as_number(mine), as_number(target)
    if number is not None and known is not None:
        return number == known
    if _MIXED.match(found) or _MIXED.match(expected):
        return None
    if mine.replace(" ", "") == target.replace(" ", ""):
        return True
    if is_choice(expected):
        choice = _CHOICE.fullmatch(mine)
        return choice is not None and choice[1].casefold() == target.strip("()").casefold()
    if is_words(expected):
        return mine.casefold() == target.casefold()
    based = _numeral(target)
    if based and based[0].lstrip("-").isalnum() and based[0].lstrip("-")[:1].isdigit():
        return _same_numeral(mine, *based)
    return None


def for_mathematics(text: str, *, unit: bool) -> str:
    """The answer in a form that math-verify reads as it is meant.

    Without that, ``2(15)`` would be the mixed number 17 and ``1 3/4`` none, a final full stop part
    of the formula, and a repeating decimal no number.

    Args:
        text: The answer as written.
        unit: Whether the known answer is a number, which a unit in plain letters may follow.
    """
    for sign, command in _SIGNS.items():
        text = text.replace(sign, command)
    text = _EDGES.sub("", text).strip("$")
    text = _EDGES.sub("", text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    if unit:
        text = _BARE_UNIT.sub("", text)
    return _FACTOR.sub(r"\1 \\cdot \2", _REPEATING.sub(_as_fraction, text))


def is_plain(expected: str) -> bool:
    """Whether a known answer is a number, a word, a choice or a numeral, and needs no parser."""
    text = normalise(expected)
    based = _numeral(text)
    return (
        as_number(text) is not None
        or is_choice(expected)
        or is_words(expected)
        or (based is not None and based[0].lstrip("-").isdigit())
    )


def is_choice(expected: str) -> bool:
    r"""Whether a known answer is a letter to choose, such as ``\text{(B)}`` or ``(B)``."""
    text = normalise(expected)
    if re.fullmatch(r"\([A-Z]\)", text):
        return True
    return bool(_ALL_WRAPPED.fullmatch(expected) and re.fullmatch(r"[A-Z]", text))


def is_words(expected: str) -> bool:
    """Whether a known answer is meant as words."""
    text = normalise(expected)
    if _ALL_WRAPPED.fullmatch(expected):
        return bool(re.fullmatch(r"[^\W\d_][^\d_\\{}^=+]*", text))
    return bool(_WORDS.fullmatch(text))


def as_number(text: str) -> Decimal | None:
    """A plain number, thousands commas allowed."""
    if not _NUMBER.fullmatch(text.removeprefix("+")):
        return None
    return Decimal(text.replace(",", ""))


def _as_fraction(decimal: re.Match[str]) -> str:
    whole, fixed, repeated = decimal.groups()
    over = int(whole + fixed + repeated) - int(whole + fixed or "0")
    under = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    return f"\\frac{{{over}}}{{{under}}}"


def _numeral(text: str) -> tuple[str, str] | None:
    """The digits and the base of a numeral, ``204_5`` or ``(204)_5``."""
    match = _IN_BASE.fullmatch(text.replace(" ", ""))
    return (match["digits"], match["base"]) if match else None


def _same_numeral(found: str, digits: str, base: str) -> bool:
    """The base may be left away, since the question names it; another one is wrong."""
    based = _numeral(found)
    if based is None:
        return found.replace(" ", "").casefold() == digits.casefold()
    return (based[0].casefold(), based[1]) == (digits.casefold(), base)


def _tidy(text: str) -> str:
    text = _WRAPPED.sub(r"\1", _MARKUP.sub("", text))
    text = text.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return " ".join(text.split())
