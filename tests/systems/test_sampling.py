"""Traces sampled from Python; what the command makes of them is in tests/cli/test_sample.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from chat_server import say
from flexalign.data import LogitsSettings, SamplingSettings, load_traces
from flexalign.errors import ConfigError, LambdaError
from flexalign.systems import SystemOptions, parse_system, sample


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n}+2?"}) + "\n" for n in range(3)))
    return path


def test_a_call_writes_what_training_reads(tiny_pair, questions: Path, tmp_path: Path):
    output, told = tmp_path / "traces.jsonl", []
    settings = SamplingSettings(samples=2, max_new_tokens=5, batch_size=4)
    summary = sample(tiny_pair.reference, questions, output, settings, progress=told.append)
    assert (summary.prompts, summary.rows, summary.made) == (3, 6, 6)
    assert told == [4, 6]
    assert len(load_traces(output, skip_bad_rows=True)) == 6 - summary.empty

    again = sample(f"model:{tiny_pair.reference}", questions, output, settings)
    assert (again.rows, again.made) == (6, 0)
    with pytest.raises(ConfigError, match="belongs to another run"):
        sample(tiny_pair.aligned, questions, output, settings)


def test_limits_and_penalties_belong_to_the_run(tiny_pair, questions: Path, tmp_path: Path):
    def rows(name: str, **settings: Any) -> list[str]:
        output = tmp_path / name
        sample(
            tiny_pair.reference, questions, output, SamplingSettings(max_new_tokens=6, **settings)
        )
        return output.read_text("utf-8").splitlines()

    greedy = rows("greedy.jsonl", temperature=0)
    assert rows("likeliest.jsonl", logits=LogitsSettings(top_k=1)) == greedy
    penalised = LogitsSettings(repetition_penalty=1.5)
    assert rows("penalised.jsonl", temperature=0, logits=penalised) != greedy

    def recorded(name: str) -> dict[str, Any]:
        text = (tmp_path / f"{name}.manifest.json").read_text("utf-8")
        return dict(json.loads(text)["settings"])

    # A run without them has the manifest that earlier versions wrote.
    earlier = {"samples", "max_new_tokens", "temperature", "top_p", "batch_size", "seed", "plain"}
    assert set(recorded("greedy.jsonl")) == earlier
    assert recorded("likeliest.jsonl")["top_k"] == 1
    with pytest.raises(ConfigError, match="belongs to another run"):
        rows("likeliest.jsonl", logits=LogitsSettings(top_k=2))
    with pytest.raises(ConfigError, match="belongs to another run"):
        rows("likeliest.jsonl")


def test_a_limit_takes_the_first_prompts(tiny_pair, questions: Path, tmp_path: Path):
    output = tmp_path / "traces.jsonl"
    settings = SamplingSettings(max_new_tokens=3)
    assert sample(tiny_pair.reference, questions, output, settings, limit=2).rows == 2


def test_a_server_is_asked_for_its_only_model(serve, questions: Path, tmp_path: Path):
    def answer(path: str, body: Any) -> Any:
        return (200, {"data": [{"id": "only"}]}) if path.endswith("/models") else say("4")

    server = serve(answer)
    output = tmp_path / "traces.jsonl"
    assert sample(f"url:{server.url}", questions, output).rows == 3
    [row, *_] = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert row["completion"] == [{"role": "assistant", "content": "4"}]
    manifest = json.loads((tmp_path / "traces.jsonl.manifest.json").read_text("utf-8"))
    assert manifest["source"] == {"endpoint": server.url, "model": "only"}


@pytest.mark.parametrize(
    ("dial", "ends", "far"),
    [
        # At λ = 1 the likeliest tokens may be the reference's.
        ("dial:miniature,miniature:dial", ["miniature:reference"], 3),
        ("dial:miniature,miniature:fast", ["miniature:reference"], 1),
        ("pair:miniature", ["miniature:reference", "miniature:aligned"], 3),
    ],
)
def test_a_dial_is_sampled_at_its_lambda(
    dial: str, ends: list[str], far: float, questions: Path, tmp_path: Path
):
    settings = SamplingSettings(max_new_tokens=24, temperature=0)

    def texts(system: str, lam: object = None) -> list[str]:
        output = tmp_path / f"{system}-{lam}.jsonl"
        sample(system, questions, output, settings, lam=lam)
        rows = map(json.loads, output.read_text("utf-8").splitlines())
        return [row["completion"][0]["content"] for row in rows]

    for lam, end in enumerate(ends):
        assert texts(dial, lam) == texts(end)
    assert texts(dial, 0) != texts(dial, far)


def test_the_lambda_belongs_to_the_run(questions: Path, tmp_path: Path):
    output = tmp_path / "traces.jsonl"
    settings = SamplingSettings(max_new_tokens=4)
    sample("dial:miniature,miniature:dial", questions, output, settings, lam=2)
    with pytest.raises(ConfigError, match="lambda"):
        sample("dial:miniature,miniature:dial", questions, output, settings, lam=3)
    manifest = json.loads((tmp_path / "traces.jsonl.manifest.json").read_text("utf-8"))
    assert manifest["source"]["lambda"] == {"policy": "fixed", "lambda": 2.0}
    assert manifest["source"]["beside"]["name"] == "miniature:dial"


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("miniature", {"temperature": 0.0}, "options.temperature .* settings.temperature says it"),
        ("miniature", {"template": {"enable_thinking": False}}, "prompting.template says it"),
        ("pair:miniature", {"gate": 0.1}, "options.gate .* sampled without a gate"),
        ("miniature", {"lambda_range": (0, 2)}, "options.lambda_range .* has no dial"),
        ("miniature", {"model_name": "m"}, "options.model_name .* is no server"),
        ("url:http://127.0.0.1:9", {"dtype": "float16"}, "options.dtype .* a server has its own"),
    ],
)
def test_options_that_have_no_effect_on_traces_are_refused(
    questions: Path, tmp_path: Path, system: str, options: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        sample(system, questions, tmp_path / "traces.jsonl", options=SystemOptions(**options))
    assert not (tmp_path / "traces.jsonl").exists()


def test_what_is_no_dial_takes_no_lambda(questions: Path, tmp_path: Path):
    output = tmp_path / "traces.jsonl"
    with pytest.raises(ConfigError, match="is sampled as it is"):
        sample("model:miniature", questions, output, lam=1)
    with pytest.raises(ConfigError, match="sampled from models or from a server"):
        sample(parse_system("interpolate:miniature"), questions, output)
    with pytest.raises(ConfigError, match="interpolate:REF,ALIGNED alone has"):
        sample("pair:miniature", questions, output, lam="ladder 0.9,0.6")
    with pytest.raises(LambdaError, match="outside the range"):
        sample("dial:miniature,miniature:dial", questions, output, lam=7)
    assert not output.exists()
