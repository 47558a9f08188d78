"""What the server asks of the engine, and how the answer comes back across the threads.

A :class:`Job` holds values that are checked and typed: the engine parses none of them again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flexalign.lambdas import Dial, Way

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Job:
    """One answer to be written.

    Attributes:
        prompt: Its tokens, at least one.
        dial: What λ follows; None on a model without a dial.
        max_tokens: Tokens at which it is cut off.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        seed: Of its sampling; see :class:`flexalign.generation.seeded.SeededSampling`.
        stop: Texts that end it and are not in it.
        logprobs: Likeliest tokens to tell at each token; None for no log-probabilities.
    """

    prompt: tuple[int, ...]
    dial: Dial | None
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class WrittenToken:
    """A token and, where they were asked for, log-probabilities at temperature 1 in nats.

    Attributes:
        token: Its id.
        logprob: Its own.
        likeliest: (id, log-probability), the likeliest first.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ended:
    """How an answer ended.

    Attributes:
        finish: By itself or a stop text, by its limit, or because its client left.
        token_ids: Its tokens, without the one that ends it.
        route: ``"fast"`` or ``"slow"`` under an adaptive or route policy.
        confidence: The fast answer's, under an adaptive policy.
        rejected_tokens: Tokens of a rejected fast answer.
        lam: λ of the way that was taken, where a policy chose it.
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
        text: Its next text, which no later token takes back.
        tokens: The tokens that the text came from.
        ended: How the answer ended, with its last piece; else None.
    """

    text: str
    tokens: tuple[WrittenToken, ...] = ()
    ended: Ended | None = None


class Generation:
    """An answer on its way: the engine's thread delivers, a task of the event loop iterates.

    Attributes:
        job: What is to be written.
        is_cancelled: Whether its client has left.
    """

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop, outbox: "Outbox") -> None:
        """Begin for a job.

        Args:
            job: What is to be written.
            loop: Where :meth:`pieces` is iterated.
            outbox: The engine's.
        """
        self.job = job
        self.is_cancelled = False
        self._loop = loop
        self._outbox = outbox
        self._pieces: asyncio.Queue[AnswerPiece | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """Let it end before the engine's next step; from any thread, as often as one likes."""
        self.is_cancelled = True

    def deliver(self, piece: AnswerPiece | Exception) -> None:
        """Put a piece, or what went wrong, into the outbox; from the engine's thread."""
        self._outbox.put(self._loop, partial(self._pieces.put_nowait, piece))

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """Yield the pieces up to the last.

        Raises:
            Exception: What the engine failed with.
        """
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.ended is not None:
                return


class Outbox:
    """What the engine's thread has for the event loops, which are woken once a step for all of it.

    Waking a loop costs about as much as a small model's layer: done for each sequence and token, it
    takes a fifth of a step of sixteen sequences.
    """

    def __init__(self) -> None:
        """Begin with nothing held."""
        self._held: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Keep a call that is to be made in a loop."""
        self._held.setdefault(loop, []).append(call)

    def send(self) -> None:
        """Let the loops make the calls."""
        held, self._held = self._held, {}
        for loop, calls in held.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_call_all, calls)


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
