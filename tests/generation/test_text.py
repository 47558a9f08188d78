"""A response as text: what of it counts, and what is told of it while it is written."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import Piece, ResponseText, StreamedResponse, StreamedSplit


def test_special_tokens_go_and_thinking_tags_stay(tiny_tokenizer):
    reader = ResponseText(tiny_tokenizer)
    ids = tiny_tokenizer("<think>one<|im_start|> two</think> Six  is<|im_end|>")["input_ids"]
    assert reader.read(ids) == "<think>one two</think> Six  is"
    assert reader.answer(ids) == "six is"
    assert reader.answer(tiny_tokenizer("SIX \n is")["input_ids"]) == "six is"
    assert reader.answer(tiny_tokenizer("one two")["input_ids"], opened=True) == ""
    assert reader.is_opened_by(tiny_tokenizer("one<think> two")["input_ids"])
    assert not reader.is_opened_by(ids)


TAGS = ThinkingTags()
BITS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<", "<th", "ink>", "</", "think>", " ", "a", "é", "\n"]
    ),
    max_size=12,
)


def joined(pieces: list[Piece]) -> tuple[str, str]:
    return tuple(
        "".join(piece.text for piece in pieces if piece.is_thinking == side)
        for side in (True, False)
    )  # type: ignore[return-value]


BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def parts_of(text: str) -> tuple[str, str]:
    """The thinking and the rest of a text that does not begin inside a thinking."""
    return "".join(BLOCK.findall(text)), BLOCK.sub("", text)


def closes_unopened(text: str) -> bool:
    return TAGS.close in text and TAGS.open not in text.partition(TAGS.close)[0]


@given(BITS)
def test_the_pieces_are_the_parts_of_the_whole(bits: list[str]) -> None:
    text = "".join(bits)
    split = StreamedSplit(TAGS)
    pieces = [piece for bit in bits for piece in split.put(bit)] + split.put("", is_last=True)
    assert all(piece.text for piece in pieces)
    if closes_unopened(text):
        assert joined(pieces) == parts_of(text)
    else:
        parts = TAGS.split(text)
        assert joined(pieces) == (parts.thinking, parts.answer)


@given(BITS)
def test_a_prompt_that_opened_the_thinking_counts(bits: list[str]) -> None:
    split = StreamedSplit(TAGS, opened=True)
    pieces = [piece for bit in bits for piece in split.put(bit)] + split.put("", is_last=True)
    first, _, rest = "".join(bits).partition(TAGS.close)
    more, answer = parts_of(rest)
    assert joined(pieces) == (first + more, answer)
    assert TAGS.split("".join(bits), opened=True)[:2] == (first + more, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sure.<think>a</think>b", ("a", "Sure.b")),
        ("<think>a</think>b<think>c</think>d", ("ac", "bd")),
        ("<think>a</think>b<think>c", ("a", "b<think>c")),
        ("say <think> aloud", ("", "say <think> aloud")),
    ],
)
def test_a_thinking_may_stand_anywhere(text: str, expected: tuple[str, str]) -> None:
    split = StreamedSplit(TAGS)
    pieces = [piece for letter in text for piece in split.put(letter)]
    assert joined(pieces + split.put("", is_last=True)) == expected
    assert TAGS.split(text)[:2] == expected


def test_nothing_waits_that_is_certain() -> None:
    split = StreamedSplit(TAGS)
    assert split.put("<think>ab</th") == [Piece("ab", True)]
    assert split.put("i") == []
    assert split.put("s") == [Piece("</this", True)]
    assert split.put("</think>c") == [Piece("c", False)]
    assert split.put("</th") == [Piece("</th", False)]


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_tokens_come_out_as_their_text(tiny_tokenizer: Any, text: str) -> None:
    whole = f"<think>{text}</think>answer {text}"
    tokens = tiny_tokenizer(whole, add_special_tokens=False)["input_ids"]
    stream = StreamedResponse(tiny_tokenizer, TAGS)
    pieces = [
        piece for token in [*tokens, tiny_tokenizer.eos_token_id] for piece in stream.put(token)
    ]
    pieces += stream.end()
    assert not any("\ufffd" in piece.text for piece in pieces) or "\ufffd" in text
    decoded = tiny_tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    parts = TAGS.split(decoded)
    if all(special not in text for special in tiny_tokenizer.all_special_tokens):
        assert joined(pieces) == (parts.thinking, parts.answer)


def test_half_a_character_waits_and_is_not_lost(tiny_tokenizer: Any) -> None:
    tokens = tiny_tokenizer("日", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3
    stream = StreamedResponse(tiny_tokenizer, TAGS)
    assert [stream.put(token) for token in tokens[:2]] == [[], []]
    assert joined(stream.end()) == ("", "\ufffd")
