import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from flexalign.data import load_traces
from flexalign.data.traces import SamplingSettings, derive_seed, make_traces, open_run
from flexalign.errors import ConfigError, DataError

SETTINGS = SamplingSettings(samples=3, batch_size=4, max_new_tokens=9)
SOURCE = {"model": "m", "fingerprint": "f"}
PROMPTS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"{i}+1?"}], "answer": str(i + 1)} for i in range(5)]
)


@dataclass(frozen=True)
class Said:
    text: str
    tokens: int | None
    truncated: bool


def respond(prompts: Sequence[Any], seeds: Sequence[int]) -> list[Said]:
    """Like a model: every response depends on its whole batch and on the batch's seed."""
    batch = json.dumps([list(prompts), seeds[0]])
    return [
        Said(f"{prompt[0]['content']} {hash(batch)}é", index + 1, index == 3)
        for index, prompt in enumerate(prompts)
    ]


class Killed(BaseException):
    pass


def run(output: Path, generate: Any = respond, settings: SamplingSettings = SETTINGS) -> Any:
    done = open_run(PROMPTS, output, settings, SOURCE)
    return make_traces(PROMPTS, output, generate, settings, done=done)


def test_every_prompt_is_answered_samples_times(tmp_path: Path) -> None:
    output = tmp_path / "new" / "traces.jsonl"
    seen: list[int] = []
    done = open_run(PROMPTS, output, SETTINGS, SOURCE)
    summary = make_traces(PROMPTS, output, respond, SETTINGS, done=done, progress=seen.append)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [(row["prompt_index"], row["sample"]) for row in rows] == [
        (prompt, sample) for prompt in range(5) for sample in range(3)
    ]
    assert all(row["prompt"] == PROMPTS[row["prompt_index"]]["prompt"] for row in rows)
    assert all(
        row["completion"][0]["content"].startswith(row["prompt"][0]["content"]) for row in rows
    )
    assert all(row["answer"] == PROMPTS[row["prompt_index"]]["answer"] for row in rows)
    assert seen == [4, 8, 12, 15]
    assert summary.to_json() == {
        "prompts": 5,
        "rows": 15,
        "made": 15,
        "truncated": 3,
        "empty": 0,
        "mean_tokens": pytest.approx((3 * (1 + 2 + 3 + 4) + 1 + 2 + 3) / 15),
    }
    loaded = load_traces(output)
    assert len(loaded) == 15
    assert loaded[0]["completion"] == rows[0]["completion"]


@pytest.mark.parametrize("kept", range(0, 2000, 97))
def test_a_run_cut_off_at_any_byte_ends_in_the_same_file(tmp_path: Path, kept: int) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(whole)
    run(cut)
    content = whole.read_bytes()
    cut.write_bytes(content[:kept])
    summary = run(cut)
    assert cut.read_bytes() == content
    assert summary.made == 15 - content[:kept].count(b"\n")


def test_a_generator_that_dies_loses_no_finished_block(tmp_path: Path) -> None:
    calls: list[int] = []

    def dies(prompts: Sequence[Any], seeds: Sequence[int]) -> list[Said]:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise Killed
        return respond(prompts, seeds)

    output = tmp_path / "traces.jsonl"
    with pytest.raises(Killed):
        run(output, dies)
    assert open_run(PROMPTS, output, SETTINGS, SOURCE) == 8
    assert run(output).made == 7
    assert run(output, generate=None).made == 0


def test_seeds_belong_to_prompt_and_sample() -> None:
    seeds = {derive_seed(s, p, k) for s in range(3) for p in range(30) for k in range(30)}
    assert len(seeds) == 2700
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, 12, 3) == derive_seed(0, 12, 3) != derive_seed(0, 1, 23)


def test_plain_prompts_give_plain_traces(tmp_path: Path) -> None:
    prompts = Dataset.from_list([{"prompt": "1+2="}])
    output = tmp_path / "traces.jsonl"
    settings = SamplingSettings()

    def say(prompts: Sequence[Any], seeds: Sequence[int]) -> list[Said]:
        return [Said("3", None, False) for _ in prompts]

    open_run(prompts, output, settings, SOURCE)
    summary = make_traces(prompts, output, say, settings)
    assert summary.mean_tokens is None
    assert load_traces(output).to_list() == [{"prompt": "1+2=", "completion": "3"}]


def test_empty_responses_are_kept_and_counted(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"

    def half_silent(prompts: Sequence[Any], seeds: Sequence[int]) -> list[Said]:
        return [Said("" if index % 2 else "3", 0, False) for index, _ in enumerate(prompts)]

    assert run(output, half_silent).empty == 7
    with pytest.warns(UserWarning, match="skipped: 7 of 15 rows"):
        assert len(load_traces(output, skip_bad_rows=True)) == 8


def test_plain_settings_render_the_prompt(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"
    settings = SamplingSettings(plain=True)
    open_run(PROMPTS, output, settings, SOURCE)
    make_traces(
        PROMPTS, output, respond, settings, render=lambda prompt: f"<{prompt[0]['content']}>"
    )
    loaded = load_traces(output)
    assert loaded[2]["prompt"] == "<2+1?>"
    assert loaded[2]["completion"].startswith("2+1? ")


@pytest.mark.parametrize(
    ("settings", "source", "prompts", "message"),
    [
        (SamplingSettings(samples=2, batch_size=4, max_new_tokens=9), SOURCE, PROMPTS, "settings"),
        (SETTINGS, {"model": "other"}, PROMPTS, r'source: .*"m".* there, {"model": "other"} asked'),
        (SETTINGS, SOURCE, PROMPTS.select(range(4)), "prompts"),
    ],
)
def test_the_output_of_another_run_is_refused(
    tmp_path: Path, settings: Any, source: Any, prompts: Any, message: str
) -> None:
    output = tmp_path / "traces.jsonl"
    run(output)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match=rf"another run \({message}"):
        open_run(prompts, output, settings, source)
    assert output.read_bytes() == before


def test_a_run_without_a_row_leaves_its_file_to_any_other(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"
    assert open_run(PROMPTS, output, SETTINGS, {"model": "no such"}) == 0
    output.touch()
    assert run(output).rows == 15
    manifest = json.loads((tmp_path / "traces.jsonl.manifest.json").read_text("utf-8"))
    assert manifest["source"] == SOURCE


def test_a_file_that_is_taken_over_is_not_written_by_two_runs(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"

    def overtaken(prompts: Any, seeds: Any) -> Any:
        open_run(PROMPTS, output, SETTINGS, {"model": "other"})
        return respond(prompts, seeds)

    with pytest.raises(ConfigError, match="was taken over by another run"):
        run(output, overtaken)
    assert output.read_bytes() == b""


def test_a_run_begun_before_manifests_told_of_the_template_goes_on(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "traces.jsonl"
    run(whole)
    run(output)
    output.write_text("".join(output.read_text("utf-8").splitlines(keepends=True)[:5]), "utf-8")
    now = {"template": "t", "arguments": {}, "vocabulary": "v"}
    done = open_run(PROMPTS, output, SETTINGS, SOURCE, now)
    assert done == 5
    make_traces(PROMPTS, output, respond, SETTINGS, done=done, rendering=now)
    assert output.read_bytes() == whole.read_bytes()
    assert len(load_traces(output)) == 15

    asked = {**now, "arguments": {"enable_thinking": False}}
    with pytest.raises(ConfigError, match="of a run without template arguments, by an earlier"):
        open_run(PROMPTS, output, SETTINGS, SOURCE, asked)
    fresh = tmp_path / "fresh.jsonl"
    open_run(PROMPTS, fresh, SETTINGS, SOURCE, now)
    make_traces(PROMPTS, fresh, respond, SETTINGS, rendering=now)
    with pytest.raises(ConfigError, match=r"another run \(rendering"):
        open_run(PROMPTS, fresh, SETTINGS, SOURCE, asked)


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"
    output.write_text("mine")
    with pytest.raises(ConfigError, match="no manifest says how it was made"):
        open_run(PROMPTS, output, SETTINGS, SOURCE)
    assert output.read_text() == "mine"
    (tmp_path / "traces.jsonl.manifest.json").write_text("[")
    with pytest.raises(ConfigError, match="is not a manifest of traces"):
        open_run(PROMPTS, output, SETTINGS, SOURCE)


def test_a_damaged_line_in_the_middle_stops_the_run(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"
    run(output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([*lines[:2], lines[2][:30] + b"\n", *lines[3:]]))
    with pytest.raises(DataError, match="line 3 is damaged; remove that line and all after it"):
        open_run(PROMPTS, output, SETTINGS, SOURCE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"temperature": -1}, "temperature must be a number ≥ 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"temperature": 0, "samples": 2}, "the same response each time"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingSettings(**settings)
