"""Compares two answers mathematically: the program of a worker process.

It reads one JSON object on each line, ``{"found": …, "expected": …, "seconds": …}``, and writes
`EQUAL`, `UNEQUAL` or `UNPARSED`. It may hang, exceed its memory limit or crash on a model's answer;
the parent process handles all of these.

math-verify parses the answers and compares lists, sets, matrices and equations. This module
compares numbers and terms: exact ones exactly, of any size, and decimals by their leading digits.
Inequalities and set notation are first read as sets.
"""

import contextlib
import json
import logging
import math
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from flexalign.evaluation.answers import as_number, for_mathematics, normalise, split_outside

EQUAL, UNEQUAL, UNPARSED, READY = "equal", "unequal", "unparsed", "ready"

_MEMORY_BYTES = 2 * 1024**3
_DIGITS = 6
_EXACT_DIGITS = 400
_WIDE_DIGITS = 12
_PROBES = ((7, 11), (-5, 13), (29, 3), (-31, 17))

_RELATION = re.compile(r"\\(?:leqslant|geqslant|leq?|geq?|lt|gt|neq?)(?![a-zA-Z])|[<>]|!=")
_OR = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{\s*or\s*\}|\\(?:lor|vee)(?![a-zA-Z])|\bor\b")
_AND = re.compile(
    r"\\(?:text|mbox|mathrm|textbf)\s*\{\s*and\s*\}|\\(?:land|wedge)(?![a-zA-Z])|\band\b"
)
_BUILDER = re.compile(
    r"(?:\\left)?\\\{\s*(?P<name>[a-zA-Z])\s*(?:\\in\s*(?:\\mathbb\s*\{?R\}?|\\Reals|\\R)\s*)?"
    r"(?:\\mid|\\middle\||\\vert|:|\|)\s*(?P<condition>.+?)\s*(?:\\right)?\\\}"
)
_MEMBER = re.compile(r"^\s*[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")


def compare(found: str, expected: str) -> str:
    """Compare an answer with the known one.

    Returns:
        `UNPARSED` if `found` or `expected` cannot be parsed, else `EQUAL` or `UNEQUAL`.
    """
    from math_verify import verify

    unit = (
        as_number(normalise(expected)) is not None or "\\text" in expected or "\\mbox" in expected
    )
    found, expected = for_mathematics(found, unit=unit), for_mathematics(expected, unit=unit)
    _compare_numbers_exactly()

    as_sets = _same_sets(found, expected)
    if as_sets is not None:
        return EQUAL if as_sets else UNEQUAL

    mine, target = _parse(found), _parse(expected)
    if not mine or not target:
        return UNPARSED
    if _all_the_same(mine[0], target[0]):
        return EQUAL
    equal = verify(target, mine, allow_set_relation_comp=True, timeout_seconds=None)
    return EQUAL if equal else UNEQUAL


def main() -> None:
    """Answer requests until the standard input ends."""
    import math_verify  # noqa: F401  (loaded before the first answer's time starts)

    logging.disable(logging.WARNING)
    replies = sys.stdout
    sys.stdout = sys.stderr  # so that a library's prints do not mix with replies
    _limit_memory()
    print(READY, file=replies, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        _end_without_parent(2 * request["seconds"])
        try:
            verdict = compare(request["found"], request["expected"])
        except (Exception, RecursionError, MemoryError):
            verdict = UNPARSED
        print(verdict, file=replies, flush=True)
        _end_without_parent(0)


def _parse(text: str) -> list[Any]:
    """Parse an answer to sympy objects; empty if math-verify cannot parse it."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    readers = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parsed: list[Any] = parse(
        f"\\boxed{{{text}}}", extraction_config=readers, parsing_timeout=None, raise_on_error=True
    )
    return [each for each in parsed if isinstance(each, Basic | MatrixBase)]


# Numbers and terms


def _compare_numbers_exactly() -> None:
    """Make math-verify compare the members of lists, sets, matrices and equations by `_same_value`.

    math-verify's own function takes two exact numbers as equal if they differ by less than about
    1e-15, and rounds decimals at a fixed place. It is looked up in its module at each call, so it
    can be replaced there.
    """
    from math_verify import grader

    grader.sympy_numeric_eq = _same_value


def _same_value(target: Any, mine: Any, *_: int) -> bool:
    """Whether two numbers, terms or matrices are equal; exact ones are compared exactly."""
    from sympy import Float, MatrixBase, MatrixExpr

    target, mine = _percent_less(target, mine)
    target, mine = _done(target), _done(mine)
    if isinstance(target, MatrixBase | MatrixExpr) or isinstance(mine, MatrixBase | MatrixExpr):
        return _same_matrix(target, mine)
    if target == mine:
        return target.is_finite is not False
    if target.is_Rational and mine.is_Rational:
        return False

    decimal = bool(target.atoms(Float) or mine.atoms(Float))
    if not _symbols(target, mine):
        return _same_number(target, mine, decimal=decimal)
    return all(_same_number(one, other, decimal=decimal) for one, other in _probed(target, mine))


def _same_matrix(target: Any, mine: Any) -> bool:
    from sympy import MatrixBase

    if not isinstance(target, MatrixBase) or not isinstance(mine, MatrixBase):
        return bool(target == mine)
    return target.shape == mine.shape and all(
        _same_value(one, other) for one, other in zip(target.flat(), mine.flat(), strict=True)
    )


def _same_number(target: Any, mine: Any, *, decimal: bool) -> bool:
    """Whether two terms without free symbols are the same number.

    Exact ones are the same if they agree to 400 digits. Decimals are the same if they agree to six
    decimal places, to six significant digits if the known answer is below 1, or to twelve
    significant digits if it is large.
    """
    difference = target - mine
    if not decimal:
        return not _is_significant(difference.evalf(15, maxn=_EXACT_DIGITS))

    size, error = abs(complex(target.evalf(20))), abs(complex(difference.evalf(20)))
    if not math.isfinite(size) or not math.isfinite(error):
        return False
    places = 0 if size == 0 else min(0, math.ceil(math.log10(size)))
    return error <= max(0.5 * 10.0 ** (places - _DIGITS), size * 10.0**-_WIDE_DIGITS)


def _is_significant(value: Any) -> bool:
    """Whether an evaluated difference has a significant digit, or is not a number."""
    from sympy import Float, nan, zoo

    if value.has(nan, zoo) or not value.is_number or value.free_symbols:
        return True
    parts = [part for part in value.as_real_imag() if part != 0]
    return any(not isinstance(part, Float) or part._prec > 1 for part in parts)


def _probed(target: Any, mine: Any) -> Iterator[tuple[Any, Any]]:
    """Evaluate both terms at rational points; points where either has no value are skipped.

    If all points are skipped, the terms themselves are returned.
    """
    from sympy import Rational, nan, oo, zoo

    target, mine = _without_functions(target), _without_functions(mine)
    symbols = sorted(target.free_symbols | mine.free_symbols, key=str)
    seen = False
    for over, under in _PROBES:
        point = {
            symbol: Rational(over + 10 * index * (1 if over > 0 else -1), under + 2 * index)
            for index, symbol in enumerate(symbols)
        }
        values = _done(target.subs(point)), _done(mine.subs(point))
        if any(value.has(nan, zoo, oo, -oo) for value in values):
            continue
        seen = True
        yield values
    if not seen:
        yield target, mine


def _without_functions(term: Any) -> Any:
    """Replace applications of unknown functions, such as f(2), by symbols."""
    from math_verify.grader import unwrap_fcs

    return unwrap_fcs(term)


def _symbols(*terms: Any) -> bool:
    from sympy.core.function import AppliedUndef

    return any(term.free_symbols or term.atoms(AppliedUndef) for term in terms)


def _percent_less(target: Any, mine: Any) -> tuple[Any, Any]:
    """Return both terms without percent signs if both are then whole: 28 % equals 28."""
    from math_verify.grader import get_pct_val
    from sympy import Integer

    plain = get_pct_val(target, target), get_pct_val(mine, mine)
    whole = all(isinstance(each, Integer) for each in plain)
    return plain if whole else (target, mine)


def _done(term: Any) -> Any:
    """Carry out a term's factorials, sums and percentages, if possible."""
    with contextlib.suppress(Exception):
        return term.doit()
    return term


def _all_the_same(mine: Any, target: Any) -> bool:
    """Whether all members of a list equal the known answer, as in ``1/2, 0.5`` for one half."""
    from sympy import Expr, FiniteSet

    if not isinstance(mine, FiniteSet) or not isinstance(target, Expr) or len(mine.args) < 2:
        return False
    return all(isinstance(each, Expr) and _same_value(target, each) for each in mine.args)


# Sets


def _same_sets(found: str, expected: str) -> bool | None:
    """Whether two answers are the same set, if at least one is written with inequalities.

    Returns:
        None if neither has an inequality, or one of them cannot be read as a set of reals.
    """
    if not any(_RELATION.search(text) or _BUILDER.search(text) for text in (found, expected)):
        return None
    (mine, of), (target, known_of) = _region(found), _region(expected)
    if mine is None or target is None or (of and known_of and of != known_of):
        return None
    return _same_region(mine, target)


def _region(text: str) -> tuple[Any, str | None]:
    """Read an inequality, a set builder or a union of intervals as a set of reals.

    Returns:
        The set, or None if it cannot be read; and the name of the unknown, None if it is bound.
    """
    from sympy import Complement, EmptySet, Interval, Set, Union

    builder = _BUILDER.fullmatch(text.strip())
    if builder:
        text = builder["condition"]
    if _RELATION.search(text):
        alternatives = [_conjunction(part) for part in split_outside(text, _OR)]
        names = {name for _, names in alternatives for name in names}
        if len(names) != 1 or any(region is None for region, _ in alternatives):
            return None, None
        name = None if builder else names.pop()
        return Union(*(region for region, _ in alternatives)), name

    parsed = _parse(_MEMBER.sub("", text))
    region = parsed[0] if parsed else None
    if isinstance(region, Interval | Union | Complement) or region is EmptySet:
        return region, None
    inside = isinstance(region, Set) and region.is_subset(_reals())
    return (region if inside else None), None


def _conjunction(text: str) -> tuple[Any, set[str]]:
    """Read inequalities joined by "and": their set, or None, and the names of their variables."""
    from math_verify.grader import is_relation, unwrap_fcs
    from sympy import Intersection

    regions, names = [], set[str]()
    for part in split_outside(text, _AND):
        parsed = _parse(part)
        if not parsed or not is_relation(parsed[0]) or len(parsed[0].free_symbols) != 1:
            return None, names
        relation = unwrap_fcs(parsed[0])
        names |= {str(symbol) for symbol in relation.free_symbols}
        try:
            regions.append(relation.as_set())
        except Exception:
            return None, names
    return Intersection(*regions), names


def _same_region(mine: Any, target: Any) -> bool:
    """Whether two sets are equal.

    Sets of intervals and points are compared piece by piece, and other sets by their symmetric
    difference.
    """
    if mine == target:
        return True
    ours, theirs = _pieces(mine), _pieces(target)
    if ours is not None and theirs is not None:
        return len(ours) == len(theirs) and all(
            kind == other and all(_same_end(a, b) for a, b in zip(ends, others, strict=True))
            for (kind, ends), (other, others) in zip(ours, theirs, strict=True)
        )
    return mine.symmetric_difference(target).is_empty is True


def _pieces(region: Any) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]] | None:
    """List a set's intervals and points from left to right, each as its kind and its ends.

    Returns:
        None if the set has other pieces.
    """
    from sympy import Complement, FiniteSet, Interval, Union

    if isinstance(region, Complement):
        return None
    pieces: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    for piece in region.args if isinstance(region, Union) else [region]:
        if isinstance(piece, Interval):
            kind = ("interval", bool(piece.left_open), bool(piece.right_open))
            pieces.append((kind, (piece.start, piece.end)))
        elif isinstance(piece, FiniteSet):
            pieces += [(("point",), (point,)) for point in piece.args]
        else:
            return None
    return sorted(pieces, key=lambda piece: float(piece[1][0]))


def _same_end(mine: Any, target: Any) -> bool:
    return bool(mine == target) or bool(
        mine.is_finite and target.is_finite and _same_value(target, mine)
    )


def _reals() -> Any:
    from sympy import S

    return S.Reals


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def _end_without_parent(seconds: float) -> None:
    """End this process by a signal after `seconds`, in case the parent is gone; 0 cancels it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
