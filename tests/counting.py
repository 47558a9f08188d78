"""How often a λ is made into a dial, checked to be a number, and held against a range."""

import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from flexalign import lambdas
from flexalign.lambdas import Adaptive, AnyDial, Dial, Fixed, Route, Schedule, extremes


def count_lambda(monkeypatch: pytest.MonkeyPatch, lam: float) -> Counter[str]:
    """Count from now on what is done to one λ: ``dials``, ``numbers``, ``parses``, ``ranges``.

    Args:
        monkeypatch: What ends the counting.
        lam: The λ; choose one that nothing else is.
    """
    counts: Counter[str] = Counter()

    def watch(kind: type[Any]) -> None:
        made = kind.__post_init__

        def count(self: Any) -> None:
            made(self)
            counts["dials"] += lam in extremes(self)

        monkeypatch.setattr(kind, "__post_init__", count)

    for kind in (Fixed, Schedule, Adaptive, Route):
        watch(kind)

    finite, parse, outside = lambdas.finite_lambda, lambdas.parse_any_dial, lambdas.outside_range

    def count_number(value: object, name: str) -> float:
        counts["numbers"] += value == lam
        return finite(value, name)

    def count_parse(value: object) -> AnyDial:
        counts["parses"] += not isinstance(value, Dial)
        return parse(value)

    def count_range(dial: Dial, permitted: tuple[float, float]) -> float | None:
        counts["ranges"] += lam in extremes(dial)
        return outside(dial, permitted)

    for original, counting in (
        (finite, count_number),
        (parse, count_parse),
        (outside, count_range),
    ):
        _replace(monkeypatch, original, counting)
    return counts


def _replace(monkeypatch: pytest.MonkeyPatch, original: Any, other: Any) -> None:
    """Replace a function wherever a module of flexalign has it."""
    for module in [one for name, one in sys.modules.items() if name.startswith("flexalign")]:
        if isinstance(module, ModuleType) and vars(module).get(original.__name__) is original:
            monkeypatch.setattr(module, original.__name__, other)
