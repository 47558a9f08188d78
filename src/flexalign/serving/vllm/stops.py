"""Stop texts of a chat on vLLM: looked for outside the thinking, as on the local engine.

vLLM looks for them in all that is written, so that a text which happens to stand in the thinking ends
the answer before it begins. The server in front therefore hands a chat's stop texts on as arguments of
the engine (:func:`with_stops`), and the text of such a request is made by :class:`OutsideThinking`.
"""

import sys
from functools import wraps
from typing import Any

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import StopSearch

STOPS_KEY = "flexalign_stop"
"""The key of ``vllm_xargs`` under which they are handed on: the tags, then the texts."""


def with_stops(body: dict[str, Any], extras_key: str, tags: ThinkingTags) -> dict[str, Any]:
    """Return a chat's body whose stop texts the engine looks for outside the thinking.

    A body without stop texts is returned as it is, and so is one that vLLM refuses with the reason.

    Args:
        body: The chat's.
        extras_key: The key of a body whose values vLLM hands to the engine.
        tags: The tags around the thinking.
    """
    given, extras = body.get("stop"), body.get(extras_key) or {}
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not isinstance(extras, dict):
        return body
    if not stops or not all(isinstance(stop, str) and stop for stop in stops):
        return body

    marked = {STOPS_KEY: [tags.open, tags.close, *stops]}
    return {**body, "stop": [], extras_key: {**extras, **marked}}


def are_stops_installed() -> bool:
    """Whether vLLM, in this process, makes the text of marked requests outside the thinking."""
    loaded = sys.modules.get("vllm.v1.engine.detokenizer")  # vLLM's server has loaded it
    if loaded is None:
        return False
    return getattr(loaded.IncrementalDetokenizer.from_new_request, "knows_thinking", False)


def install_stops() -> None:
    """Let vLLM make the text of marked requests by :class:`OutsideThinking`. Twice is once.

    This relies on ``IncrementalDetokenizer.from_new_request``, which vLLM's output processor calls for
    every request, in the process that takes it.
    """
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    original = IncrementalDetokenizer.from_new_request
    if getattr(original, "knows_thinking", False):
        return

    @wraps(original)
    def from_new_request(_: Any, tokenizer: Any, request: Any) -> Any:
        inner = original(tokenizer, request)
        marked = (request.sampling_params.extra_args or {}).get(STOPS_KEY)
        if marked is None or tokenizer is None:
            return inner
        opens, closes, *stops = marked
        tags = ThinkingTags(opens, closes)
        opened = tags.opened_by(tokenizer.decode(request.prompt_token_ids or []))
        return OutsideThinking(inner, StopSearch(stops, tags, opened=opened))

    from_new_request.knows_thinking = True  # type: ignore[attr-defined]
    IncrementalDetokenizer.from_new_request = classmethod(from_new_request)


class OutsideThinking:
    """A request's text as vLLM makes it, up to the first stop text after the thinking.

    It stands in the place of vLLM's ``IncrementalDetokenizer``, which it asks for the text.
    """

    def __init__(self, inner: Any, search: StopSearch) -> None:
        """Begin a request.

        Args:
            inner: vLLM's own, which knows no stop text.
            search: Looks for them.
        """
        self._inner = inner
        self._search = search
        self._final = 0
        self._returned = 0

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens that were written."""
        ids: list[int] = self._inner.output_token_ids
        return ids

    def num_output_tokens(self) -> int:
        """How many they are."""
        return len(self.output_token_ids)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Take the tokens of a step; return the stop text that one of them completes, if any.

        Tokens after that one, which drafting makes in the same step, are left out.
        """
        for place, token in enumerate(new_token_ids):
            before = len(self._inner.output_text)
            is_last = place == len(new_token_ids) - 1
            self._inner.update([token], stop_terminated and is_last)

            new = self._inner.output_text[before:]
            may_stop = self.num_output_tokens() > self._inner.min_tokens
            self._final += len(self._search.put(new, may_stop=may_stop))
            if self._search.found is not None:
                kept = len(self._search.found) if self._inner.include_stop_str_in_output else 0
                self._inner.output_text = self._inner.output_text[: self._final + kept]
                return self._search.found
        return None

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """Return the text that no later token changes; with `delta` what is new of it."""
        text: str = self._inner.output_text
        if not finished:
            text = text[: self._final]
        if not delta:
            return text
        new, self._returned = text[self._returned :], max(self._returned, len(text))
        return new
