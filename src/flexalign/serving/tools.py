"""Tools of a chat: the prompt's side by the chat template, the answer's by transformers' parser.

A chat template that reads ``tools`` describes them to the model. What the model then writes is its own
form of a call; a *response template* beside the chat template says how to read it
(``tokenizer.parse_response``). Where a tokenizer brings none, that of TRL for the same chat template
is used. Without either, a call stays text.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from flexalign.data.template import bare_template
from flexalign.data.template_arguments import reads_tools
from flexalign.generation.text import ResponseText
from flexalign.serving.errors import ApiError
from flexalign.serving.requests import AnswerDraft, TokenIds

UNPARSED = "x-flexalign-tool-calls"
"""The header of answers whose tool calls, if there are any, are text: nothing can read them."""


@dataclass(frozen=True)
class ParsedCalls:
    """An answer that calls tools.

    Attributes:
        content: The text beside the calls; None if there is none.
        calls: The calls, in OpenAI's form.
    """

    content: str | None
    calls: list[dict[str, Any]]


class ToolParser:
    """Reads the calls of tools in the answers of a model."""

    def __init__(self, tokenizer: Any, reader: ResponseText) -> None:
        """Use a tokenizer, and the reader by which its answers become text."""
        self._tokenizer = tokenizer
        self._reader = reader

    def require_tools(self) -> None:
        """Check that the chat template describes tools to the model, and find the response template.

        Raises:
            ApiError: If it does not.
        """
        if not reads_tools(self._tokenizer):
            raise ApiError(
                400,
                "tools: this model's chat template does not read tools, so that it would not hear "
                "of them; leave them out, or serve a model that was trained for them.",
                param="tools",
                code="invalid_value",
            )
        _ = self.marker  # TRL's templates take a while to import, and the event loop must not wait

    @cached_property
    def template(self) -> Mapping[str, Any] | None:
        """The response template; None if there is none that reads calls of tools."""
        own = getattr(self._tokenizer, "response_template", None)
        found = _template_of_trl(bare_template(self._tokenizer)) if own is None else own
        has_calls = isinstance(found, dict) and "tool_calls" in found.get("fields", {})
        return found if has_calls else None

    @cached_property
    def marker(self) -> str | None:
        """The text with which a call begins; None if it is no fixed text, or is not shown."""
        begins = (self.template or {}).get("fields", {}).get("tool_calls", {}).get("open")
        if not isinstance(begins, str):
            return None
        tokens = self._tokenizer(begins, add_special_tokens=False)["input_ids"]
        return None if any(map(self._reader.hides, tokens)) else begins

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens as text, special ones included."""
        decoded = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return str(decoded)

    def parse(self, text: str, prefix: str, tools: Sequence[Any]) -> ParsedCalls | None:
        """Read the calls of an answer.

        Args:
            text: The answer, special tokens included.
            prefix: Its prompt.
            tools: The tools of its request, which say the types of arguments.

        Returns:
            The calls; None if there are none, or one is malformed.
        """
        try:
            message = self._tokenizer.parse_response(
                text, dict(self.template or {}), prefix=prefix, tools=list(tools)
            )
            calls = [_call_of(one) for one in message.get("tool_calls") or []]
        except Exception:  # the model's text and the client's schemas are its arguments
            return None
        content = message.get("content")
        return ParsedCalls(content or None, calls) if calls else None


@dataclass(frozen=True)
class ToolAnswers:
    """Reads the answers to one request that has tools.

    Attributes:
        parser: Of the model.
        tools: The request's.
        prompt: The tokens of its prompt.
        has_stop: Whether texts end its answers, so that their tokens may hold more than their text.
    """

    parser: ToolParser
    tools: tuple[dict[str, Any], ...]
    prompt: TokenIds
    has_stop: bool

    @property
    def is_parsed(self) -> bool:
        """Whether calls can be read."""
        return self.parser.template is not None

    def calls(self, draft: AnswerDraft) -> ParsedCalls | None:
        """Return the calls of an answer that has ended; None if it has none."""
        if draft.ended is None or not self.is_parsed:
            return None
        whole = draft.text if self.has_stop else self.parser.text(draft.ended.token_ids)
        return self.parser.parse(whole, self.parser.text(self.prompt), self.tools)


def _call_of(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call in OpenAI's form.

    Raises:
        KeyError: If it has no function with a name.
        TypeError: If a part of it has another type.
    """
    function = parsed["function"]
    arguments = function.get("arguments") or {}
    if not isinstance(function["name"], str) or not isinstance(arguments, dict):
        raise TypeError(f"{parsed!r} is no call")
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": json.dumps(arguments, ensure_ascii=False, allow_nan=False),
        },
    }


def _template_of_trl(chat_template: Any) -> Any:
    """Return TRL's response template for a chat template; None if it knows none."""
    from trl.chat_template_utils import add_response_schema

    bearer = SimpleNamespace(chat_template=chat_template)
    try:
        add_response_schema(bearer)
    except ValueError:
        return None
    return getattr(bearer, "response_template", None)
