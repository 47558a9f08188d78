"""A model's chat template: its bound arguments, its shape, and the only call that renders messages.

A template is a program. This module renders sentinel texts with it to find where it opens the
response, how it writes thinking and answer, and which token ends a response. It assumes nothing
from the names of models or templates.

Template arguments (``enable_thinking: false``) are bound to the template's text. Everything that
renders with the tokenizer afterwards (generation, serving, another library) then uses them, and a
trained model's folder keeps them. An argument given in a call overrides a bound one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

from flexalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
"""A conversation in TRL's form: dictionaries with `role` and `content`."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The keys under which messages carry their thinking; a template reads one of them."""


# Bound arguments. They are written before the template's text: a Jinja comment that names them,
# and one `set` statement for each.

_HEADER = re.compile(r"\{# flexalign: (?P<settings>\{.*?\}) #\}(?:.*?)\{# end #\}\n", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


def bind_template(
    tokenizer: "PreTrainedTokenizerBase",
    arguments: Mapping[str, Any] | None = None,
    thinking: tuple[str, str] | None = None,
) -> None:
    """Bind arguments to a tokenizer's chat template; a saved tokenizer keeps them.

    Replaces what was bound before. If neither arguments nor markers are given, nothing is bound
    afterwards.

    Args:
        tokenizer: Changed in place.
        arguments: Values by the names that the template reads, such as ``enable_thinking``.
        thinking: The opening and the closing marker of the model's thinking; needed only where
            rendering does not show them.

    Raises:
        ConfigError: If arguments are given and there is no template, a name cannot be an
            argument, a value is not plain JSON, or a marker is not in the vocabulary.
    """
    arguments = dict(arguments or {})
    if thinking is not None:
        for marker in thinking:
            require_marker(tokenizer, marker)

    if tokenizer.chat_template is None:
        if arguments:
            raise ConfigError(
                f"template has the arguments {_listed(arguments)}, but the tokenizer has no chat "
                "template to take them; leave template out."
            )
        return

    for name in arguments:
        if not _NAME.match(name) or name in _RESERVED:
            raise ConfigError(
                f"template.{name} cannot be an argument of a chat template; name a variable that "
                "the template reads, such as enable_thinking."
            )

    header = _header(arguments, thinking) if arguments or thinking else ""
    bare = bare_template(tokenizer)
    if isinstance(bare, dict):  # a tokenizer may have several templates, by name
        tokenizer.chat_template = {name: header + text for name, text in bare.items()}
    else:
        tokenizer.chat_template = header + bare


def replace_template(tokenizer: "PreTrainedTokenizerBase", template: Any) -> None:
    """Give a tokenizer another chat template, and bind the same arguments and markers to it.

    Args:
        tokenizer: Changed in place.
        template: The text of one template, a mapping from names to texts, or None.

    Raises:
        ConfigError: If arguments are bound and the new template is None.
    """
    arguments, thinking = template_arguments(tokenizer), bound_thinking(tokenizer)
    tokenizer.chat_template = template
    if arguments or thinking:
        bind_template(tokenizer, arguments, thinking)


def bare_template(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the chat template without what is bound to it.

    Returns:
        A text, a mapping from names to texts where the tokenizer has several templates, or None.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return {name: _HEADER.sub("", text, count=1) for name, text in template.items()}
    return None if template is None else _HEADER.sub("", template, count=1)


def fixed_template(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the chat template with its bound arguments fixed: a call cannot override them.

    It is for engines that give arguments of their own with every call, as llama.cpp gives
    ``enable_thinking``.

    Returns:
        As in `bare_template`.
    """

    def fix(text: str) -> str:
        for name, value in template_arguments(tokenizer).items():
            text = text.replace(_default(name, value), _assignment(name, value), 1)
        return text

    template = tokenizer.chat_template
    if isinstance(template, dict):
        return {name: fix(text) for name, text in template.items()}
    return None if template is None else fix(template)


def template_arguments(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the arguments that are bound to a tokenizer's chat template, by name."""
    return dict(_bound(tokenizer).get("arguments", {}))


def bound_thinking(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str] | None:
    """Return the thinking markers that are bound to a tokenizer's chat template, if any are."""
    markers = _bound(tokenizer).get("thinking")
    return (markers[0], markers[1]) if markers else None


def template_hash(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Hash a chat template without what is bound to it.

    Returns:
        16 hexadecimal digits; None if the tokenizer has no template.
    """
    template = bare_template(tokenizer)
    if template is None:
        return None
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]


def require_marker(tokenizer: "PreTrainedTokenizerBase", marker: str) -> None:
    """Check that a thinking marker is one token, or contains a special or added token.

    Raises:
        ConfigError: If the marker is split into ordinary tokens only. Such tokens merge with the
            text next to them.
    """
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    known = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
    if not known and not added & (set(ids) - {tokenizer.unk_token_id}):
        raise ConfigError(
            f"the thinking marker {marker!r} is not in the vocabulary; name the markers that the "
            "model writes, as they stand in its chat template."
        )


def _bound(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Read the settings in a template's header; of several templates, all have the same."""
    template = tokenizer.chat_template
    text = next(iter(template.values()), "") if isinstance(template, dict) else template
    found = _HEADER.match(text or "")
    return cast("dict[str, Any]", json.loads(found["settings"])) if found else {}


def _header(arguments: Mapping[str, Any], thinking: tuple[str, str] | None) -> str:
    """Write the line that is put before a template's text.

    transformers renders with `trim_blocks`, so the line break after the last comment is not
    rendered.

    Raises:
        ConfigError: If a value is not plain JSON.
    """
    settings: dict[str, Any] = {"arguments": arguments}
    if thinking is not None:
        settings["thinking"] = list(thinking)
    try:
        told = json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"template has a value that is not plain JSON ({error}); give numbers, text, true, "
            "false, lists or mappings."
        ) from None

    told = told.replace("#", "\\u0023")  # '#}' in a value would end the comment
    statements = "".join(_default(name, value) for name, value in sorted(arguments.items()))
    return f"{{# flexalign: {told} #}}{statements}{{# end #}}\n"


def _default(name: str, value: Any) -> str:
    """Write the statement that gives an argument its value where a call gives none."""
    return f"{{% if {name} is not defined %}}{_assignment(name, value)}{{% endif %}}"


def _assignment(name: str, value: Any) -> str:
    return f"{{% set {name} = {_literal(value)} %}}"


def _literal(value: Any) -> str:
    """Write a JSON value as a Jinja literal."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            items = (f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
    return json.dumps(value, ensure_ascii=False)


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in sorted(arguments.items()))


# The shape of a template.


@dataclass(frozen=True)
class TemplateShape:
    """How a template writes the last response of a conversation, after the prompt's end.

    Attributes:
        opening: The text after the last user message where a response is asked for.
        answer_start: The text between the opening and an answer without thinking; None if the
            template's rendering of an answered conversation does not begin with the prompt.
        thinking_start: The text between the opening and the thinking; None if the template does
            not render the thinking, or its rendering does not begin with the prompt.
        thinking_end: The text between the thinking and its answer; None if the template does not
            render a thinking that is given beside the content.
        ending: The text between the answer and the stop token; usually empty.
        stop: The token that ends a response; None if the template shows none.
        trims: Whether the template removes white space around the content.
        has_generation_prompt: Whether `add_generation_prompt` changes the rendering.
        takes_developer: Whether a message of the role ``developer`` is rendered.
        takes_parts: Whether content must be given as a list of parts, because the template drops
            content that is text.
    """

    opening: str
    answer_start: str | None
    thinking_start: str | None
    thinking_end: str | None
    ending: str
    stop: str | None
    trims: bool
    has_generation_prompt: bool
    takes_developer: bool
    takes_parts: bool


_QUESTION, _OTHER, _THINKING, _ANSWER = "xq7x", "xo7x", "xt7x", "xa7x"
"""Sentinel texts, which occur in no template."""

_shapes: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, TemplateShape]]"
_shapes = WeakKeyDictionary()

_MOST_SHAPES = 256
"""The most shapes that are kept for one tokenizer."""

Kept = TypeVar("Kept")


def shape_of(tokenizer: "PreTrainedTokenizerBase", **arguments: Any) -> TemplateShape:
    """Find how a tokenizer's chat template writes responses.

    The result is kept for each tokenizer, template and set of arguments.

    Args:
        tokenizer: Must have a chat template.
        **arguments: Template arguments; they override those that are bound.

    Raises:
        DataError: If the template leaves out the user's message where a response is asked for.
    """
    key = repr((tokenizer.chat_template, sorted(arguments.items()), tokenizer.eos_token))
    known = _shapes.setdefault(tokenizer, {})
    return kept(known, key, partial(_find_shape, tokenizer, arguments))


def kept(known: dict[str, Kept], key: str, find: Callable[[], Kept]) -> Kept:
    """Return what is known for a key, or find it and keep it.

    A server's clients choose the arguments of templates, and must not fill its memory: only the
    newest `_MOST_SHAPES` are kept.

    Args:
        known: What is kept, by key, oldest first; changed in place.
        key: The key.
        find: Finds what is not known.
    """
    if (found := known.get(key)) is not None:
        return found
    for oldest in list(known)[: max(0, len(known) + 1 - _MOST_SHAPES)]:
        known.pop(oldest, None)
    known[key] = found = find()
    return found


def _find_shape(
    tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]
) -> TemplateShape:
    takes_parts = _takes_parts(tokenizer, arguments)

    def render(*messages: dict[str, Any], ask: bool = False) -> str:
        given = [_with_parts(message) for message in messages] if takes_parts else list(messages)
        return call_template(tokenizer, given, add_generation_prompt=ask, **arguments)

    def attempt(*messages: dict[str, Any], ask: bool = False) -> str:
        """Render messages that a template may refuse; empty if it does."""
        try:
            return render(*messages, ask=ask)
        except Exception:  # a template is a program, and may fail in any way
            return ""

    question = {"role": "user", "content": _QUESTION}
    asked = render(question, ask=True)
    if _QUESTION not in asked:
        raise DataError(
            "the chat template leaves the user's message out where a response is asked for, so it "
            "cannot render a generation prompt; set training.chat_template_path to one that can."
        )
    opening = asked[asked.rindex(_QUESTION) + len(_QUESTION) :]

    # An answer without thinking: the text before and after it.
    answer = {"role": "assistant", "content": _ANSWER}
    answered = attempt(question, answer)
    before, shown, tail = answered.partition(_ANSWER)
    answer_start = before[len(asked) :] if shown and before.startswith(asked) else None
    stop, ending = _find_stop(tokenizer, tail)
    if stop is None and shown and not tail.strip():
        # Some templates end a response with the token that begins the next turn.
        going_on = attempt(question, answer, {"role": "user", "content": _OTHER})
        stop, ending = _first_special(tokenizer, going_on.partition(_ANSWER)[2]), ""
    padded = attempt(question, {**answer, "content": f"{_ANSWER} \n"})

    # A thinking given beside the content.
    thought = attempt(question, {**answer, **dict.fromkeys(REASONING_KEYS, _THINKING)})
    head, has_thinking, rest = thought.partition(_THINKING)
    middle, has_answer, _ = rest.partition(_ANSWER)
    separated = bool(has_thinking and has_answer)
    goes_on = separated and head.startswith(asked)

    # A message of the role `developer`, which many templates leave out.
    developed = attempt({"role": "developer", "content": _OTHER}, question, ask=True)
    return TemplateShape(
        opening=opening,
        answer_start=answer_start,
        thinking_start=head[len(asked) :] if goes_on else None,
        thinking_end=middle if separated else None,
        ending=ending,
        stop=stop,
        trims=padded.partition(_ANSWER)[2] == tail and bool(shown),
        has_generation_prompt=asked != attempt(question),
        takes_developer=_OTHER in developed and _QUESTION in developed,
        takes_parts=takes_parts,
    )


def _takes_parts(tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]) -> bool:
    """Return whether a template drops content that is text and renders it as a part.

    Templates of models that take images do this.
    """
    message = {"role": "user", "content": _QUESTION}
    rendered = call_template(tokenizer, [message], add_generation_prompt=True, **arguments)
    if _QUESTION in rendered:
        return False
    try:
        rendered = call_template(
            tokenizer, [_with_parts(message)], add_generation_prompt=True, **arguments
        )
    except Exception:  # a template is a program, and may fail in any way
        return False
    return _QUESTION in rendered


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _find_stop(tokenizer: "PreTrainedTokenizerBase", tail: str) -> tuple[str | None, str]:
    """Find the token that ends a response in the text that a template writes after the answer.

    Of several special tokens in a row it is the last one: the model writes the others too.

    Returns:
        The token (None if there is no special token), and the text before it.
    """
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    first = next((place for place, token in enumerate(ids) if token in special), None)
    if first is None:
        return None, ""

    last = first
    while last + 1 < len(ids) and ids[last + 1] in special:
        last += 1
    stop = str(tokenizer.convert_ids_to_tokens(ids[last]))
    run = "".join(map(str, tokenizer.convert_ids_to_tokens(ids[first : last + 1])))
    end = tail.find(run) + len(run)
    return stop, tail[: end - len(stop)]


def _first_special(tokenizer: "PreTrainedTokenizerBase", tail: str) -> str | None:
    """Return the special token directly after an answer, ignoring white space; None if none."""
    ids = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return str(tokenizer.convert_ids_to_tokens(ids[0])) if ids and ids[0] in special else None


def call_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    *,
    add_generation_prompt: bool,
    **arguments: Any,
) -> str:
    """Render messages as text, unchanged; no other function calls a chat template."""
    return cast(
        "str",
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
        ),
    )


# Messages in the form that a template takes.


def template_messages(
    messages: Messages, shape: TemplateShape, markers: tuple[str, str]
) -> Messages:
    """Put messages into the form in which a template renders all of them.

    A ``developer`` message becomes ``system`` where the template would drop it. The thinking of
    earlier turns is given under every key that templates read. Where the template takes thinking
    beside the content, it is also removed from the content. The template decides how much of the
    thinking it renders.

    Args:
        messages: A conversation.
        shape: The shape of the template.
        markers: The opening and the closing marker of a thinking that is part of the content.

    Returns:
        New messages; those given are not changed.
    """
    given = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        if message["role"] == "developer" and not shape.takes_developer:
            message["role"] = "system"
        if message["role"] == "assistant":
            message = _with_thinking_apart(message, shape, markers)
        given.append(_with_parts(message) if shape.takes_parts else message)
    return given


def _with_thinking_apart(
    message: dict[str, Any], shape: TemplateShape, markers: tuple[str, str]
) -> dict[str, Any]:
    """Give an assistant's thinking under every reasoning key, outside the content if possible."""
    thinking = reasoning_of(message)
    content = message.get("content")
    if not thinking and shape.thinking_end is not None and isinstance(content, str):
        start, closed, answer = content.partition(markers[1])
        if closed and start.lstrip().startswith(markers[0]):
            thinking = start.lstrip().removeprefix(markers[0]).strip()
            message = {**message, "content": answer.lstrip()}
    return message | dict.fromkeys(REASONING_KEYS, thinking) if thinking else message


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Return the thinking that a message carries beside its content; empty if there is none."""
    values = (message.get(key) for key in REASONING_KEYS)
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def require_all_shown(messages: Messages, rendered: str) -> None:
    """Check that a prompt contains every user, system and developer message.

    Args:
        messages: The conversation.
        rendered: The conversation as the chat template rendered it.

    Raises:
        DataError: If the text of a message is missing; white space is ignored.
    """
    squeezed = "".join(rendered.split())
    for message in messages:
        content = message.get("content")
        asks = message["role"] in ("user", "system", "developer")
        if asks and isinstance(content, str) and "".join(content.split()) not in squeezed:
            raise DataError(
                f"the chat template leaves a message of the role {message['role']} out of the "
                "prompt; put its text into the user's message, or use another template."
            )
