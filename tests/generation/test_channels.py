"""Thinking between markers of several tokens, as gpt-oss's channels are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from contract.subjects import stir
from flexalign.data.rendering import Rendering
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.generation.responses import generate_responses
from flexalign.generation.row_lambdas import TagTokens
from flexalign.generation.text import ResponseText, StreamedResponse
from flexalign.inra import InRaModel
from flexalign.lambdas import Adaptive

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


@pytest.fixture
def model(tokenizer: Any, tiny_model: Callable[..., Any]) -> InRaModel:
    """A dial over a base with gpt-oss's own template, whose two streams disagree often."""
    template = Path(trl.__file__).parent / "chat_templates" / "gptoss.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    model = InRaModel.create(tiny_model(vocab_size=len(tokenizer), initializer_range=0.1))
    stir(model.adapter, 0.2, seed=2)
    model.inra_config = replace(model.inra_config, lambda_range=(0.0, 1.0))
    model.tokenizer = tokenizer
    return model


QUESTION = [{"role": "user", "content": "What is 2+3?"}]


def test_the_templates_channels_are_found_by_rendering(model: InRaModel) -> None:
    assert ThinkingTags.of(model.tokenizer) == CHANNELS


def test_a_schedule_and_an_adaptive_dial_work_inside_channels(model: InRaModel) -> None:
    prompt = Rendering(model.tokenizer).prompt(QUESTION).text
    opened = f"{prompt}{CHANNELS.open}I add."
    prompts = [prompt, opened, opened + CHANNELS.close]

    def write(given: list[str], **dial: Any) -> list[tuple[int, ...]]:
        made = generate_responses(
            model, model.tokenizer, given, max_new_tokens=6, temperature=0, **dial
        )
        return [tuple(response.token_ids) for response in made]

    slow, fast = write(prompts, lam=0.0), write(prompts, lam=1.0)
    assert all(one != other for one, other in zip(slow, fast, strict=True))
    inside = write(prompts, lam={"kind": "thinking", "think": 0, "answer": 1})
    assert inside == [fast[0], slow[1], fast[2]]  # before the channel opens, it is the answer
    assert write(prompts, lam={"kind": "thinking", "think": 1, "answer": 0}) == [
        slow[0],
        fast[1],
        slow[2],
    ]

    # The fast answer has to end for its confidence to count.
    end = fast[2][2]
    model.generation_config.eos_token_id = [end, model.tokenizer.eos_token_id]
    answered = write([prompts[2]], policy=Adaptive(0, measure="agreement"))
    assert answered == [fast[2][: fast[2].index(end)]]
    assert end not in slow[2]
    assert write([prompts[2]], policy=Adaptive(1)) == [slow[2]]
