"""Conversations as text, by the chat template, and what a template may lose on the way."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Prompt",
    "chat_template_of",
    "check_rendering",
    "keeps_thinking",
    "plain_prompt",
    "render_chat",
]

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
    from flexalign.loading import load_tokenizer

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
