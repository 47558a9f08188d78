"""A response as text: what of it counts, and what is told of it while it is written."""

from typing import Any

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


def closes_unopened(text: str) -> bool:
    return TAGS.close in text and not text.lstrip().startswith(TAGS.open)


@given(BITS)
def test_the_pieces_are_the_parts_of_the_whole(bits: list[str]) -> None:
    text = "".join(bits)
    split = StreamedSplit(TAGS)
    pieces = [piece for bit in bits for piece in split.put(bit)] + split.put("", is_last=True)
    assert all(piece.text for piece in pieces)
    if closes_unopened(text):
        assert joined(pieces) == ("", text)
    else:
        parts = TAGS.split(text)
        assert joined(pieces) == (parts.thinking, parts.answer)


@given(BITS)
def test_a_prompt_that_opened_the_thinking_counts(bits: list[str]) -> None:
    split = StreamedSplit(TAGS, opened=True)
    pieces = [piece for bit in bits for piece in split.put(bit)] + split.put("", is_last=True)
    thinking, _, answer = "".join(bits).partition(TAGS.close)
    assert joined(pieces) == (thinking, answer)


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
