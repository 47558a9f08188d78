"""Traces: sampled responses to prompts, in a file that an interrupted run can continue.

The (prompt, sample) pairs are answered in file order, in blocks of `batch_size`. Every pair has its
own seed, derived from the run's seed and the pair's two indices. A continued run samples the
interrupted block again and writes only the missing rows, so the finished file equals that of an
uninterrupted run.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexalign._storage import write_json
from flexalign.data.formats import data_fingerprint
from flexalign.data.logits import LogitsSettings
from flexalign.data.rendering import Prompt, rendering_record, vocabulary_hash
from flexalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# A run on disk: its settings, its manifest, and the rows that it has written.


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled.

    Attributes:
        samples: Responses per prompt.
        max_new_tokens: Limit on the tokens of a response, which is cut off there.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Probability mass sampled from, 0 < top_p ≤ 1.
        batch_size: Responses sampled together.
        seed: Seed of the whole run.
        plain: Whether rows are written as text (rendered prompt, raw response) instead of
            messages. Training does not need this: it uses the token ids that were sampled.
        logits: Limits on tokens, penalties and biases, such as ``LogitsSettings(top_k=20)``.

    Raises:
        ConfigError: If a value is out of range, or several samples are asked at temperature 0.
    """

    samples: int = 1
    max_new_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16
    seed: int = 0
    plain: bool = False
    logits: LogitsSettings = field(default_factory=LogitsSettings)

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature must be a number ≥ 0 (0 is greedy), got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"samples is {self.samples} at temperature 0, which would write the same response "
                "each time; raise the temperature or take one sample."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings by name, for a manifest; of `logits` those that have an effect."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "logits"}
        return own | self.logits.to_json()


def open_run(
    prompts: "Dataset",
    output: Path,
    settings: SamplingSettings,
    source: dict[str, Any],
    rendering: dict[str, Any] | None = None,
) -> int:
    """Begin a run, or find where an earlier run of the same configuration stopped.

    Writes the manifest, or compares it. A manifest without a row beside it, as a run leaves it that
    failed before its first one, is written anew. Removes an incomplete last line. Needs no model,
    so call it before loading one.

    Args:
        prompts: As `load_prompts` returns them.
        output: The JSONL file; its manifest is in the same folder.
        settings: How responses are sampled.
        source: What generates them (a model's name and fingerprint, an endpoint), for the
            manifest.
        rendering: What the sampled token ids depend on, from `sampling_record`; None if it is not
            known.

    Returns:
        The number of rows that the file already holds.

    Raises:
        ConfigError: If the file exists without a manifest, or has rows of another run.
        DataError: If a line before the last is damaged.
    """
    manifest = {
        "format_version": 1,
        "source": source,
        "prompts": {"rows": len(prompts), "fingerprint": data_fingerprint(prompts)},
        "settings": settings.to_json(),
    }
    if rendering is not None:
        manifest["rendering"] = rendering

    path = _manifest_of(output)
    if path.exists():
        different = _manifest_differences(path, manifest)
        rows = drop_half_line(output)
        if different and rows:
            raise ConfigError(
                f"{path} belongs to another run ({different}); "
                "repeat that run's options to go on with it, or name another output."
            )
        if different:
            write_json(path, manifest)
        return rows

    if output.exists():
        raise ConfigError(
            f"{output} is there already and no manifest says how it was made; "
            "move it away or name another output."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)
    return 0


def _manifest_of(output: Path) -> Path:
    return output.with_name(output.name + ".manifest.json")


def _manifest_differences(path: Path, expected: dict[str, Any]) -> str:
    """Say in what the manifest on disk is not that of this run; empty if it is.

    A manifest by an earlier version has no `rendering`; it is then not compared.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not a manifest of traces ({error}); move it away or name another output."
        ) from error

    _require_rendering_known(path, found, expected)
    different = [
        key
        for key in expected
        if key in found or key != "rendering"
        if found.get(key) != expected[key]
    ]
    return "; ".join(
        f"{key}: {json.dumps(found.get(key))} there, {json.dumps(expected[key])} asked"
        for key in different
    )


def _require_rendering_known(path: Path, found: Any, expected: dict[str, Any]) -> None:
    """Check that a run whose manifest has no `rendering` is continued without template arguments.

    An earlier version began it, and that version had no template arguments.

    Raises:
        ConfigError: If template arguments are asked for such a run.
    """
    arguments = (expected.get("rendering") or {}).get("arguments")
    if arguments and isinstance(found, dict) and "rendering" not in found:
        raise ConfigError(
            f"{path} is of a run without template arguments, by an earlier version, and "
            f"{json.dumps(arguments)} are asked; leave them out to go on with it, or name another "
            "output."
        )


def drop_half_line(output: Path) -> int:
    """Truncate a JSONL file after its last complete line.

    Returns:
        The number of rows left; 0 if there is no file.

    Raises:
        DataError: If a complete line is not JSON.
    """
    if not output.exists():
        return 0

    rows, end = 0, 0
    with output.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            whole = line.endswith(b"\n")
            if whole and not _is_json(line):
                raise DataError(
                    f"{output}: line {number} is damaged; remove that line and all after it, "
                    "then run again."
                )
            if whole:
                rows, end = number, end + len(line)
        file.truncate(end)
    return rows


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# Sampling.


class Sampled(Protocol):
    """The response that a generator returns for one prompt.

    A generator that knows the sampled token ids also has them as `token_ids`.
    """

    @property
    def text(self) -> str:
        """The response with its thinking tags, without the stop token."""

    @property
    def tokens(self) -> int | None:
        """Its length in tokens; None if it is not known."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut off by the limit on new tokens."""


Generate = Callable[[Sequence[Prompt], Sequence[int]], Sequence[Sampled]]
"""Answers prompts, given one seed for each; a generator with one seed a batch uses the first."""


@dataclass(frozen=True)
class TraceSummary:
    """The counts of a finished file.

    Attributes:
        prompts: Prompts answered.
        rows: Rows in the file.
        made: Rows that this call added.
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
    rendering: dict[str, Any] | None = None,
) -> TraceSummary:
    """Answer every prompt `samples` times and append the responses to `output`.

    Rows are `prompt` and `completion` (messages, or text after a plain prompt), `answer` if the
    prompt has one, `prompt_index`, `sample`, `tokens` and `truncated`; `load_traces` reads them.
    Where the generator returns the sampled token ids, a row also has them as `response_ids`,
    without the stop token, and `rendering`, the record of how the prompt was rendered. Training
    uses these ids and does not tokenize the response again.

    Args:
        prompts: As `load_prompts` returns them.
        output: The JSONL file that `open_run` prepared.
        generate: Returns the responses to a block of prompts, in order.
        settings: How responses are sampled.
        done: Rows already in the file, from `open_run`.
        progress: Called with the number of rows after each block.
        render: Renders a prompt of messages as text; used only where `settings.plain` is set.
        rendering: The same record as for `open_run`.

    Raises:
        ConfigError: If the file had no row, and another run has taken it over.
    """
    manifest = _manifest_bytes(output)
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
                _trace(row, pair, response, render if settings.plain else None, rendering)
                for row, pair, response in zip(rows, block, responses, strict=True)
            ]

            if not output.stat().st_size and _manifest_bytes(output) != manifest:
                raise ConfigError(
                    f"{output} was taken over by another run while this one had no row; name "
                    "another output."
                )
            # Of a block that was interrupted, only the rows that are not yet in the file.
            file.writelines(
                json.dumps(row, ensure_ascii=False) + "\n" for row in made[max(done - start, 0) :]
            )
            file.flush()
            os.fsync(file.fileno())
            if progress is not None:
                progress(start + len(block))
    return _summarise(output, len(prompts), made=len(pairs) - done)


def _manifest_bytes(output: Path) -> bytes | None:
    path = _manifest_of(output)
    return path.read_bytes() if path.exists() else None


def sampling_record(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what sampled ids depend on: vocabulary, chat template and template arguments."""
    return {**rendering_record(tokenizer), "vocabulary": vocabulary_hash(tokenizer)}


def derive_seed(seed: int, *place: int | str) -> int:
    """Derive a response's seed, 31 bits, from the run's seed and the response's indices."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *place))).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _trace(
    row: dict[str, Any],
    pair: tuple[int, int],
    response: Sampled,
    render: Callable[[Prompt], str] | None,
    rendering: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return one response as a row of the output file."""
    prompt: Prompt = row["prompt"]
    if render is not None:
        prompt = render(prompt)
    completion: Any = response.text
    if not isinstance(prompt, str):
        completion = [{"role": "assistant", "content": response.text}]
    answer = {"answer": row["answer"]} if row.get("answer") is not None else {}

    # A server returns text only.
    ids = getattr(response, "token_ids", None)
    sampled: dict[str, Any] = {} if ids is None else {"response_ids": list(ids)}
    if sampled and rendering is not None:
        sampled["rendering"] = rendering

    return {
        "prompt": prompt,
        "completion": completion,
        **answer,
        "prompt_index": pair[0],
        "sample": pair[1],
        "tokens": response.tokens,
        "truncated": response.truncated,
        **sampled,
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
