import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexalign.data.logits import LogitsSettings
from flexalign.data.traces import derive_seed
from flexalign.errors import ConfigError, ServingError
from flexalign.evaluation import sweep as module
from flexalign.evaluation.grading import grade
from flexalign.evaluation.sweep import (
    Sweep,
    SweepResult,
    regrade,
    sample_seed,
    sampling_options,
    sweep_cells,
)
from flexalign.evaluation.tasks import Task, TaskQuestion
from flexalign.inra import InRaModel
from flexalign.lambdas import AS_IT_IS, unique_settings
from flexalign.systems import SystemOptions, open_backend, parse_systems

TASK = Task(
    "sums",
    tuple(
        TaskQuestion(f"q{n}", "what is " + "one plus " * n + "two", str(n + 2)) for n in range(3)
    ),
    instruction="",
)
OPTIONS = SystemOptions(temperature=1.0, top_p=0.9, max_new_tokens=6, batch_size=4)


@pytest.fixture(scope="session")
def adapter(tiny_pair, tmp_path_factory) -> Path:
    """An adapter that is not the identity."""
    model = InRaModel.create(str(tiny_pair.reference))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make(tiny_pair, adapter) -> Callable[..., Sweep]:
    def make(*systems: str, lams=(0, 0.5, 1), **fields) -> Sweep:
        named = {
            "dial": f"dial=dial:{tiny_pair.reference},{adapter}",
            "pair": f"pair=pair:{tiny_pair.reference},{tiny_pair.aligned}",
            "between": f"between=interpolate:{tiny_pair.reference},{tiny_pair.aligned}",
            "ref": f"ref=model:{tiny_pair.reference}",
        }
        texts = [named.get(system, system) for system in systems]
        given = {"samples": 2, "options": OPTIONS} | fields
        return Sweep(parse_systems(texts), [TASK], unique_settings(lams), **given)

    return make


def _rows(output: Path) -> list[dict]:
    with (output / "samples.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _by_place(rows) -> dict[tuple, dict]:
    return {(r["system"], r["setting"], r["question"], r["sample"]): r for r in rows}


def test_all_kinds_agree_at_the_reference(make, tmp_path) -> None:
    """λ = 0 of a dial, a pair and between weights is the reference: equal seeds, equal samples."""
    sweep = make("dial", "pair", "between", "ref", baseline="ref")
    result = sweep.run(tmp_path)
    assert (result.made, result.lost) == (sweep.total, [])
    rows = _by_place(_rows(tmp_path))
    assert len(rows) == sweep.total == 3 * 2 * (3 + 3 + 3 + 1)
    for (system, setting, *place), row in rows.items():
        if setting == "λ=0":
            assert row["response"] == rows["ref", "as it is", *place]["response"], system
    for setting in ("λ=0.5", "λ=1"):
        answers = {
            system: [r["response"] for key, r in rows.items() if key[:2] == (system, setting)]
            for system in ("dial", "pair")
        }
        assert answers["dial"] != answers["pair"]
    cut = {(r["system"], r["setting"]): r["token_cut"] for r in result.summary.to_json()["rows"]}
    assert cut["ref", "as it is"] == cut["dial", "λ=0"] == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == result.summary.to_json()


def test_a_row_says_how_it_came_about(make, tmp_path) -> None:
    sweep = make("dial", lams=[0.5])
    sweep.run(tmp_path)
    row = _by_place(_rows(tmp_path))["dial", "λ=0.5", "q1", 1]
    [answer] = [
        answer
        for outcomes in sweep.backends["dial"].run(sweep.cells(sweep.systems[0]), set())
        for cell, answer in outcomes
        if (cell.question, cell.sample) == ("q1", 1)
    ]
    graded = grade(row["response"], "3", truncated=row["finish"] == "length")
    assert row == {
        "system": "dial",
        "setting": "λ=0.5",
        "lambda": 0.5,
        "policy": None,
        "task": "sums",
        "question": "q1",
        "sample": 1,
        "seed": derive_seed(0, "sums", "q1", 1),
        "prompt_hash": row["prompt_hash"],
        "response": answer.text,
        "tokens": answer.tokens,
        "thinking_tokens": answer.thinking_tokens,
        "rejected_tokens": 0,
        "finish": "length" if answer.truncated else "stop",
        "route": None,
        "confidence": None,
        "status": graded.status,
        "extracted": graded.extracted,
    }
    assert len({r["prompt_hash"] for r in _rows(tmp_path)}) == 3


def test_a_sample_does_not_depend_on_its_batch(make, tmp_path) -> None:
    alone = dataclasses.replace(OPTIONS, batch_size=1)
    wide = dataclasses.replace(OPTIONS, batch_size=64)
    make("dial", "pair", options=alone).run(tmp_path / "alone")
    make("dial", "pair", options=wide).run(tmp_path / "wide")
    assert _by_place(_rows(tmp_path / "alone")) == _by_place(_rows(tmp_path / "wide"))


def test_all_settings_of_a_dial_share_one_prefill(make, tmp_path, monkeypatch) -> None:
    swept = []
    sweep = InRaModel.sweep

    def counted(model, input_ids, *args, lams, **options):
        swept.append((len(input_ids), len(lams)))
        return sweep(model, input_ids, *args, lams=lams, **options)

    monkeypatch.setattr(InRaModel, "sweep", counted)
    make("dial", options=dataclasses.replace(OPTIONS, batch_size=12)).run(tmp_path)
    assert swept == [(4, 3), (2, 3)]


def test_a_coin_falls_by_the_samples_own_seed(make, tmp_path) -> None:
    sweep = make("pair", lams=[0, 1, {"policy": "route", "share": 0.5}], samples=4)
    sweep.run(tmp_path)
    rows = _by_place(_rows(tmp_path))
    routed = {key: row for key, row in rows.items() if row["setting"] == "route 0.5"}
    assert {row["route"] for row in routed.values()} == {"fast", "slow"}
    for (system, _, *place), row in routed.items():
        end = "λ=1" if row["route"] == "fast" else "λ=0"
        assert row["response"] == rows[system, end, *place]["response"]


def test_an_adaptive_dial_thinks_with_the_slow_ways_own_seeds(make, tmp_path) -> None:
    never = {"policy": "adaptive", "threshold": 1}
    always = {"policy": "adaptive", "threshold": 0}
    make("dial", lams=[0, never, always], samples=3).run(tmp_path)
    rows = _by_place(_rows(tmp_path))
    for (system, setting, *place), row in rows.items():
        if setting == "adaptive 1":
            slow = rows[system, "λ=0", *place]
            assert (row["route"], row["response"]) == ("slow", slow["response"])
            assert row["tokens"] == slow["tokens"] + row["rejected_tokens"]
            assert 0 < row["confidence"] < 1
        elif setting == "adaptive 0" and row["route"] == "fast":
            assert row["rejected_tokens"] == 0
    greedy = {row["response"] for row in rows.values() if row["route"] == "fast"}
    assert len(greedy) <= len(TASK.questions)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_broken_off_sweep_goes_on_to_the_same_summary(make, tmp_path, share) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = make("dial", "between").run(whole)
    shutil.copytree(whole, broken)
    (broken / "summary.json").unlink()
    samples = broken / "samples.jsonl"
    content = samples.read_bytes()
    samples.write_bytes(content[: int(share * len(content))])
    resumed = make("dial", "between").run(broken)
    assert 0 < resumed.made < expected.made
    assert samples.read_bytes() == content
    assert (broken / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


def test_a_finished_sweep_loads_no_model(make, tmp_path, monkeypatch) -> None:
    expected = make("dial").run(tmp_path)
    monkeypatch.setattr(InRaModel, "from_pretrained", None)
    assert make("dial").run(tmp_path) == SweepResult(expected.summary, 0, [], expected.total)


def test_another_seed_is_another_configuration(make, tmp_path) -> None:
    make("ref", lams=[]).run(tmp_path)
    with pytest.raises(ConfigError, match=r"sampling\.seed: 0 there, 1 asked"):
        make("ref", lams=[], seed=1).run(tmp_path)


def test_limits_and_penalties_are_another_configuration(make, tmp_path) -> None:
    plain = make("ref", lams=[]).configuration()["sampling"]
    assert set(plain) == {"samples", "seed", "temperature", "top_p", "max_new_tokens", "gate"}

    limited = dataclasses.replace(OPTIONS, logits=LogitsSettings(top_k=1, repetition_penalty=1.2))
    sweep = make("ref", lams=[], options=limited, samples=1)
    sweep.run(tmp_path)
    stored = json.loads((tmp_path / "run.json").read_text("utf-8"))["configuration"]["sampling"]
    assert stored == plain | {"samples": 1, "top_k": 1, "repetition_penalty": 1.2}
    assert sweep.run(tmp_path).made == 0
    with pytest.raises(ConfigError, match=r"sampling\.top_k: 1 there"):
        make("ref", lams=[], samples=1).run(tmp_path)


def test_limits_are_keys_of_the_python_functions() -> None:
    task = dataclasses.replace(TASK)
    options = sampling_options([task], top_k=20, min_p=None, presence_penalty=1.5)
    assert options.logits == LogitsSettings(top_k=20, presence_penalty=1.5)
    both = sampling_options([task], logits=LogitsSettings(min_p=0.1), top_k=20)
    assert both.logits == LogitsSettings(top_k=20, min_p=0.1)
    with pytest.raises(ConfigError, match="top_k must be a whole number"):
        sampling_options([task], top_k=-5)


def test_seeds_differ_by_all_that_they_derive_from() -> None:
    places = [(s, t, q, k) for s in (0, 1) for t in ("a", "b") for q in ("x", "y") for k in (0, 1)]
    assert len({sample_seed(*place) for place in places}) == len(places)
    cells = sweep_cells([TASK], unique_settings([0, 1]), 2)
    seeds = {(c.question, c.sample): c.seed for c in cells}
    assert len(cells) == 12
    assert len(set(seeds.values())) == len(seeds) == 6


def test_stored_samples_are_graded_again(make, tmp_path, monkeypatch) -> None:
    result = make("ref", lams=[]).run(tmp_path)
    rows = _rows(tmp_path)
    for row in rows:
        row |= {"response": "<think>7</think>\\boxed{4}", "status": "wrong", "finish": "stop"}
    rows[0] |= {"response": "<think>7", "finish": "length"}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(text)
    monkeypatch.setattr(module, "open_backend", None)
    summary, changed = regrade(tmp_path)
    right = sum(row["question"] == "q2" for row in rows[1:])
    assert right > 0
    assert summary.to_json()["rows"][0]["accuracy"] == right / len(rows)
    assert summary.to_json()["rows"][0]["truncated"] == 1 / len(rows)
    assert changed == right + 1
    assert summary.environment == result.summary.environment
    assert _rows(tmp_path)[0]["status"] == "truncated"


def test_a_ladder_of_weights_is_measured_beside_a_pair(make, tmp_path) -> None:
    ladder = {"policy": "ladder", "thresholds": [1.0], "lambdas": [1.0, 0.0]}
    sweep = make("pair", "between", lams=[0, ladder])
    sweep.run(tmp_path)
    rows = _by_place(_rows(tmp_path))
    assert len(rows) == sweep.total == 3 * 2 * (1 + 2)
    for question in ("q0", "q1", "q2"):
        for sample in (0, 1):
            row = rows["between", "ladder 1", question, sample]
            slow = rows["between", "λ=0", question, sample]
            # No first answer is sure, and the reference answers as it does alone.
            assert (row["response"], row["route"]) == (slow["response"], "slow")
            assert row["tokens"] == slow["tokens"] + row["rejected_tokens"]
            assert (row["lambda"], row["policy"]) == (
                None,
                {"policy": "ladder", "thresholds": [1.0]},
            )
            assert 0 < row["confidence"] < 1
    [pair] = [one for one in sweep.configuration()["systems"] if one["name"] == "pair"]
    assert [one["id"] for one in pair["settings"]] == ["λ=0"]


@pytest.mark.parametrize(
    ("systems", "fields", "problem"),
    [
        (("ref",), {"lams": [1]}, "no system here can be set to λ=1"),
        (("ref",), {"lams": [], "baseline": "x"}, "'x' is none of the systems"),
        (("between",), {"lams": ["auto"]}, "takes none of the settings"),
        (("between",), {"lams": ["adaptive 0.9"]}, "--lambda, or .* --policy 'ladder 0.9,0.6'"),
        (("between",), {"lams": ["exit 0.9"]}, "--lambda, or .* --policy 'ladder 0.9,0.6'"),
        (
            ("pair",),
            {"lams": ["ladder 0.5"]},
            "pair: ladder 0.5 gives each question weights of its",
        ),
        (("pair",), {"lams": [0, "ladder 0.5"]}, "ladders are for them alone"),
        (("ref",), {"lams": [], "samples": 0}, "samples must be at least 1"),
        (
            ("ref",),
            {"lams": [], "options": SystemOptions(temperature=0)},
            "samples is 2 at temperature 0",
        ),
        (("ref",), {"lams": [], "options": SystemOptions(top_p=0)}, "top_p must be above 0"),
        (("ref",), {"lams": [], "options": SystemOptions(engine="x")}, "engine is local or vllm"),
        (("ref",), {"lams": [], "options": SystemOptions(gate=0.1)}, "--gate is about logits that"),
        (("between",), {"options": SystemOptions(gate=0.1)}, "--gate is about logits that are mix"),
        (
            ("ref",),
            {"lams": [], "options": SystemOptions(lambda_range=(0, 2))},
            "--lambda-range is about what has a range",
        ),
        (("pair",), {"options": SystemOptions(model_name="m")}, "--model-name is about a server"),
        (("pair",), {"options": SystemOptions(timeout_seconds=9)}, "--timeout is about a server"),
        (
            ("s=url:http://127.0.0.1:9",),
            {"lams": [], "options": SystemOptions(batch_size=64)},
            r"--batch-size is about what runs on this machine .*--concurrency",
        ),
        (
            ("s=url:http://127.0.0.1:9",),
            {"lams": [], "options": SystemOptions(engine="vllm")},
            "--engine is about what runs on this machine",
        ),
        (("model:nowhere",), {"lams": []}, "there is no model 'nowhere'"),
        ((), {"lams": []}, "at least one system and one --task"),
        (
            ("ref",),
            {"lams": [], "options": SystemOptions(temperature=float("inf"))},
            "temperature must be a number ≥ 0",
        ),
    ],
)
def test_what_does_not_go_together_is_said_at_once(make, systems, fields, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        make(*systems, **fields)


def test_an_option_that_one_system_reads_is_taken(make) -> None:
    """A model beside a pair has no gate, as it has no λ."""
    options = dataclasses.replace(OPTIONS, gate=0.1, lambda_range=(0, 2), concurrency=2)
    make("ref", "pair", "s=url:http://127.0.0.1:9", options=options)


def test_a_baseline_that_no_system_is_held_against_is_said(make) -> None:
    told = "--baseline dial has no effect: every system has λ = 0"
    assert any(told in caution for caution in make("dial", "pair", baseline="dial").cautions())
    assert not any(told in one for one in make("dial", "ref", baseline="dial").cautions())


def test_a_gate_that_no_setting_reaches_is_said(make) -> None:
    gated = dataclasses.replace(OPTIONS, gate=0.1)
    told = "--gate has no effect: it is about λ outside [0, 1], and none is measured."
    assert told in make("pair", options=gated).cautions()
    assert told not in make("pair", lams=[0, 2], options=gated).cautions()
    assert told not in make("pair").cautions()


ASKED = SystemOptions(
    max_new_tokens=9, temperature=0.5, top_p=0.8, concurrency=3, attempts=2, pause_seconds=0.0,
    model_name="m", timeout_seconds=5.0,
)  # fmt: skip


def _served(make, url, **options) -> Sweep:
    return make(f"s=url:{url}", lams=[0, 1], options=dataclasses.replace(ASKED, **options))


def _reply(text="<think>a</think>2", **usage):
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    used = {"completion_tokens": 5} | usage
    return 200, {"choices": [choice], "usage": used, "dial": {"policy": "fixed"}}


def test_a_server_that_does_not_say_that_it_turned_the_dial_is_not_swept(
    make, serve, tmp_path
) -> None:
    def answer(path, body):
        status, told = _reply()
        return status, {key: value for key, value in told.items() if key != "dial"}

    chat = serve(answer)
    for lams in ([0, 1], [0], ["adaptive 0.5"]):
        sweep = make(f"s=url:{chat.url}", lams=lams, options=ASKED)
        with pytest.raises(ServingError, match=r"did not say that it turned λ.*without --lambda"):
            sweep.run(tmp_path / str(lams))
        assert not (tmp_path / str(lams) / "samples.jsonl").exists()

    plain = make(f"s=url:{chat.url}", lams=[], options=ASKED)
    assert plain.run(tmp_path / "plain").made == 6
    assert not any("lambda" in body for _, body, _ in chat.asked[-6:])


def test_a_server_is_sent_the_dial_and_the_seed(make, serve, tmp_path) -> None:
    chat = serve(lambda path, body: _reply(f"{body['lambda']}\ud800"))
    result = _served(make, chat.url).run(tmp_path)
    assert result.made == 12
    assert chat.most_at_once <= 3
    sent = {(b["messages"][0]["content"], b["lambda"], b["seed"]) for _, b, _ in chat.asked}
    assert len(sent) == 12
    body = chat.asked[0][1]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == (
        "m",
        9,
        0.5,
        0.8,
    )
    for row in _rows(tmp_path):
        assert row["response"] == f"{row['lambda']}?"
        assert row["seed"] == sample_seed(0, "sums", row["question"], row["sample"])


def test_thinking_is_counted_where_it_can_be(make, serve, tmp_path, tiny_pair) -> None:
    chat = serve(lambda path, body: _reply())
    details = {"completion_tokens_details": {"reasoning_tokens": 3}}
    counting = serve(lambda path, body: _reply(**details))
    silent = serve(lambda path, body: _reply(completion_tokens=None))
    tokenizer = str(tiny_pair.reference)
    cases = [(chat, {}, 5, None), (counting, {}, 5, 3), (silent, {"tokenizer": tokenizer}, 4, 1)]
    for index, (server, options, tokens, thinking) in enumerate(cases):
        _served(make, server.url, **options).run(tmp_path / str(index))
        for row in _rows(tmp_path / str(index)):
            assert (row["tokens"], row["thinking_tokens"]) == (tokens, thinking)
    with pytest.raises(ServingError, match=r"--tokenizer"):
        _served(make, silent.url).run(tmp_path / "silent")


def test_one_question_that_fails_costs_itself_alone(make, serve, tmp_path) -> None:
    broken = [True]

    def answer(path, body):
        bad = broken[0] and "one plus one" in body["messages"][0]["content"] and body["lambda"] == 1
        return (400, b"too long") if bad else _reply()

    chat = serve(answer)
    result = _served(make, chat.url).run(tmp_path)
    assert result.made == 10
    assert {(one.cell.question, one.cell.setting.id) for one in result.lost} == {("q2", "λ=1")}
    assert all("400 too long" in one.reason for one in result.lost)
    asked = len(chat.asked)
    broken[0] = False
    again = _served(make, chat.url).run(tmp_path)
    assert (again.made, again.lost) == (2, [])
    assert len(chat.asked) == asked + 2


def test_what_no_repetition_mends_stops_a_sweep_in_one_line(make, serve, tmp_path) -> None:
    uncounted = {"choices": [{"message": {"content": "2"}}], "dial": {"policy": "fixed"}}
    cases = [
        ((400, b"no such field"), r"refused a request: 400 no such field"),
        ((401, b"no key"), r"401 no key; give --api-key-env NAME"),
        ((200, b"<html>"), r"something else than JSON \(<html>\)"),
        ((200, uncounted), r"does not count .* name its model's tokenizer with --tokenizer"),
    ]
    for number, (told, message) in enumerate(cases):
        chat = serve(lambda path, body, told=told: told)
        with pytest.raises(ServingError, match=message) as stopped:
            _served(make, chat.url).run(tmp_path / str(number))
        assert "same command" not in str(stopped.value)
        assert str(stopped.value).count(chat.url) == 1
        assert told[0] == 400 or len(chat.asked) <= ASKED.concurrency


def test_a_reason_is_said_once_with_the_number_of_samples(make, serve, tmp_path) -> None:
    def answer(path, body):
        if "one plus one" in body["messages"][0]["content"]:
            return (400, b"too long") if body["lambda"] == 1 else (503, b"down")
        return _reply()

    result = _served(make, serve(answer).url, attempts=1, concurrency=1).run(tmp_path)
    with pytest.raises(ServingError) as incomplete:
        result.require_complete()
    said = str(incomplete.value)
    assert said.startswith("4 of 12 samples got no response (question q2 of sums at λ=0, s and 1 ")
    assert said.count("400 too long") == said.count("503 down") == 1
    assert "s and 1 more: http" in said
    assert said.endswith(
        "same command again to ask for these; what was refused will be refused again."
    )
    refused = [one for one in result.lost if one.is_final]
    with pytest.raises(ServingError, match=r"saved; what was refused will be refused again\.$"):
        dataclasses.replace(result, lost=refused).require_complete()


def test_a_server_that_goes_down_is_given_up(make, serve, tmp_path) -> None:
    served = [0]

    def answer(path, body):
        served[0] += 1
        return _reply() if served[0] <= 4 else (503, b"down")

    chat = serve(answer)
    sweep = _served(make, chat.url, attempts=1, concurrency=1)
    sweep = dataclasses.replace(sweep, samples=4)
    with pytest.raises(ServingError, match=r"8 requests in a row.*question q\d of sums.*503 down"):
        sweep.run(tmp_path)
    assert len(_rows(tmp_path)) == 4
    assert len(chat.asked) < 24


def test_the_only_model_of_a_server_needs_no_name(make, serve, tmp_path) -> None:
    models = [{"id": "only"}]
    chat = serve(lambda path, body: _reply() if body else (200, {"data": models}))
    _served(make, chat.url, model_name=None).run(tmp_path)
    assert {body["model"] for _, body, _ in chat.asked if body} == {"only"}
    models.append({"id": "second"})
    with pytest.raises(ConfigError, match=r"has 2 models \(only, second\); name one"):
        _served(make, chat.url, model_name=None).run(tmp_path / "two")
    assert _served(make, chat.url, model_name="only").run(tmp_path / "two").made == 12


def test_a_task_is_asked_once(tiny_pair) -> None:
    systems = parse_systems([f"ref=model:{tiny_pair.reference}"])
    with pytest.raises(ConfigError, match=r"a task is given twice.*\['sums', 'sums'\]"):
        Sweep(systems, [TASK, TASK], options=OPTIONS)


def test_a_finished_sweep_asks_no_server(make, serve, tmp_path) -> None:
    chat = serve(lambda path, body: _reply())
    _served(make, chat.url).run(tmp_path)
    asked = len(chat.asked)
    assert _served(make, chat.url).run(tmp_path).made == 0
    assert len(chat.asked) == asked


def test_what_breaks_in_a_request_is_no_lost_sample(make, serve, tmp_path, monkeypatch) -> None:
    def broken(self, response):
        raise MemoryError("no room")

    monkeypatch.setattr("flexalign.systems.endpoint.EndpointBackend._read", broken)
    chat = serve(lambda path, body: _reply())
    with pytest.raises(MemoryError, match="no room"):
        _served(make, chat.url).run(tmp_path)


def test_a_model_without_a_template_is_asked_in_plain_text(tiny_pair, tmp_path) -> None:
    bare = shutil.copytree(tiny_pair.reference, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    [system] = parse_systems([f"bare=model:{bare}"])
    backend = open_backend(system, [AS_IT_IS], OPTIONS)
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2?"}]
    assert backend.render(messages) == "Add.\n\n1+2?"
    Sweep([system], [TASK], samples=1, options=OPTIONS).run(tmp_path / "out")
    assert len(_rows(tmp_path / "out")) == 3
