"""One answer while it is written: how the next token is chosen, where it ends, what is delivered.

An :class:`AnswerSequence` is a member of the engine's batch. It takes the logits of each step and
delivers text as soon as it is final; a :class:`StoppedText` decides that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.confidence import ConfidenceTracker
from flexalign.generation.penalties import logits_processors
from flexalign.generation.row_lambdas import TagTokens
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText, StopSearch, StreamedText
from flexalign.generation.thinking_limits import ClosingTokens
from flexalign.lambdas import Adaptive, Fixed, Route, Schedule, Way, way_dial
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
    """

    reader: ResponseText
    ends: frozenset[int]
    tags: TagTokens | None
    threshold: Callable[[Adaptive], float]
    closing: ClosingTokens | None = None


class _FastTrial(NamedTuple):
    """How a fast answer is accepted or rejected.

    Attributes:
        tracker: Measures its confidence.
        threshold: The least confidence that is accepted.
        slow: The dial of the slow answer, written if the fast one is rejected.
    """

    tracker: ConfidenceTracker
    threshold: float
    slow: Fixed


class AnswerSequence:
    """An answer that is being written.

    Under an adaptive policy it is written up to twice. The fast answer is greedy, and is not delivered
    before it is accepted. If it is rejected, the slow answer begins again at the prompt
    (:meth:`go_slow`).

    Attributes:
        generation: The generation that it belongs to.
        next_token: The token that goes into the model next; before the first, the last of each prompt.
        ended: How it ended; None while it is written.
        is_rejected: Whether it is a fast answer below the threshold.
        dial: The dial of the current attempt.
    """

    next_token: int | tuple[int, ...]
    ended: Ended | None
    is_rejected: bool
    dial: Fixed | Schedule
    _index: int
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

        dial = job.dial
        if isinstance(dial, Route):
            self._route = dial.draw(torch.Generator().manual_seed(job.seed))
            dial = way_dial(dial, self._route)
        elif isinstance(dial, Adaptive):
            threshold = settings.threshold(dial)
            tracker = ConfidenceTracker([dial], [threshold], torch.device("cpu"))
            tracker.use_ends([EosTokenCriteria(sorted(settings.ends)), self._stop_found])
            self._fast = _FastTrial(tracker, threshold, way_dial(dial, "slow"))
            dial = way_dial(dial, "fast")
        self._begin(dial or Fixed(0.0))  # a model without a dial does not use λ

    @property
    def slow_dial(self) -> Fixed | None:
        """The dial after a rejection, if this is a fast answer; otherwise None."""
        return None if self._fast is None else self._fast.slow

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

        if self._grammar is not None:
            self._grammar.take(token)
        self._index += 1
        self.next_token = token
        is_end = token in self._settings.ends
        if not is_end:
            self._written.append(token)
            self._tokens.append(_written_token(token, logits, job.logprobs))
            self._text += self._running.put(token)

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
        return finish is None

    def end(self, finish: Finish) -> None:
        """End the answer and deliver the rest of it."""
        self._text += self._running.end()

        is_chosen = isinstance(self._job.dial, Adaptive | Route)
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
        """Begin a rejected fast answer again at the prompt, as the slow answer."""
        if self._fast is not None:
            slow, self._fast = self._fast.slow, None
            self._begin(slow)

    def _begin(self, dial: Fixed | Schedule) -> None:
        job = self._job
        self.next_token = job.prompt[-1]
        if job.aligned is not None:
            self.next_token = (job.prompt[-1], job.aligned[-1])
        self.ended = None
        self.is_rejected = False
        self.dial = dial
        self._index = 0
        self._written = []
        self._tokens = []
        self._text = ""
        reader = self._settings.reader
        tags = reader.tags if job.stops_after_thinking else None
        opened = reader.is_opened_by(job.prompt) if job.opened is None else job.opened
        self._running = StoppedText(reader, job.stop, tags, opened=opened)
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
            self._rejected_tokens = int(tracker.counted[0])

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

    def put(self, token: int) -> str:
        """Add the next token; return the text that has become final."""
        return self._search.put(self._text.put(token))

    def end(self) -> str:
        """Return the text that was held back; no token follows."""
        if self.has_stopped:
            return ""
        return self._search.put(self._text.end()) + self._search.end()
