"""Answers that follow a JSON schema: which tokens may come next, by llguidance, answer by answer.

The thinking is free. The grammar holds for the answer after it, so that a fast answer without thinking
and a slow one with it follow the same schema. Each answer has its own state, so that rows of a batch
differ in their grammars as they differ in λ.
"""

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexalign._packages import require_packages
from flexalign.errors import ConfigError
from flexalign.generation.row_lambdas import TagTokens
from flexalign.models.hub import in_one_line

_START = r"start: /[ \n]{0,4}/ %json "
"""The grammar of an answer, in llguidance's notation: models write line breaks after a thinking."""


_SPACES = r"[ \n]{0,32}"
"""White space between the parts of a value; without a limit, weak models write nothing else."""


class GrammarCompiler:
    """Makes grammars for the tokens of one model."""

    def __init__(self, tokenizer: Any, tags: TagTokens | None, ends: Collection[int]) -> None:
        """Prepare for a model; llguidance is loaded at the first grammar.

        Args:
            tokenizer: Its tokenizer, one of the ``tokenizers`` library.
            tags: The tokens of its thinking tags; None if they cannot be found in token ids.
            ends: The tokens that end an answer.
        """
        self._tokenizer = tokenizer
        self._tags = tags
        self._ends = sorted(ends)

    def compile(self, schema: object, *, opened: bool = False) -> "Grammar":
        """Make the grammar of a JSON schema.

        Args:
            schema: The schema.
            opened: Whether the prompt leaves the thinking open.

        Raises:
            ConfigError: If llguidance is not installed or does not take the schema, or the end of
                an open thinking cannot be found in token ids.
        """
        if opened and self._tags is None:
            raise ConfigError(
                "response_format: the prompt opens a thinking, and this model's tags are several "
                "tokens each, so that its end is not found; close it by chat_template_kwargs."
            )
        require_packages("response_format", "llguidance", install="'flexalign[grammar]'")
        from llguidance import LLMatcher

        if isinstance(schema, dict):
            schema = {"x-guidance": {"whitespace_pattern": _SPACES}} | schema
        matcher = LLMatcher(self._words, _START + json.dumps(schema), log_level=0)
        if matcher.is_error():
            # The first line says it; the others show the place in a text that is not the user's.
            said = matcher.get_error().partition("\n")[0].rpartition("JSON schema: ")[2]
            raise ConfigError(f"the JSON schema cannot be followed ({said[:300]}); change it.")
        return Grammar(matcher, self._tags, tuple(self._ends))

    @cached_property
    def _words(self) -> Any:
        """The tokens as llguidance reads them; about a second for a large vocabulary."""
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, len(self._tokenizer), self._ends)
        except ValueError as error:
            raise ConfigError(
                f"response_format: this model's tokenizer cannot follow a schema: {in_one_line(error)}; "
                "serve a model with a tokenizer of the tokenizers library."
            ) from error


@dataclass(frozen=True)
class Grammar:
    """The grammar of one request's answers.

    Attributes:
        matcher: llguidance's, at the beginning; copied for each answer.
        tags: The tokens of the thinking tags, or None.
        ends: The tokens that end an answer.
    """

    matcher: Any
    tags: TagTokens | None
    ends: tuple[int, ...]

    def begin(self, *, opened: bool) -> "GrammarState":
        """Return the state of an answer before its first token.

        Args:
            opened: Whether its prompt leaves the thinking open.
        """
        return GrammarState(self, opened=opened)


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(self, grammar: Grammar, *, opened: bool) -> None:
        """Begin an answer; see :meth:`Grammar.begin`."""
        self._matcher = grammar.matcher.deep_copy()
        self._ends = list(grammar.ends)
        tags = grammar.tags
        self._opening = tags.opening if tags is not None and not opened else []
        self._closing = tags.closing if tags is not None else []
        self._is_thinking = opened
        self._tag: list[int] = []  # of the opening tag, what has been written
        self._tail: list[int] = []  # the last tokens of the thinking

    def copy(self) -> "GrammarState":
        """Return the same state, to be continued in another way."""
        other = copy.copy(self)
        other.__dict__.update(_matcher=self._matcher.deep_copy(), _tag=list(self._tag))
        return other

    def limit(self, scores: Tensor) -> Tensor:
        """Return scores, shape ``(1, V)``, that are −∞ at tokens that may not come next."""
        if self._is_thinking:  # an answer must follow
            return scores.index_fill(1, torch.tensor(self._ends, device=scores.device), -torch.inf)

        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        if not self._tag:
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            bits = np.unpackbits(packed, bitorder="little")[: len(allowed)]
            allowed[: len(bits)] = torch.from_numpy(bits.astype(bool))
        if self._opening:
            allowed[self._opening[len(self._tag)]] = True
        if not allowed.any():
            allowed[self._ends] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def take(self, token: int) -> None:
        """Take the token that was chosen."""
        if self._is_thinking:
            self._tail = [*self._tail, token][-len(self._closing) :]
            self._is_thinking = self._tail != self._closing
        elif self._opening and token == self._opening[len(self._tag)]:
            self._tag.append(token)
            if len(self._tag) == len(self._opening):
                self._is_thinking, self._opening, self._tag = True, [], []
        else:
            self._opening = []
            if token not in self._ends:
                self._matcher.consume_token(token)
