"""Prompts as `flexalign generate` is given them: an argument, standard input, or a file."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from flexalign.errors import ConfigError, DataError


class GivenPrompt(NamedTuple):
    """A prompt.

    Attributes:
        given: As results show it: a text, or messages.
        put: As the model is asked: messages, or text that it goes on from as it is.
    """

    given: str | list[dict[str, Any]]
    put: str | list[dict[str, Any]]


def read_given(prompt: str | None, file: Path | None) -> list[GivenPrompt]:
    """Read the prompt on the command line, else those of a file, else standard input.

    Raises:
        ConfigError: If there is none, or there are two sources.
        DataError: If a prompt is empty, or the file cannot be read.
    """
    if file is not None:
        if prompt is not None:
            raise ConfigError("give PROMPT or --prompts, not both.")
        return _read_file(file)
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise ConfigError(
                "there is no prompt; write one behind the model, name a file of them with "
                "--prompts, or pipe one in. (flexalign chat is for conversations.)"
            )
        prompt = sys.stdin.read()
    return [_question(prompt)]


def _read_file(file: Path) -> list[GivenPrompt]:
    if file.suffix.lower() != ".txt":
        from flexalign.data.formats import load_prompts

        return [GivenPrompt(one, one) for one in load_prompts(file)["prompt"]]
    if not file.is_file():
        raise DataError(f"{file}: no such file.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
    prompts = [_question(line) for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file} holds no prompt; write one a line.")
    return prompts


def _question(text: str) -> GivenPrompt:
    text = text.strip()
    if not text:
        raise DataError("the prompt is empty.")
    return GivenPrompt(text, [{"role": "user", "content": text}])
