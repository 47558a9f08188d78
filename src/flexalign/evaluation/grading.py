"""Whether a response is right: its answer found, normalised and compared with the known one."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from flexalign.data.thinking import ThinkingTags

__all__ = ["Grade", "Status", "grade"]

Status = Literal["correct", "wrong", "unparsed", "truncated", "no_answer"]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####\s*(.+)")
_ANNOUNCED = re.compile(r"\banswer\s*(?:is|:)\s*:?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_MARKUP = re.compile(r"\\(?:left|right|!|,|;|:|displaystyle)(?![a-zA-Z])|\\?\$|\*\*|`")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class Grade:
    """What became of one response.

    Attributes:
        correct: Whether its answer equals the known one.
        status: `correct` and `wrong` speak of an answer that was found; `unparsed` means that
            there is text after the thinking but no answer could be made out in it, `no_answer`
            that the response ended without any, `truncated` that the limit on tokens cut it off
            before a complete answer.
        extracted: The answer found, as it stands in the response.
    """

    correct: bool
    status: Status
    extracted: str | None


def grade(
    response: str,
    gold: str,
    *,
    truncated: bool = False,
    tags: ThinkingTags | None = None,
    opened: bool = False,
) -> Grade:
    r"""Grade a response by exact match after light normalisation.

    The answer is looked for after the thinking only: a right number that a model merely thought
    of earns nothing. It is, in this order, what stands in the last ``\boxed{}``, after ``####``,
    or after "answer is" (there the first number, if the known answer is a number); else the last
    number, if it is one; else the text, if it is a single line. White space, a final full stop, ``$``, ``\text{}``, thousands commas and
    trailing zeros do not count.

    Args:
        response: The response, special tokens removed, thinking tags kept.
        gold: The known answer; a worked one ends in ``#### answer``.
        truncated: Whether the limit on tokens cut the response off. Only a complete ``\boxed{}``
            is graded then, since any other answer may lack its end.
        tags: The thinking tags; `<think>` and `</think>` if not given.
        opened: Whether the prompt had already opened the tag.
    """
    answer = (tags or ThinkingTags()).split(response, opened=opened).answer.strip()
    expected = _expected(gold)
    extracted = _boxed(answer)
    if extracted is None:
        if truncated:
            return Grade(False, "truncated", None)
        if not answer:
            return Grade(False, "no_answer", None)
        extracted = _stated(answer, numeric=_as_number(expected) is not None)
    if extracted is None:
        return Grade(False, "unparsed", None)
    correct = _equal(_normalise(extracted), expected)
    return Grade(correct, "correct" if correct else "wrong", extracted)


def _expected(gold: str) -> str:
    boxed = _boxed(gold)
    if boxed is not None:
        return _normalise(boxed)
    worked = _HASHES.findall(gold)
    return _normalise(worked[-1] if worked else gold)


def _boxed(text: str) -> str | None:
    r"""The contents of the last complete ``\boxed{…}``, braces balanced."""
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position].strip()
    return None


def _stated(answer: str, *, numeric: bool) -> str | None:
    """The answer after an announcement; without one the last number, or a single line."""
    announced = _HASHES.findall(answer) or _ANNOUNCED.findall(answer)
    text = announced[-1].strip() if announced else answer
    if numeric:
        numbers = _NUMBER.findall(_tidy(text))
        return numbers[0 if announced else -1] if numbers else None
    return text if "\n" not in text else None


def _tidy(text: str) -> str:
    text = _WRAPPED.sub(r"\1", _MARKUP.sub("", text))
    text = text.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return " ".join(text.split())


def _normalise(text: str) -> str:
    text = _tidy(text)
    return text if text.endswith("..") else text.removesuffix(".").rstrip()


def _equal(found: str, expected: str) -> bool:
    number, target = _as_number(found), _as_number(expected)
    if number is not None and target is not None:
        return number == target
    return found.replace(" ", "") == expected.replace(" ", "")


def _as_number(text: str) -> Decimal | None:
    if not _NUMBER.fullmatch(text.removeprefix("+")):
        return None
    return Decimal(text.replace(",", ""))
