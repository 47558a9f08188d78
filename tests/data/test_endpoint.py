import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flexalign.data.endpoint import Endpoint, EndpointResponse
from flexalign.errors import ConfigError, ServingError

Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


class Chat:
    """A server on the loopback that answers as told and keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.most_at_once = 0
        self._running = 0
        lock, chat = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    chat._running += 1
                    chat.most_at_once = max(chat.most_at_once, chat._running)
                    chat.asked.append((self.path, body, self.headers.get("Authorization")))
                status, value = answer(self.path, body)
                with lock:
                    chat._running -= 1
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Chat]]:
    chats: list[Chat] = []

    def start(answer: Answer) -> Chat:
        chat = Chat(answer)
        threading.Thread(target=chat.server.serve_forever, args=(0.01,), daemon=True).start()
        chats.append(chat)
        return chat

    yield start
    for chat in chats:
        chat.server.shutdown()
        chat.server.server_close()


def say(content: Any, finish: str = "stop", **message: Any) -> tuple[int, Any]:
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 5}}


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


def test_a_refusal_is_final(serve: Callable[[Answer], Chat]) -> None:
    chat = serve(lambda path, body: (404, b"no model m"))
    with pytest.raises(ServingError, match="refused a request: 404 no model m"):
        endpoint(chat.url).generate([user("?")], [1])
    assert len(chat.asked) == 1


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
