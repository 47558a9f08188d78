import numpy as np
import pytest
import torch

from flexalign import Adaptive
from flexalign.errors import DataError
from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaModel
from flexalign.miniature import make_questions
from flexalign.miniature.demo import (
    JudgedAnswers,
    adaptive,
    coin,
    compare_with_ends,
    confidences,
    judge,
    respond,
)
from flexalign.miniature.world import Question
from flexalign.models.loading import load_tokenizer

FAST = JudgedAnswers(np.array([True, False, True, False]), np.array([3, 3, 3, 3]))
SLOW = JudgedAnswers(np.array([True, True, False, True]), np.array([60, 80, 100, 120]))
SURE = np.array([0.9, 0.5, 0.7, 0.2])


def test_adaptive_takes_the_sure_answers_and_pays_for_the_rejected_ones():
    chosen = adaptive(FAST, SLOW, SURE, 0.7)
    assert chosen.right.tolist() == [True, True, True, True]
    assert chosen.tokens.tolist() == [3, 83, 3, 123]


def test_the_thresholds_at_the_ends_are_the_ends():
    always_fast = adaptive(FAST, SLOW, SURE, 0.0)
    assert always_fast.tokens.tolist() == FAST.tokens.tolist()
    never = adaptive(FAST, SLOW, SURE, 1.0)
    assert never.right.tolist() == SLOW.right.tolist()
    assert never.mean_tokens == SLOW.mean_tokens + 3


def test_a_coin_of_share_one_is_slow_and_of_zero_fast():
    assert coin(FAST, SLOW, 1.0).tokens.tolist() == SLOW.tokens.tolist()
    assert coin(FAST, SLOW, 0.0).right.tolist() == FAST.right.tolist()


def test_the_coin_lies_on_the_line_between_the_ends():
    draw = np.random.default_rng(0)
    fast = JudgedAnswers(draw.random(6000) < 0.5, np.full(6000, 3))
    slow = JudgedAnswers(draw.random(6000) < 0.8, draw.integers(50, 150, 6000))
    found = coin(fast, slow, 0.3, seed=1)
    assert found.right.mean() == pytest.approx(0.7 * 0.5 + 0.3 * 0.8, abs=0.02)
    assert found.mean_tokens == pytest.approx(0.7 * 3 + 0.3 * slow.mean_tokens, rel=0.05)
    low, height, high = compare_with_ends(found, fast, slow).over_coin
    assert low < 0 < high
    assert abs(height) < 0.02


def test_a_policy_that_knows_stands_above_the_coin():
    draw = np.random.default_rng(0)
    knows = draw.random(3000) < 0.6
    fast = JudgedAnswers(knows, np.full(3000, 3))
    slow = JudgedAnswers(draw.random(3000) < 0.8, np.full(3000, 90))
    worth = compare_with_ends(adaptive(fast, slow, np.where(knows, 0.9, 0.1), 0.5), fast, slow)
    assert worth.accuracy.mean == pytest.approx(0.6 + 0.4 * 0.8, abs=0.03)
    assert worth.tokens.mean == pytest.approx(3 + 0.4 * 90, rel=0.1)
    assert worth.difference.low > 0.05
    assert worth.over_coin.low > 0.1


def test_the_ends_lie_on_their_own_line():
    assert (
        compare_with_ends(SLOW, FAST, SLOW).over_coin
        == compare_with_ends(FAST, FAST, SLOW).over_coin
        == (0, 0, 0)
    )


def test_traces_are_judged_by_answer_and_length():
    found = judge(
        [Question((1, 2)), Question((3, 4))],
        [["<think>", "</think>", "3"], ["<think>", "#1", "</think>", "8"]],
    )
    assert (found.right.tolist(), found.tokens.tolist()) == ([True, False], [3, 4])


def test_ends_of_different_questions_are_refused():
    shorter = JudgedAnswers(FAST.right[:2], FAST.tokens[:2])
    with pytest.raises(DataError, match="the same questions"):
        adaptive(shorter, SLOW, SURE, 0.5)


def test_confidence_is_the_product_of_the_answers_token_probabilities():
    model = InRaModel.from_pretrained("miniature:reference", "miniature:fast")
    tokenizer = load_tokenizer("miniature:reference")
    questions = make_questions(5, seed=4)
    traces = [["<think>", "</think>", str(question.answer)] for question in questions]
    traces[2] = ["<think>", "#1", "</think>", "9"]
    found = confidences(model, tokenizer, questions, traces)
    for question, trace, value in zip(questions, traces, found, strict=True):
        tokens = ["<bos>", *question.text.split()]
        expected = 1.0
        for token in [*trace, "<eos>"]:
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
            with torch.no_grad():
                logits = model(input_ids=ids, lam=1.0).logits[0, -1].double()
            expected *= float(logits.softmax(-1)[tokenizer.convert_tokens_to_ids(token)])
            tokens.append(token)
        assert value == pytest.approx(expected, rel=1e-4)


def test_put_together_it_is_what_the_library_gives_under_the_policy():
    model = InRaModel.from_pretrained("miniature:reference", "miniature:fast")
    tokenizer = load_tokenizer("miniature:reference")
    questions = make_questions(12, seed=5)
    seeds = list(range(12))
    written = respond(model, tokenizer, questions, seed=1, temperature=0.0, lam=1.0)
    slow = judge(questions, respond(model, tokenizer, questions, seed=0, seeds=seeds, lam=0.0))
    sure = confidences(model, tokenizer, questions, written)
    composed = adaptive(judge(questions, written), slow, sure, 0.5)
    prompts = [[{"role": "user", "content": question.text}] for question in questions]
    responses = generate_responses(
        model,
        tokenizer,
        prompts,
        max_new_tokens=1000,
        seeds=seeds,
        lam=Adaptive(threshold=0.5),
    )
    assert {response.route for response in responses} == {"fast", "slow"}
    assert [response.tokens for response in responses] == composed.tokens.tolist()
    assert [response.confidence for response in responses if response.route == "fast"] == (
        pytest.approx(sure[sure >= 0.5].tolist(), rel=1e-4)
    )
