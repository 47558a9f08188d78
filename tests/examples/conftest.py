import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example's folder; its scripts can be imported by name, as they import each other."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield EXAMPLE
    for name in {file.stem for file in EXAMPLE.glob("*.py")} - before:
        sys.modules.pop(name, None)
