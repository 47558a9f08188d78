"""Answers in OpenAI's form, whole or as the chunks of a stream."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flexalign.data.thinking import ThinkingTags
from flexalign.decoding.streaming import StreamedSplit
from flexalign.decoding.text import ResponseText
from flexalign.serving.engine import Ended, Piece, WrittenToken

__all__ = ["AnswerForm", "ChatForm", "CompletionForm", "Draft", "count_usage", "event"]


@dataclass
class Draft:
    """A choice of an answer, as it grows.

    Attributes:
        index: Its number.
        prompt_tokens: Tokens of its prompt.
        opened: Whether its prompt leaves the thinking open.
        text: Its text so far.
        tokens: Its tokens so far.
        ended: How it ended; None while it goes on.
    """

    index: int
    prompt_tokens: int
    opened: bool = False
    text: str = ""
    tokens: list[WrittenToken] = field(default_factory=list)
    ended: Ended | None = None

    def take(self, piece: Piece) -> None:
        """Take a piece in."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.ended = piece.ended


class AnswerForm(ABC):
    """What chats and completions have in common: an id, a time, a model's name.

    Subclasses say how a choice is told, as a whole and piece by piece.
    """

    prefix = ""
    whole = ""
    part = ""

    def __init__(self, model: str, tokenizer: Any, tags: ThinkingTags) -> None:
        self.tags = tags
        self.tokenizer = tokenizer
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.part,
            "created": int(time.time()),
            "model": model,
        }

    def answer(self, choices: Sequence[Draft], logprobs: int | None) -> dict[str, Any]:
        """Return a whole answer.

        Args:
            choices: All ended.
            logprobs: As the request asked for them.
        """
        told = [
            {**self.tell(choice, logprobs), "index": choice.index, "finish_reason": _reason(choice)}
            for choice in choices
        ]
        usage = count_usage(choices, self.tokenizer, self.tags)
        return {**self._head, "object": self.whole, "choices": told, "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self._head, "choices": list(choices), **more}

    def begin(self, choice: Draft) -> list[dict[str, Any]]:
        """Return the chunks, of one choice each, that stand before a choice's first piece."""
        return []

    @abstractmethod
    def tell(self, choice: Draft, logprobs: int | None) -> dict[str, Any]:
        """Return a choice of a whole answer, its index and its end left out."""

    @abstractmethod
    def tell_piece(self, choice: Draft, piece: Piece, logprobs: int | None) -> list[dict[str, Any]]:
        """Return what a piece, which the choice has taken in, adds to a stream."""

    def _part(self, choice: Draft, piece: Piece, is_last: bool = True) -> dict[str, Any]:
        reason = _reason(choice) if piece.ended and is_last else None
        return {"index": choice.index, "finish_reason": reason}

    def _name(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatForm(AnswerForm):
    """Answers of ``/v1/chat/completions``: the thinking apart, under both names it goes by."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Any, tags: ThinkingTags) -> None:
        super().__init__(model, tokenizer, tags)
        self._splits: dict[int, StreamedSplit] = {}

    def begin(self, choice: Draft) -> list[dict[str, Any]]:
        """Name the role."""
        self._splits[choice.index] = StreamedSplit(self.tags, opened=choice.opened)
        delta = {"role": "assistant", "content": ""}
        return [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def tell(self, choice: Draft, logprobs: int | None) -> dict[str, Any]:
        """Return the message."""
        thinking, answer, _ = self.tags.split(choice.text, opened=choice.opened)
        thought = thinking or None
        message = {"role": "assistant", "content": answer, "reasoning": thought}
        message |= {"reasoning_content": thought, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.tokens, logprobs)}

    def tell_piece(self, choice: Draft, piece: Piece, logprobs: int | None) -> list[dict[str, Any]]:
        """Return a delta for thinking, one for the answer, or both."""
        parts = self._splits[choice.index].put(piece.text, is_last=piece.ended is not None)
        deltas: list[dict[str, Any]] = [
            {"reasoning": text, "reasoning_content": text} if is_thinking else {"content": text}
            for text, is_thinking in parts
        ]
        if not deltas and (piece.ended or logprobs is not None):
            deltas = [{}]
        told = [
            {**self._part(choice, piece, place == len(deltas) - 1), "delta": delta}
            for place, delta in enumerate(deltas)
        ]
        for place, one in enumerate(told):
            one["logprobs"] = None if place else self._logprobs(piece.tokens, logprobs)
        return told

    def _logprobs(self, tokens: Sequence[WrittenToken], wanted: int | None) -> Any:
        if wanted is None:
            return None
        content = [
            {
                **self._token(token.token, token.logprob),
                "top_logprobs": [self._token(*other) for other in token.likeliest],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


class CompletionForm(AnswerForm):
    """Answers of ``/v1/completions``: the text as it is, tags and all."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def tell(self, choice: Draft, logprobs: int | None) -> dict[str, Any]:
        """Return the text."""
        return {"text": choice.text, "logprobs": self._logprobs(choice.tokens, logprobs, 0)}

    def tell_piece(self, choice: Draft, piece: Piece, logprobs: int | None) -> list[dict[str, Any]]:
        """Return the text that is new."""
        offset = len(choice.text) - len(piece.text)
        told = {"text": piece.text, "logprobs": self._logprobs(piece.tokens, logprobs, offset)}
        return [{**self._part(choice, piece), **told}]

    def _logprobs(self, tokens: Sequence[WrittenToken], wanted: int | None, offset: int) -> Any:
        if wanted is None:
            return None
        names = [self._name(token.token) for token in tokens]
        offsets = [offset + sum(map(len, names[:place])) for place in range(len(names))]
        top = [{self._name(i): logprob for i, logprob in token.likeliest} for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top if wanted else None,
            "text_offset": offsets,
        }


def count_usage(choices: Sequence[Draft], tokenizer: Any, tags: ThinkingTags) -> dict[str, Any]:
    """Count tokens as the library does: without the one that ends an answer, with rejected ones.

    Choices of one prompt count it once; those that go on do not count yet.
    """
    reader = ResponseText(tokenizer, tags)
    prompt = written = thinking = rejected = 0
    for choice, ended in ((choice, choice.ended) for choice in choices if choice.ended):
        prompt += choice.prompt_tokens
        rejected += ended.rejected_tokens
        written += len(ended.token_ids) + ended.rejected_tokens
        text = reader.read(ended.token_ids)
        thinking += tags.count_tokens(text, tokenizer, opened=choice.opened)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "completion_tokens_details": {
            "reasoning_tokens": thinking,
            "rejected_prediction_tokens": rejected,
        },
    }


def event(value: object) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _reason(choice: Draft) -> str | None:
    return choice.ended.finish if choice.ended else None
