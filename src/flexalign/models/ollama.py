"""Ollama's Modelfile for a GGUF file."""

from collections.abc import Sequence
from typing import Any


def modelfile(name: str, tokenizer: Any, stops: Sequence[str], adds_bos: bool) -> str:
    """Return the Modelfile of a GGUF file in the same folder.

    Args:
        name: The file's name.
        tokenizer: The model's tokenizer.
        stops: The tokens that end a response.
        adds_bos: Whether the BOS token is put before each text.
    """
    lines = [f"FROM ./{name}"]
    lines.append("# No TEMPLATE: the chat template inside the GGUF file is used.")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    mark = '"""' if '"' in text else '"'
    return f"{mark}{text}{mark}"
