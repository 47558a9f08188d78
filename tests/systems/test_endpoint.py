"""What is made of a server's answers, however many of them come in at one time."""

from contextlib import closing
from queue import SimpleQueue
from typing import Any

import pytest

from chat_server import Chat, say
from flexalign.errors import ServingError
from flexalign.lambdas import AS_IT_IS
from flexalign.systems import Answer, Failure, PromptRequest, SystemOptions
from flexalign.systems.endpoint import EndpointBackend, _collected

REQUESTS = [PromptRequest(n, "1+1?", AS_IT_IS, 0, n) for n in range(5)]


def collected(*answers: Answer | Failure, expected: int = 5, at_once: int = 0) -> list[Any]:
    """Collect answers that have all come in before anybody looks."""
    queue: SimpleQueue[Any] = SimpleQueue()
    for outcome in zip(REQUESTS, answers, strict=False):
        queue.put(outcome)
    batches = _collected(queue, expected, 3, "http://x", at_once)
    return [one for batch in batches for one in batch]


def test_failures_in_a_row_give_the_server_up_although_all_came_in_at_once():
    with pytest.raises(ServingError, match=r"3 requests in a row.*for prompt 3 \(down\)"):
        collected(*[Failure("down")] * 5)


def test_failures_between_answers_cost_themselves_alone():
    answers = [Failure("down"), Failure("down"), Answer("2", 1), Failure("down"), Failure("down")]
    assert [answer for _, answer in collected(*answers)] == answers


def test_failures_at_the_end_leave_nothing_to_give_up():
    answers = [Answer("2", 1), Answer("2", 1), *[Failure("down")] * 3]
    assert [answer for _, answer in collected(*answers)] == answers


def test_first_requests_that_all_fail_end_the_run_with_their_reason_alone():
    for expected in (2, 5):
        with pytest.raises(ServingError, match=r"^400 no$"):
            collected(*[Failure("400 no")] * 2, expected=expected, at_once=2)
    answers = [Failure("400 no"), Answer("2", 1), Failure("400 no"), Failure("400 no")]
    assert [one for _, one in collected(*answers, expected=4, at_once=2)] == answers


def test_the_list_of_models_and_the_samples_tell_one_retry():
    listed = (200, {"data": [{"id": "only"}]})
    answers = iter([(503, b"loading"), listed, (503, b"loading"), say("2")])
    told: list[str] = []
    options = SystemOptions(concurrency=1, pause_seconds=0, on_retry=told.append)
    with closing(Chat(lambda path, body: next(answers))) as chat:
        [[(_, answer)]] = EndpointBackend(chat.url, options).run(REQUESTS[:1], ())
    assert (answer.text, answer.tokens) == ("2", 5)
    assert [body.get("model") for _, body, _ in chat.asked] == [None, None, "only", "only"]
    assert len(told) == 1
