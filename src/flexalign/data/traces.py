"""Making traces: sampled responses to prompts, written so that a broken-off run can go on.

Work is done in blocks of `batch_size` (prompt, sample) pairs in file order, and every pair has
a seed of its own, derived from the run's seed and the pair's two indices. A run that goes on
makes the block in which it was broken off again and keeps what is missing, so the finished file
equals that of an uninterrupted run.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexalign.data.rendering import Prompt
from flexalign.data.trace_run import SamplingSettings

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Generate", "TraceSummary", "derive_seed", "make_traces"]


class Sampled(Protocol):
    """What a generator returns for one prompt."""

    @property
    def text(self) -> str:
        """The response, thinking tags kept, without the end token."""

    @property
    def tokens(self) -> int | None:
        """Its length in tokens, if known."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut off by the limit on new tokens."""


Generate = Callable[[Sequence[Prompt], Sequence[int]], Sequence[Sampled]]
"""Answers prompts, given one seed for each; a generator that seeds a batch takes the first."""


@dataclass(frozen=True)
class TraceSummary:
    """What a finished file holds.

    Attributes:
        prompts: Prompts answered.
        rows: Rows in the file.
        made: Rows that this run added.
        truncated: Rows cut off by `max_new_tokens`.
        empty: Rows whose response has no text; `load_traces` counts them as bad rows.
        mean_tokens: Mean length of the responses, in tokens; None if no length is known.
    """

    prompts: int
    rows: int
    made: int
    truncated: int
    empty: int
    mean_tokens: float | None

    def to_json(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return asdict(self)


def make_traces(
    prompts: "Dataset",
    output: Path,
    generate: Generate,
    settings: SamplingSettings,
    *,
    done: int = 0,
    progress: Callable[[int], None] | None = None,
    render: Callable[[Prompt], str] | None = None,
) -> TraceSummary:
    """Answer every prompt `samples` times and append the responses to `output`.

    Rows are `prompt` and `completion` (messages, or text after a plain prompt), `answer` if the
    prompt has one, `prompt_index`, `sample`, `tokens` and `truncated`; `load_traces` reads them.

    Args:
        prompts: As `load_prompts` returns them.
        output: The JSONL file that `open_run` prepared.
        generate: Makes the responses.
        settings: How many, and with which seeds.
        done: Rows already in the file, from `open_run`.
        progress: Called with the number of rows after each block.
        render: Renders a prompt of messages as text; needed where `settings.plain` is set.
    """
    pairs = [(index, sample) for index in range(len(prompts)) for sample in range(settings.samples)]
    with output.open("a", encoding="utf-8", newline="\n") as file:
        for start in range(0, len(pairs), settings.batch_size):
            block = pairs[start : start + settings.batch_size]
            if done >= start + len(block):
                continue
            rows = [prompts[index] for index, _ in block]
            responses = generate(
                [row["prompt"] for row in rows],
                [derive_seed(settings.seed, *pair) for pair in block],
            )
            made = [
                _trace(row, pair, response, render if settings.plain else None)
                for row, pair, response in zip(rows, block, responses, strict=True)
            ]
            file.writelines(
                json.dumps(row, ensure_ascii=False) + "\n" for row in made[max(done - start, 0) :]
            )
            file.flush()
            os.fsync(file.fileno())
            if progress is not None:
                progress(start + len(block))
    return _summarise(output, len(prompts), made=len(pairs) - done)


def derive_seed(seed: int, *place: int | str) -> int:
    """The seed of one response: 31 bits from the run's seed and the response's place in it."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *place))).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _trace(
    row: dict[str, Any],
    pair: tuple[int, int],
    response: Sampled,
    render: Callable[[Prompt], str] | None,
) -> dict[str, Any]:
    prompt: Prompt = row["prompt"]
    if render is not None:
        prompt = render(prompt)
    completion: Any = response.text
    if not isinstance(prompt, str):
        completion = [{"role": "assistant", "content": response.text}]
    answer = {"answer": row["answer"]} if row.get("answer") is not None else {}
    return {
        "prompt": prompt,
        "completion": completion,
        **answer,
        "prompt_index": pair[0],
        "sample": pair[1],
        "tokens": response.tokens,
        "truncated": response.truncated,
    }


def _summarise(output: Path, prompts: int, made: int) -> TraceSummary:
    rows = list(_read(output))
    lengths = [row["tokens"] for row in rows if row["tokens"] is not None]
    return TraceSummary(
        prompts=prompts,
        rows=len(rows),
        made=made,
        truncated=sum(row["truncated"] for row in rows),
        empty=sum(not _response(row).strip() for row in rows),
        mean_tokens=sum(lengths) / len(lengths) if lengths else None,
    )


def _response(row: dict[str, Any]) -> str:
    completion = row["completion"]
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _read(output: Path) -> Iterator[dict[str, Any]]:
    with output.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
