"""vLLM's answers, rewritten as this library's server sends them.

The thinking stands apart, under both names it goes by, and ``usage`` counts as the library does:
without the token that ends an answer, with those of a rejected fast one. The split is the library's,
and vLLM runs without a reasoning parser (see ``docs/decisions.md`` for why). Where the operator has
chosen one all the same, what it found is kept.
"""

from dataclasses import dataclass
from typing import Any

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import ResponseText, StreamedSplit
from flexalign.serving.dial import DialChoice
from flexalign.serving.middleware import DialWriter


class ThinkingReader:
    """Finds and counts a model's thinking, by its tokens and tags.

    Attributes:
        tokenizer: Its tokenizer.
        tags: The tags around its thinking.
        has_special_tags: Whether the tokenizer calls them special, so that vLLM would hide them.
    """

    def __init__(self, tokenizer: Any, tags: ThinkingTags) -> None:
        """Read with a model's tokenizer and the tags around its thinking."""
        self.tokenizer = tokenizer
        self.tags = tags
        self.has_special_tags = not {tags.open, tags.close}.isdisjoint(tokenizer.all_special_tokens)
        self._response_text = ResponseText(tokenizer, tags)

    def opens(self, prompt: Any) -> bool:
        """Whether a prompt, a text or token ids, leaves the thinking open."""
        if isinstance(prompt, str):
            return self.tags.opened_by(prompt)
        return self._response_text.is_opened_by(prompt)

    def count(self, text: str, *, opened: bool) -> int:
        """Count the tokens of a response's thinking."""
        return self.tags.count_tokens(text, self.tokenizer, opened=opened)


@dataclass
class _ChoiceDraft:
    """A choice as it grows: its text, what splits it, and whether a token of its own ended it."""

    opened: bool
    split: StreamedSplit
    text: str = ""
    is_parsed: bool = False
    has_end_token: bool = False


class ResponseRewriter(DialWriter):
    """Rewrites an answer of vLLM on its way to the client."""

    def __init__(
        self,
        reader: ThinkingReader,
        body: dict[str, Any],
        is_chat: bool,
        choice: DialChoice,
        send: Any,
    ) -> None:
        """Stand before a client.

        Args:
            reader: Of the model's thinking.
            body: What the client asked for.
            is_chat: Whether it is a chat.
            choice: Its dial.
            send: The client's.
        """
        super().__init__(choice, send)
        self._reader = reader
        self._is_chat = is_chat
        self._hides_prompt = is_chat and not body.get("return_prompt_text")
        self._hides_logprobs = not body.get("logprobs") if is_chat else body.get("logprobs") is None
        self._counts_thinking = not body.get("echo")
        self._opened = [] if is_chat else _opened(reader, body)
        self._choices_each = body.get("n") or 1
        self._drafts: dict[int, _ChoiceDraft] = {}

    def rewrite(self, answer: Any) -> Any:
        """Return a whole answer as the client gets it."""
        self._read_prompt(answer)
        for part in answer["choices"]:
            draft = self._take(part)
            if self._is_chat:
                self._rewrite_message(part["message"], draft)
            else:
                draft.text = part["text"]
        if answer.get("usage"):
            answer["usage"] = self._recounted(answer["usage"])
        return super().rewrite(answer)

    def rewrite_chunk(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """Return a chunk of a stream as the client gets it; None for nothing."""
        if "error" in chunk:
            return super().rewrite_chunk(chunk)
        self._read_prompt(chunk)

        parts = chunk["choices"]
        chunk["choices"] = [part for part in parts if self._rewrite_part(part)]
        if parts and not chunk["choices"]:
            return None  # all of it is held back, as the start of a tag may be
        if not parts and chunk.get("usage"):
            chunk["usage"] = self._recounted(chunk["usage"])
        return super().rewrite_chunk(chunk)

    def _read_prompt(self, value: dict[str, Any]) -> None:
        """Learn whether a chat's prompt opens the thinking, which vLLM alone can tell."""
        prompt = value.get("prompt_text")
        if self._is_chat and isinstance(prompt, str):
            self._opened = [self._reader.opens(prompt)]
        if self._hides_prompt:
            value.pop("prompt_text", None)

    def _take(self, part: dict[str, Any]) -> _ChoiceDraft:
        """Return a choice's draft, and let the choice end as it says."""
        index = part["index"]
        if index not in self._drafts:
            place = 0 if self._is_chat else index // self._choices_each
            opened = place < len(self._opened) and self._opened[place]
            self._drafts[index] = _ChoiceDraft(
                opened, StreamedSplit(self._reader.tags, opened=opened)
            )

        draft = self._drafts[index]
        is_ended = part.get("finish_reason") in ("stop", "tool_calls")
        draft.has_end_token |= is_ended and not isinstance(part.get("stop_reason"), str)

        # The fast answer is asked for with log-probabilities, whoever wants them.
        if self._hides_logprobs and "logprobs" in part:
            part["logprobs"] = None
        return draft

    def _rewrite_message(self, message: dict[str, Any], draft: _ChoiceDraft) -> None:
        """Split a whole message, unless a parser of vLLM's has."""
        draft.is_parsed = message.get("reasoning") is not None
        if not draft.is_parsed and isinstance(message.get("content"), str):
            draft.text = message["content"]
            thinking, message["content"], _ = self._reader.tags.split(
                draft.text, opened=draft.opened
            )
            message["reasoning"] = thinking or None
        message["reasoning_content"] = message.get("reasoning")

    def _rewrite_part(self, part: dict[str, Any]) -> bool:
        """Rewrite a choice of a chunk; return whether anything is left to send."""
        draft = self._take(part)
        if not self._is_chat:
            draft.text += part["text"]
            return True

        delta = part["delta"]
        if delta.get("reasoning") is not None:
            draft.is_parsed = True
            delta["reasoning_content"] = delta["reasoning"]

        is_last = bool(part.get("finish_reason"))
        if not draft.is_parsed:
            text = delta.pop("content", None) or ""
            draft.text += text
            for piece in draft.split.put(text, is_last=is_last):
                names = ("reasoning", "reasoning_content") if piece.is_thinking else ("content",)
                delta |= dict.fromkeys(names, piece.text)
            if "role" in delta:
                delta.setdefault("content", "")

        return bool(delta or is_last or part.get("logprobs") or part.get("token_ids"))

    def _recounted(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return a request's ``usage`` as the library counts."""
        drafts = self._drafts.values()
        rejected = self.choice.report.get("rejected_tokens", 0)
        ends = sum(draft.has_end_token for draft in drafts)
        written = usage["completion_tokens"] - ends + rejected

        details = dict(usage.get("completion_tokens_details") or {})
        details["rejected_prediction_tokens"] = rejected
        if self._counts_thinking and not any(draft.is_parsed for draft in drafts):
            counts = [self._reader.count(draft.text, opened=draft.opened) for draft in drafts]
            details["reasoning_tokens"] = sum(counts)

        return usage | {
            "completion_tokens": written,
            "total_tokens": usage["prompt_tokens"] + written,
            "completion_tokens_details": details,
        }


def _opened(reader: ThinkingReader, body: dict[str, Any]) -> list[bool]:
    """Return, for each prompt of a completion, whether it leaves the thinking open."""
    given = body.get("prompt")
    prompts = given if isinstance(given, list) and not are_ids(given) else [given]
    return [(isinstance(one, str) or are_ids(one)) and reader.opens(one) for one in prompts]


def are_ids(value: Any) -> bool:
    """Whether a prompt is one of token ids."""
    return isinstance(value, list) and all(type(one) is int for one in value)
