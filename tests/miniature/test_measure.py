import math

import pytest
import torch

from flexalign.fusion import fuse
from flexalign.miniature import REFERENCE, SYSTEM, make_questions
from flexalign.miniature.build import CONTEXT_TOKENS, build_model, encode
from flexalign.miniature.measure import (
    branch_probabilities,
    count_branches,
    is_right,
    mean_habits,
    outcome,
    split_trace,
    told,
)
from flexalign.miniature.tokenizer import build_tokenizer
from flexalign.miniature.world import Question, branches, sample_trace


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CONTEXT_TOKENS)


@pytest.fixture(scope="module")
def models():
    return build_model(seed=1).eval(), build_model(seed=2).eval()


@pytest.fixture(scope="module")
def responses():
    import random

    rng = random.Random(4)
    questions = make_questions(12, seed=4)
    return questions, [sample_trace(question, REFERENCE, rng) for question in questions]


def logits_of(model):
    return lambda ids, attention: model(input_ids=ids, attention_mask=attention).logits


def test_probabilities_equal_one_trace_at_a_time_without_padding(tokenizer, models, responses):
    questions, traces = responses
    reference, _ = models

    def fused(ids, attention):
        return fuse(*(logits_of(model)(ids, attention) for model in models), 1.7)

    measured = branch_probabilities(
        {"reference": logits_of(reference), "fused": fused}, tokenizer, questions, traces, 5
    )
    expected: dict[str, list[float]] = {}
    for question, trace in zip(questions, traces, strict=True):
        asked, answered = encode(tokenizer, question.text, trace)
        ids = torch.tensor([asked + answered])
        both = [logits_of(model)(ids, None)[0].double().detach() for model in models]
        mixed = torch.softmax(1.7 * both[1] - 0.7 * both[0], -1)
        for branch in branches(question, trace):
            here = mixed[len(asked) + branch.position - 1]
            tokens = [branch.otherwise] if branch.habit == "error" else list(branch.event)
            chance = float(here[tokenizer.convert_tokens_to_ids(tokens)].sum())
            chance = 1 - chance if branch.habit == "error" else chance
            expected.setdefault(branch.habit, []).append(chance)
    assert set(measured["fused"]) == set(expected)
    for habit, values in expected.items():
        found = measured["fused"][habit]
        assert sorted(found.values) == pytest.approx(sorted(values), abs=1e-6)
        assert len(measured["reference"][habit].values) == len(values)


def test_counted_habits_are_the_shares_of_events():
    question = Question((3, 8, 5))
    trace = split_trace(
        "<think> #1 3 + 8 = 10 check 3 + 8 = 10 again 3 + 8 = 11 ; #2 11 + 5 = 16 ; </think> 16"
    )
    habits = mean_habits(count_branches([question], [trace]))
    assert habits.error == habits.check == habits.again == habits.catch == 0.5
    assert habits.quit == 0
    assert outcome([question], [trace]).tokens == 29


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think> #1 3 + 8 = 11 ; </think> 16", True),
        ("<think> </think> 16", True),
        ("<think> #1 3 + 8 = 11 ; </think> 17", False),
        ("<think> #1 3 + 8 = 11 ; 16", False),
        ("<think> </think> 16 16", False),
        ("", False),
    ],
)
def test_an_answer_counts_only_after_the_thinking(response, right):
    assert is_right(Question((3, 8, 5)), split_trace(response)) is right


def test_a_habit_without_a_branch_is_not_a_number(tokenizer, models):
    habits = mean_habits(count_branches([Question((3, 8, 5))], [["<think>"]]))
    assert math.isnan(habits.again)


def test_the_tokenizer_makes_one_token_of_each_number_and_forgets_white_space(tokenizer):
    close, wide = (tokenizer(text).input_ids for text in ("3+8+49?", " 3 + 8 +  49 ? "))
    assert close == wide
    assert tokenizer.decode(close) == "3 + 8 + 49 ?"
    assert tokenizer.unk_token_id not in close


def test_the_chat_template_frames_questions_as_training_does(tokenizer, responses):
    question, trace = responses[0][0], responses[1][0]
    asked, answered = encode(tokenizer, question.text, trace)
    messages = [
        {"role": "user", "content": question.text},
        {"role": "assistant", "content": " ".join(trace)},
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert whole == asked + answered
    assert prompt == asked


def test_logits_under_a_system_message_are_those_of_the_longer_prompt(tokenizer, models, responses):
    questions, traces = responses
    model = models[0]
    found = branch_probabilities(
        {"told": told(logits_of(model), tokenizer, SYSTEM)}, tokenizer, questions, traces
    )["told"]
    expected = {}
    for question, trace in zip(questions, traces, strict=True):
        asked, answered = encode(tokenizer, question.text, trace, SYSTEM)
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question.text},
        ]
        assert tokenizer.apply_chat_template(messages)["input_ids"] == asked
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked + answered])).logits[0].double()
        for branch in branches(question, trace):
            at = logits[len(asked) + branch.position - 1].softmax(-1)
            words = tokenizer.convert_tokens_to_ids(
                [branch.otherwise] if branch.habit == "error" else list(branch.event)
            )
            value = float(at[words].sum())
            expected.setdefault(branch.habit, []).append(
                1 - value if branch.habit == "error" else value
            )
    assert found.keys() == expected.keys()
    for habit, values in expected.items():
        assert sorted(found[habit].values) == pytest.approx(sorted(values), abs=1e-6)
