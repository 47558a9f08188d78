"""What a client is told of a body that is refused: the field, what it was, what it may be."""

import json
import math
from typing import Any

import pytest

from flexalign.errors import ConfigError
from flexalign.lambdas import Fixed
from flexalign.serving.dial import DialRules
from flexalign.serving.errors import ApiError
from flexalign.serving.protocol import parse_body, read_chat, read_completion

RULES = DialRules(Fixed(0.25), (-1.0, 2.0))
FORMS = 'a finite number such as 0.5, "auto", or an object such as {"policy": "adaptive", "threshold": 0.5}'
FINITE = "must be a finite number (a λ), got"


def calibrated(effort: float) -> Fixed:
    if effort > 150:
        raise ConfigError(f"an effort of this adapter is a number from 0 to 150, got {effort:g}.")
    return Fixed(1 - effort / 100)


def told(body: bytes, rules: DialRules = RULES, read: Any = read_chat) -> str:
    """Read a body as the server does; return why not."""

    def serve() -> None:
        parsed = parse_body(body)
        rules.choose(parsed)
        read(parsed)

    with pytest.raises(ApiError) as caught:
        serve()
    assert caught.value.status == 400
    return caught.value.message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], f"lambda must be {FORMS}, got [1]."),
        (True, f"lambda must be {FORMS}, got true."),
        ("0.5", f'lambda must be {FORMS}, got "0.5".'),
        (math.nan, f"lambda must be {FORMS}, got NaN."),
        (1e39, f"lambda must be {FORMS}, got 1e+39."),
        ([0] * 100, f"lambda must be {FORMS}, got [{'0, ' * 26}…."),
        (9, "lambda: λ = 9 is outside the range [-1, 2] that this server's operator permits; stay inside it."),
        (
            {"threshold": 0.5},
            'lambda: a dial\'s object has a "policy", as in {"policy": "adaptive", "threshold": 0.5}, '
            'or a "kind", as in {"kind": "thinking", "think": 0, "answer": 1}; got '
            "{'threshold': 0.5}.",
        ),
        ({"policy": "rout"}, "lambda: 'rout' is no policy; did you mean 'route'?"),
        ({"kind": "liner"}, "lambda: kind 'liner' is no schedule; did you mean 'linear'?"),
        ({"policy": "fixed", "lambda": [1]}, f"lambda: lambda {FINITE} [1]."),
        ({"policy": "adaptive", "fast_lambda": "1"}, f"lambda: fast_lambda {FINITE} '1'."),
        ({"policy": "route", "share": 0.5, "slow_lambda": [1]}, f"lambda: slow_lambda {FINITE} [1]."),
        (
            {"policy": "adaptive", "threshold": 2},
            "lambda: an adaptive policy's threshold must be a number in [0, 1], got 2.",
        ),
        (
            {"policy": "adaptive", "treshold": 0.5},
            "lambda: the policy adaptive takes no 'treshold'; did you mean 'threshold'?",
        ),
        (
            {"policy": "adaptive", "measure": "agreement"},
            'lambda: the measure "agreement" samples several answers for one, which the server does '
            'not; take "answer_probability" or "min_token_probability".',
        ),
        ({"policy": "adaptive", "samples": 0}, "lambda: an adaptive policy's samples must be a whole number ≥ 1, got 0."),
        (
            {"policy": "route", "share": "half"},
            "lambda: a route policy's share (of the slow way) must be a number in [0, 1], got 'half'.",
        ),
        (
            {"policy": "route"},
            'lambda: the policy route needs a share: {"policy": "route", "share": 0.3}.',
        ),
        ({"kind": "linear", "start": [0], "end": 1, "steps": 5}, f"lambda: start {FINITE} [0]."),
        (
            {"kind": "linear", "start": 0, "end": 1},
            "lambda: a linear schedule needs 'steps'; it takes start, end, steps.",
        ),
        ({"kind": "linear", "start": 0, "end": 1, "steps": 0}, "lambda: steps must be a whole number ≥ 1, got 0."),
    ],
)  # fmt: skip
def test_a_lambda_says_what_it_may_be(value: object, message: str):
    assert told(json.dumps({"lambda": value}).encode()) == message
    assert told(json.dumps({"control": value}).encode()) == "control" + message.removeprefix(
        "lambda"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lamda": 0.5}, "'lamda' is no dial; did you mean 'lambda'?"),
        ({"lambda": 0, "effort": 5}, "lambda and effort are 2 dials; give one of them."),
        (
            {"effort": "50"},
            "effort must be a number, 0 for the fastest answers and 100 for the reference's tokens, "
            'got "50".',
        ),
        (
            {"effort": 10**400},
            "effort must be a number, 0 for the fastest answers and 100 for the reference's tokens, "
            f"got 1{'0' * 78}….",
        ),
        ({"effort": 160}, "effort: an effort of this adapter is a number from 0 to 150, got 160."),
        (
            {"reasoning_effort": "lots"},
            "reasoning_effort must be one of none, minimal, low, medium, high, xhigh, max, got "
            '"lots".',
        ),
    ],
)
def test_a_dial_says_what_it_may_be(body: dict[str, Any], message: str):
    rules = DialRules(Fixed(0.25), (-0.5, 1.0), effort=calibrated)
    assert told(json.dumps(body).encode(), rules) == message


def test_what_has_no_meaning_here_says_why():
    assert told(b'{"lambda": 0}', DialRules(None)) == (
        "lambda: this server's model has no dial; leave lambda out."
    )
    assert told(b'{"effort": 50}') == (
        "effort: this adapter is not calibrated, so that effort has no meaning here; give lambda, "
        "or let the operator run flexalign calibrate."
    )


MESSAGE = 'such as {"role": "user", "content": "1+2?"}'
PART = 'such as {"type": "text", "text": "1+2?"}'
USER = {"role": "user"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, f"messages must be a list of at least one message, {MESSAGE}, got null."),
        ({"messages": "hi"}, f'messages must be a list of at least one message, {MESSAGE}, got "hi".'),
        (
            {"messages": [{"role": "robot", "content": "hi"}]},
            "messages[0].role must be one of system, developer, user, assistant, tool, "
            'got "robot".',
        ),
        ({"messages": ["hi"]}, f'messages[0] must be an object with a role, {MESSAGE}, got "hi".'),
        (
            {"messages": [USER | {"content": "a"}, USER]},
            f"messages[1].content must be a text or a list of parts, {PART}, got null.",
        ),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            f'messages[0].content[1] must be a part of the type text, {PART}, got {{"type": "image_url"}}.',
        ),
        ({"model": 3}, "model must be a text, got 3."),
        ({"temperature": "hot"}, 'temperature must be a number from 0 to 2, got "hot".'),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, got 0."),
        ({"max_tokens": True}, "max_tokens must be a whole number ≥ 1, got true."),
        ({"n": 129}, "n must be a whole number from 1 to 128, got 129."),
        ({"seed": "1"}, f'seed must be a whole number from {-(2**63)} to {2**63 - 1}, got "1".'),
        ({"stop": [1]}, "stop must be a text or a list of texts, none of them empty, got [1]."),
        ({"stop": ["a"] * 17}, "stop must be at most 16 texts, got 17."),
        ({"stream": "yes"}, 'stream must be true or false, got "yes".'),
        ({"stream_options": []}, 'stream_options must be an object, such as {"include_usage": true}, got [].'),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage must be true or false, got 1."),
        ({"logprobs": 3}, "logprobs must be true or false, got 3."),
        ({"top_logprobs": 3}, 'top_logprobs needs "logprobs": true.'),
        ({"frequency_penalty": 3}, "frequency_penalty must be a number from -2 to 2, got 3."),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0 and at most 10, got 0."),
        ({"top_k": -3}, "top_k must be a whole number ≥ 0, got -3."),
        ({"tool_choice": "any"}, 'tool_choice is served at "none" or "auto" alone, got "any"; leave it out.'),
        ({"temprature": 1}, "'temprature' is not known to this server; did you mean 'temperature'?"),
        ({"zzz": 1}, "'zzz' is not known to this server; leave it out."),
    ],
)  # fmt: skip
def test_a_chat_says_what_its_keys_may_be(body: dict[str, Any], message: str):
    body = {"messages": [{"role": "user", "content": "a"}]} | body if body else body
    assert told(json.dumps(body).encode()) == message


@pytest.mark.parametrize(("body", "given"), [({}, "null"), ({"prompt": [1, "a"]}, '[1, "a"]')])
def test_a_completion_says_what_a_prompt_may_be(body: dict[str, Any], given: str):
    assert told(json.dumps(body).encode(), read=read_completion) == (
        'prompt must be a text such as "1+2?", a list of texts, a list of token ids, or a list of '
        f"such lists, got {given}."
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1]", "the body must be a JSON object, such as {EXAMPLE}, got [1]."),
        (
            b"{",
            "the body is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)); send an object, such as {EXAMPLE}.",
        ),
    ],
)
def test_a_body_says_what_it_may_be(body: bytes, message: str):
    example = '{"messages": [{"role": "user", "content": "1+2?"}]}'
    assert told(body) == message.replace("{EXAMPLE}", example)
