"""Bodies of requests: what is taken, and what is refused by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexalign.data.logits import LogitsSettings
from flexalign.serving.errors import ApiError
from flexalign.serving.protocol import read_chat, read_completion

MESSAGES = [{"role": "user", "content": "1+2"}]


def chat(**values: Any) -> Any:
    return read_chat({"messages": MESSAGES, **values})


def test_the_defaults_are_openais():
    sampling = chat().sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (None, 1.0, 1.0)
    assert (sampling.stop, sampling.n, sampling.logprobs) == ((), 1, None)
    assert not sampling.stream
    assert chat().sampling.seed != sampling.seed  # drawn anew
    assert read_completion({"prompt": "a"}).sampling.max_tokens == 16


def test_everything_is_read():
    asked = chat(
        model="m",
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        seed=-3,
        stop=["a", "b"],
        n=2,
        logprobs=True,
        top_logprobs=3,
        stream=True,
        stream_options={"include_usage": True},
        user="u",
        frequency_penalty=0,
        tools=[],
        response_format={"type": "text"},
    )
    sampling = asked.sampling
    assert sampling.logits == LogitsSettings()
    assert (asked.model, sampling.max_tokens, sampling.temperature) == ("m", 5, 0.0)
    assert (sampling.top_p, sampling.seed, sampling.stop, sampling.n) == (0.5, -3, ("a", "b"), 2)
    assert (sampling.logprobs, sampling.stream, sampling.include_usage) == (3, True, True)


def test_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]
    asked = read_chat({"messages": [{"role": "user", "content": parts}]})
    assert asked.messages == ({"role": "user", "content": "1+2"},)
    silent = read_chat({"messages": [{"role": "assistant", "content": None}]})
    assert silent.messages[0]["content"] == ""


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts_have_four_forms(prompt: Any, prompts: Any):
    assert read_completion({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("messages", None),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [1]),
        ("messages", [{"content": "a"}]),
        ("messages", [{"role": 1, "content": "a"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
        ("model", 3),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("seed", 2**63),
        ("seed", "1"),
        ("n", 0),
        ("n", 129),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["a"] * 17),
        ("stream", "yes"),
        ("stream_options", []),
        ("logprobs", 3),
        ("top_logprobs", 3),
        ("frequency_penalty", 2.5),
        ("presence_penalty", "high"),
        ("repetition_penalty", 0),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"one": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": True}),
        ("logit_bias", {"1": float("nan")}),
        ("logit_bias", [1]),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "yaml"}),
        ("temprature", 0.5),
    ],
)
def test_what_would_change_the_answer_and_is_not_served_is_refused(param: str, value: Any):
    with pytest.raises(ApiError) as caught:
        chat(**{param: value})
    assert (caught.value.status, caught.value.param) == (400, param)


def test_limits_penalties_and_biases_are_read():
    asked = chat(
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias={"7": -100, "3": 0, "12": 1.5},
    )
    bias = ((7, -100.0), (12, 1.5))
    assert asked.sampling.logits == LogitsSettings(20, 0.05, 1.1, -0.5, 0.5, bias)
    assert chat(top_k=-1).sampling.logits.top_k == 0


def test_a_misspelt_key_names_the_nearest():
    with pytest.raises(ApiError, match="'temperature'"):
        chat(temprature=0.5)


@pytest.mark.parametrize("prompt", [None, [], [[]], [True], ["a", 1], [[1], "a"], {"a": 1}, 3])
def test_a_prompt_that_is_none_is_refused(prompt: Any):
    with pytest.raises(ApiError) as caught:
        read_completion({"prompt": prompt})
    assert caught.value.param == "prompt"


KEYS = ["messages", "prompt", "temperature", "top_p", "seed", "stop", "n", "stream", "logprobs"]
KEYS += ["top_logprobs", "max_tokens", "stream_options", "tools", "logit_bias", "model", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5))
def test_any_json_is_read_or_refused_and_nothing_else(body: dict[str, Any]):
    refused = set()
    for read in (read_chat, read_completion):
        try:
            read(body)
        except ApiError as error:
            refused.add(error.status)
    assert refused <= {400}
