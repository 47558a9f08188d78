"""Ask a served dial questions of several turns, each turn at a λ of its own.

    python examples/paper/ask_in_turns.py http://localhost:8000/v1 mt_bench.jsonl --lambda 1.5,0.5 \
        -o out/mt_bench-1.5-0.5.jsonl

Rows have ``turns`` (MT-Bench, Arena-Hard), ``instruction`` (AlpacaEval) or ``prompt``. Turns beyond the
last λ are asked at that one. Decoding is greedy, as the paper's. Every row is written with the λ and
the answers, and as AlpacaEval's judge reads them, with ``output`` and ``generator``; rows that are in
the file already are not asked again.
"""

import argparse
import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexalign.data.files import Row, read_rows


def turns_of(row: dict[str, Any]) -> list[str]:
    """Return what is asked, one text a turn."""
    turns = row.get("turns") or [row.get("instruction") or row["prompt"]]
    return [turn["content"] if isinstance(turn, dict) else turn for turn in turns]


def answer(url: str, turns: Sequence[str], lams: Sequence[float], limit: int) -> list[str]:
    """Hold one conversation and return its answers, without their thinking."""
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        body = {
            "messages": messages,
            "lambda": lams[min(number, len(lams) - 1)],
            "temperature": 0,
            "max_tokens": limit,
        }
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps({"model": served(url), **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            said = json.load(reply)["choices"][0]["message"]
        messages.append({"role": "assistant", "content": said["content"] or ""})
    return [message["content"] for message in messages[1::2]]


def served(url: str) -> str:
    """Return the name of the model that is served."""
    with urllib.request.urlopen(f"{url}/models") as reply:
        return str(json.load(reply)["data"][0]["id"])


def main() -> None:
    """Ask what is missing and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--lambda", dest="lams", required=True, help="one a turn, such as 1.5,0.5")
    parser.add_argument("--max-new-tokens", type=int, default=4096)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    lams = [float(lam) for lam in options.lams.split(",")]

    rows = [row.value for row in read_rows(options.questions) if isinstance(row, Row)]
    rows = rows[: options.limit]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = len(options.output.read_text("utf-8").splitlines()) if options.output.exists() else 0

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        answers = answer(options.url, turns_of(row), lams, options.max_new_tokens)
        name = f"lambda={options.lams}"
        return {**row, "lambda": lams, "answers": answers, "output": answers[-1], "generator": name}

    with (
        ThreadPoolExecutor(options.concurrency) as pool,
        options.output.open("a", encoding="utf-8") as file,
    ):
        for made in pool.map(ask, rows[done:]):
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{options.output}: {len(rows)} conversations, {len(rows) - done} made now")


if __name__ == "__main__":
    main()
