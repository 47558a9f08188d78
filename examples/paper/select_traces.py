"""Take the rows that a recipe trains on from a larger file, as they stand there.

    python examples/paper/select_traces.py out/sampled.jsonl --tokens 4096:8192 --rows 3200 -o traces.jsonl
    python examples/paper/select_traces.py open-r1.parquet --rows 20000 -o answers.jsonl

With ``--tokens`` a row must say how many tokens its response has, as those of `flexalign sample` do,
and responses that were cut off are left out. The first rows that fit are taken, in the file's order.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from flexalign.data.files import BadRow, read_rows


def fitting(path: Path, least: int, most: int | None) -> Iterator[dict[str, Any]]:
    """Give the rows whose response is whole and has a number of tokens from `least` to `most`."""
    for row in read_rows(path):
        if isinstance(row, BadRow):
            continue
        if most is None or (not row.value["truncated"] and least <= row.value["tokens"] <= most):
            yield row.value


def main() -> None:
    """Write the rows, and say so if there are too few."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--tokens", default="0:", help="least and most tokens of a response, as 4096:8192"
    )
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()

    least, most = options.tokens.split(":")
    rows = list(
        islice(fitting(options.file, int(least), int(most) if most else None), options.rows)
    )
    if not rows:
        sys.exit(
            f"error: {options.file} has no row of {options.tokens} tokens; sample more prompts."
        )

    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    options.output.write_text("".join(lines), encoding="utf-8")
    print(f"{options.output}: {len(rows)} rows")
    if len(rows) < options.rows:
        print(
            f"{options.rows - len(rows)} fewer than asked for: sample more prompts.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
