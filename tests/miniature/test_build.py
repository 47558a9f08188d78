"""How the miniature's parts are taught, and the fast adapter that ships."""

import dataclasses
import json
import random

import pytest
import torch

from flexalign.errors import ConfigError
from flexalign.fusion import fuse
from flexalign.inra import InRaConfig, InRaModel
from flexalign.lora_dial import LoRADial
from flexalign.miniature import (
    ALIGNED,
    CONCISE,
    PARTS,
    REFERENCE,
    SYSTEM,
    build,
    folder,
    make_questions,
    make_traces,
)
from flexalign.miniature.build import (
    FAST_SCHOOLING,
    Schooling,
    _Traces,
    make_adapter,
    sorted_by_length,
    teach,
)
from flexalign.miniature.closed_form import expected_outcome, token_level
from flexalign.miniature.demo import judge, load_pair, respond
from flexalign.miniature.measure import branch_probabilities, mean_habits, told
from flexalign.miniature.tokenizer import build_tokenizer
from flexalign.miniature.world import sample_trace
from flexalign.models.loading import fingerprint, load_model, load_tokenizer
from flexalign.models.pair import ModelPair

MEGABYTE = 2**20
MODELS = ("reference", "aligned", "placebo", "hybrid", "concise")


def taught_rows(schooling):
    tokenizer = build_tokenizer(256)
    rows = _Traces(tokenizer, schooling, seed=3)
    return [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in rows]


def test_fresh_traces_are_as_many_as_the_steps_ask_for():
    texts = taught_rows(Schooling(REFERENCE, steps=3, learning_rate=1e-3, batch_size=4))
    assert len(texts) == 12
    assert all("#1" in text for text in texts)


def test_without_thinking_only_right_answers_are_learnt_and_no_thinking():
    schooling = dataclasses.replace(FAST_SCHOOLING, traces=40)
    texts = taught_rows(schooling)
    assert len(texts) == 40
    for text in texts:
        asked, answered = text[1 : text.index("?")], text[text.index("?") + 1 :]
        total = sum(int(token) for token in asked if token != "+")
        assert answered == ["<think>", "</think>", str(total), "<eos>"]


def test_the_adapter_alone_is_taught_and_saved(tmp_path):
    adapter = make_adapter(folder("reference"))
    before = fingerprint(adapter.model.base)
    teach(adapter.stream, dataclasses.replace(FAST_SCHOOLING, steps=2, traces=8), 0, callbacks=[])
    assert fingerprint(adapter.model.base) == before
    adapter.save(tmp_path / "fast")
    loaded = InRaModel.from_pretrained("miniature:reference", tmp_path / "fast")
    assert loaded.inra_config.base == "miniature:reference"
    assert loaded.inra_config.thinking_tags == ("<think>", "</think>")
    ids = torch.tensor([[1, 19, 8, 24, 10]])
    with torch.no_grad():
        found, expected = (m(input_ids=ids, lam=1.0).logits for m in (loaded, adapter.model))
        plain = loaded(input_ids=ids, lam=0.0).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


@pytest.mark.slow
def test_every_part_is_made_and_loads(tmp_path, monkeypatch):
    for name in (
        "ALIGNED_SCHOOLING",
        "PLACEBO_SCHOOLING",
        "HYBRID_SCHOOLING",
        "FAST_SCHOOLING",
        "CONCISE_SCHOOLING",
    ):
        short = dataclasses.replace(getattr(build, name), steps=1, batch_size=2, traces=4)
        monkeypatch.setattr(build, name, short)
    reference = [
        dataclasses.replace(one, steps=1, batch_size=2) for one in build.REFERENCE_SCHOOLING
    ]
    monkeypatch.setattr(build, "REFERENCE_SCHOOLING", reference)
    monkeypatch.setattr(build, "DIAL_STEPS", 2)
    parts = list(build.build_all(tmp_path / "one", seed=3, placebo=True))
    assert parts == ["reference", "aligned", "placebo", "fast", "hybrid", "dial", "concise"]
    again = list(build.build_all(tmp_path / "other", seed=3))
    assert again == ["reference", "aligned", "fast", "hybrid", "dial", "concise"]
    prints = {part: fingerprint(tmp_path / "one" / part) for part in parts if part in MODELS}
    assert len(set(prints.values())) == 5
    models = [part for part in again if part in MODELS]
    assert all(fingerprint(tmp_path / "other" / part) == prints[part] for part in models)
    made = tmp_path / "one"
    assert InRaModel.from_pretrained(made / "reference", made / "fast")
    dial = LoRADial.from_pretrained(made / "reference", made / "dial")
    assert (dial.dial_config.lambda_range, dial.dial_config.gate) == ((0.0, 5.0), 0.01)
    names = json.loads((made / "dial" / "adapter_config.json").read_text())
    assert names["base_model_name_or_path"] == dial.dial_config.base == "miniature:reference"
    names = json.loads((made / "concise" / "adapter_config.json").read_text())
    assert names["base_model_name_or_path"] == "miniature:reference"
    for part in ("dial", "concise"):
        texts = (file.read_text() for file in (made / part).glob("*.json"))
        assert str(tmp_path) not in "".join(texts)


def test_every_second_trace_is_told_to_think_the_aligned_way():
    tokenizer = build_tokenizer(256)
    schooling = Schooling(
        REFERENCE, steps=40, learning_rate=1e-3, batch_size=4, exact=True, told=ALIGNED
    )
    rows = _Traces(tokenizer, schooling, seed=3)._rows
    words = tokenizer.convert_tokens_to_ids(SYSTEM.split())
    again = tokenizer.convert_tokens_to_ids("again")
    for habits, chosen in ((REFERENCE, rows[::2]), (ALIGNED, rows[1::2])):
        assert all((row["input_ids"][1:3] == words) is (habits is ALIGNED) for row in chosen)
        going_on = [
            dict(targets)[again]
            for row in chosen
            for targets in row["targets"]
            if len(targets) > 1 and targets[-1][0] == again
        ]
        assert len(going_on) > 40
        assert going_on == pytest.approx([habits.again] * len(going_on))


def test_the_hybrid_has_the_habits_of_either_world():
    model, tokenizer = load_model("miniature:hybrid"), load_tokenizer("miniature:hybrid")
    questions = make_questions(120, seed=77)
    rng = random.Random(5)

    def logits(ids, attention):
        return model(input_ids=ids, attention_mask=attention).logits

    for habits, ask in ((REFERENCE, logits), (ALIGNED, told(logits, tokenizer, SYSTEM))):
        traces = [sample_trace(question, habits, rng) for question in questions]
        found = mean_habits(branch_probabilities({"own": ask}, tokenizer, questions, traces)["own"])
        for habit in ("error", "check", "again", "quit"):
            assert getattr(found, habit) == pytest.approx(getattr(habits, habit), abs=0.01), habit


def test_the_concise_part_differs_from_the_reference_in_again_alone():
    pair, tokenizer = (
        ModelPair.load("miniature:reference", "miniature:concise"),
        build_tokenizer(256),
    )
    questions = make_questions(150, seed=78)
    rng = random.Random(8)
    traces = [sample_trace(question, CONCISE, rng) for question in questions]

    def logits(side):
        return lambda ids, attention: pair.logits(side, input_ids=ids, attention_mask=attention)

    found = branch_probabilities(
        {"reference": logits("reference"), "aligned": logits("aligned")},
        tokenizer,
        questions,
        traces,
    )
    concise, reference = (mean_habits(found[side]) for side in ("aligned", "reference"))
    assert concise.again == pytest.approx(CONCISE.again, abs=0.01)
    for habit in ("error", "check", "catch", "quit"):
        assert getattr(concise, habit) == pytest.approx(getattr(CONCISE, habit), abs=0.01), habit
        assert getattr(concise, habit) == pytest.approx(getattr(reference, habit), abs=0.01), habit


def test_below_zero_the_concise_pair_gains_more_than_the_aligned_one():
    """The form: thinking longer without losing skill pays; with it, it hardly does."""
    base = expected_outcome(REFERENCE).accuracy
    gains = [
        expected_outcome(token_level(REFERENCE, aligned, -0.5)).accuracy - base
        for aligned in (CONCISE, ALIGNED)
    ]
    assert gains == pytest.approx([0.034, 0.004], abs=0.001)


@pytest.mark.slow
def test_the_dial_follows_the_pairs_own_form_over_its_whole_range():
    reference, aligned, tokenizer = load_pair()
    dial = LoRADial.from_pretrained("miniature:reference", "miniature:dial")
    questions = make_questions(150, seed=77)
    rng = random.Random(6)

    def logits(model, **options):
        return lambda ids, attention: (
            model(input_ids=ids, attention_mask=attention, **options).logits
        )

    for lam in (0.25, 1.0, 2.0, 3.5, 5.0):

        def pair(ids, attention, lam=lam):
            both = (logits(one)(ids, attention) for one in (reference, aligned))
            return fuse(*both, lam, dial.dial_config.gate)

        world = token_level(REFERENCE, ALIGNED, lam, dial.dial_config.gate)
        traces = [sample_trace(question, world, rng) for question in questions]
        found = branch_probabilities(
            {"pair": pair, "dial": logits(dial, lam=lam)}, tokenizer, questions, traces
        )
        own, learnt = (mean_habits(found[name]) for name in ("pair", "dial"))
        for habit in ("again", "check", "error"):
            near = pytest.approx(getattr(own, habit), abs=0.01)
            assert getattr(learnt, habit) == near, (lam, habit)
        outcomes = [expected_outcome(habits) for habits in (learnt, own)]
        assert outcomes[0].accuracy == pytest.approx(outcomes[1].accuracy, abs=0.015), lam


def test_batches_of_similar_length_hold_the_same_rows():
    rows = make_traces(48, seed=5)
    found = sorted_by_length(rows, 8, seed=1)
    lengths = [len(row["completion"][0]["content"].split()) for row in found]
    batches = [lengths[start : start + 8] for start in range(0, 48, 8)]
    assert sorted(map(str, found)) == sorted(map(str, rows))
    assert sorted(batches) == [sorted(lengths)[start : start + 8] for start in range(0, 48, 8)]
    assert batches != sorted(batches)


def test_exact_targets_are_the_habits_own_probabilities():
    tokenizer = build_tokenizer(256)
    schooling = Schooling(REFERENCE, steps=2, learning_rate=1e-3, batch_size=4, exact=True)
    branching = 0
    for row in _Traces(tokenizer, schooling, seed=3)._rows:
        for targets in row["targets"]:
            assert not targets or sum(p for _, p in targets) == pytest.approx(1)
            branching += len(targets) > 1
    assert branching > 0


def test_a_part_that_is_none_or_not_installed_is_said(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no part 'slow'; it has reference, aligned, fast"):
        folder("slow")
    monkeypatch.setattr("flexalign.miniature._WEIGHTS", tmp_path)
    with pytest.raises(ConfigError, match="reinstall flexalign, or make them with: flexalign mini"):
        folder("fast")


def test_what_ships_is_small_and_made_for_the_reference():
    path = folder("fast")
    assert (path / "inra_adapter.safetensors").stat().st_size < 1.5 * MEGABYTE
    assert InRaConfig.load(path).base_fingerprint == fingerprint("miniature:reference")


def test_all_weights_together_are_small():
    files = list(folder("reference").parent.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == set(PARTS)
    assert sum(file.stat().st_size for file in files) < 12e6


@pytest.mark.slow
def test_the_fast_mode_does_not_think_and_knows_the_easy_questions_best():
    model = InRaModel.from_pretrained("miniature:reference", "miniature:fast")
    tokenizer = load_tokenizer("miniature:reference")
    questions = make_questions(600, seed=77)
    traces = respond(model, tokenizer, questions, seed=0, temperature=0.0, lam=1.0)
    assert sum(len(trace) == 3 for trace in traces) > 570
    found = judge(questions, traces)
    by_terms = [
        found.right[[len(question.terms) == terms for question in questions]].mean()
        for terms in (3, 5)
    ]
    assert by_terms[0] > 0.7
    assert 0.35 < by_terms[1] < by_terms[0] - 0.1
