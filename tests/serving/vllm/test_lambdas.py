"""λ of every token, however the engine cuts a request into steps."""

import json
import random

import numpy as np
import pytest
import torch

from flexalign.errors import ConfigError, LambdaError, ServingError
from flexalign.generation.row_lambdas import RowDials, TagTokens
from flexalign.lambdas import Schedule
from flexalign.serving.vllm.lambdas import DialSettings, RequestDial, TokenLambdas, read_lambda

SETTINGS = DialSettings(default_lambda=0.25, thinking_tokens=(4, 5))
DIALS = (
    0.5,
    {"kind": "linear", "start": 0, "end": 2, "steps": 7},
    {"kind": "piecewise", "points": [[0, 1], [5, 1], [5, -1]]},
    {"kind": "thinking", "think": 0.0, "answer": 1.0},
    {"kind": "thinking", "think": 0.5, "answer": -1.0, "budget": 6, "end": 2.0},
)


class _Params:
    def __init__(self, lam):
        self.extra_args = {"lambda": lam}


@pytest.fixture(scope="module")
def tags(tiny_tokenizer):
    from flexalign.data.thinking import ThinkingTags

    found = TagTokens(tiny_tokenizer, ThinkingTags())
    assert (found.open, found.close) == SETTINGS.thinking_tokens
    return found


def _sequence(draw, length):
    return [draw.choice((4, 5, 6, 7, 8, 9)) for _ in range(length)]


def _expected(dial, tokens, prompt_length, tags):
    """What the library's own decoding gives, token by token from the whole sequence."""
    rows = RowDials.of(dial, 1)
    found = []
    for end in range(1, len(tokens) + 1):
        index = max(0, end - prompt_length)
        found.append(
            float(rows.at(torch.tensor([0]), index, torch.tensor([tokens[:end]]), tags)[0])
        )
    return found


@pytest.mark.parametrize("dial", DIALS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_any_cut_into_steps_gives_the_lambda_of_decoding(dial, seed, tags):
    """Cached prefixes, chunks, drafts that are thrown away, and starting again."""
    draw = random.Random(seed)
    prompt_length, length = draw.randrange(1, 20), 40
    tokens = _sequence(draw, length)
    cached = draw.randrange(prompt_length)
    known = tokens[:prompt_length]
    request = RequestDial(Schedule.parse(dial), prompt_length, SETTINGS.thinking_tokens, known)
    found = [None] * length
    position = cached
    while position < length:
        count = min(draw.randrange(1, 9), length - position)
        wrong = _sequence(draw, draw.randrange(4))
        fed = tokens[position : position + count] + wrong
        found[position : position + count] = request.at(position, len(fed), fed)[:count]
        position += count
        if draw.random() < 0.2:
            position = draw.randrange(cached, position)
    assert found[cached:] == pytest.approx(_expected(dial, tokens, prompt_length, tags)[cached:])


def test_a_batch_has_the_lambda_of_each_of_its_tokens():
    lambdas = TokenLambdas(torch.full((12,), 9.0), SETTINGS)
    address = lambdas.values.data_ptr()
    parameters = {"one": _Params(2.0), "two": _Params(DIALS[1]), "three": _Params(DIALS[3])}
    dials = [lambdas.dial(name, params, 3, [6, 4, 7]) for name, params in parameters.items()]
    starts = np.array([0, 2, 5, 9], dtype=np.int32)
    positions = torch.tensor([7, 8, 2, 3, 4, 0, 1, 2, 3, 0, 0])
    tokens = torch.tensor([6, 6, 6, 6, 6, 6, 4, 7, 5, 0, 0])
    lambdas.write(dials, starts, positions, tokens)
    expected = [2.0, 2.0, 0.0, 2 / 7, 4 / 7, 1.0, 0.0, 0.0, 1.0]
    assert lambdas.values[:9].tolist() == pytest.approx(expected)
    assert lambdas.values[9:].tolist() == [9.0] * 3
    assert lambdas.values.data_ptr() == address


def test_a_request_keeps_its_dial_until_its_parameters_are_others():
    lambdas = TokenLambdas(torch.zeros(4), SETTINGS)
    first, second = _Params(0.5), _Params(0.7)
    dial = lambdas.dial("one", first, 3)
    assert lambdas.dial("one", first, 3) is dial
    assert lambdas.dial("one", second, 3).constant == 0.7
    lambdas.forget_others(["two"])
    assert lambdas.dial("one", second, 3) is not dial
    assert lambdas.dial("two", _Params(None), 3).constant == SETTINGS.default_lambda


@pytest.mark.parametrize("text", [0.5, "0.5", '{"kind": "constant", "start": 0.5}'])
def test_a_lambda_may_come_as_text(text):
    assert read_lambda({"lambda": text}, SETTINGS) == Schedule.parse(0.5)


@pytest.mark.parametrize(
    ("extra_args", "error", "message"),
    [
        ({"lambda": "abc"}, ConfigError, "must be a number or a JSON object"),
        ({"lambda": float("nan")}, LambdaError, "finite"),
        ({"lambda": 1e300}, LambdaError, "finite"),
        ({"lambda": True}, LambdaError, "finite"),
        ({"lambda": {"kind": "thinking", "think": 1}}, ConfigError, "needs 'answer'"),
        ({"lamda": 1.0}, ConfigError, "did you mean 'lambda'"),
        ({"Lambda": 1.0}, ConfigError, "did you mean 'lambda'"),
        ({"lam": 1.0}, ConfigError, "did you mean 'lambda'"),
    ],
)
def test_malformed_and_misspelt_dials_are_refused(extra_args, error, message):
    with pytest.raises(error, match=message):
        read_lambda(extra_args, SETTINGS)


def test_other_arguments_are_nobodys_business():
    assert read_lambda({"kv_transfer_params": {}, "label": 1}, SETTINGS).at(0) == 0.25


def test_a_thinking_schedule_needs_tags_that_are_tokens():
    with pytest.raises(ConfigError, match="tags that are one token each"):
        read_lambda({"lambda": DIALS[3]}, DialSettings())


@pytest.mark.parametrize("dial", DIALS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_lora_dials_prompt_is_read_at_the_lambda_of_its_first_token(dial, seed, tags):
    """However it is cut into steps, cached or started again."""
    draw = random.Random(seed)
    prompt_length, length = draw.randrange(1, 20), 40
    tokens = _sequence(draw, length)
    expected = _expected(dial, tokens, prompt_length, tags)
    expected[:prompt_length] = [expected[prompt_length - 1]] * prompt_length
    for _ in range(5):
        known = draw.randrange(prompt_length, length)
        request = RequestDial(
            Schedule.parse(dial), prompt_length, (4, 5), tokens[:known], whole_prompt=True
        )
        start = draw.randrange(known)
        while start < length:
            count = draw.randrange(1, length - start + 1)
            found = request.at(start, count, tokens[start : start + count])
            assert found == pytest.approx(expected[start : start + count])
            start += count


def test_a_salt_is_shared_at_equal_lambda_alone():
    def salt(dial, prompt, given=None):
        request = RequestDial(Schedule.parse(dial), len(prompt), (4, 5), prompt, whole_prompt=True)
        return request.salt(given)

    prompt = [6, 6, 6, 6]
    assert salt(0.0, prompt) == salt(-0.0, [7]) == salt({"kind": "constant", "start": 0}, [8])
    assert salt(0.1, prompt) == salt(float(np.float32(0.1)), prompt)
    thinking = {"kind": "thinking", "think": 0.0, "answer": 1.0}
    different = [
        salt(0.0, prompt),
        salt(1.0, prompt),
        salt(1.0 + 1e-6, prompt),
        salt(1.0, prompt, "tenant"),
        salt(DIALS[1], prompt),
        salt(DIALS[1], [*prompt, 6]),
        salt(DIALS[2], prompt),
        salt(thinking, prompt),
        salt(thinking, [6, 6, 6, 4]),
    ]
    assert len(set(different)) == len(different)


def test_a_request_whose_prefix_is_not_told_apart_is_refused():
    settings = DialSettings(default_lambda=1.0, ranks={"model.layers.0.mlp.down_proj": [4]})
    for needs, extra_args in ((True, {"flexalign_salted": True}), (False, None)):
        lambdas = TokenLambdas(torch.zeros(2), settings, needs_salt=needs)
        params = _Params(0.5)
        params.extra_args = extra_args
        assert lambdas.start(params, 1, [6]).constant == 1.0
    with pytest.raises(ServingError, match="--no-enable-prefix-caching"):
        TokenLambdas(torch.zeros(2), settings, needs_salt=True).start(_Params(0.5), 1, [6])


def test_settings_come_back_from_json():
    ranks = {"model.layers.0.self_attn.qkv_proj": [4, 0, 4]}
    for settings in (DialSettings(2, 0.5, (4, 5)), DialSettings(1, 0.5, None, ranks)):

        class Config:
            flexalign = json.loads(json.dumps(settings.to_json()))

        assert DialSettings.of(Config) == settings
        assert settings.is_lora == (settings.ranks is not None)
