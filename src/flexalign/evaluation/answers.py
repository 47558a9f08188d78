r"""Finds the answer in a response, and compares answers where no mathematics is needed.

The answer is the content of ``\boxed{}``; without a box, the first expression that is announced
("the answer is …"), or else the last expression. An expression is taken whole: a number in it is
the answer only if it is the whole expression.
"""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

# Boxes

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!\\)\\[{}]|[{}]")
_DELIMITERS = re.compile(
    r"\\[()\[\],;:! ]|\\q?quad(?![a-zA-Z])|(?<!\\)\$|\\(?:text|mbox|textbf)\s*\{|[{}~()*]|\s"
)
_ASSIGNMENT = re.compile(r"(?<!\w)[a-zA-Z]\w*(?:\s*_\s*\w+)?\s*=\s*$")
_LINK = re.compile(
    r"(?P<words>(?!(?:and|or)\b)\w+(?: (?!(?:and|or)\b)\w+){0,2})? ?[,;]? ?(?P<link>and|or)?"
)
_LINK_LENGTH = 200
_DENIALS = frozenset(
    [
        "is",
        "are",
        "was",
        "were",
        "not",
        "no",
        "nor",
        "wrong",
        "but",
        "rather",
        "wait",
        "hmm",
        "either",
        "maybe",
        "perhaps",
        "instead",
    ]
)

# Announced and stated answers

_HASHES = re.compile(r"####\s*(.+)")
_ANNOUNCED = re.compile(
    r"\banswer\s*(?:is|:)\s*:?\s*(\$\$[^$]+\$\$|\\\[(?s:.{1,1000}?)\\\]|.+)", re.IGNORECASE
)
_WORKINGS = re.compile("<<[^<>]*>>")
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.{1,1000}?)\\\)|\\\[((?s:.{1,1000}?))\\\]"
    r"|(\\begin\{[a-z]*matrix\}(?s:.{1,1000}?)\\end\{[a-z]*matrix\})"
)
_LABEL = re.compile(r"(?<=[^\W\d_]{2}):(?=\S)")
_RATE = re.compile(r"(?<=\d)/(?=[a-zA-Z]{2})(?!(?:sqrt|pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z]))")
_PROSE = re.compile(r"(?<!\\)(?<![a-zA-Z])[^\W\d_]{2,}")
_NAMES = frozenset(
    [
        "sqrt",
        "pi",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "arcsin",
        "arccos",
        "arctan",
        "max",
        "min",
        "inf",
        "infinity",
    ]
)
_LINKS = frozenset({"and", "or", "&"})
_MONEY = re.compile("[$€£¥]")
_UNIT = (
    r"(?:[cdmk]m|m(?=[\^²³])|ft|mi|yd|[kmµ]g|lbs?|oz|m[lL]|mph|k[mp]h|hrs?|min|secs?|ms|"
    r"[KkMGT]?Hz|[kMGT][bB]|kWh|am|pm|th|st|nd|rd)"
)
_MEASURE = re.compile(rf"(?<=\d){_UNIT}(?:\^?\{{?[23]\}}?|[²³])?$")
_OPERATOR = (
    r"[-+*/^_=<>≤≥≠≈×·⋅÷±|]|\\(?:times|cdot|div|pm|leq?|geq?|neq?|approx|cup|cap)(?![a-zA-Z])"
)
_OPENS = re.compile(rf"(?:{_OPERATOR})$")
_CONTINUES = re.compile(rf"{_OPERATOR}|\\?%|[)\]}}]|\\[a-zA-Z]")
_MATHEMATICAL = re.compile(rf"\d|{_OPERATOR}|\\[a-zA-Z]|[\x00π¼½¾⅐-⅞∞∅√∪]")
_FRACTION = re.compile(r"\d+/\d+")
_VALUED = re.compile(r"\d|π|\\pi|[¼½¾⅐-⅞∞∅√]|\\(?:infty|emptyset|varnothing)")
_EQUALS = re.compile(r"(?<![<>!\\])=|≈|\\approx(?![a-zA-Z])")

# Comparison without mathematics

_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_SPACED_NUMBER = re.compile(r"-?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"(-?\d+),(\d+)")
_MARKUP = re.compile(r"\\(?:left|right|!|,|;|:|displaystyle)(?![a-zA-Z])|\\?\$|\*\*|`")
_SPACES = re.compile(r"\\ |\\q?quad(?![a-zA-Z])|~")
_GROUPED = re.compile(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3})")
_COLON = re.compile(r"\s*(?:\{\s*:\s*\}|\\colon(?![a-zA-Z])|(?<=\d)\s*:\s*(?=\d))\s*")
_TEXT = r"\\(?:text|textnormal|textrm|textbf|textit|mathrm|mathbf|mathsf|mbox)"
_WRAPPED = re.compile(_TEXT + r"\s*\{([^{}]*)\}")
_ALL_WRAPPED = re.compile(rf"\s*(?:{_TEXT}\s*\{{[^{{}}]*\}})\s*\.?\s*")
_WORDS = re.compile(r"[^\W\d_]{4,}|(?=.*[^\W\d_]{3})[^\W\d_]+(?:[ '-][^\W\d_]+)+")
_LETTERS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[\s:.,)].*)?")
_TWO_CHOICES = re.compile(r"\(?[A-Z]\)?\s*(?:[,;&/]|and|or)\s*\(?[A-HJ-Z]\)?(?![\w'])")
_VALUED_CHOICE = re.compile(r"(?:\((?P<inside>[A-Z])\)|(?P<bare>[A-H])[).:])\s*(?P<value>.*\d.*)")
_IN_BASE = re.compile(r"(?P<open>\()?(?P<digits>-?\w+?)(?(open)\))_\{?(?P<base>\d+)\}?")
_CLOCK = re.compile(r"(\d+(?::\d+)+)\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_EMPTY = re.compile(
    r"\\emptyset|\\varnothing|∅|\\\{\s*\\\}|(?:the )?empty set|no (?:real )?solutions?",
    re.IGNORECASE,
)

_QUOTIENT = re.compile(r"(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))")
_MODULUS = re.compile(r"\s*(?:\\pmod\s*\{?\s*(\w+)\s*\}?|\(\s*\\?(?:mod|bmod)\s*(\w+)\s*\))")
_BRACES_AROUND = re.compile(r"\\\{[^(){}\[\]]*,[^(){}\[\]]*\\\}")
_BRACKETS_AROUND = re.compile(r"[(\[][^(){}\[\]]*,[^(){}\[\]]*[)\]]")

# Forms that math-verify misreads

_FACTOR = re.compile(r"(?<![_^\d.])(\d+(?:\.\d+)?)\s*((?:\\left)?\()")
_MIXED = re.compile(r"^\s*(-?\d+)(?:\\[,;:! ]|\s)+(\d+)\s*/\s*(\d+)\s*$")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_BARE_UNIT = re.compile(
    r"(?<=[\d}])\s+(?!pi\b)(?:(?:square|cubic) )?[a-zA-Z]{2,}(?:\^\{?[23]\}?)?$"
)
_EDGES = re.compile(r"^(?:\\displaystyle|\\[,;:! ]|\s)+|(?:\\[,;:! ]|\s|(?<!\.)\.)+$")
_UNDONE = re.compile(r"\d[\d,.]*(?:\s*[-+*×·]\s*\d[\d,.]*)+")
_VULGAR = re.compile(r"(\d*)\s*([¼½¾⅐-⅞↉])")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*(?:\([^()]*\)[^()]*)*)\)|\{([^{}]*)\}|([\w.]+))")
_ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}
_REWRITTEN = (
    (re.compile(r"(?<=\d)\\[,!](?=\d{3})"), ""),
    (_GROUPED, ""),
    (re.compile(r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![a-zA-Z\\])pi\b"), r"\\pi "),
    (re.compile(r"(?<=\d)[eE]([+-]?\d+)"), r" \\cdot 10^{\1}"),
    (re.compile(r"\\mathrm\s*\{([ei])\}"), r"\1"),
    (re.compile(r"\\(?:cfrac|dfrac|tfrac)(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\leqslant(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\geqslant(?![a-zA-Z])"), r"\\ge "),
    (
        re.compile(
            rf"^(?:{_TEXT}\s*\{{\s*\([A-Z]\)\s*\}}|\([A-Z]\)(?=\s|~|\\ ))(?:\s|~|\\ )*(?=.*\d)"
        ),
        "",
    ),
    (re.compile(r"^[^=<>]*\\equiv(?![a-zA-Z])"), ""),
    (_MODULUS, ""),
    (re.compile(r"^[a-zA-Z]\s*\\in\b"), ""),
    (_MIXED, r"\1\\frac{\2}{\3}"),
)
_SIGNS = {
    "~": " ",
    "π": "\\pi ",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∅": "\\emptyset ",
    "ℝ": "\\mathbb{R} ",
    "−": "-",
    "–": "-",
    "×": "\\times ",
    "⋅": "\\cdot ",
    "∙": "\\cdot ",
    "·": "\\cdot ",
    "÷": "\\div ",
    "∕": "/",
    "⁄": "/",
    "±": "\\pm ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\neq ",
    "≈": "\\approx ",
    "°": "^\\circ",
    "θ": "\\theta ",
    "α": "\\alpha ",
    "β": "\\beta ",
    "λ": "\\lambda ",
}


class Boxes(NamedTuple):
    r"""The boxed answer of a text.

    Attributes:
        answer: The contents of the last box, or of the last boxes where they are one list
            (``\boxed{2} and \boxed{3}``), joined by commas; None if there is no complete box.
        open: Whether a later box is opened and not closed; the answer then does not count.
    """

    answer: str | None
    open: bool


def find_boxes(text: str) -> Boxes:
    r"""Find the last complete ``\boxed{…}``, or the list that the last ones form, in one pass.

    An empty box is ignored if there is any other; it is the answer only if all are empty.
    """
    open_boxes: list[tuple[int, int] | None] = []
    complete: list[tuple[int, int, int]] = []  # where a box starts, its contents start, and end
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace == "}":
            start = open_boxes.pop() if open_boxes else None
            if start is not None and (not complete or start[0] > complete[-1][0]):
                complete.append((*start, match.start()))
        elif brace == "{":
            open_boxes.append(None)
        elif len(brace) > 2:
            open_boxes.append((match.start(), match.end()))

    last_open = max((start[0] for start in open_boxes if start), default=-1)
    if not complete:
        return Boxes(None, last_open >= 0)
    filled = [box for box in complete if text[box[1] : box[2]].strip()]
    if not filled:
        return Boxes("", last_open > complete[-1][0])
    group = [filled[-1]]
    for before, after in zip(filled[-2::-1], filled[:0:-1], strict=True):
        if not _joins(text[before[2] + 1 : after[0]]):
            break
        group.insert(0, before)
    contents = dict.fromkeys(text[start:end].strip() for _, start, end in group)
    return Boxes(", ".join(contents), last_open > complete[-1][0])


def find_boxed(text: str) -> str | None:
    """Return the boxed answer of a text; None if there is none, or if a later box is left open."""
    boxes = find_boxes(text)
    return None if boxes.open else boxes.answer


def find_stated(answer: str, *, expected: str) -> str | None:
    """Return the answer of a text without a box; None if there is none.

    If the known answer is words or a choice, the answer is the first formula of an announced
    answer, or the last formula of the whole text, or the text itself if it is a single line. A line
    with more words than the known answer is a sentence in which no answer is found; after ``####``
    all is the answer. If the known answer is mathematics, the answer is an expression; if it is a
    number, only the right side of an equation.

    Args:
        answer: The text after the thinking.
        expected: The known answer.
    """
    marked = _HASHES.findall(answer)
    announced = marked or _ANNOUNCED.findall(answer)
    text = announced[-1].strip() if announced else answer
    if not marked and not _FORMULA.search(text) and _is_sentence(text, expected):
        return None
    if is_choice(expected) or is_words(expected):
        formulas = ["".join(groups).strip() for groups in _FORMULA.findall(text)]
        if formulas:
            return formulas[0 if announced else -1]
        return text if "\n" not in text else None

    if as_number(normalise(text)) is not None:
        return normalise(text)
    numeric = as_number(normalise(expected).rstrip("\\% ")) is not None
    stated = _stated_expression(
        text,
        announced=bool(announced),
        numeric=numeric,
        valued=_VALUED.search(_in_commands(expected)) is not None,
    )
    if stated is None and not numeric and "\n" not in text:
        return text
    return stated


def is_prose(expected: str) -> bool:
    """Whether a known answer is words, of two letters or more, without a number or LaTeX."""
    return is_words(expected) or bool(_LETTERS.fullmatch(normalise(expected)))


def _is_sentence(text: str, expected: str) -> bool:
    """Whether a text says more than an answer does, where the known answer is words."""
    return is_prose(expected) and len(normalise(text).split()) > len(normalise(expected).split())


def _joins(between: str) -> bool:
    """Whether two boxes with this text between them are members of one list."""
    if len(between) > _LINK_LENGTH or between.count("{") != between.count("}"):
        return False
    text = " ".join(_DELIMITERS.sub(" ", between).split())
    match = _LINK.fullmatch(_ASSIGNMENT.sub("", text).strip())
    if match is None:
        return False
    words = (match["words"] or "").casefold().split()
    return not words or (bool(match["link"]) and _DENIALS.isdisjoint(words))


class _Span(NamedTuple):
    """An expression in a text, and what surrounds it.

    Attributes:
        text: The expression, with placeholders for formulas.
        linked: What links it to the previous expression: a comma, "and" or "or", else empty.
        closed: Whether punctuation, a link or the end follows, so that no word belongs to it.
    """

    text: str
    linked: str
    closed: bool


def _stated_expression(text: str, *, announced: bool, numeric: bool, valued: bool) -> str | None:
    """Return the expression that a text states: the first one if announced, else the last.

    Args:
        text: The announced answer, or the whole answer.
        announced: Whether it is announced.
        numeric: Whether the known answer is one number; formulas are then not preferred to
            expressions in plain text, and only the right side of an equation counts.
        valued: Whether the known answer contains a number; expressions with one then come first.
    """
    masked, formulas = _mask_formulas(text)
    if not formulas and not numeric and "\n" not in text and not _has_prose(masked):
        return text

    groups = _lists(_spans(masked), by_commas=announced)
    written = [(group, ", ".join(_unmask(part, formulas) for part in group)) for group in groups]
    in_formulas = [each for each in written if "\x00" in "".join(each[0])]
    with_values = [each for each in written if _VALUED.search(each[1])]
    choices = (
        [with_values]
        if numeric
        else [
            [each for each in in_formulas if not valued or each in with_values],
            with_values,
            in_formulas,
            written if announced or "\n" not in text else [],
        ]
    )
    found = next((choice for choice in choices if choice), None)
    if found is None:
        return None

    group, expression = found[0 if announced else -1]
    if numeric and len(group) == 1:
        return _MEASURE.sub("", split_outside(expression, _EQUALS)[-1].strip())
    return expression


def _mask_formulas(text: str) -> tuple[str, list[str]]:
    """Return the text with a placeholder for each formula, and the formulas.

    A dollar sign before an amount of money does not begin a formula.
    """
    text = _WORKINGS.sub("", text).replace("\\$", "").replace("**", "").replace("`", "")
    text = text.replace("−", "-")

    masked, formulas, position = "", list[str](), 0
    while match := _FORMULA.search(text, position):
        content = next(group for group in match.groups() if group is not None).strip()
        is_money = (
            match[0][0] == "$" and content[:1].isdigit() and _has_prose(_WRAPPED.sub("", content))
        )
        masked += text[position : match.start()]
        if is_money:
            position = match.start() + 1
            continue
        masked += f"\x00{len(formulas)}\x00"
        formulas.append(content)
        position = match.end()
    masked += text[position:]

    masked = _RATE.sub(" ", _LABEL.sub(": ", _MONEY.sub("", masked)))
    return _WRAPPED.sub(r" \1 ", masked), formulas


def _unmask(text: str, formulas: list[str]) -> str:
    return re.sub("\x00(\\d+)\x00", lambda match: formulas[int(match[1])], text)


def _has_prose(text: str) -> bool:
    """Whether a text has words of two letters or more; names of functions do not count."""
    return any(word not in _NAMES for word in _PROSE.findall(text))


def _spans(masked: str) -> list[_Span]:
    """Return the expressions of a text, in order; words separate them."""
    return [span for line in masked.split("\n") for span in _Reader().read(line.split())]


class _Reader:
    """Reads the expressions out of the tokens of one line."""

    def __init__(self) -> None:
        self._spans: list[_Span] = []
        self._tokens: list[str] = []
        self._depth = 0
        self._linked = ""  # the link before the expression that is being read
        self._link = ""  # the link before the next one

    def read(self, tokens: list[str]) -> list[_Span]:
        for index, token in enumerate(tokens):
            if token in _LINKS and self._depth <= 0:
                # "and" links two expressions only if one precedes it, not a word.
                follows = self._tokens or self._link
                self._finish(closed=True, link=token if follows else "")
                continue

            core = token.strip("\"'“”*#").rstrip(".,;:?\"'”")
            stop = token[len(core) :] if token.startswith(core) else token[-1:]
            belongs = self._continues_with(core)
            if not _is_mathematical(core, joined=belongs, following=tokens[index + 1 : index + 2]):
                self._finish(closed=False)
                continue

            if not belongs:
                self._finish(closed=False, link=self._link)
                self._linked, self._link = self._link, ""
            self._tokens.append(core)
            self._depth += _depth(core)
            if stop and self._depth > 0:  # a comma within brackets
                self._tokens[-1] += stop
            elif stop:
                self._finish(closed=True, link=stop if stop in ",;" else "")
        self._finish(closed=True)
        return self._spans

    def _continues_with(self, token: str) -> bool:
        """Whether this token continues the expression that is being read."""
        if not self._tokens:
            return False
        last = self._tokens[-1]
        return bool(
            self._depth > 0
            or _OPENS.search(last)
            or _CONTINUES.match(token)
            or (last.isdigit() and len(self._tokens) == 1 and _FRACTION.fullmatch(token))
        )

    def _finish(self, *, closed: bool, link: str = "") -> None:
        """End the expression, without the brackets that belong to the sentence around it."""
        text, depth = " ".join(self._tokens).lstrip("="), self._depth
        while depth > 0 and text[:1] in tuple("([{"):
            text, depth = text[1:], depth - 1
        while depth < 0 and text[-1:] in tuple(")]}"):
            text, depth = text[:-1], depth + 1
        text = text.rstrip("=<>+*/^ ")
        if text:
            self._spans.append(_Span(text, self._linked, closed))
        self._tokens, self._depth, self._link = [], 0, link


def _is_mathematical(token: str, *, joined: bool, following: list[str]) -> bool:
    """Whether a token belongs to an expression; a letter does only next to an operator."""
    if _has_prose(_MEASURE.sub("", token)) or not token:
        return False
    if len(token) == 1 and token.isalpha():
        return joined or bool(following and re.match(_OPERATOR, following[0]))
    if re.fullmatch(rf"(?:{_OPERATOR})+", token):
        return joined
    return bool(_MATHEMATICAL.search(token)) or (joined and bool(re.search(r"[)\]}%]", token)))


def _lists(spans: list[_Span], *, by_commas: bool) -> list[list[str]]:
    """Group the expressions; those that are linked as one list share a group."""
    groups: list[list[str]] = []
    for span in spans:
        linked = span.linked in _LINKS or (by_commas and span.linked in (",", ";") and span.closed)
        if groups and linked:
            groups[-1].append(span.text)
        else:
            groups.append([span.text])
    return groups


def _depth(text: str) -> int:
    """Return how many brackets a text leaves open; below 0 if it closes more than it opens."""
    return sum(text.count(opening) for opening in "([{") - sum(
        text.count(closing) for closing in ")]}"
    )


def is_left_undone(stated: str, expected: str) -> bool:
    """Whether the stated answer is plain arithmetic, not carried out, where a number is known.

    ``2 + 3 + 5`` is not accepted as the answer 10, except in a box.
    """
    return bool(_UNDONE.fullmatch(stated)) and as_number(normalise(expected)) is not None


def expected_answer(gold: str) -> str:
    """Return the known answer as written, without its box or its working."""
    boxed = find_boxed(gold)
    if boxed is not None:
        return boxed
    worked = _HASHES.findall(gold)
    return str(worked[-1]) if worked else gold


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at the separators that are outside all brackets."""
    parts, start, depth, last = [], 0, 0, 0
    for match in separator.finditer(text):
        depth += _depth(text[last : match.start()])
        last = match.start()
        if depth <= 0:
            parts.append(text[start : match.start()])
            start = last = match.end()
    return [*parts, text[start:]]


# Comparison without mathematics


def normalise(text: str) -> str:
    """Return a text without markup, superfluous space and a final full stop."""
    text = _tidy(text)
    return text if text.endswith("..") else text.removesuffix(".").rstrip()


def plain_verdict(found: str, expected: str) -> bool | None:
    """Whether two answers agree, as far as this can be decided without mathematics.

    Numbers are compared as numbers; words (in ``\\text{}``, or of four letters or more) as text;
    choices by their letter, and by their value if both give one; times and ratios part by part;
    numerals with a base digit by digit. The mathematical parser would read a word as a product of
    letters, a time as a quotient, and a base as an index.

    Returns:
        True or False if that is decided; None if the mathematical parser must decide.
    """
    # Numbers.
    mine, target = normalise(found), normalise(expected)
    number, known = as_number(mine), as_number(target)
    if number is None and known is not None and (comma := _DECIMAL_COMMA.fullmatch(mine)):
        number = Decimal(f"{comma[1]}.{comma[2]}")
    if number is not None and known is not None:
        return number == known
    if _MIXED.match(found) or _MIXED.match(expected):
        return None

    # Equal texts, choices, words and times.
    if mine.replace(" ", "") == target.replace(" ", ""):
        return bool(mine)  # two empty texts do not agree
    if _EMPTY.fullmatch(mine) or _EMPTY.fullmatch(target):
        return bool(_EMPTY.fullmatch(mine) and _EMPTY.fullmatch(target))
    if valued := _valued_verdict(mine, target, expected):
        return valued.verdict if valued.rest is None else plain_verdict(*valued.rest)
    if is_choice(expected):
        choice = None if _TWO_CHOICES.match(mine) else _CHOICE.fullmatch(mine)
        return choice is not None and choice[1].casefold() == target.strip("()").casefold()
    if is_words(expected):
        return mine.casefold() == target.casefold()
    if (clock := _same_clock(mine, target)) is not None:
        return clock

    # Sets, congruences and numerals with a base.
    if any(
        _BRACES_AROUND.fullmatch(one) and _BRACKETS_AROUND.fullmatch(other)
        for one, other in ((mine, target), (target, mine))
    ):
        return False  # a set is neither a pair nor an interval
    moduli = [["".join(each) for each in _MODULUS.findall(text)] for text in (mine, target)]
    if all(moduli) and moduli[0] != moduli[1]:
        return False
    based = _numeral(target)
    if based and based[0].lstrip("-").isalnum() and based[0].lstrip("-")[:1].isdigit():
        return _same_numeral(mine, *based)
    return None


def is_plain(expected: str) -> bool:
    """Whether a known answer is a number, a word, a choice or a numeral, and needs no parser."""
    text = normalise(expected)
    based = _numeral(text)
    return (
        as_number(text) is not None
        or is_choice(expected)
        or is_words(expected)
        or _EMPTY.fullmatch(text) is not None
        or _CLOCK.fullmatch(text) is not None
        or (based is not None and based[0].lstrip("-").isdigit())
    )


def is_choice(expected: str) -> bool:
    r"""Whether a known answer is the letter of a choice, such as ``\text{(B)}`` or ``(B)``."""
    text = normalise(expected)
    if re.fullmatch(r"\([A-Z]\)", text):
        return True
    return bool(_ALL_WRAPPED.fullmatch(expected) and re.fullmatch(r"[A-Z]", text))


def is_words(expected: str) -> bool:
    """Whether a known answer is words, not a product of letters."""
    text = normalise(expected)
    if _ALL_WRAPPED.fullmatch(expected):
        return bool(re.fullmatch(r"[^\W\d_][^\d_\\{}^=+]*", text))
    return bool(_WORDS.fullmatch(text))


def as_number(text: str) -> Decimal | None:
    """Read a plain number; commas or single spaces may separate its thousands.

    Returns:
        None if the text is not a plain number.
    """
    text = text.removeprefix("+")
    if re.fullmatch(r"-?0,\d+", text):  # 0 has no thousands: this is a decimal comma
        return Decimal(text.replace(",", "."))
    if not _NUMBER.fullmatch(text) and not _SPACED_NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", "").replace(" ", ""))


def for_mathematics(text: str, *, unit: bool) -> str:
    """Rewrite an answer so that math-verify reads it correctly.

    As written, math-verify would read ``2(15)`` as the mixed number 17, would not read ``1 3/4`` as
    a mixed number or a repeating decimal as a number, and would take a final full stop as part of
    the formula.

    Args:
        text: The answer as written.
        unit: Whether the known answer is a number, so that a unit in plain letters may follow it.
    """
    text = _in_commands(text)
    text = _EDGES.sub("", text).strip("$")
    text = _EDGES.sub("", text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = _COLON.sub(":", text) if _CLOCK.search(_COLON.sub(":", text)) else text
    if unit:
        text = _BARE_UNIT.sub("", text)
    return _FACTOR.sub(r"\1 \\cdot \2", _REPEATING.sub(_as_fraction, text))


def _in_commands(text: str) -> str:
    """Replace Unicode fractions, powers, roots and operators by LaTeX commands."""
    text = _VULGAR.sub(_as_frac, text)
    text = _RAISED.sub(lambda match: f"^{{{_ascii(match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{_ascii(match[0])}}}", text)
    for sign, command in _SIGNS.items():
        text = text.replace(sign, command)
    return _ROOT.sub(
        lambda match: f"\\sqrt{_ROOTS[match[1]]}{{{match[2] or match[3] or match[4] or ''}}}", text
    )


def _as_frac(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[2]).partition("⁄")
    return f"{match[1]}\\frac{{{over}}}{{{under or 1}}}"


def _ascii(digits: str) -> str:
    return unicodedata.normalize("NFKC", digits).replace("−", "-")


def _as_fraction(decimal: re.Match[str]) -> str:
    whole, fixed, repeated = decimal.groups()
    over = int(whole + fixed + repeated) - int(whole + fixed or "0")
    under = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    return f"\\frac{{{over}}}{{{under}}}"


class _Valued(NamedTuple):
    """The comparison of a choice with its value: a verdict, or the pair still to be compared."""

    verdict: bool | None
    rest: tuple[str, str] | None = None


def _valued_verdict(mine: str, target: str, expected: str) -> _Valued | None:
    """Compare ``(B) 5`` with a letter, a value, or another choice with its value.

    Returns:
        None if neither text is a choice with its value, or the other has nothing to compare with.
    """
    ours, theirs = _VALUED_CHOICE.fullmatch(mine), _VALUED_CHOICE.fullmatch(target)
    if ours and theirs:
        if _letter(ours) != _letter(theirs):
            return _Valued(False)
        return _Valued(None, (ours["value"], theirs["value"]))
    if ours and (is_choice(expected) or re.fullmatch("[A-H]", target)):
        return _Valued(_letter(ours) == target.strip("()"))
    if theirs and (letter := re.fullmatch(r"\(?([A-H])\)?", mine)):
        return _Valued(letter[1] == _letter(theirs))
    if ours and re.search(r"\d", target):
        return _Valued(None, (ours["value"], target))
    if theirs and re.search(r"\d", mine):
        return _Valued(None, (mine, theirs["value"]))
    return None


def _letter(choice: re.Match[str]) -> str:
    return str(choice["inside"] or choice["bare"])


def _same_clock(mine: str, target: str) -> bool | None:
    """Whether two times or ratios are equal; None if this cannot be decided.

    ``10:30`` is a time and not the ratio 1:3; ``4:6`` and ``2:3`` are the same ratio.
    """
    known = _CLOCK.fullmatch(target)
    ours = _CLOCK.fullmatch(mine)
    if known is None:
        return None
    if ours is None:
        quotient = _QUOTIENT.fullmatch(mine)
        if quotient and [each for each in quotient.groups() if each] == known[1].split(":"):
            return True
        return False if _is_time(known[1]) else None

    # "am" and "pm" must agree only if both are given.
    if (known[2] or ours[2] or "").casefold() != (ours[2] or known[2] or "").casefold():
        return False

    parts, others = ([int(part) for part in match[1].split(":")] for match in (ours, known))
    if parts == others:
        return True
    if len(parts) != len(others) or _is_time(ours[1]) or _is_time(known[1]):
        return False
    if not all(parts) or not all(others):
        return False
    return len({Fraction(part, other) for part, other in zip(parts, others, strict=True)}) == 1


def _is_time(text: str) -> bool:
    return re.fullmatch(r"(?:[01]?\d|2[0-4])(?::[0-5]\d){1,2}", text) is not None


def _numeral(text: str) -> tuple[str, str] | None:
    """Return the digits and the base of a numeral, ``204_5`` or ``(204)_5``; None if it is none."""
    match = _IN_BASE.fullmatch(text.replace(" ", ""))
    return (match["digits"], match["base"]) if match else None


def _same_numeral(found: str, digits: str, base: str) -> bool:
    """Whether two numerals agree; the found one may omit the base, as the question names it."""
    based = _numeral(found)
    if based is None:
        return found.replace(" ", "").casefold() == digits.casefold()
    return (based[0].casefold(), based[1]) == (digits.casefold(), base)


def _tidy(text: str) -> str:
    text = " ".join(text.split())
    text = _GROUPED.sub(",", text)
    text = _WRAPPED.sub(r"\1", _MARKUP.sub("", _SPACES.sub(" ", text)))
    text = text.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _LOWERED.sub(lambda match: f"_{_ascii(match[0])}", text)
    text = _COLON.sub(":", text)
    return " ".join(text.split())
