"""One answer on its way: how its next token is chosen, where it ends, what is told of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria

from flexalign.generation.confidence import ConfidenceTracker
from flexalign.generation.row_lambdas import TagTokens
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText, StreamedText
from flexalign.lambdas import Adaptive, Fixed, Route, Schedule, Way
from flexalign.serving.engine.jobs import Ended, Finish, Generation, Piece, WrittenToken

# An answer's text up to a stop text: nothing is sent that a later token could cut off.


class StoppedText:
    """Turns tokens into text, piece by piece, and ends before the first stop text.

    What may be the beginning of a stop text waits until it is none.

    Attributes:
        has_stopped: Whether a stop text was found.
    """

    def __init__(self, reader: ResponseText, stops: Sequence[str]) -> None:
        self.has_stopped = False
        self._text = StreamedText(reader)
        self._stops = stops
        self._held = ""

    def put(self, token: int) -> str:
        """Take the next token; return the text that is certain by now."""
        return self._until_stop(self._text.put(token))

    def end(self) -> str:
        """Return what was held back, as no token follows."""
        if self.has_stopped:
            return ""
        text = self._until_stop(self._text.end()) + self._held
        self._held = ""
        return text

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.has_stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        start = max(0, len(text) - longest)
        while start < len(text) and not any(s.startswith(text[start:]) for s in self._stops):
            start += 1
        self._held = text[start:]
        return text[:start]


_LEAST_LOGPROB = -9999.0
"""Told in the place of −∞, which JSON does not have."""


@dataclass(frozen=True)
class Writing:
    """What all rows of an engine have in common.

    Attributes:
        reader: Tokens as text.
        ends: Tokens that end an answer.
        tags: The thinking tags' tokens, or None if they are not single tokens.
        threshold: The least confidence that an adaptive policy accepts.
    """

    reader: ResponseText
    ends: frozenset[int]
    tags: TagTokens | None
    threshold: Callable[[Adaptive], float]


class _Trial(NamedTuple):
    """What decides on a fast answer: the policy, and the watch that hears its confidence."""

    policy: Adaptive
    watch: ConfidenceTracker


class Row:
    """An answer that is being written.

    Under an adaptive policy it has two lives: the fast answer, greedy and shown to nobody until it
    is accepted, then, if it is not, the slow one from the start (:meth:`go_slow`).

    Attributes:
        generation: Whose answer it is.
        next_token: The token that goes into the model next.
        ended: How it has ended; None while it goes on.
        is_rejected: Whether it is a fast answer that was not sure enough.
    """

    next_token: int
    ended: Ended | None
    is_rejected: bool
    _dial: Fixed | Schedule
    _index: int
    _written: list[int]
    _tokens: list[WrittenToken]
    _text: str
    _running: StoppedText
    _sampling: SeededSampling | None

    def __init__(self, generation: Generation, writing: Writing) -> None:
        self.generation = generation
        self._job = job = generation.job
        self._writing = writing
        self._route: Way | None = None
        self._confidence: float | None = None
        self._rejected_tokens = 0
        self._trial: _Trial | None = None
        dial = job.dial
        if isinstance(dial, Route):
            self._route = dial.draw(torch.Generator().manual_seed(job.seed))
            dial = Fixed(dial.slow_lambda if self._route == "slow" else dial.fast_lambda)
        elif isinstance(dial, Adaptive):
            watch = ConfidenceTracker([dial], [writing.threshold(dial)], torch.device("cpu"))
            watch.use_ends([EosTokenCriteria(sorted(writing.ends)), self._stop_found])
            self._trial = _Trial(dial, watch)
            dial = Fixed(dial.fast_lambda)
        self._begin(dial or Fixed(0.0))

    @property
    def dial(self) -> Fixed | Schedule:
        """What λ follows in this life."""
        return self._dial

    @property
    def later_dial(self) -> Fixed | None:
        """What λ will follow if this is a fast answer and is rejected."""
        return None if self._trial is None else Fixed(self._trial.policy.slow_lambda)

    def lam(self) -> float:
        """λ of the token that will be chosen next."""
        if isinstance(self._dial, Fixed):
            return self._dial.lam
        tags = self._writing.tags
        if not self._dial.follows_thinking or tags is None:
            return self._dial.at(self._index)
        (inside,), (thinking,) = tags.place(torch.tensor([self._job.prompt + tuple(self._written)]))
        return self._dial.at(self._index, inside=inside, thinking_tokens=thinking)

    def accept(self, logits: Tensor, likeliest: int) -> bool:
        """Choose the next token.

        Args:
            logits: The model's, shape ``(1, V)``.
            likeliest: Their largest, which greedy decoding takes.

        Returns:
            Whether the row goes on.
        """
        job = self._job
        token = likeliest
        if self._sampling is not None:
            scores = self._sampling(self._ids_of_length(), logits)
            token = int(scores.argmax(-1))
        if self._trial is not None:
            self._trial.watch.recorder(self._ids_of_length(), logits)
        self._index += 1
        self.next_token = token
        is_end = token in self._writing.ends
        if not is_end:
            self._written.append(token)
            self._tokens.append(_told(token, logits, job.logprobs))
            self._text += self._running.put(token)
        is_dropped = False
        if self._trial is not None:
            is_dropped = bool(self._trial.watch(torch.tensor([[token]]), None))
        finish: Finish | None = None
        if is_end or self._running.has_stopped:
            finish = "stop"
        elif self._index >= job.max_tokens:
            finish = "length"
        if self._trial is not None and (finish or is_dropped):
            self._judge(self._trial)
            if self.is_rejected:
                return False
        if finish:
            self.end(finish)
        elif self._trial is None:
            self._deliver()
        return finish is None

    def end(self, finish: Finish) -> None:
        """End the answer and say so."""
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
        """Begin a fast answer again from the prompt, the slow way; others go on as they are."""
        later = self.later_dial
        if later is not None:
            self._trial = None
            self._begin(later)

    def _begin(self, dial: Fixed | Schedule) -> None:
        job = self._job
        self.next_token = job.prompt[-1]
        self.ended = None
        self.is_rejected = False
        self._dial = dial
        self._index = 0
        self._written = []
        self._tokens = []
        self._text = ""
        self._running = StoppedText(self._writing.reader, job.stop)
        is_greedy = job.temperature == 0 or self._trial is not None
        self._sampling = (
            None if is_greedy else SeededSampling([job.seed], job.temperature, job.top_p)
        )

    def _judge(self, trial: _Trial) -> None:
        policy, watch = trial
        self._confidence = float(watch.confidence[0])
        is_sure = self._confidence >= self._writing.threshold(policy)
        self.is_rejected = not (bool(watch.ended[0]) and is_sure)
        self._route = "slow" if self.is_rejected else "fast"
        if self.is_rejected:
            self._rejected_tokens = int(watch.counted[0])

    def _deliver(self) -> None:
        """Hand over what is certain; tokens go with the text that they became."""
        if self._text or self.ended is not None:
            self.generation.deliver(Piece(self._text, tuple(self._tokens), self.ended))
            self._text, self._tokens = "", []

    def _ids_of_length(self) -> Tensor:
        """Return ids of the present length, which is all that the processors read of them."""
        return torch.empty((1, len(self._job.prompt) + self._index), dtype=torch.long)

    def _stop_found(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.tensor([self._running.has_stopped])


def _told(token: int, logits: Tensor, alternatives: int | None) -> WrittenToken:
    if alternatives is None:
        return WrittenToken(token)
    log_probs = logits[0].log_softmax(-1).clamp(min=_LEAST_LOGPROB)
    top = log_probs.topk(min(alternatives, len(log_probs)))
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return WrittenToken(token, float(log_probs[token]), likeliest)
