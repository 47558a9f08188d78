"""Tools in conversations: their definitions and calls in rows, and how a chat template takes them.

In a data set both are JSON text, because Arrow would give all mappings of a column the same keys.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from flexalign.data.files import Unusable
from flexalign.data.template import (
    Messages,
    TemplateShape,
    call_template,
    kept,
    template_messages,
)
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]
"""Definitions of tools in the form of the chat templates: ``{type: function, function: {…}}``."""

CALLS = "tool_calls"
"""The key of a message's calls."""


# Reading from a row.


def read_tools(row: Mapping[str, Any]) -> dict[str, str]:
    """Read a row's `tools`, a list of definitions or its JSON text.

    Returns:
        ``{"tools": TEXT}``, the definitions as JSON text; empty if there are none.

    Raises:
        Unusable: If they have another form.
    """
    tools = _parsed(row.get("tools"))
    if not tools:
        return {}
    if not isinstance(tools, list):
        raise Unusable("'tools' is not a list of definitions of functions")
    return {"tools": _dumped([_definition(index, tool) for index, tool in enumerate(tools)])}


def read_calls(where: str, message: Mapping[str, Any]) -> dict[str, str]:
    """Read the calls of a message: `tool_calls`, or `function_call`, their older form.

    Arguments that are JSON text, as servers write them, become mappings, as templates take them.

    Args:
        where: The message's place in the row, for messages.
        message: The message.

    Returns:
        ``{"tool_calls": TEXT}``, the calls as JSON text; empty if there are none.

    Raises:
        Unusable: If they have another form.
    """
    calls = _parsed(message.get(CALLS))
    if not calls and message.get("function_call"):
        calls = [message["function_call"]]
    if not calls:
        return {}
    if not isinstance(calls, list):
        raise Unusable(f"{where} has tool_calls that are not a list")
    return {
        CALLS: _dumped([_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)])
    }


def _definition(index: int, tool: Any) -> dict[str, Any]:
    function = _function(tool)
    if not isinstance(function.get("name"), str):
        raise Unusable(f"tools[{index}] has no name of a function")
    return tool if "function" in tool else {"type": "function", "function": function}


def _call(where: str, call: Any) -> dict[str, Any]:
    function = _function(call)
    arguments = _parsed(function.get("arguments")) or {}
    if not isinstance(function.get("name"), str):
        raise Unusable(f"{where} has no name of a function")
    if not isinstance(arguments, dict):
        raise Unusable(f"{where} has arguments that are not a JSON object")
    told = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    named = {"name": function["name"], "arguments": arguments}
    return told | {"type": "function", "function": named}


def _function(given: Any) -> dict[str, Any]:
    """Return the function of a definition or a call, which may stand inside `function` or alone."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    return inner if isinstance(inner, dict) else {}


def _parsed(value: Any) -> Any:
    """Return the value of JSON text; any other value, and text that is not JSON, unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError:
        return value


def _dumped(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("a tool has half of a surrogate pair (a broken \\u escape)") from None
    return text


# Reading from a data set's row.


def tools_of(row: Mapping[str, Any]) -> Tools | None:
    """Return the definitions of tools of a data set's row; None if it has none."""
    told = row.get("tools")
    return cast("Tools | None", json.loads(told) if isinstance(told, str) else told)


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the calls of a message, their arguments as mappings; empty if it has none.

    The calls, and the arguments of each, may be JSON text.
    """
    told = message.get(CALLS)
    calls = json.loads(told) if isinstance(told, str) else told or []
    return [_with_arguments(call, _parsed(_function(call).get("arguments"))) for call in calls]


# Rendering.


@dataclass(frozen=True)
class ToolShape:
    """What a chat template renders of tools.

    Attributes:
        takes_definitions: Whether it renders the definitions.
        takes_calls: Whether it renders calls.
        takes_results: Whether it renders messages of the role ``tool``.
        arguments_as_text: Whether it takes a call's arguments as JSON text, not as a mapping.
        after_calls: What it writes between a call and the token that begins the result's message,
            and that token, which ends the call where nothing else does; None if it shows none.
    """

    takes_definitions: bool
    takes_calls: bool
    takes_results: bool
    arguments_as_text: bool
    after_calls: tuple[str, int] | None


_MARKERS = ("<think>", "</think>")
_QUESTION, _NAME, _KEY, _VALUE, _RESULT = "xq7x", "xf7x", "xk7x", "xv7x", "xr7x"
"""Sentinel texts, which occur in no template."""

_shapes: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, ToolShape]]" = WeakKeyDictionary()


def tool_shape(
    tokenizer: "PreTrainedTokenizerBase", shape: TemplateShape, **arguments: Any
) -> ToolShape:
    """Find what a tokenizer's chat template renders of tools, by rendering sentinel texts.

    Args:
        tokenizer: Must have a chat template.
        shape: The shape of that template.
        **arguments: Template arguments; they override those that are bound.
    """
    key = repr((tokenizer.chat_template, sorted(arguments.items())))
    known = _shapes.setdefault(tokenizer, {})
    return kept(known, key, partial(_find_shape, tokenizer, shape, arguments))


def _find_shape(
    tokenizer: "PreTrainedTokenizerBase", shape: TemplateShape, arguments: Mapping[str, Any]
) -> ToolShape:
    properties = {_KEY: {"type": "string", "description": _KEY}}
    parameters = {"type": "object", "properties": properties, "required": [_KEY]}
    definition = {"name": _NAME, "description": _NAME, "parameters": parameters}
    tools = [{"type": "function", "function": definition}]

    def attempt(*messages: dict[str, Any], ask: bool) -> str:
        """Render messages that a template may refuse; empty if it does."""
        try:
            given = template_messages(list(messages), shape, _MARKERS)
            return call_template(
                tokenizer, given, add_generation_prompt=ask, tools=tools, **arguments
            )
        except Exception:  # a template is a program, and may fail in any way
            return ""

    question = {"role": "user", "content": _QUESTION}
    # Nine letters or digits, the only form of an id that Mistral's templates take.
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    calling = {"role": "assistant", "content": "", CALLS: [call]}
    as_text = _with_text_arguments(calling)
    takes = [_VALUE in attempt(question, each, ask=False) for each in (calling, as_text)]

    result = {"role": "tool", "name": _NAME, "tool_call_id": "abcdefghi", "content": _RESULT}
    answered = {"role": "assistant", "content": _VALUE}
    before = (calling if takes[0] else as_text) if any(takes) else answered
    alone, going_on = (attempt(question, *each, ask=False) for each in ([before], [before, result]))
    return ToolShape(
        takes_definitions=_NAME in attempt(question, ask=True),
        takes_calls=any(takes),
        takes_results=_RESULT in attempt(question, before, result, ask=True),
        arguments_as_text=takes[1] and not takes[0],
        after_calls=_first_special(tokenizer, alone.rstrip(), going_on),
    )


def _first_special(
    tokenizer: "PreTrainedTokenizerBase", text: str, longer: str
) -> tuple[str, int] | None:
    """Return the first special token that a longer text goes on with, and what stands before it.

    White space may stand before it; None if anything else does.
    """
    if not text or not longer.startswith(text):
        return None
    rest = longer[len(text) :]
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if not ids or ids[0] not in special:
        return None
    return rest[: len(rest) - len(rest.lstrip())], ids[0]


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        _with_arguments(call, json.dumps(_function(call).get("arguments"), ensure_ascii=False))
        for call in message[CALLS]
    ]
    return {**message, CALLS: calls}


def _with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    function = {**_function(call), "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def uses_tools(messages: Messages, tools: Tools | None) -> bool:
    """Return whether a conversation has tools, calls or their results."""
    return bool(tools) or any(m.get(CALLS) or m["role"] == "tool" for m in messages)


def tool_messages(messages: Messages, tools: Tools | None, shape: ToolShape) -> Messages:
    """Put calls into the form in which a chat template takes them.

    Args:
        messages: A conversation.
        tools: The definitions of its tools, if it has any.
        shape: What the template renders of tools.

    Returns:
        New messages; those given are not changed.

    Raises:
        DataError: If the template does not render definitions, calls or results, and there are
            some.
    """
    given = [{**m, CALLS: calls} if (calls := calls_of(m)) else m for m in messages]
    wanted = {
        "the definitions of tools": bool(tools) and not shape.takes_definitions,
        "calls of tools": not shape.takes_calls and any(m.get(CALLS) for m in given),
        "messages of the role tool": not shape.takes_results
        and any(m["role"] == "tool" for m in given),
    }
    missing = [what for what, is_missing in wanted.items() if is_missing]
    if missing:
        raise DataError(
            f"the chat template does not render {' and '.join(missing)}; take them out, or use a "
            "template that does."
        )
    if not shape.arguments_as_text:
        return given
    return [_with_text_arguments(m) if m.get(CALLS) else m for m in given]


def require_tools_shown(messages: Messages, tools: Tools | None, rendered: str) -> None:
    """Check that a rendered conversation names all tools and all functions that it calls.

    Args:
        messages: The conversation, as the chat template got it.
        tools: The definitions of its tools, if it has any.
        rendered: The conversation as text.

    Raises:
        DataError: If a name is missing.
    """
    calls = [call for message in messages for call in message.get(CALLS) or []]
    for given in [*(tools or []), *calls]:
        name = _function(given).get("name")
        if isinstance(name, str) and name not in rendered:
            raise DataError(
                f"the chat template leaves out the tool {name!r}; take it out, or use a template "
                "that renders it."
            )


# Responses that call tools.


def call_ending(
    tokenizer: "PreTrainedTokenizerBase", text: str, stop: str | None, shape: ToolShape
) -> tuple[str, int | None]:
    """Split what a chat template writes for a response that calls tools from its stop token.

    Some templates end a call with a token of its own, such as gpt-oss's ``<|call|>``; some with
    the token that begins the message of the result, such as GLM's ``<|observation|>``.

    Args:
        tokenizer: The model's.
        text: What the template writes after the prompt.
        stop: The token with which the template ends other responses.
        shape: What the template renders of tools.

    Returns:
        The text that the model must write, and the id of the token that ends it; None if the
        template writes none.
    """
    end = text.rstrip()
    if stop is not None and end.endswith(stop):
        return end.removesuffix(stop), cast("int", tokenizer.convert_tokens_to_ids(stop))
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if ids and ids[-1] in tokenizer.all_special_ids:
        own = str(tokenizer.convert_ids_to_tokens(ids[-1]))
        if end.endswith(own):
            return end.removesuffix(own), cast("int", ids[-1])
    if shape.after_calls is not None:
        return end + shape.after_calls[0], shape.after_calls[1]
    return text, None


def before_thinking(prompt: str, tags: ThinkingTags) -> str:
    """Return a prompt without the thinking that it opens, or opens and closes, at its end."""
    end = prompt.rstrip()
    if end.endswith(tags.open):
        return end.removesuffix(tags.open)
    opened = end.removesuffix(tags.close).rstrip()
    is_closed = end.endswith(tags.close) and opened.endswith(tags.open)
    return opened.removesuffix(tags.open) if is_closed else prompt
