"""A run of trace-making on disk: its settings, its manifest, and where it stopped."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexalign.data.formats import data_fingerprint
from flexalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SamplingSettings", "drop_half_line", "open_run"]


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn.

    Attributes:
        samples: Responses per prompt.
        max_new_tokens: Tokens after which a response is cut off.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from, 0 < top_p ≤ 1.
        batch_size: Responses made together.
        seed: Of the whole run.
        plain: Whether rows are written as text (rendered prompt, raw response) instead of
            messages, for templates that would drop a part of the response.
    """

    samples: int = 1
    max_new_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16
    seed: int = 0
    plain: bool = False

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


def open_run(
    prompts: "Dataset", output: Path, settings: SamplingSettings, source: dict[str, Any]
) -> int:
    """Begin a run, or find where an earlier one of the same configuration stopped.

    A last line that was half written is removed. Needs no model, so call it before loading one.

    Args:
        prompts: As `load_prompts` returns them.
        output: The JSONL file; its manifest stands beside it.
        settings: How responses are drawn.
        source: What makes them (a model's name and fingerprint, an endpoint), for the manifest.

    Returns:
        The number of rows that the file already holds.

    Raises:
        ConfigError: If the file is there without a manifest, or with one of another run.
        DataError: If a line before the last is damaged.
    """
    manifest = {
        "format_version": 1,
        "source": source,
        "prompts": {"rows": len(prompts), "fingerprint": data_fingerprint(prompts)},
        "settings": asdict(settings),
    }
    path = output.with_name(output.name + ".manifest.json")
    if path.exists():
        _check_manifest(path, manifest)
    elif output.exists():
        raise ConfigError(
            f"{output} is there already and no manifest says how it was made; "
            "move it away or name another output."
        )
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")
        temporary.replace(path)
    return drop_half_line(output)


def _check_manifest(path: Path, expected: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not a manifest of traces ({error}); move it away or name another output."
        ) from error
    different = [key for key in expected if found.get(key) != expected[key]]
    if different:
        details = "; ".join(
            f"{key}: {json.dumps(found.get(key))} there, {json.dumps(expected[key])} asked"
            for key in different
        )
        raise ConfigError(
            f"{path} belongs to another run ({details}); "
            "repeat that run's options to go on with it, or name another output."
        )


def drop_half_line(output: Path) -> int:
    """Cut a JSONL file after its last whole row.

    Returns:
        How many rows are left; 0 if there is no file.

    Raises:
        DataError: If a whole row is damaged.
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
