"""Jobs for the engine, and how their answers get from its thread to the event loop.

The values of a :class:`Job` are typed and checked before; the engine does not check them again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from flexalign.data.logits import LogitsSettings
from flexalign.lambdas import Dial, Way
from flexalign.serving.engine.grammar import Grammar

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Job:
    """One answer to be written.

    Attributes:
        prompt: Its tokens, at least one; of two prompts, the reference's.
        dial: A number, a schedule or a policy; None on a model without a dial.
        max_tokens: Tokens at which it is cut off.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        seed: Seeds its sampling; see :class:`flexalign.generation.seeded.SeededSampling`.
        stop: Texts that end it and are not in it.
        stops_after_thinking: Whether they are looked for only outside its thinking.
        logits: Limits on its tokens, penalties and biases.
        logprobs: Number of likeliest tokens to report at each token; None for no log-probabilities.
        aligned: The tokens of the aligned prompt, where the model is asked under two.
        opened: Whether the thinking is open at the prompt's end; None to read it from its tokens.
        grammar: What the answer after the thinking must follow, if anything.
    """

    prompt: tuple[int, ...]
    dial: Dial | None
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stops_after_thinking: bool = False
    logits: LogitsSettings = field(default_factory=LogitsSettings)
    aligned: tuple[int, ...] | None = None
    opened: bool | None = None
    grammar: Grammar | None = None

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Its prompts: one, or the reference's and the aligned one."""
        return (self.prompt,) if self.aligned is None else (self.prompt, self.aligned)


@dataclass(frozen=True)
class WrittenToken:
    """A token and, if requested, log-probabilities at temperature 1 in nats.

    Attributes:
        token: Its id.
        logprob: Its own log-probability.
        likeliest: Pairs (id, log-probability), the likeliest first.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ended:
    """How an answer ended.

    Attributes:
        finish: ``"stop"`` at an end token or a stop text, ``"length"`` at its limit,
            ``"cancelled"`` if its client disconnected.
        token_ids: Its tokens, without the one that ends it.
        route: ``"fast"`` or ``"slow"`` under a policy that chooses; with exits, ``"fast"`` after one.
        confidence: Confidence of the fast answer, or of the last trial answer.
        rejected_tokens: Number of tokens of a rejected fast answer, or of rejected trial answers.
        lam: λ of the route, if a policy chose it.
    """

    finish: Finish
    token_ids: tuple[int, ...]
    route: Way | None = None
    confidence: float | None = None
    rejected_tokens: int = 0
    lam: float | None = None


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer.

    Attributes:
        text: Its next text, which is final.
        tokens: The tokens that the text was decoded from.
        ended: How the answer ended, in its last piece; otherwise None.
    """

    text: str
    tokens: tuple[WrittenToken, ...] = ()
    ended: Ended | None = None


class Generation:
    """The answer to a job: the engine's thread delivers pieces, a task of the event loop reads them.

    Attributes:
        job: The job.
        is_cancelled: Whether :meth:`cancel` was called.
    """

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop, outbox: "Outbox") -> None:
        """Create the generation of a job.

        Args:
            job: The job.
            loop: The event loop in which :meth:`pieces` is iterated.
            outbox: The outbox of the engine.
        """
        self.job = job
        self.is_cancelled = False
        self._loop = loop
        self._outbox = outbox
        self._pieces: asyncio.Queue[AnswerPiece | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """Make it end before the engine's next step; from any thread, and any number of times."""
        self.is_cancelled = True

    def deliver(self, piece: AnswerPiece | Exception) -> None:
        """Put a piece or an error into the outbox; called in the engine's thread only."""
        self._outbox.put(self._loop, partial(self._pieces.put_nowait, piece))

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """Yield the pieces up to the last.

        Raises:
            Exception: The error with which the engine failed.
        """
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.ended is not None:
                return


class Outbox:
    """Collects the deliveries of a step, so that each event loop is woken once per step.

    Waking a loop costs about as much as a layer of a small model. For each sequence and token, it
    would take a fifth of the time of a step of sixteen sequences.
    """

    def __init__(self) -> None:
        """Create an empty outbox."""
        self._held: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Keep a call to make in a loop at the next :meth:`send`."""
        self._held.setdefault(loop, []).append(call)

    def send(self) -> None:
        """Schedule the calls in their loops."""
        held, self._held = self._held, {}
        for loop, calls in held.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, so no task waits
                loop.call_soon_threadsafe(_call_all, calls)


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
