"""Stop texts in a stream: nothing after one, nothing lost before it."""

import re
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import ResponseText
from flexalign.serving.engine.sequence import StoppedText

TAGS = ThinkingTags()
LETTERS = st.text("aab ", max_size=12)


@given(LETTERS, st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
@example(text=" aa", stops=["a", " aa"])
def test_the_text_ends_before_the_first_stop(tiny_tokenizer: Any, text: str, stops: list[str]):
    running = StoppedText(ResponseText(tiny_tokenizer, ThinkingTags()), stops)
    given_out = ""
    for token in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]:
        given_out += running.put(token)
        assert not any(stop in given_out for stop in stops)
        if running.has_stopped:
            break
    given_out += running.end()
    # The first that is complete, letter by letter, and of two that end together the longer one.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert running.has_stopped == bool(ends)
    assert given_out == (text[: min(ends)[1]] if ends else text)


def test_what_cannot_become_a_stop_text_does_not_wait(tiny_tokenizer: Any):
    running = StoppedText(ResponseText(tiny_tokenizer, ThinkingTags()), ["xyz"])
    told = [running.put(tiny_tokenizer(letter)["input_ids"][0]) for letter in "axbxy"]
    assert told == ["a", "", "xb", "", ""]
    assert running.end() == "xy"


def test_special_tokens_leave_no_trace(tiny_tokenizer: Any):
    running = StoppedText(ResponseText(tiny_tokenizer, ThinkingTags()), [])
    ids = tiny_tokenizer("<think>a<|pad|> é</think>", add_special_tokens=False)["input_ids"]
    assert "".join(map(running.put, ids)) + running.end() == "<think>a é</think>"


BITS = st.lists(st.sampled_from(["<think>", "</think>", "one", " two", ".", "\n"]), max_size=10)


@given(BITS, st.booleans())
def test_no_stop_text_is_found_inside_the_thinking(
    tiny_tokenizer: Any, bits: list[str], opened: bool
):
    text = "".join(bits)
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    running = StoppedText(ResponseText(tiny_tokenizer, TAGS), [" two", "."], TAGS, opened=opened)
    written = ""
    for token in ids:
        written += running.put(token)
        if running.has_stopped:
            break
    written += running.end()

    # Every character's place, with those of the thinking left out: a naive version.
    places, inside, at = [], opened, 0
    while at < len(text):
        tag = TAGS.close if inside else TAGS.open
        if text.startswith(tag, at):
            inside, at = not inside, at + len(tag)
            places.append(None)
            continue
        places.append(None if inside else at)
        at += 1
    visible = "".join("\0" if place is None else text[place] for place in places)
    first = re.search(r" two|\.", visible)
    assert running.has_stopped == bool(first)
    assert written == (text[: places[first.start()]] if first else text)


def test_a_completion_stops_inside_what_looks_like_thinking(tiny_tokenizer: Any):
    running = StoppedText(ResponseText(tiny_tokenizer, TAGS), ["two"])
    ids = tiny_tokenizer("<think>one two", add_special_tokens=False)["input_ids"]
    written = "".join(running.put(token) for token in ids)
    assert running.has_stopped
    assert written == "<think>one "
