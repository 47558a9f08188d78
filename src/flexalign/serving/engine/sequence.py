"""One answer while it is written: how the next token is chosen, where it ends, what is delivered.

An :class:`AnswerSequence` is a member of the engine's batch. It takes the logits of each step and
delivers text as soon as it is final; a :class:`StoppedText` decides that.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.confidence import ConfidenceTracker
from flexalign.generation.early_exit import ExitTokens, ThinkingParts
from flexalign.generation.penalties import logits_processors
from flexalign.generation.row_lambdas import TagTokens
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText, StopSearch, StreamedText
from flexalign.generation.thinking_limits import ClosingTokens
from flexalign.lambdas import Adaptive, Exit, Fixed, Policy, Route, Schedule, Way, way_dial
from flexalign.serving.engine.grammar import GrammarState
from flexalign.serving.engine.jobs import AnswerPiece, Ended, Finish, Generation, WrittenToken

_LEAST_LOGPROB = -9999.0
"""Reported instead of −∞, which JSON does not have."""


@dataclass(frozen=True)
class DecodingSettings:
    """What all sequences of an engine have in common.

    Attributes:
        reader: Decodes tokens to text.
        ends: Tokens that end an answer.
        tags: The thinking tags' tokens, or None if they are not single tokens.
        threshold: The least confidence that an adaptive policy accepts.
        closing: The tokens that close the thinking, or None if they are not found.
        exits: What exits need of the tokenizer, or None if it shows no thinking tags.
    """

    reader: ResponseText
    ends: frozenset[int]
    tags: TagTokens | None
    threshold: Callable[[Adaptive], float]
    closing: ClosingTokens | None = None
    exits: ExitTokens | None = None


class _FastTrial(NamedTuple):
    """How a fast answer is accepted or rejected.

    Attributes:
        tracker: Measures its confidence.
        threshold: The least confidence that is accepted.
        slow: The dial that the answer continues at if the fast one is rejected.
    """

    tracker: ConfidenceTracker
    threshold: float
    slow: Fixed


class _Held(NamedTuple):
    """A response at the end of a part of its thinking, as it continues if its trial is rejected.

    All its text that is final has been delivered.

    Attributes:
        written: Number of its tokens.
        next_token: The token that goes into the model next.
        tokens: Tokens without text yet.
        running: Decodes its text.
        sampling: Its sampling.
        grammar: How far it has come in its grammar.
    """

    written: int
    next_token: int | tuple[int, ...]
    tokens: list[WrittenToken]
    running: "StoppedText"
    sampling: SeededSampling | None
    grammar: GrammarState | None


class AnswerSequence:
    """An answer that is being written.

    Under an adaptive policy it is written up to twice. The fast answer is greedy, and is not delivered
    before it is accepted. If it is rejected, the slow answer begins again at the prompt
    (:meth:`go_slow`).

    Under an exit policy its thinking is closed on trial at the ends of its parts, where
    :attr:`wants_trial` is set: the tokens that close it are forced, and a greedy answer follows, which
    is not delivered before it is accepted. If it is rejected, the thinking continues from before the
    trial (:meth:`go_slow`). The caller keeps the cache of that place.

    Attributes:
        generation: The generation that it belongs to.
        next_token: The token that goes into the model next; before the first, the last of each prompt.
        ended: How it ended; None while it is written.
        is_rejected: Whether it is a fast answer below the threshold.
        wants_trial: Whether :meth:`begin_trial` must be called before the next step.
        dial: The dial of the current attempt.
    """

    next_token: int | tuple[int, ...]
    ended: Ended | None
    is_rejected: bool
    wants_trial: bool
    dial: Fixed | Schedule
    _index: int
    _parts: ThinkingParts | None
    _written: list[int]
    _tokens: list[WrittenToken]
    _text: str
    _running: "StoppedText"
    _penalties: LogitsProcessorList
    _sampling: SeededSampling | None
    _grammar: GrammarState | None

    def __init__(self, generation: Generation, settings: DecodingSettings) -> None:
        """Prepare for a job; under a route policy, fast or slow is drawn here by the job's seed."""
        self.generation = generation
        self._job = job = generation.job
        self._settings = settings
        self._route: Way | None = None
        self._confidence: float | None = None
        self._rejected_tokens = 0
        self._fast: _FastTrial | None = None
        self._exit: Exit | None = None
        self._held: _Held | None = None
        self._forced: list[int] = []

        dial = job.dial
        if isinstance(dial, Route):
            self._route = dial.draw(torch.Generator().manual_seed(job.seed))
            dial = way_dial(dial, self._route)
        elif isinstance(dial, Adaptive):
            self._fast = self._trial_of(dial, settings.threshold(dial))
            dial = way_dial(dial, "fast")
        elif isinstance(dial, Exit):
            self._exit, self._route = dial, "slow"
            dial = way_dial(dial, "slow")
        self._begin(dial or Fixed(0.0))  # a model without a dial does not use λ

    @property
    def slow_dial(self) -> Fixed | None:
        """The dial after a rejection, if this is a fast answer; otherwise None."""
        return None if self._fast is None else self._fast.slow

    @property
    def cache_dial(self) -> Fixed | Schedule:
        """The dial that its cache must serve: with exits, also that of trial answers."""
        return self.dial if self._exit is None else self._exit.lambdas

    @property
    def ids(self) -> list[int]:
        """The tokens of its prompt and of its response so far."""
        return [*self._job.prompt, *self._written]

    def lam(self) -> float:
        """Return λ of the token that is chosen next."""
        if isinstance(self.dial, Fixed):
            return self.dial.lam
        tags = self._settings.tags
        if not self.dial.follows_thinking or tags is None:
            return self.dial.at(self._index)
        (inside,), (thinking,) = tags.place(torch.tensor([self._job.prompt + tuple(self._written)]))
        return self.dial.at(self._index, inside=inside, thinking_tokens=thinking)

    def accept(self, logits: Tensor, likeliest: int) -> bool:
        """Choose the next token.

        Args:
            logits: The model's, shape ``(1, V)``.
            likeliest: The token of the largest logit, which greedy decoding takes.

        Returns:
            Whether the sequence continues.
        """
        if self._forced:
            self._write(self._forced.pop(0), logits)
            return True

        job = self._job
        token = likeliest
        scores = logits
        if self._penalties:
            ids = torch.tensor([[*job.prompt, *self._written]], device=logits.device)
            scores = self._penalties(ids, logits.clone())
        if self._grammar is not None:
            scores = self._grammar.limit(scores)
        if self._sampling is not None:
            scores = self._sampling(self._ids_of_length(), scores)
        if scores is not logits:
            token = int(scores.argmax(-1))
        if self._fast is not None:
            self._fast.tracker.recorder(self._ids_of_length(), logits)

        self._write(token, logits)
        is_end = token in self._settings.ends

        # This follows the text: a stop text that the token completes ends a fast answer too.
        is_dropped = False
        if self._fast is not None:
            is_dropped = bool(self._fast.tracker(torch.tensor([[token]]), None))

        finish: Finish | None = None
        if is_end or self._running.has_stopped:
            finish = "stop"
        elif self._index >= job.max_tokens:
            finish = "length"

        if self._fast is not None and (finish or is_dropped):
            self._judge(self._fast)
            if self.is_rejected:
                return False
        if finish:
            self.end(finish)
        elif self._fast is None:
            self._deliver()
            self.wants_trial = self._ends_part(token)
        return finish is None

    def _write(self, token: int, logits: Tensor) -> None:
        """Add a token to the answer; one that ends it is only given to the model."""
        if self._grammar is not None:
            self._grammar.take(token)
        self._index += 1
        self.next_token = token
        if token not in self._settings.ends:
            self._written.append(token)
            self._tokens.append(_written_token(token, logits, self._job.logprobs))
            self._text += self._running.put(token)

    def begin_trial(self) -> None:
        """Close the thinking on trial, at the end of a part; :meth:`go_slow` returns to it."""
        policy = self._exit
        if policy is None or not self.wants_trial:
            return
        self._held = _Held(
            len(self._written),
            self.next_token,
            self._tokens,
            self._running.copy(),
            self._sampling,
            None if self._grammar is None else self._grammar.copy(),
        )
        self.wants_trial = False
        self._tokens = list(self._tokens)
        self._forced = list(self._closing)
        self._fast = self._trial_of(policy, policy.threshold, self._room)
        self._sampling = None
        self.dial = way_dial(policy, "fast")

    @property
    def _closing(self) -> tuple[int, ...]:
        """The tokens that close the thinking; an answer with a grammar follows the tag itself."""
        tokens = self._settings.exits
        if tokens is None:
            return ()
        return tokens.closing if self._job.grammar is None else tokens.tag

    @property
    def _room(self) -> int:
        """The most tokens of a trial answer."""
        policy = self._exit
        most = 0 if policy is None else policy.answer_tokens
        return min(most, self._job.max_tokens - len(self._written) - len(self._closing))

    def _ends_part(self, token: int) -> bool:
        """Return whether a part of the thinking ends with a token, and a trial answer has room."""
        return self._parts is not None and self._parts.put(token) and self._room > 0

    def _trial_of(
        self, policy: Adaptive | Exit, threshold: float, limit: int | None = None
    ) -> _FastTrial:
        limits = None if limit is None else [limit]
        tracker = ConfidenceTracker([policy], [threshold], torch.device("cpu"), limits)
        tracker.use_ends([EosTokenCriteria(sorted(self._settings.ends)), self._stop_found])
        return _FastTrial(tracker, threshold, way_dial(policy, "slow"))

    def end(self, finish: Finish) -> None:
        """End the answer and deliver the rest of it, without a trial answer that is under way."""
        if finish == "cancelled" and self._held is not None:
            self.go_slow()
        self._text += self._running.end()

        is_chosen = isinstance(self._job.dial, Policy)
        self.ended = Ended(
            finish,
            tuple(self._written),
            self._route,
            self._confidence,
            self._rejected_tokens,
            self.lam() if is_chosen else None,
        )
        self._deliver()

    def go_slow(self) -> None:
        """Begin a rejected fast answer again at the prompt, or go back to before a trial answer."""
        if self._fast is None:
            return
        slow, self._fast = self._fast.slow, None
        if self._held is None:
            self._begin(slow)
            return

        held, self._held = self._held, None
        self.dial, self.is_rejected, self._forced = slow, False, []
        self._index = held.written
        self._written = self._written[: held.written]
        self.next_token, self._tokens, self._text = held.next_token, held.tokens, ""
        self._running, self._sampling, self._grammar = held.running, held.sampling, held.grammar

    def _begin(self, dial: Fixed | Schedule) -> None:
        job = self._job
        self.next_token = job.prompt[-1]
        if job.aligned is not None:
            self.next_token = (job.prompt[-1], job.aligned[-1])
        self.ended = None
        self.is_rejected = self.wants_trial = False
        self.dial = dial
        self._index = 0
        self._written = []
        self._tokens = []
        self._text = ""

        # What follows the text.
        reader = self._settings.reader
        tags = reader.tags if job.stops_after_thinking else None
        opened = reader.is_opened_by(job.prompt) if job.opened is None else job.opened
        self._running = StoppedText(reader, job.stop, tags, opened=opened)
        self._parts = None
        if self._exit is not None and self._settings.exits is not None:
            own = self._settings.exits.reader
            self._parts = ThinkingParts(own, self._exit.marker, opened=opened)

        # What changes the logits, and chooses a token of them.
        closing = self._settings.closing
        if closing is not None and job.grammar is not None:
            # The answer follows the grammar from the closing tag on.
            closing = replace(closing, after=())
        self._penalties = logits_processors(job.logits, len(job.prompt), closing, opened=opened)
        self._grammar = None if job.grammar is None else job.grammar.begin(opened=opened)
        self._sampling = None
        if job.temperature != 0 and self._fast is None:
            limits = (job.logits.top_k, job.logits.min_p)
            self._sampling = SeededSampling([job.seed], job.temperature, job.top_p, *limits)

    def _judge(self, fast: _FastTrial) -> None:
        tracker = fast.tracker
        self._confidence = float(tracker.confidence[0])
        is_sure = self._confidence >= fast.threshold
        self.is_rejected = not (bool(tracker.ended[0]) and is_sure)
        self._route = "slow" if self.is_rejected else "fast"
        if self.is_rejected:
            self._rejected_tokens += int(tracker.counted[0])

    def _deliver(self) -> None:
        """Deliver the text that is final, with its tokens; tokens without text yet wait."""
        if self._text or self.ended is not None:
            self.generation.deliver(AnswerPiece(self._text, tuple(self._tokens), self.ended))
            self._text, self._tokens = "", []

    def _ids_of_length(self) -> Tensor:
        """Return uninitialised ids of the current length; the processors read only the length."""
        return torch.empty((1, len(self._job.prompt) + self._index), dtype=torch.long)

    def _stop_found(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return whether a stop text was found, as a stopping criterion."""
        return torch.tensor([self._running.has_stopped])


def _written_token(token: int, logits: Tensor, alternatives: int | None) -> WrittenToken:
    if alternatives is None:
        return WrittenToken(token)
    log_probs = logits[0].log_softmax(-1).clamp(min=_LEAST_LOGPROB)
    top = log_probs.topk(min(alternatives, len(log_probs)))
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return WrittenToken(token, float(log_probs[token]), likeliest)


class StoppedText:
    """Decodes tokens to text, piece by piece, up to the first stop text after the thinking."""

    def __init__(
        self,
        reader: ResponseText,
        stops: Sequence[str],
        tags: ThinkingTags | None = None,
        *,
        opened: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            reader: Decodes tokens to text.
            stops: The stop texts.
            tags: The tags around a thinking in which no stop text is looked for; None: there is
                none.
            opened: Whether the prompt has opened the thinking.
        """
        self._text = StreamedText(reader)
        self._search = StopSearch(stops, tags, opened=opened)

    @property
    def has_stopped(self) -> bool:
        """Whether a stop text was found."""
        return self._search.found is not None

    def copy(self) -> "StoppedText":
        """Return the same answer so far, to be continued in another way."""
        other = copy.copy(self)
        other.__dict__.update(_text=self._text.copy(), _search=copy.copy(self._search))
        return other

    def put(self, token: int) -> str:
        """Add the next token; return the text that has become final."""
        return self._search.put(self._text.put(token))

    def end(self) -> str:
        """Return the text that was held back; no token follows."""
        if self.has_stopped:
            return ""
        return self._search.put(self._text.end()) + self._search.end()
