"""Limits on the thinking, held against loops that are written out and against transformers' generate."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexalign.data.logits import LogitsSettings
from flexalign.data.thinking import ThinkingTags, text_after_closing
from flexalign.errors import ConfigError
from flexalign.generation.penalties import RowPenalties
from flexalign.generation.responses import generate_responses
from flexalign.generation.row_lambdas import TagTokens
from flexalign.generation.thinking_limits import ClosingTokens, ThinkingLimits
from flexalign.lambdas import Adaptive, Exit
from flexalign.models.loading import load_model

VOCABULARY = 12
OPENING, CLOSING, AFTER = [1], [2, 3, 4], (5, 6)

REASONING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes a line break before the closing tag and two after it, as Qwen3's does."""


def closing_tokens(opening: list[int], closing: list[int], after: tuple[int, ...]) -> ClosingTokens:
    """Return the tokens of tags that no tokenizer has."""
    tags = TagTokens.__new__(TagTokens)
    tags.opening, tags.closing = opening, closing
    return ClosingTokens(tags, after)


def written_out(prompt: list[int], response: list[int], budget: int, closing: list[int]) -> Any:
    """Return the token that a budget forces next, by a walk through all tokens one at a time."""
    inside, spent, queue = False, 0, []
    for place, token in enumerate([*prompt, *response]):
        if place == len(prompt) and not inside:
            spent = 0  # of the prompt, only a thinking that is open counts
        queue = queue[1:]
        seen = [*prompt, *response][: place + 1]
        if token == OPENING[0]:
            inside, spent = True, spent if place >= len(prompt) else 0
        elif inside and seen[-len(closing) :] == closing:
            inside = False
            queue = list(AFTER) if spent >= budget and place >= len(prompt) else []
        elif inside:
            spent += 1
    if queue:
        return queue[0]
    if not inside or spent < budget:
        return None
    begun = [n for n in range(len(closing)) if n == 0 or response[-n:] == closing[:n]]
    return closing[max(begun)]


@pytest.mark.parametrize("closing", [[2], CLOSING])
def test_a_forced_token_is_that_of_a_walk_through_all_tokens(closing: list[int]) -> None:
    draw, forced_ones, free = random.Random(3), 0, 0
    for _ in range(150):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(2, 9))]
        budget = draw.randrange(6)
        limits = ThinkingLimits(
            LogitsSettings(thinking_budget=budget),
            closing_tokens(OPENING, closing, AFTER),
            len(prompt),
        )
        ids = list(prompt)
        for _ in range(25):
            expected = written_out(prompt, ids[len(prompt) :], budget, closing)
            scores = limits(torch.tensor([ids]), torch.zeros(1, VOCABULARY))[0]
            if expected is None:
                free += 1
                assert bool((scores == 0).all())
            else:
                forced_ones += 1
                assert scores.isfinite().nonzero().flatten().tolist() == [expected]
            ids.append(draw.randrange(VOCABULARY) if expected is None else expected)
    assert forced_ones > 200 < free


def test_a_bias_is_on_the_first_token_of_the_closing_tag_inside_the_thinking_alone() -> None:
    settings = LogitsSettings(end_of_thinking_bias=1.5)
    biased = {(7, 1): True, (7, 1, 8): True, (7, 8): False, (7, 1, 8, 2): False}
    biased |= {(7, 1, 8, 2, 9): True, (7, 1, 2, 3, 4): False, (7, 1, 2, 3, 4, 1): True}
    for ids, expected in biased.items():
        limits = ThinkingLimits(settings, closing_tokens(OPENING, CLOSING, AFTER), 2)
        scores = torch.randn(1, VOCABULARY)
        change = limits(torch.tensor([ids]), scores) - scores
        assert change[0, 2].item() == pytest.approx(1.5 * expected, abs=1e-6)
        assert change[0].nonzero().flatten().tolist() == [2] * expected


def test_padding_and_repeated_rows_change_nothing() -> None:
    settings = LogitsSettings(thinking_budget=2, end_of_thinking_bias=-1.0)
    closing = closing_tokens([1], [2], ())
    prompts, responses = [[7, 1], [9, 9, 8, 1]], [[8, 8], [8, 2], [8, 9], [2, 9]]
    rows = RowPenalties(settings, torch.tensor([2, 4]), 4, closing)
    # Padding with the opening tag would open a thinking, if it counted.
    ids = [[1] * (4 - len(prompts[n // 2])) + prompts[n // 2] + responses[n] for n in range(4)]
    scores = torch.randn(4, VOCABULARY)
    found = rows(torch.tensor(ids), scores)
    for n, response in enumerate(responses):
        own = prompts[n // 2]
        alone = RowPenalties(settings, torch.tensor([len(own)]), None, closing)
        expected = alone(torch.tensor([own + response]), scores[n : n + 1])
        assert torch.equal(found[n : n + 1], expected)


# Whole responses.


@pytest.fixture
def opening(hybrid_tokenizer: Any) -> Any:
    """A tokenizer whose template opens the thinking."""
    return hybrid_tokenizer


def cut_and_continued(model: Any, ids: list[int], budget: int, close: list[int], most: int) -> Any:
    """Generate greedily with transformers alone: write, cut the thinking, close it, write on."""

    def write(tokens: list[int], count: int) -> list[int]:
        given = torch.tensor([tokens])
        written = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False
        )
        return list(written[0, len(tokens) :].tolist())

    first = write(ids, budget)
    if close[0] in first:
        return write(ids, most)
    cut = [*ids, *first, *close]
    return [*first, *close, *write(cut, most - len(first) - len(close))]


@pytest.mark.parametrize("budget", [1, 5, 11])
def test_a_budget_is_transformers_generate_cut_closed_and_continued(
    budget: int, opening: Any, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(initializer_range=0.15)
    close = opening("</think>")["input_ids"]
    prompts: Any = [
        [{"role": "user", "content": text}] for text in ("1+2=", "the answer is six because one")
    ]
    found = generate_responses(
        model, opening, prompts, max_new_tokens=24, temperature=0,
        logits=LogitsSettings(thinking_budget=budget),
    )  # fmt: skip
    for prompt, response in zip(prompts, found, strict=True):
        ids = opening.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert opening.decode(ids).endswith("<think>\n")
        # The line break after the opening tag is a token of thinking, as in a thinking schedule.
        expected = cut_and_continued(model, ids, budget - 1, close, 24) if budget > 1 else None
        if expected is None:
            assert response.token_ids[0] == close[0]
            continue
        end = opening.eos_token_id
        expected = expected[: expected.index(end)] if end in expected else expected
        assert list(response.token_ids) == expected
        assert response.tokens == len(expected)


def test_a_bias_of_the_end_is_the_logit_plus_a_number(
    opening: Any, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(initializer_range=0.15)
    [close] = opening("</think>")["input_ids"]
    prompt: Any = [{"role": "user", "content": "1+2="}]
    ids = opening.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]

    lengths = []
    for bias in (0.0, 3.0, 5.0, 100.0):
        expected: list[int] = []
        while len(expected) < 20:
            with torch.no_grad():
                logits = model(torch.tensor([ids + expected])).logits[0, -1]
            logits[close] += bias * (close not in expected)
            if int(logits.argmax()) == opening.eos_token_id:
                break
            expected.append(int(logits.argmax()))
        [found] = generate_responses(
            model, opening, [prompt], max_new_tokens=20, temperature=0,
            logits=LogitsSettings(end_of_thinking_bias=bias),
        )  # fmt: skip
        assert list(found.token_ids) == expected
        lengths.append(expected.index(close) if close in expected else 20)
    assert lengths[-1] == 0
    assert lengths[0] == 20
    assert sorted(lengths, reverse=True) == lengths


def test_a_row_is_what_it_is_alone(pair: Any, opening: Any) -> None:
    from flexalign.generation import TwoModelDecoder

    model = TwoModelDecoder(pair)
    prompts: Any = [
        [{"role": "user", "content": text}]
        for text in ("1+2=", "the answer is six because one and two", "a", "<think></think>", "six")
    ]
    exits = Exit(0.0, "answer_probability", " ", answer_tokens=4)
    dials: list[Any] = [0.0, 0.5, 2.0, Adaptive(1.0), exits]
    options: Any = {
        "max_new_tokens": 20,
        "logits": LogitsSettings(
            thinking_budget=8, end_of_thinking_bias=2.0, repetition_penalty=1.3
        ),
    }
    together = generate_responses(
        model, opening, prompts, lam=dials, seeds=[1, 2, 3, 4, 5], **options
    )
    for number, response in enumerate(together):
        [alone] = generate_responses(
            model, opening, [prompts[number]], lam=[dials[number]], seeds=[number + 1], **options
        )
        assert response.token_ids == alone.token_ids
        assert (response.tokens, response.route) == (alone.tokens, alone.route)


def test_the_thinking_is_closed_in_the_words_of_the_template(
    tiny_tokenizer: Any, tiny_model: Callable[..., Any]
) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REASONING_TEMPLATE
    assert text_after_closing(tokenizer, ThinkingTags()) == "\n\n"
    [response] = generate_responses(
        tiny_model(initializer_range=0.15), tokenizer,
        ["<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n<think>"],
        max_new_tokens=16, temperature=0, logits=LogitsSettings(thinking_budget=4),
    )  # fmt: skip
    line_breaks = tokenizer("</think>\n\n", add_special_tokens=False)["input_ids"]
    assert list(response.token_ids[4 : 4 + len(line_breaks)]) == line_breaks


def test_an_answer_without_thinking_is_left_as_it_is(
    opening: Any, tiny_model: Callable[..., Any]
) -> None:
    from flexalign.data.template import bind_template

    bind_template(opening, {"enable_thinking": False})
    model, prompt = tiny_model(initializer_range=0.15), [{"role": "user", "content": "1+2="}]
    options: Any = {"max_new_tokens": 16, "temperature": 0}
    limited = LogitsSettings(thinking_budget=0, end_of_thinking_bias=50.0)
    assert generate_responses(
        model, opening, [prompt], logits=limited, **options
    ) == generate_responses(model, opening, [prompt], **options)


def test_a_model_without_tags_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
        unk_token="?",
    )
    with pytest.raises(ConfigError, match="thinking_budget and end_of_thinking_bias need the tags"):
        generate_responses(
            load_model("miniature"),
            bare,
            ["a"],
            max_new_tokens=2,
            logits=LogitsSettings(thinking_budget=3),
        )


@pytest.mark.parametrize(
    "given",
    [
        {"thinking_budget": -1},
        {"thinking_budget": 2.5},
        {"thinking_budget": True},
        {"end_of_thinking_bias": float("inf")},
        {"end_of_thinking_bias": "2"},
    ],
)
def test_a_limit_that_is_none_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(given))} must be"):
        LogitsSettings(**given)
