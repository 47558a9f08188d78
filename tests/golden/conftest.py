"""Figures as they were when they were recorded: the fixture that compares with them."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RECORD = "FLEXALIGN_GOLDEN"
FOLDER = Path(__file__).parent / "figures"
RELATIVE, SMALLEST = 1e-9, 1e-12
DIGITS = 13
"""How many digits of a figure are kept in the files."""

BISECTED, BISECTION = (
    ("difference", "accuracy_change_ci", "advantage", "strength", "tune_margin"),
    1e-9,
)
"""Figures that were recorded from a bisection, which stops within 1e-9 of what it looks for: the
score limits of a paired difference, the bounds of a proof's looks and the margin that `tune`
proves. An exact solution moves them by up to 5e-10, and no other figure beyond RELATIVE."""


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Compare a JSON value with the recorded one: ``golden(name, value)``.

    Numbers agree to 1e-9 of their size, or to 1e-12 near zero; whole numbers, texts, keys and
    their order agree exactly. With FLEXALIGN_GOLDEN=record in the environment the value is
    written to tests/golden/figures/NAME.json instead, and the test is skipped at its end.
    """

    def check(name: str, value: Any) -> None:
        path = FOLDER / f"{name}.json"
        if os.environ.get(RECORD) == "record":
            FOLDER.mkdir(exist_ok=True)
            path.write_text(_text(_rounded(value)), encoding="utf-8")
            # What was just written cannot be compared with itself: recording must not look like passing.
            request.addfinalizer(lambda: pytest.skip(f"{path.name} was recorded"))
            return
        recorded = json.loads(path.read_text(encoding="utf-8"))
        moved = list(differences(recorded, json.loads(json.dumps(value)), ""))
        assert not moved, f"{name}: {len(moved)} figures moved:\n" + "\n".join(moved[:20])

    return check


def differences(recorded: Any, found: Any, place: str) -> Iterator[str]:
    """Say where two JSON values differ by more than the tolerance."""
    if isinstance(recorded, dict) and isinstance(found, dict) and list(recorded) == list(found):
        for key in recorded:
            yield from differences(recorded[key], found[key], f"{place}/{key}")
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for index, pair in enumerate(zip(recorded, found, strict=True)):
            yield from differences(*pair, f"{place}/{index}")
    elif isinstance(recorded, float) and isinstance(found, float):
        is_bisected = any(f"/{name}" in place for name in BISECTED)
        smallest = BISECTION if is_bisected else SMALLEST
        if not math.isclose(recorded, found, rel_tol=RELATIVE, abs_tol=smallest):
            yield f"{place}: {recorded!r} recorded, {found!r} found ({found - recorded:+.2g})"
    elif type(recorded) is not type(found) or recorded != found:
        yield f"{place}: {recorded!r} recorded, {found!r} found"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _text(value: Any, indent: str = "") -> str:
    """JSON with a line for each row of numbers, and for what is short."""
    line = json.dumps(value, ensure_ascii=False)
    is_numbers = isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    is_plain = not isinstance(value, dict | list) or not value or is_numbers
    if is_plain or len(indent + line) <= 100:
        return line + ("" if indent else "\n")
    inner = indent + " "
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(k, ensure_ascii=False)}: {_text(v, inner)}" for k, v in value.items()
        ]
        opened, closed = "{", "}"
    else:
        parts, (opened, closed) = [_text(v, inner) for v in value], "[]"
    body = ",\n".join(inner + part for part in parts)
    return f"{opened}\n{body}\n{indent}{closed}" + ("" if indent else "\n")
