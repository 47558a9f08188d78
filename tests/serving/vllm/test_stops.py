"""Stop texts on vLLM, with a text maker of the kind that vLLM has; vLLM's own is in test_contract."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import StopSearch
from flexalign.serving.vllm.stops import STOPS_KEY, OutsideThinking, with_stops

TAGS = ThinkingTags()


class Words:
    """Makes text as vLLM does: a token is the place of a word."""

    def __init__(self, words: list[str], min_tokens: int = 0, *, includes: bool = False) -> None:
        self.words, self.min_tokens = words, min_tokens
        self.include_stop_str_in_output = includes
        self.output_text = ""
        self.output_token_ids: list[int] = []

    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> None:
        for token in new_token_ids:
            self.output_token_ids.append(token)
            self.output_text += self.words[token]


def run(words: list[str], stops: list[str], step: int = 1, **options: Any) -> Any:
    """Write words in steps; return the stop text, what was returned piece by piece, the tokens."""
    maker = OutsideThinking(Words(words, **options), StopSearch(stops, TAGS))
    pieces, found = [], None
    for first in range(0, len(words), step):
        found = maker.update(list(range(first, min(first + step, len(words)))), False)
        is_last = found is not None or first + step >= len(words)
        pieces.append(maker.get_next_output_text(is_last, True))
        if found is not None:
            break
    assert maker.get_next_output_text(True, False) == "".join(pieces)
    return found, "".join(pieces), maker.num_output_tokens()


BITS = st.lists(st.sampled_from(["<think>", "</think>", "one", " two", ".", "\n"]), max_size=10)


@given(BITS, st.integers(1, 4))
def test_the_text_ends_before_the_first_stop_outside(words: list[str], step: int):
    text = "".join(words)
    inside = [match.span() for match in re.finditer(r"<think>.*?(</think>|$)", text, re.DOTALL)]
    places = [
        match.start()
        for match in re.finditer(r" two|\.", text)
        if not any(low <= match.start() < high for low, high in inside)
    ]
    found, written, tokens = run(words, [" two", "."], step)
    assert (found is not None) == bool(places)
    assert written == (text[: places[0]] if places else text)
    lengths = [len("".join(words[:count])) for count in range(len(words) + 1)]
    expected = next(n for n, length in enumerate(lengths) if length > places[0]) if places else None
    assert tokens == (expected if places else len(words))


def test_the_stop_may_be_included_and_may_have_to_wait():
    words = ["a", ".", "b", ".", "c"]
    assert run(words, ["."]) == (".", "a", 2)
    assert run(words, ["."], includes=True) == (".", "a.", 2)
    assert run(words, ["."], min_tokens=2) == (".", "a.b", 4)
    assert run(words, ["."], min_tokens=4) == (None, "a.b.c", 5)


def test_text_that_may_be_a_stop_is_held_back():
    maker = OutsideThinking(Words(["x", "EN", "D"]), StopSearch(["END"], TAGS))
    told = []
    for token in range(2):
        assert maker.update([token], False) is None
        told.append(maker.get_next_output_text(False, True))
    assert told == ["x", ""]
    assert maker.update([2], False) == "END"
    assert maker.get_next_output_text(True, True) == ""


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"stop": None},
        {"stop": []},
        {"stop": 3},
        {"stop": ["a", ""]},
        {"stop": "a", "vllm_xargs": 3},
    ],
)
def test_a_body_without_stop_texts_is_left_to_vllm(body: dict[str, Any]):
    assert with_stops(body, "vllm_xargs", TAGS) is body


def test_stop_texts_are_handed_on_beside_other_arguments():
    body = {"stop": "a", "vllm_xargs": {"lambda": 0.5}}
    assert with_stops(body, "vllm_xargs", TAGS) == {
        "stop": [],
        "vllm_xargs": {"lambda": 0.5, STOPS_KEY: ["<think>", "</think>", "a"]},
    }
