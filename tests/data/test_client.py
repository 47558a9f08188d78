import threading
from collections.abc import Callable
from typing import Any

import pytest

from chat_server import CLOSE, Answer, Chat, Half, say
from flexalign.data.client import Endpoint, EndpointResponse
from flexalign.errors import (
    ConfigError,
    RequestRefusedError,
    ServerUnusableError,
    ServingError,
)


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, "m", 7, 0.5, 0.9, **{"pause_seconds": 0.0, **options})


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text, "name": None}]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_each_prompt_is_asked_with_its_seed_and_answered_in_order(
    serve: Callable[[Answer], Chat], suffix: str
) -> None:
    chat = serve(lambda path, body: say(body["messages"][0]["content"] + str(body["seed"])))
    prompts = [user(f"p{i}:") for i in range(12)]
    responses = endpoint(chat.url + suffix, concurrency=3).generate(prompts, range(12))
    assert responses == [EndpointResponse(f"p{i}:{i}", 5, False) for i in range(12)]
    assert chat.most_at_once <= 3
    path, body, key = chat.asked[0]
    assert path == "/v1/chat/completions"
    assert {name: body[name] for name in ("model", "max_tokens", "temperature", "top_p")} == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert set(body["messages"][0]) == {"role", "content"}
    assert key is None


def test_a_developer_is_sent_as_system(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: say("7"))
    developer = {"role": "developer", "content": "be brief"}
    endpoint(chat.url).generate([[developer, *user("?")]], [1])
    sent = chat.asked[0][1]["messages"]
    assert sent[0] == {"role": "system", "content": "be brief"}
    assert developer["role"] == "developer"


def test_text_is_completed_as_it_stands(serve: Callable[[Answer], Chat]) -> None:
    answer = {"choices": [{"text": " 3", "finish_reason": "length"}]}
    chat = serve(lambda path, body: (200, answer))
    assert endpoint(chat.url).generate(["1+2="], [1]) == [EndpointResponse(" 3", None, True)]
    assert chat.asked[0][:1] == ("/v1/completions",)
    assert chat.asked[0][1]["prompt"] == "1+2="


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_thinking_that_comes_apart_is_put_back(serve: Callable[[Answer], Chat], field: str) -> None:
    chat = serve(lambda path, body: say("7", **{field: "3+4"}))
    assert endpoint(chat.url).generate([user("?")], [1])[0].text == "<think>3+4</think>7"
    chat = serve(lambda path, body: say(None, "length", **{field: "3+4"}))
    assert endpoint(chat.url).generate([user("?")], [1])[0].text == "<think>3+4"


def test_the_key_is_sent_only_where_it_is_given(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: say("7"))
    server = endpoint(chat.url, api_key="secret")
    server.generate([user("?")], [1])
    assert chat.asked[0][2] == "Bearer secret"
    assert "secret" not in repr(server)


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_a_key_for_openai_stays_here(
    serve: Callable[[Answer], Chat], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for openai")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "for openai")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"{name}: Bearer for openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    chat = serve(lambda path, body: say("7"))
    endpoint(chat.url).generate([user("?")], [1])
    endpoint(chat.url, api_key="secret").generate([user("?")], [1])
    assert [key for _, _, key in chat.asked] == [None, "Bearer secret"]


def test_half_a_surrogate_pair_is_sent_as_it_stands(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: say("7"))
    endpoint(chat.url).generate([user("1+\ud83d 北?")], [1])
    assert chat.asked[0][1]["messages"][0]["content"] == "1+\ud83d 北?"


@pytest.mark.parametrize("url", ["http://a:x", "http://a\nb"])
def test_an_address_that_cannot_be_read_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be asked"):
        endpoint(url).models()


def test_a_proxy_that_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "other://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"127.0.0.1:8.*cannot be asked.*proxy"):
        endpoint("http://127.0.0.1:8").models()


def test_an_overloaded_server_is_asked_again(serve: Callable[[Answer], Chat]) -> None:
    answers = iter([(429, b"slow down"), (503, b""), (200, b"{half"), say("7")])
    chat = serve(lambda path, body: next(answers))
    assert endpoint(chat.url).generate([user("?")], [1])[0].text == "7"
    assert len(chat.asked) == 4


def test_a_server_that_stays_overloaded_ends_the_run(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: (503, b"loading"))
    with pytest.raises(ServingError, match=r"in 3 attempts \(503 loading\).*same command"):
        endpoint(chat.url, attempts=3).generate([user("?")], [1])
    assert len(chat.asked) == 3


def test_the_first_retry_alone_is_told(serve: Callable[[Answer], Chat]) -> None:
    answers = iter([(503, b"loading"), (503, b"loading"), say("7")])
    chat, told = serve(lambda path, body: next(answers)), []
    assert endpoint(chat.url, on_retry=told.append).generate([user("?")], [1])[0].text == "7"
    assert told == [
        f"{chat.url} gave no response (503 loading); every request is tried up to 5 times, after "
        "longer and longer pauses."
    ]


def test_a_refusal_is_final(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: (404, b"no model m"))
    with pytest.raises(ServingError, match="refused a request: 404 no model m"):
        endpoint(chat.url).generate([user("?")], [1])
    assert len(chat.asked) == 1


@pytest.mark.parametrize(
    ("status", "options", "cure"),
    [
        (401, {}, "give --api-key-env NAME"),
        (403, {"api_key": "old"}, "check the key that --api-key-env names"),
        (404, {}, "check the address and --model-name"),
    ],
)
def test_a_refusal_of_every_request_names_its_cure(
    serve: Callable[[Answer], Chat], status: int, options: dict[str, Any], cure: str
) -> None:
    chat = serve(lambda path, body: (status, b"<p>\n no </p>"))
    message = rf"refused a request: {status} <p> no </p>; {cure}"
    for ask in (lambda one: one.models(), lambda one: one.generate([user("?")], [1])):
        with pytest.raises(ServerUnusableError, match=message):
            ask(endpoint(chat.url, **options))
    assert len(chat.asked) == 2


def test_a_refusal_of_one_request_is_told_apart(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: (400, b"too long"))
    with pytest.raises(RequestRefusedError, match=r"400 too long$"):
        endpoint(chat.url).generate([user("?")], [1])


def test_a_page_is_said_to_be_no_json_and_not_asked_for_again(
    serve: Callable[[Answer], Chat],
) -> None:
    chat = serve(lambda path, body: (200, b"<!DOCTYPE html>\n<title>A router</title>"))
    with pytest.raises(
        ServerUnusableError, match=r"else than JSON \(<!DOCTYPE html> <title>A router</title>\)"
    ):
        endpoint(chat.url).generate([user("?")], [1])
    assert len(chat.asked) == 1
    empty = serve(lambda path, body: (200, b""))
    with pytest.raises(
        ServingError, match=r"in 2 attempts \(its answer is not whole JSON: it is empty"
    ):
        endpoint(empty.url, attempts=2).generate([user("?")], [1])


@pytest.mark.parametrize("value", [{}, [], {"choices": []}, {"choices": [{}]}, {"error": "x"}])
def test_an_answer_that_is_no_response_is_said(serve: Callable[[Answer], Chat], value: Any) -> None:
    chat = serve(lambda path, body: (200, value))
    with pytest.raises(ServingError, match="something else than a response"):
        endpoint(chat.url).generate([user("?")], [1])


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ServingError, match=r"127.0.0.1:9.*check that the server runs"):
        endpoint("http://127.0.0.1:9", attempts=2).generate([user("?")], [1])
    with pytest.raises(ConfigError, match="is not an address"):
        endpoint("localhost:8000")


def test_a_server_that_breaks_off_is_asked_again(serve: Callable[[Answer], Chat]) -> None:
    answers = iter([CLOSE, (200, Half(say("6")[1])), say("7")])
    chat = serve(lambda path, body: next(answers))
    assert endpoint(chat.url).generate([user("?")], [1])[0].text == "7"
    assert len(chat.asked) == 3


def test_a_server_that_hangs_is_asked_again(serve: Callable[[Answer], Chat]) -> None:
    hung, done = threading.Event(), threading.Event()

    def answer(path: str, body: dict[str, Any]) -> Any:
        if not hung.is_set():
            hung.set()
            done.wait(60)
        return say("7")

    chat = serve(answer)
    assert endpoint(chat.url, timeout_seconds=1.0).generate([user("?")], [1])[0].text == "7"
    done.set()
    assert len(chat.asked) == 2


def test_a_server_says_when_to_come_back(
    serve: Callable[[Answer], Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr("flexalign.data.client.time.sleep", paused.append)
    waits = iter(["7", "900", "tomorrow", "-3"])
    chat = serve(lambda path, body: (429, b"", {"Retry-After": next(waits)}))
    with pytest.raises(ServingError):
        endpoint(chat.url, attempts=4, pause_seconds=1.0).generate([user("?")], [1])
    assert paused == [7.0, 60.0, 4.0]


def test_more_is_sent_and_read(serve: Callable[[Answer], Chat]) -> None:
    details = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 4}}
    choice = {"message": {"content": "3"}, "finish_reason": "stop"}
    answer = {"choices": [choice], "usage": details, "dial": {"route": "fast"}}
    chat = serve(lambda path, body: (200, answer))
    response = endpoint(chat.url).ask(user("?"), 1, **{"lambda": 0.5})
    assert response == EndpointResponse("3", 9, False, 4, {"route": "fast"})
    assert chat.asked[0][1]["lambda"] == 0.5


def test_a_server_lists_its_models(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: (200, {"data": [{"id": "a"}, {"id": "b"}]}))
    assert endpoint(chat.url).models() == ["a", "b"]
    assert chat.asked[0][0] == "/v1/models"
    silent = serve(lambda path, body: (200, {}))
    with pytest.raises(ServingError, match=r"which models it has.*--model-name"):
        endpoint(silent.url).models()
