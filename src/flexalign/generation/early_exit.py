"""Early exit: the thinking is closed as soon as a trial answer is confident enough.

Responses with an :class:`~flexalign.lambdas.Exit` policy are generated in rounds. In each round every
response thinks until a part of its thinking ends (:class:`ThinkingParts`), and then the fast stream
answers on trial, after the tokens that close the thinking. A response whose trial answer is accepted
is done; the others think on from before the trial. No cache is cropped: each round prefills the
prompts with the tokens written so far, once for the trial and for the thinking that follows it, so
that layers with sliding windows or recurrent states are right too.

A trial is what ``generate`` writes greedily at the fast λ after the prompt, the thinking and the
closing tokens. The thinking is what it writes at the slow λ, with the caller's sampling.

Source: arXiv 2504.15895, here with trial answers of the fast stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.generation.adaptive import PromptBatch, with_settings, write_fast_answers
from flexalign.generation.confidence import RowTracker
from flexalign.generation.interface import DialModel
from flexalign.generation.penalties import RowPenalties
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText, StreamedText
from flexalign.generation.thinking_limits import closing_ids
from flexalign.lambdas import Dial, Exit, Way, way_dial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSED = ("min_new_tokens", "min_length", "max_time")
"""Options of ``generate`` that count the whole response, and would be counted in each round."""

Pause = Literal["marker", "end", "limit"]
"""Why a response stopped: a part of its thinking ended, its end, or its limit on tokens."""


@dataclass(frozen=True)
class ExitTokens:
    """What exits need of a tokenizer.

    The closing tag is found in decoded text, and its tokens are only written. Therefore tags of
    ordinary text are served too, which :class:`~flexalign.generation.thinking_limits.ClosingTokens`,
    found in token ids, must refuse.

    Attributes:
        reader: Decodes responses; it has thinking tags.
        tag: The tokens of the closing tag.
        after: The tokens that the chat template writes between the tag and the answer.
    """

    reader: ResponseText
    tag: tuple[int, ...]
    after: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags | None = None
    ) -> "ExitTokens":
        """Find them.

        Args:
            tokenizer: The model's tokenizer.
            tags: The thinking tags; those that the tokenizer shows if not given.

        Raises:
            ConfigError: If the tokenizer shows no tags.
        """
        found = tags or ThinkingTags.detect(tokenizer)
        if found is None:
            raise ConfigError(
                "an exit policy closes the thinking, and neither the chat template nor the "
                "vocabulary of this model shows tags around one; take an adaptive policy."
            )
        return cls(ResponseText(tokenizer, found), *closing_ids(tokenizer, found))

    @property
    def closing(self) -> tuple[int, ...]:
        """The tokens that close the thinking, as the chat template does."""
        return self.tag + self.after


class ThinkingParts:
    """Follows one response token by token, and finds the ends of the parts of its thinking.

    Only the response's first thinking counts. A response that does not begin with a thinking has no
    parts.
    """

    def __init__(self, reader: ResponseText, marker: str, *, opened: bool) -> None:
        """Begin a response.

        Args:
            reader: Decodes the response; it has thinking tags.
            marker: The text that ends a part.
            opened: Whether the prompt has opened the thinking.

        Raises:
            ConfigError: If the marker is a piece of the closing tag.
        """
        self._tags = require_marker(reader, marker)
        self._marker = marker
        self._text = StreamedText(reader)
        self._is_inside, self._is_over = opened, False
        self._part = ""  # the text since the last end of a part, or before the thinking
        self._last = ""  # the last text, in which the closing tag may have begun

    def put(self, token: int) -> bool:
        """Take the next token; return whether a part of the thinking ends with it."""
        if self._is_over or not (text := self._text.put(token)):
            return False

        self._part += text
        if not self._is_inside:
            start = self._part.lstrip()
            if not start.startswith(self._tags.open):
                self._is_over = not self._tags.open.startswith(start)
                return False
            self._is_inside, self._part = True, start.removeprefix(self._tags.open)
            text = self._part

        self._last = (self._last + text)[-len(self._tags.close) - len(text) :]
        if self._tags.close in self._last:
            self._is_over = True
            return False

        is_end = self._part.endswith(self._marker)
        has_text = bool(self._part.removesuffix(self._marker).strip())
        if is_end:
            self._part = ""
        return is_end and has_text


def require_marker(reader: ResponseText, marker: str) -> ThinkingTags:
    """Return the thinking tags, and refuse a marker that is a piece of the closing one.

    Raises:
        ConfigError: If it is one.
    """
    tags = reader.tags or ThinkingTags()
    if marker in tags.close:
        raise ConfigError(
            f"an exit policy's marker {marker!r:.40} is a piece of the closing tag {tags.close!r}; "
            "give a text that ends a part of the thinking."
        )
    return tags


def check_exit_options(model: DialModel, options: dict[str, Any]) -> None:
    """Refuse options of ``generate`` that exits do not support.

    Raises:
        ConfigError: If there is one, or there is no limit on new tokens, or no tokenizer.
    """
    model.require_tokenizer("an exit policy", options)
    for name in _REFUSED:
        if model.generation_option(name, options):
            raise ConfigError(
                f"{name} is not available with an exit policy, which generates in parts; leave it "
                "out."
            )
    if (model.generation_option("num_beams", options) or 1) > 1:
        raise ConfigError("num_beams is not available with an exit policy; leave it out.")
    if (_limit(model, options) or 0) < 1:
        raise ConfigError(
            "an exit policy needs max_new_tokens, or a max_length above that of the prompts; give one."
        )


class ExitResponse(NamedTuple):
    """A response of an exit policy.

    Attributes:
        tokens: Its tokens, shape ``(tokens,)``.
        route: ``"fast"`` if a trial answer was accepted, else ``"slow"``.
        confidence: The confidence of the last trial answer; None if there was no trial.
        rejected_tokens: Tokens of rejected trial answers, and of samples for comparison.
    """

    tokens: Tensor
    route: Way
    confidence: float | None
    rejected_tokens: int


@dataclass
class _Thinking:
    """A response under way.

    Attributes:
        row: Its prompt's row.
        policy: Its policy.
        parts: Finds the ends of parts.
        written: Its tokens.
        route: As in :class:`ExitResponse`.
        confidence: As in :class:`ExitResponse`.
        rejected_tokens: As in :class:`ExitResponse`.
    """

    row: int
    policy: Exit
    parts: ThinkingParts
    written: list[int] = field(default_factory=list)
    route: Way = "slow"
    confidence: float | None = None
    rejected_tokens: int = 0


def write_with_exits(
    prompts: PromptBatch,
    policies: Mapping[int, Exit],
    options: dict[str, Any],
    streamer: Any = None,
) -> dict[int, list[ExitResponse]]:
    """Generate the responses of rows with an exit policy.

    Args:
        prompts: The batch.
        policies: The policies, by row.
        options: The caller's options of ``generate``.
        streamer: A streamer of transformers, for one response.

    Returns:
        The responses, by row: as many as ``num_return_sequences``.

    Raises:
        ConfigError: If the model shows no thinking tags, or a marker is a piece of the closing tag.
    """
    model = prompts.model
    tokenizer = model.require_tokenizer("an exit policy", options)
    tokens = ExitTokens.of(tokenizer, model.thinking_tags)
    repeats = model.generation_option("num_return_sequences", options) or 1
    limit = _limit(model, options | {"input_ids": prompts.ids}) or 0
    options = with_settings(options, {"num_return_sequences": 1})

    responses: list[_Thinking] = []
    for row, policy in policies.items():
        opened = tokens.reader.is_opened_by(prompts.prompt_at(row, policy.slow_lambda))
        for _ in range(repeats):
            parts = ThinkingParts(tokens.reader, policy.marker, opened=opened)
            responses.append(_Thinking(row, policy, parts))

    if streamer is not None:
        streamer.put(prompts.ids.cpu())
        options = options | {"streamer": _PartStreamer(streamer)}
    current = _Round(prompts, responses, options)
    while paused := current.think(limit):
        current = _Round(prompts, paused, options)
        current.try_answers(tokens.closing, limit, streamer)
    if streamer is not None:
        streamer.end()

    found: dict[int, list[ExitResponse]] = {row: [] for row in policies}
    for one in responses:
        written = torch.tensor(one.written, dtype=prompts.ids.dtype, device=prompts.ids.device)
        response = ExitResponse(written, one.route, one.confidence, one.rejected_tokens)
        found[one.row].append(response)
    return found


class _Round:
    """Responses under way, as a batch of their prompts with the tokens written so far."""

    def __init__(
        self, prompts: PromptBatch, responses: Sequence[_Thinking], options: dict[str, Any]
    ) -> None:
        """Form the batch; the model does not run yet.

        Args:
            prompts: The whole batch.
            responses: The responses.
            options: The options of ``generate``, for the whole batch.
        """
        self._responses = responses
        rows, written = [one.row for one in responses], [one.written for one in responses]
        self._batch = prompts.extended(rows, written, prompts.model.pad_token(options))

        # Seeds and penalties know a row's prompt; each now has tokens of its own after it.
        lengths = [len(tokens) for tokens in written]
        kept: list[Any] = []
        for one in options.get("logits_processor") or []:
            if isinstance(one, SeededSampling):
                one = one.keep(torch.tensor(rows), lengths)
            elif isinstance(one, RowPenalties):
                one = one.keep(torch.tensor(rows), [max(lengths) - length for length in lengths])
            kept.append(one)
        self._options = options | {"logits_processor": kept}

    def try_answers(self, closing: Sequence[int], limit: int, streamer: Any) -> None:
        """Generate trial answers; an accepted one ends its response.

        Args:
            closing: The tokens that close the thinking.
            limit: The most tokens of a response.
            streamer: Gets the tokens of an accepted answer, if there is one.
        """
        # A response that has no room for an answer thinks on to its limit.
        room = {
            place: min(one.policy.answer_tokens, limit - len(one.written) - len(closing))
            for place, one in enumerate(self._responses)
        }
        room = {place: tokens for place, tokens in room.items() if tokens > 0}
        policies = {place: self._responses[place].policy for place in room}
        fast: dict[int, Dial] = {place: way_dial(one, "fast") for place, one in policies.items()}
        if not policies:
            return

        self._batch.prefill([fast, self._thinking_dials()], self._options)
        answers = write_fast_answers(
            self._batch,
            policies,
            [policy.threshold for policy in policies.values()],
            {name: value for name, value in self._options.items() if name != "streamer"},
            after=closing,
            limits=room,
        )
        for place, answer in answers.items():
            response = self._responses[place]
            response.confidence = answer.confidence
            response.rejected_tokens += answer.rejected_tokens
            if answer.accepted is not None:
                added = [*closing, *answer.accepted.tolist()]
                response.route = "fast"
                response.written += added
                for token in added if streamer is not None else ():
                    streamer.put(torch.tensor([token]))

    def think(self, limit: int) -> list[_Thinking]:
        """Generate until a part of the thinking ends, or the response.

        Args:
            limit: The most tokens of a response.

        Returns:
            The responses that stand at the end of a part.
        """
        dials = self._thinking_dials()
        if not dials:
            return []

        going = [self._responses[place] for place in dials]
        limits = [limit - len(one.written) for one in going]
        tracker = PartTracker([one.parts for one in going], limits)
        settings = with_settings(self._options, {"max_new_tokens": max(limits)})
        tokens = self._batch.generate(dials, settings, tracker=tracker, is_last=True).tolist()

        paused = []
        for response, own, length, pause in zip(
            going, tokens, tracker.length, tracker.pauses, strict=True
        ):
            response.written += own[:length]
            if pause == "marker":
                paused.append(response)
        return paused

    def _thinking_dials(self) -> dict[int, Dial]:
        """Return the dials of the responses without an exit, by their rows of the batch."""
        return {
            place: way_dial(one.policy, "slow")
            for place, one in enumerate(self._responses)
            if one.route == "slow"
        }


class PartTracker(RowTracker):
    """Stops each row where a part of its thinking ends, at its end, or at its limit.

    Attributes:
        length: Tokens of each row, with the token that ends it.
        pauses: Why each row has stopped; None while it is generated.
    """

    def __init__(self, parts: Sequence[ThinkingParts], limits: Sequence[int]) -> None:
        """Track a batch.

        Args:
            parts: Per row, what finds the ends of its parts.
            limits: Per row, the most tokens.
        """
        super().__init__()
        self._parts, self._limits = parts, limits
        self.length = [0] * len(parts)
        self.pauses: list[Pause | None] = [None] * len(parts)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take the token that was chosen; return which rows have stopped, shape ``(B,)``."""
        has_end = self.find_ends(input_ids, scores, **kwargs)[0].tolist()
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.pauses[row] is not None:
                continue

            self.length[row] += 1
            is_marker = self._parts[row].put(token)
            if has_end[row]:
                self.pauses[row] = "end"
            elif self.length[row] >= self._limits[row]:
                self.pauses[row] = "limit"
            elif is_marker:
                self.pauses[row] = "marker"
        stopped = [pause is not None for pause in self.pauses]
        return torch.tensor(stopped, device=input_ids.device)


class _PartStreamer:
    """Passes the tokens of several generations to one streamer, without prompts and ends."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._has_prompt = False

    def put(self, tokens: Any) -> None:
        """Skip the prompt, then pass on one token at a time."""
        if self._has_prompt:
            self._streamer.put(tokens)
        self._has_prompt = True

    def end(self) -> None:
        """Expect the prompt of the next generation."""
        self._has_prompt = False


def _limit(model: DialModel, options: dict[str, Any]) -> int | None:
    """Return the most new tokens of a response; None if there is no limit."""
    new = model.generation_option("max_new_tokens", options)
    if new is not None:
        return int(new)
    longest = model.generation_option("max_length", options)
    return None if longest is None else int(longest) - options["input_ids"].shape[1]
