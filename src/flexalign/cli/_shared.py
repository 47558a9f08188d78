"""What every command shares: where output goes, how JSON is printed, how a λ is read."""

import json
import math
from typing import Any

from rich.console import Console

from flexalign.errors import LambdaError

console = Console(stderr=True, highlight=False)
"""Everything for people goes to stderr; stdout carries the result alone."""

result_console = Console(highlight=False)
"""The result of a command, when it is not JSON."""


def print_json(value: Any) -> None:
    """Print one JSON document, alone, on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def parse_lambdas(text: str) -> list[float]:
    """Read ``--lambda 0,0.5,1``.

    Raises:
        LambdaError: If a part is not a finite number.
    """
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise LambdaError(
                f"--lambda: {part.strip()!r} is not a finite number; "
                "write one number or several with commas, such as 0,0.5,1."
            )
        values.append(value)
    return values
