"""The arguments that a chat template reads: a misspelt one would change nothing, without a word."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from flexalign._spelling import nearest
from flexalign.data.template import bare_template
from flexalign.errors import ConfigError

_GIVEN = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
)
"""Variables of chat templates that transformers sets, beside the special tokens."""


def template_variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the names that a tokenizer's chat template reads and that are not set by the library."""
    return _read_by(tokenizer) - set(_GIVEN) - set(tokenizer.special_tokens_map)


def reads_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template describes tools to the model."""
    return "tools" in _read_by(tokenizer)


def _read_by(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    template: Any = bare_template(tokenizer) or ""
    texts = list(template.values()) if isinstance(template, dict) else [template]
    return set().union(*map(_undeclared, texts))


@lru_cache(maxsize=64)
def _undeclared(template: str) -> frozenset[str]:
    """Return the names that a template's text reads; a server asks for them at every request."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))


def require_read(tokenizer: PreTrainedTokenizerBase, names: Iterable[str], whose: str) -> None:
    """Refuse arguments that a tokenizer's chat template does not read.

    Args:
        tokenizer: The tokenizer; one without a template is not judged here.
        names: The arguments.
        whose: Who sets them, for the message.

    Raises:
        ConfigError: If there is one; the message names the nearest that the template reads.
    """
    wanted = list(names)
    if not wanted or not tokenizer.chat_template:
        return
    known = template_variables(tokenizer)
    for name in wanted:
        if name not in known:
            otherwise = None if known else "it reads no argument"
            raise ConfigError(
                f"{whose} sets {name!r}, which the chat template does not read"
                + nearest(name, sorted(known), otherwise=otherwise)
            )


class _GenerationBlock(jinja2.ext.Extension):
    """Parses the block ``{% generation %}`` of transformers' chat templates, and keeps its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: Any) -> Any:
        """Return the statements in the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
