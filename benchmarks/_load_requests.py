"""The requests of the load test: random, from a seed, and what the library answers alone."""

import json
import random
from dataclasses import dataclass, replace
from typing import Any

from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaModel
from flexalign.lambdas import Fixed, parse_dial
from flexalign.miniature import make_questions

__all__ = ["LAMBDA_RANGE", "PATHS", "Asked", "draw_request", "wrong_answers"]

LAMBDA_RANGE = (-1.0, 2.0)
PATHS = ("/v1/chat/completions", "/v1/completions")
_QUESTIONS = [question.text for question in make_questions(200, seed=77)]
_OTHER_DIALS: list[Any] = [
    "auto",
    {"policy": "adaptive", "threshold": 0.9},
    {"policy": "route", "share": 0.5},
    {"kind": "linear", "start": 0, "end": 1, "steps": 20},
    {"kind": "thinking", "think": 0.2, "answer": 1.0, "budget": 30, "end": 1.5},
]
_MALFORMED: list[tuple[dict[str, Any], int]] = [
    ({"lambda": 7}, 400),
    ({"lambda": True}, 400),
    ({"lamda": 0.5}, 400),
    ({"lambda": 0.5, "control": 0.5}, 400),
    ({"max_tokens": 10**9}, 400),
    ({"temperature": "hot"}, 400),
    ({"n": 0}, 400),
    ({"prompt": [10**6], "messages": "none"}, 400),
    ({"model": "another"}, 404),
]


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        path: Where it goes.
        body: Its body.
        question: What is asked in it.
        status: What it is to be answered with.
        leaves: Whether its client leaves before the end.
    """

    path: str
    body: dict[str, Any]
    question: str
    status: int
    leaves: bool

    @property
    def content(self) -> bytes:
        return json.dumps(self.body).encode()

    @property
    def dial(self) -> Any:
        return self.body["lambda"]


def draw_request(draw: random.Random) -> Asked:
    """5 in 100 are malformed, 10 in 100 are left by their clients."""
    question = draw.choice(_QUESTIONS)
    path = draw.choice(PATHS)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "prompt": f"<bos>{question}",
        "lambda": round(draw.uniform(*LAMBDA_RANGE), 2),
        "max_tokens": draw.choice((1, 5, 20, 60, 150)),
        "temperature": draw.choice((0, 1)),
        "seed": draw.randrange(2**40),
        "n": draw.choice((1, 1, 1, 1, 3)),
        "stream": draw.random() < 0.5,
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    body.pop("prompt" if path == PATHS[0] else "messages")
    if draw.random() < 0.2:
        body["lambda"] = draw.choice(_OTHER_DIALS)
    if draw.random() < 0.1:
        body["stop"] = ["again"]
    if draw.random() < 0.1:
        body |= {"logprobs": True} if path == PATHS[0] else {"logprobs": 2}
    kind = draw.random()
    if kind < 0.05:
        wrong, status = draw.choice(_MALFORMED)
        return Asked(path, body | wrong, question, status, False)
    return Asked(path, body, question, 200, kind < 0.15)


def wrong_answers(answers: list[tuple[Asked, str, Any]]) -> list[str]:
    """Compare answers with those that the library writes for each request alone.

    Args:
        answers: The request, its first choice's text without thinking tags, and the λ that was
            told of it.

    Returns:
        A line for each that differs.
    """
    model = InRaModel.from_pretrained("miniature", "miniature:fast")
    model.inra_config = replace(model.inra_config, lambda_range=LAMBDA_RANGE)
    wrong = []
    for asked, text, told in answers:
        dial = asked.dial
        is_route = isinstance(dial, dict) and dial.get("policy") == "route"
        [alone] = generate_responses(
            model,
            model.tokenizer,
            [[{"role": "user", "content": asked.question}]],
            max_new_tokens=asked.body["max_tokens"],
            temperature=asked.body["temperature"],
            seeds=[asked.body["seed"]],
            lam=[
                Fixed(told[0] if isinstance(told, list) else told) if is_route else parse_dial(dial)
            ],
        )
        expected = _stopped(alone.text, asked) if "stop" in asked.body else alone.text
        if _bare(text) != _bare(expected):
            wrong.append(f"{json.dumps(asked.body)}: {text!r} instead of {expected!r}")
    return wrong


def _stopped(text: str, asked: Asked) -> str:
    """Cut a response at the stop text: of a chat, which is looked for after the thinking."""
    if asked.path != PATHS[0]:
        return text.partition("again")[0]
    if text.lstrip().startswith("<think>"):
        thinking, closed, answer = text.partition("</think>")
        return thinking + closed + answer.partition("again")[0]
    return text.partition("again")[0]


def _bare(text: str) -> str:
    return "".join(text.replace("<think>", "").replace("</think>", "").split())
