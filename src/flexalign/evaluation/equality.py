"""Whether two answers are equal mathematically: the program that a worker process runs.

It reads one JSON object a line, ``{"found": …, "expected": …, "seconds": …}``, and answers with
one of `EQUAL`, `UNEQUAL` and `UNPARSED`. It may hang, use up its memory or crash on what a model
wrote; its parent sees to that.
"""

import contextlib
import json
import logging
import math
import signal
import sys
from typing import Any

from flexalign.evaluation.answers import as_number, for_mathematics, normalise

EQUAL, UNEQUAL, UNPARSED, READY = "equal", "unequal", "unparsed", "ready"

_MEMORY_BYTES = 2 * 1024**3
_DIGITS = 6


def compare(found: str, expected: str) -> str:
    """Compare an answer with the known one by math-verify.

    Six decimal places count, and of a known answer below 1 six significant digits.

    Returns:
        `UNPARSED` if no mathematics can be made of `found` (or of `expected`), else the verdict.
    """
    from math_verify import verify
    from sympy import Basic, MatrixBase

    unit = (
        as_number(normalise(expected)) is not None or "\\text" in expected or "\\mbox" in expected
    )
    mine, target = (
        [e for e in _parse(for_mathematics(text, unit=unit)) if isinstance(e, Basic | MatrixBase)]
        for text in (found, expected)
    )
    if not mine or not target:
        return UNPARSED
    rounding = _decimals(target[0])
    equal = verify(
        target, mine, float_rounding=rounding, allow_set_relation_comp=True, timeout_seconds=None
    )
    return EQUAL if equal else UNEQUAL


def main() -> None:
    """Answer requests until the input ends."""
    import math_verify  # noqa: F401  (loaded before the first answer's time starts)

    logging.disable(logging.WARNING)
    replies = sys.stdout
    sys.stdout = sys.stderr
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
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    readers = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parsed: list[Any] = parse(
        f"\\boxed{{{text}}}", extraction_config=readers, parsing_timeout=None, raise_on_error=True
    )
    return parsed


def _decimals(expected: Any) -> int:
    if not getattr(expected, "is_number", False) or not expected.is_real or expected == 0:
        return _DIGITS
    return max(_DIGITS, _DIGITS - math.ceil(math.log10(abs(float(expected)))))


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def _end_without_parent(seconds: float) -> None:
    """Let the system end this process, should nobody be left to do it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
