"""Stop texts in a stream: nothing after one, nothing lost before it."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import ResponseText
from flexalign.serving.engine.sequence import StoppedText

LETTERS = st.text("aab ", max_size=12)


@given(LETTERS, st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop(tiny_tokenizer: Any, text: str, stops: list[str]):
    running = StoppedText(ResponseText(tiny_tokenizer, ThinkingTags()), stops)
    given_out = ""
    for token in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]:
        given_out += running.put(token)
        assert not any(stop in given_out for stop in stops)
        if running.has_stopped:
            break
    given_out += running.end()
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert running.has_stopped == bool(found)
    assert given_out == text[: min(found, default=len(text))]


def test_what_cannot_become_a_stop_text_does_not_wait(tiny_tokenizer: Any):
    running = StoppedText(ResponseText(tiny_tokenizer, ThinkingTags()), ["xyz"])
    told = [running.put(tiny_tokenizer(letter)["input_ids"][0]) for letter in "axbxy"]
    assert told == ["a", "", "xb", "", ""]
    assert running.end() == "xy"


def test_special_tokens_leave_no_trace(tiny_tokenizer: Any):
    running = StoppedText(ResponseText(tiny_tokenizer, ThinkingTags()), [])
    ids = tiny_tokenizer("<think>a<|pad|> é</think>", add_special_tokens=False)["input_ids"]
    assert "".join(map(running.put, ids)) + running.end() == "<think>a é</think>"
