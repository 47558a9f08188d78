"""Rows as token ids: a response is trained in the same context in which inference writes it.

The prompt is the text that the chat template renders where a response is asked for, with the same
call that generation and serving make. The response is the text that the model must write after
it. A sampled response keeps its own token ids; any other response is fitted to the opening. The
token with which the template ends a response follows, and nothing else. One function,
:meth:`Rendering.row`, does this for training, the hidden-state cache, previews and counts.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flexalign.data.files import PLACE, place_of
from flexalign.data.template import (
    REASONING_KEYS,
    bind_template,
    bound_thinking,
    call_template,
    reasoning_of,
    require_all_shown,
    shape_of,
    template_arguments,
    template_hash,
    template_messages,
)
from flexalign.data.thinking import Split, ThinkingTags, split_any
from flexalign.data.tools import (
    Tools,
    before_thinking,
    call_ending,
    calls_of,
    require_tools_shown,
    tool_messages,
    tool_shape,
    tools_of,
    uses_tools,
)
from flexalign.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]
"""Text that the model continues without a chat template, or messages for the chat template."""


class Opening(Enum):
    """The state of the thinking at the end of a prompt.

    `FREE`: the response may begin a thinking. `OPENED`: the prompt ends inside a thinking, so the
    response begins inside it. `CLOSED`: the prompt has closed the thinking, so the response is an
    answer.
    """

    FREE = "free"
    OPENED = "opened"
    CLOSED = "closed"


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text and token ids.

    Attributes:
        text: The prompt as text.
        ids: Its token ids.
        opening: The state of the thinking at its end.
        stop_id: The token that ends a response to it; None if the tokenizer has none.
    """

    text: str
    ids: list[int]
    opening: Opening
    stop_id: int | None


@dataclass(frozen=True)
class RenderedRow:
    """A prompt with its response, as trainers take it.

    Attributes:
        prompt: The prompt; the loss does not count its tokens.
        response_ids: The token ids of the response, with the stop token if the response is whole.
        text: The response as text, without the stop token.
        is_whole: Whether the response ends with the stop token.
    """

    prompt: RenderedPrompt
    response_ids: list[int]
    text: str
    is_whole: bool

    @property
    def input_ids(self) -> list[int]:
        """The token ids of the prompt, then those of the response."""
        return self.prompt.ids + self.response_ids

    @property
    def completion_mask(self) -> list[int]:
        """1 at the response's tokens, 0 at the prompt's."""
        return [0] * len(self.prompt.ids) + [1] * len(self.response_ids)


class Rendering:
    """Renders prompts and rows with one tokenizer, as inference does.

    It uses the template arguments and thinking markers that are bound to the tokenizer's chat
    template (:func:`flexalign.data.template.bind_template`).
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags | None = None
    ) -> None:
        """Render with a tokenizer; if no tags are given, they are read from the tokenizer."""
        self.tokenizer = tokenizer
        self._tags = tags

    @cached_property
    def tags(self) -> ThinkingTags:
        """The tags around the model's thinking."""
        return self._tags or ThinkingTags.of(self.tokenizer)

    def prompt(
        self, prompt: Prompt, *, tools: Tools | None = None, **arguments: Any
    ) -> RenderedPrompt:
        """Render a prompt.

        Args:
            prompt: Text, or messages for the chat template.
            tools: Definitions of the tools that a response to messages may call.
            **arguments: Template arguments of this call; they override those that are bound.

        Raises:
            DataError: If the prompt is messages and there is no chat template, or the template
                refuses the messages, leaves one out, or renders no generation prompt.
        """
        if isinstance(prompt, str):
            # Plain text: no template, so the tokenizer adds its own special tokens.
            opening = Opening.OPENED if self.tags.opened_by(prompt) else Opening.FREE
            ids = self._encode(prompt, add_special_tokens=True)
            return RenderedPrompt(prompt, ids, opening, self.tokenizer.eos_token_id)

        text = render_chat(
            self.tokenizer, prompt, add_generation_prompt=True, tools=tools, **arguments
        )
        return RenderedPrompt(
            text, self._encode(text), self._opening(prompt, text), self._stop_id(arguments)
        )

    def row(self, row: Mapping[str, Any], number: int = 1) -> RenderedRow:
        """Render a prompt with its response.

        Args:
            row: `prompt` and `completion`, as `load_traces` returns them, with `response_ids` and
                `truncated` where the response was sampled, and `tools` where it may call some.
            number: The row's number from 1, for error messages.

        Raises:
            DataError: If the prompt cannot be rendered, the response was sampled with another
                rendering or vocabulary, it cannot follow the prompt, or it contains the stop
                token.
        """
        prompt = self.prompt_of(row, number)
        self._require_sampled_here(row, number)

        place, stop_id = place_of(row, number), prompt.stop_id
        ids, truncated = row.get("response_ids"), bool(row.get("truncated"))
        if ids is not None:
            response, text, is_whole = list(ids), self.tokenizer.decode(ids), not truncated
        elif _calls(row["completion"]):
            text, stop_id = self._calls_written(row, prompt, place)
            is_whole = not truncated
            response = self._continuation(prompt, text, place)
        else:
            text, is_whole = self._fitted(row["completion"], prompt, truncated, place)
            response = self._continuation(prompt, text, place)

        if stop_id is not None and stop_id in response:
            stop = self.tokenizer.convert_ids_to_tokens(stop_id)
            raise DataError(
                f"{place}: the response contains the stop token {stop!r} in its middle, where "
                "generation would have ended; take it out, or make two rows of it."
            )
        if is_whole and stop_id is not None:
            response.append(stop_id)
        return RenderedRow(prompt, response, text, is_whole)

    def prompt_of(self, row: Mapping[str, Any], number: int = 1) -> RenderedPrompt:
        """Render a row's prompt; an error names the row.

        Raises:
            DataError: If the prompt cannot be rendered.
        """
        place = place_of(row, number)
        try:
            return self.prompt(row["prompt"], tools=tools_of(row))
        except DataError as error:
            whole = row["prompt"] if isinstance(row["prompt"], str) else _conversation_of(row)
            told = _refusal(whole, error.__cause__) if error.__cause__ else error
            raise DataError(f"{place}: {told}") from error
        except Exception as error:  # a template is a program, and the row is its argument
            raise DataError(
                f"{place}: the chat template fails on its messages ({error!r:.200}); change "
                "them to what the template takes."
            ) from error

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return cast("list[int]", list(ids))

    def _stop_id(self, arguments: Mapping[str, Any]) -> int | None:
        """Return the id of the template's stop token, or of EOS if the template shows none."""
        stop = shape_of(self.tokenizer, **arguments).stop
        if stop is None:
            return cast("int | None", self.tokenizer.eos_token_id)
        return cast("int", self.tokenizer.convert_tokens_to_ids(stop))

    def _opening(self, messages: list[dict[str, Any]], text: str) -> Opening:
        """Find the state of the thinking in the text after the last message's content."""
        end = text
        for message in reversed(messages):
            content = message.get("content")
            if isinstance(content, str) and (said := content.strip()) and said in text:
                end = text[text.rindex(said) + len(said) :]
                break

        if self.tags.opened_by(end):
            return Opening.OPENED
        return Opening.CLOSED if self.tags.close in end else Opening.FREE

    def _require_sampled_here(self, row: Mapping[str, Any], number: int) -> None:
        """Check that a sampled response belongs to this rendering and vocabulary.

        Raises:
            DataError: If the row was sampled with another template, other template arguments, or,
                where it has token ids, another vocabulary.
        """
        told = row.get("rendering")
        if not told:
            return
        there = json.loads(told) if isinstance(told, str) else told
        here = self._record if not isinstance(row["prompt"], str) else {}

        for name, why in _DIFFERENCES.items():
            if name in here and name in there and here[name] != there[name]:
                was, now = (json.dumps(each[name]) for each in (there, here))
                raise DataError(f"{place_of(row, number)}: {why.format(was=was, now=now)}")

        if row.get("response_ids") is not None:
            vocabulary = self._vocabulary
            if there.get("vocabulary", vocabulary) != vocabulary:
                raise DataError(
                    f"{place_of(row, number)}: its response was sampled with another vocabulary "
                    f"({there['vocabulary']} there, {vocabulary} here), so its token ids mean "
                    "other text; sample the traces with one of this pair's models."
                )

    @cached_property
    def _record(self) -> dict[str, Any]:
        return rendering_record(self.tokenizer)

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_hash(self.tokenizer)

    # Responses that were not sampled here, fitted to the opening.

    def _fitted(
        self, completion: Prompt, prompt: RenderedPrompt, truncated: bool, place: str
    ) -> tuple[str, bool]:
        """Return the text that the model must write after the prompt, and whether it is whole.

        Raises:
            DataError: If the response has a thinking and the prompt has closed it.
        """
        stop = "" if prompt.stop_id is None else self.tokenizer.decode([prompt.stop_id])
        if isinstance(completion, str):
            return (completion.removesuffix(stop) if stop else completion), not truncated

        message = completion[-1]
        text = message.get("content") or ""
        text = text.removesuffix(stop) if stop else text
        reasoning = reasoning_of(message)
        parts = self._parts(text, reasoning, prompt.opening, truncated)
        if parts.thinking.strip():
            _require_not_closed(prompt, place)

        is_whole = parts.closed and not truncated
        shape = shape_of(self.tokenizer)
        if not (parts.thinking.strip() or not parts.closed):
            written = self._answer_written(text, parts, prompt.opening)
        elif shape.thinking_start is not None and shape.thinking_end is not None:
            answer = shape.thinking_end + self._trimmed(parts.answer.lstrip())
            written = shape.thinking_start + parts.thinking.strip()
            written += answer if parts.closed else ""
        else:
            written = self._thinking_written(text, parts, prompt, is_own=not reasoning)

        return written + (shape.ending if is_whole else ""), is_whole

    def _calls_written(
        self, row: Mapping[str, Any], prompt: RenderedPrompt, place: str
    ) -> tuple[str, int | None]:
        """Return what the model must write for a response that calls tools, and its stop token.

        It is what the chat template writes for the response after the prompt.

        Raises:
            DataError: If the response has a thinking and the prompt has closed it, or the template
                does not render the response, or not as a continuation of the prompt.
        """
        message, shape, tags = dict(row["completion"][-1]), shape_of(self.tokenizer), self.tags
        parts = self._parts(
            message.get("content") or "", reasoning_of(message), prompt.opening, truncated=False
        )
        thinking, is_opened = parts.thinking.strip(), prompt.opening is Opening.OPENED
        if thinking:
            _require_not_closed(prompt, place)

        # A thinking that the template does not write stands before the calls, as in `_fitted`.
        start = ""
        if thinking and shape.thinking_end is None:
            message = {key: message[key] for key in message if key not in REASONING_KEYS}
            message["content"] = parts.answer.lstrip()
            start = ("" if is_opened else f"{tags.open}\n") + thinking + self._default_end
        whole = self._whole(row, message, place)

        base = prompt.text
        if start or not whole.startswith(base):
            base = before_thinking(base, tags)
        if not whole.startswith(base):
            raise DataError(
                f"{place}: the chat template writes a response that calls tools, and the prompt "
                "before it, otherwise than it asks for one; use another template."
            )
        written, stop_id = call_ending(
            self.tokenizer, whole[len(base) :], shape.stop, tool_shape(self.tokenizer, shape)
        )
        if is_opened and base != prompt.text and not start:
            if written.lstrip().startswith(tags.open):  # the prompt has the tag
                written = written.lstrip().removeprefix(tags.open).lstrip()
            else:
                start = self._default_end

        shown = "".join((start + written).split())
        for said, what in ((parts.answer, "text"), (thinking, "thinking")):
            if "".join(said.split()) not in shown:
                raise DataError(
                    f"{place}: the chat template leaves out the {what} of a response that calls "
                    "tools; take one of the two out, or use a template that renders both."
                )
        return start + written, prompt.stop_id if stop_id is None else stop_id

    def _whole(self, row: Mapping[str, Any], message: dict[str, Any], place: str) -> str:
        """Render a row's prompt with its response, as the chat template writes both.

        Raises:
            DataError: If the template fails on them, or does not render their tools.
        """
        try:
            return render_chat(self.tokenizer, [*row["prompt"], message], tools=tools_of(row))
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        except Exception as error:  # a template is a program, and the row is its argument
            raise DataError(
                f"{place}: the chat template fails on a response that calls tools "
                f"({error!r:.200}); change it to what the template takes."
            ) from error

    def _parts(self, text: str, reasoning: str, opening: Opening, truncated: bool) -> Split:
        """Split a response into thinking and answer; `reasoning` is the thinking given apart."""
        # A whole response without a closing tag is an answer, even after an opened thinking.
        opened = opening is Opening.OPENED and truncated
        split = split_any(text, self.tags, opened=opened and not reasoning)
        if not reasoning:
            return split
        return Split(reasoning, split.answer, bool(split.answer.strip()) or not truncated)

    def _answer_written(self, text: str, parts: Split, opening: Opening) -> str:
        """Write a response without thinking; if the prompt has opened one, close it first."""
        shape = shape_of(self.tokenizer)
        if opening is Opening.OPENED:
            start = shape.answer_start or shape.thinking_end or self._default_end
            return start + self._trimmed(parts.answer.lstrip())
        if opening is Opening.FREE and shape.thinking_end is None:
            return (shape.answer_start or "") + self._trimmed(text)  # tags in the text stay
        answer = parts.answer if parts.answer == text else parts.answer.lstrip()
        return (shape.answer_start or "") + self._trimmed(answer)

    def _thinking_written(
        self, text: str, parts: Split, prompt: RenderedPrompt, *, is_own: bool
    ) -> str:
        """Write a response with thinking where the template does not show how.

        `is_own` is true where the thinking is part of the text, not given beside it.
        """
        is_opened = prompt.opening is Opening.OPENED
        before = "" if is_opened else shape_of(self.tokenizer).answer_start or ""
        if is_own and (self.tags.close in text or text.lstrip().startswith(self.tags.open)):
            written = text
            if is_opened:  # the prompt has the tag, and perhaps the white space after it
                written = text.lstrip().removeprefix(self.tags.open)
                written = written.lstrip() if prompt.text[-1:].isspace() else written
            return before + self._trimmed(written)

        start = "" if is_opened else f"{before}{self.tags.open}\n"
        thinking = parts.thinking.strip() if parts.closed else parts.thinking.lstrip()
        answer = self._default_end + self._trimmed(parts.answer.lstrip()) if parts.closed else ""
        return start + thinking + answer

    @property
    def _default_end(self) -> str:
        """The text that closes a thinking where the template does not show it."""
        return f"\n{self.tags.close}" + ("\n\n" if self.tags.close.startswith("<") else "")

    def _trimmed(self, text: str) -> str:
        """Remove the white space around a text if the template does so."""
        return text.strip() if shape_of(self.tokenizer).trims else text

    def _continuation(self, prompt: RenderedPrompt, text: str, place: str) -> list[int]:
        """Tokenize a response so that the prompt has the same tokens as at inference.

        Raises:
            DataError: If the tokenizer cannot tokenize the response apart from the prompt.
        """
        before, whole = self._encode(prompt.text), self._encode(prompt.text + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]

        # The prompt's last token merges with the response. At inference the prompt is tokenized
        # alone, so the response is tokenized alone too.
        alone = self._encode(text)
        begins = self.tokenizer.convert_ids_to_tokens(alone[:1])
        if begins and str(begins[0]).startswith(_WORD_START) and not text[:1].isspace():
            raise DataError(
                f"{place}: the tokenizer cannot split the prompt's end from the beginning of "
                "the response; end the prompt with a special token or a line break."
            )
        return alone


def _calls(completion: Prompt) -> bool:
    """Return whether a completion calls tools."""
    return not isinstance(completion, str) and bool(calls_of(completion[-1]))


def _require_not_closed(prompt: RenderedPrompt, place: str) -> None:
    """Check that a response with thinking may think after the prompt.

    Raises:
        DataError: If the prompt has closed the thinking.
    """
    if prompt.opening is Opening.CLOSED:
        raise DataError(
            f"{place}: the response has a thinking, and the prompt has closed it before "
            "the response begins; set `template: {enable_thinking: true}`, or train on the "
            "answers alone with strip_thinking."
        )


_WORD_START = "▁"
"""SentencePiece's mark of a word's beginning; it is added before any text tokenized alone."""

_DIFFERENCES = {
    "arguments": "its response was sampled with the template arguments {was}, and {now} are in "
    "force; set `template` to those that it was sampled with, or sample again.",
    "template": "its response was sampled with another chat template (hash {was} there, {now} "
    "here); set training.chat_template_path to that template, or sample again.",
}


def bind_as_sampled(tokenizer: "PreTrainedTokenizerBase", dataset: "Dataset") -> None:
    """Bind the template arguments that traces were sampled with, for commands that only read them.

    Args:
        tokenizer: Changed in place; not changed if the rows record no arguments.
        dataset: As `load_traces` returns it. The first row with a record decides; rows with other
            arguments are refused when they are rendered.
    """
    told = dataset["rendering"] if "rendering" in dataset.column_names else []
    first: dict[str, Any] = next((json.loads(each) for each in told if each), {})
    if first.get("arguments"):
        bind_template(tokenizer, first["arguments"], bound_thinking(tokenizer))


def rendering_record(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what a prompt's rendering depends on, to be kept with traces, models and caches.

    Returns:
        `template`, the hash of the chat template without its arguments (None for none), and
        `arguments`, those that are bound to it.
    """
    return {"template": template_hash(tokenizer), "arguments": template_arguments(tokenizer)}


def vocabulary_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash the vocabulary, tokens with their ids, to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{index}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


# Prompts as text.


def chat_template_of(tokenizer: "PreTrainedTokenizerBase", path: str | None) -> Any:
    """Return the chat template that training will use.

    Args:
        tokenizer: The model's own.
        path: ``chat_template_path``: the file of a template, or a model that has one; None for
            the tokenizer's own.

    Returns:
        The text of one template, a mapping from names to texts, or None.
    """
    if path is None:
        return tokenizer.chat_template
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    from flexalign.models.loading import load_tokenizer

    return load_tokenizer(path).chat_template


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
    **arguments: Any,
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
        tokenizer: The model's.
        messages: A conversation.
        add_generation_prompt: Whether a response is asked for.
        tools: Definitions of the tools that a response may call.
        **arguments: Template arguments of this call; they override those that are bound.

    Raises:
        DataError: If the tokenizer has no template, the template refuses the messages or does not
            render their tools, or, where a response is asked for, it leaves a message out or
            renders no generation prompt.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            "the data are conversations, but the tokenizer has no chat template; "
            "give prompts and completions as plain text, or a tokenizer with a template."
        )

    try:
        shape = shape_of(tokenizer, **arguments)
        tags = ThinkingTags.of(tokenizer)
        given = template_messages(messages, shape, (tags.open, tags.close))
        told: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if uses_tools(messages, tools):
            given = tool_messages(given, tools, tool_shape(tokenizer, shape, **arguments))
        text = call_template(
            tokenizer, given, add_generation_prompt=add_generation_prompt, **told, **arguments
        )
    except TemplateError as error:
        raise _refusal(messages, error) from error
    require_tools_shown(given, tools, text)

    if add_generation_prompt:
        if not shape.has_generation_prompt and (shape.answer_start or "").strip():
            raise DataError(
                "the chat template renders no generation prompt: it writes "
                f"{shape.answer_start!r} before a response and does not ask for one with it; set "
                "training.chat_template_path to a template that heeds add_generation_prompt."
            )
        require_all_shown(messages, text)
    return text


def _refusal(messages: Any, error: BaseException) -> DataError:
    roles = ", ".join(message["role"] for message in messages)
    return DataError(
        f"the chat template refuses messages of the roles {roles} ({error}); "
        "change them to what the template takes."
    )


def _conversation_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*row["prompt"], *row["completion"]]


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of the tokens that end a response: the chat template's stop token, and EOS."""
    stops = [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        try:
            stop = shape_of(tokenizer).stop
        except Exception:  # a template is a program; one that fails shows no stop token
            stop = None
        if stop is not None:
            stops.insert(0, tokenizer.convert_tokens_to_ids(stop))
    return [stop for stop in dict.fromkeys(stops) if stop is not None]


def end_ids(tokenizer: "PreTrainedTokenizerBase", *configured: Any) -> list[int]:
    """Return the ids of all tokens that end a response, each once.

    Args:
        tokenizer: The tokenizer; its :func:`stop_ids` come last.
        *configured: The ``eos_token_id`` of generation configs: a number, several, or None.
    """
    ends: list[Any] = []
    for given in (*configured, stop_ids(tokenizer)):
        ends += given if isinstance(given, list | tuple) else [given]
    return [int(end) for end in dict.fromkeys(ends) if end is not None]


def plain_prompt(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]) -> str:
    """Render a prompt so that tokenizing the text gives the same ids as the chat template.

    Many templates write the BOS token, and the tokenizer adds another one to plain text. Where
    both do, the template's is removed.

    Raises:
        DataError: As in `render_chat`.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    bos = tokenizer.bos_token
    if (
        bos
        and text.startswith(bos)
        and tokenizer(bos)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    ):
        return text.removeprefix(bos)
    return text


# The lengths of rows in tokens, and the effect of a cut-off.


@dataclass(frozen=True)
class Lengths:
    """The lengths of a data set's rows, in tokens.

    Attributes:
        rows: Number of rows.
        kept: Number of rows whose prompt is shorter than the cut-off.
        truncated: Number of those whose response the cut-off shortens.
        prompt_tokens: Prompt tokens of all rows within the cut-off.
        response_tokens: Response tokens of all rows within the cut-off, which the loss counts.
        longest: Tokens of the longest row, before the cut-off.
        shortest: Tokens of the shortest row, before the cut-off.
    """

    rows: int
    kept: int
    truncated: int
    prompt_tokens: int
    response_tokens: int
    longest: int
    shortest: int

    def to_json(self) -> dict[str, int]:
        """The figures by name, for JSON."""
        return asdict(self)


def measure_lengths(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> Lengths:
    """Count tokens as training counts them, with the rendering of :class:`Rendering`.

    Args:
        dataset: Prompts and completions, as `load_traces` returns them.
        tokenizer: The model's own.
        max_length: The cut-off in tokens, prompt and response together; None for none.

    Raises:
        DataError: If the data set is empty, every row is longer than the cut-off, or a row cannot
            be rendered.
    """
    parts = split_tokens(dataset, tokenizer)
    return lengths_of([(len(prompt), len(response)) for prompt, response in parts], max_length)


def lengths_of(sizes: Sequence[tuple[int, int]], max_length: int | None) -> Lengths:
    """Count the tokens of rows.

    Args:
        sizes: The tokens of each row's prompt and of its response.
        max_length: As in `measure_lengths`.

    Raises:
        DataError: If there is no row, or every row is longer than the cut-off.
    """
    if not sizes:
        raise DataError("the data set is empty; nothing to work on.")

    lengths = [prompt + response for prompt, response in sizes]
    cut = max_length if max_length is not None else max(lengths)
    if min(lengths) > cut:
        raise DataError(
            f"all {len(sizes)} rows are longer than the cut-off of {cut} tokens "
            f"(the shortest has {min(lengths)}, the longest {max(lengths)}); "
            "raise max_length or use shorter data."
        )

    return Lengths(
        rows=len(sizes),
        kept=sum(prompt < cut for prompt, _ in sizes),
        truncated=sum(prompt < cut < prompt + response for prompt, response in sizes),
        prompt_tokens=sum(min(prompt, cut) for prompt, _ in sizes),
        response_tokens=sum(max(min(prompt + size, cut) - prompt, 0) for prompt, size in sizes),
        longest=max(lengths),
        shortest=min(lengths),
    )


def split_tokens(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[int]]]:
    """Render rows, and yield the token ids of each prompt and response.

    Args:
        dataset: As in `measure_lengths`.
        tokenizer: The model's own.

    Yields:
        The token ids of the prompt, which the loss does not count, and those of the response.

    Raises:
        DataError: If a row cannot be rendered.
    """
    rendering = Rendering(tokenizer)
    for number, row in enumerate(dataset, start=1):
        rendered = rendering.row(row, number)
        yield rendered.prompt.ids, rendered.response_ids


# Data sets as trainers take them: token ids, so that TRL renders nothing.


def tokenize_rows(dataset: Any, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Turn prompts with responses into token ids and a mask of the response.

    Args:
        dataset: As in `measure_lengths`, or an `IterableDataset` of such rows.
        tokenizer: The model's own.

    Returns:
        A data set of `input_ids` and `completion_mask` (1 at the response's tokens, 0 at the
        prompt's). A data set without `prompt` and `completion` is returned unchanged.

    Raises:
        DataError: If a row cannot be rendered.
    """
    columns = _columns(dataset)
    if not {"prompt", "completion"} <= set(columns):
        return dataset
    rendering = Rendering(tokenizer)

    def render(row: dict[str, Any], index: int) -> dict[str, Any]:
        rendered = rendering.row(row, index + 1)
        return {"input_ids": rendered.input_ids, "completion_mask": rendered.completion_mask}

    return map_rows(dataset, render, columns)


def tokenize_preferences(dataset: Any, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Turn prompts with a chosen and a rejected response into token ids.

    Args:
        dataset: Preferences, as `load_preferences` returns them.
        tokenizer: The model's own.

    Returns:
        A data set of `prompt_ids`, `chosen_ids` and `rejected_ids`. A data set without `prompt`,
        `chosen` and `rejected` is returned unchanged.

    Raises:
        DataError: If a row cannot be rendered.
    """
    columns = _columns(dataset)
    if not {"prompt", "chosen", "rejected"} <= set(columns):
        return dataset
    rendering = Rendering(tokenizer)

    def render(row: dict[str, Any], index: int) -> dict[str, Any]:
        shared = {name: row[name] for name in ("prompt", "tools", PLACE) if name in row}
        chosen, rejected = (
            rendering.row({**shared, "completion": row[side]}, index + 1)
            for side in ("chosen", "rejected")
        )
        return {
            "prompt_ids": chosen.prompt.ids,
            "chosen_ids": chosen.response_ids,
            "rejected_ids": rejected.response_ids,
        }

    return map_rows(dataset, render, columns)


def _columns(dataset: "Dataset | IterableDataset") -> list[str]:
    names = dataset.column_names
    return list(next(iter(dataset))) if names is None else list(names)


def map_rows(dataset: Any, render: Any, columns: list[str]) -> Any:
    """Map rows with ``render(row, index)`` and remove columns, without hashing the tokenizer.

    Args:
        dataset: A `Dataset` or an `IterableDataset`.
        render: Returns the new columns of a row.
        columns: The columns to remove.
    """
    from datasets import IterableDataset

    options: dict[str, Any] = {"with_indices": True, "remove_columns": columns}
    if isinstance(dataset, IterableDataset):
        return dataset.map(render, **options)

    # Without a given fingerprint, datasets would hash the function, and with it the tokenizer.
    from datasets.fingerprint import generate_fingerprint

    name = generate_fingerprint(dataset)
    return dataset.map(render, load_from_cache_file=False, new_fingerprint=name, **options)
