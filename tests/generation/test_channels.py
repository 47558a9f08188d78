"""Thinking between markers of several tokens, as gpt-oss's channels are."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.generation.row_lambdas import TagTokens
from flexalign.generation.text import ResponseText, StreamedResponse

CHANNELS = ThinkingTags(
    "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
)
THOUGHT = f"{CHANNELS.open}I add.{CHANNELS.close}It is 5."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("start", "end", "channel", "message", "return")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|return|>",
        extra_special_tokens=[f"<|{name}|>" for name in names],
    )


def test_the_thinking_is_found_in_token_ids(tokenizer: Any) -> None:
    tags = TagTokens(tokenizer, CHANNELS)
    ids = tokenizer(THOUGHT, add_special_tokens=False)["input_ids"]
    begins = len(tokenizer(CHANNELS.open)["input_ids"])
    ends = len(tokenizer(CHANNELS.open + "I add." + CHANNELS.close)["input_ids"])
    for length in range(1, len(ids) + 1):
        (inside,), (index,) = tags.place(torch.tensor([ids[:length]]))
        assert inside == (begins <= length < ends), length
        if inside:
            assert index == length - begins
    with pytest.raises(ConfigError, match="needs tags that are one token each"):
        TagTokens(tokenizer, ThinkingTags("<think>", "</think>"))


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [(THOUGHT, "I add.", "It is 5."), ("<|channel|>final<|message|>It is 5.", "", "It is 5.")],
)
def test_a_response_is_read_whole_and_as_it_comes(
    tokenizer: Any, text: str, thinking: str, answer: str
) -> None:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    read = ResponseText(tokenizer, CHANNELS).read(ids)
    assert read == text
    assert CHANNELS.split(read) == (thinking, answer, True)
    stream = StreamedResponse(tokenizer, CHANNELS)
    pieces = [piece for token in ids for piece in stream.put(token)] + stream.end()
    assert "".join(piece.text for piece in pieces if piece.is_thinking) == thinking
    assert "".join(piece.text for piece in pieces if not piece.is_thinking) == answer
