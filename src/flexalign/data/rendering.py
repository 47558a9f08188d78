"""Conversations as text, by the chat template, and what a template may lose on the way."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]
"""Text that the model goes on from as it is, or messages for the chat template."""


def chat_template_of(tokenizer: "PreTrainedTokenizerBase", path: str | None) -> Any:
    """Return the chat template that training is going to use.

    Args:
        tokenizer: The model's own.
        path: ``chat_template_path``: a template's file, or a model with another one; None for the
            tokenizer's own.
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
) -> str:
    """Render messages with the tokenizer's chat template.

    Raises:
        DataError: If it has none, or its template refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            "the data are conversations, but the tokenizer has no chat template; "
            "give prompts and completions as plain text, or a tokenizer with a template."
        )
    try:
        return cast(
            "str",
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            ),
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses messages of the roles {roles} ({error}); "
            "change them to what the template takes."
        ) from error


def plain_prompt(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]) -> str:
    """Render a prompt so that tokenizing the text gives what the chat template gives.

    A template often begins with the BOS token, which the tokenizer then adds to plain text a
    second time; it is left out here where that happens.

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


def keeps_thinking(tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags) -> bool:
    """Whether the chat template renders the thinking of a last response."""
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": f"{tags.open}some thinking{tags.close}answer"},
    ]
    return "some thinking" in render_chat(tokenizer, messages)


def check_rendering(number: int, rendered: str, completion: list[dict[str, Any]]) -> None:
    """Refuse a rendering that has lost a part of the response.

    Args:
        number: The row's number, for the message.
        rendered: The whole conversation as text.
        completion: The messages that must stand in it.

    Raises:
        DataError: If a response does not, white space apart.
    """
    if any(_squeeze(message["content"]) not in _squeeze(rendered) for message in completion):
        raise DataError(
            f"row {number}: the chat template leaves a part of the response out (some drop the "
            "thinking), so it would not be trained on; set training.chat_template_path to a "
            "template that keeps it, or use plain text rows (flexalign sample --plain)."
        )


def _squeeze(text: str) -> str:
    return "".join(text.split())


# How long the rows are, in tokens, and what a cut-off does to them.


@dataclass(frozen=True)
class Lengths:
    """The lengths of a data set's rows, in tokens.

    Attributes:
        rows: Rows measured.
        kept: Rows of which at least one response token lies within the cut-off.
        truncated: Of those, the rows whose response the cut-off shortens.
        prompt_tokens: All prompt tokens within the cut-off.
        response_tokens: All response tokens within the cut-off: what the loss counts.
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
    """Count tokens as TRL's trainer will: with the chat template, or plain text with EOS.

    Args:
        dataset: Prompts and completions, as `load_traces` returns them.
        tokenizer: The model's own.
        max_length: The cut-off in tokens, prompt and response together; None for none.

    Raises:
        DataError: If no row fits the cut-off whole, or if the chat template leaves a part of a
            response out.
    """
    if len(dataset) == 0:
        raise DataError("the data set is empty; nothing to work on.")
    parts = split_tokens(dataset, tokenizer)
    sizes = [(len(prompt), len(response)) for prompt, response in parts]
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
    """Tokenize rows as TRL's trainer will, and split each into prompt and response.

    Args:
        dataset: As in `measure_lengths`.
        tokenizer: The model's own.

    Yields:
        The prompt's token ids (which the loss leaves out) and the response's (which it counts).

    Raises:
        DataError: If the chat template leaves a part of a response out.
    """
    from trl.data_utils import common_prefix_length

    for number, row in enumerate(dataset, start=1):
        if isinstance(row["prompt"], str):
            eos = tokenizer.eos_token or ""
            prompt = _token_ids(tokenizer, row["prompt"])
            whole = _token_ids(tokenizer, row["prompt"] + row["completion"].removesuffix(eos) + eos)
        else:
            rendered = render_chat(tokenizer, row["prompt"] + row["completion"])
            check_rendering(number, rendered, row["completion"])
            opening = render_chat(tokenizer, row["prompt"], add_generation_prompt=True)
            prompt = _token_ids(tokenizer, opening, add_special_tokens=False)
            whole = _token_ids(tokenizer, rendered, add_special_tokens=False)
        start = common_prefix_length(prompt, whole)
        yield whole[:start], whole[start:]


def _token_ids(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool = True
) -> list[int]:
    return cast("list[int]", tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
