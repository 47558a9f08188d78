"""The engine: one thread that writes all answers, one token of each per step.

Sequences join the batch between two steps and leave it when they have ended. The server uses
:class:`Engine`, which takes jobs (:mod:`flexalign.serving.engine.jobs`) from any thread and never
blocks the caller while the model runs.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexalign._modes import evaluating
from flexalign.data.logits import LogitsSettings
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, ServingError
from flexalign.generation.early_exit import ExitTokens, require_marker
from flexalign.generation.row_lambdas import RowDials, TagTokens
from flexalign.generation.text import ResponseText
from flexalign.generation.thinking_limits import ClosingTokens
from flexalign.lambdas import Adaptive, Dial, Exit, Fixed, Schedule
from flexalign.serving.engine.batch import Batch, Runner, next_tokens
from flexalign.serving.engine.grammar import GrammarCompiler
from flexalign.serving.engine.jobs import Generation, Job, Outbox
from flexalign.serving.engine.sequence import AnswerSequence, DecodingSettings

_log = logging.getLogger("flexalign.serving")

_SECONDS = 10.0
"""The window over which tokens per second are counted, in seconds."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on.

    Attributes:
        rows: The most answers written at a time.
        queue: The most answers that wait; more are refused.
        prefill_tokens: The most prompt tokens, padding included, that one step prefills, so that
            running answers do not wait long; a longer prompt is prefilled alone.
    """

    rows: int = 32
    queue: int = 256
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            ConfigError: If one is below 1.
        """
        for name in ("rows", "queue", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Engine:
    """Writes answers with one model; each answer has its own dial.

    Attributes:
        grammars: Makes grammars for the model's answers.

    Public methods may be called from the event loop; only :meth:`stop` waits for the model. The
    private methods from :meth:`_run` on are called in the engine's thread only.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        tags: ThinkingTags,
        ends: Sequence[int],
        limits: EngineLimits | None = None,
    ) -> None:
        """Prepare the engine; :meth:`start` starts its thread.

        Args:
            runner: The model.
            tokenizer: Its tokenizer.
            tags: The tags around its thinking.
            ends: Tokens that end an answer.
            limits: How much it takes on.
        """
        self._runner = runner
        self._limits = limits or EngineLimits()
        self._tag_error = self._closing_error = self._exit_error = ""
        # A model with an adapter has its calibrated threshold.
        threshold = getattr(runner.model, "threshold", Adaptive.resolved_threshold)
        reader = ResponseText(tokenizer, tags)
        tag_tokens = self._find_tags(tokenizer, tags)
        closing = self._find_closing(tokenizer, tags)
        exits = self._find_exits(tokenizer, getattr(runner.model, "thinking_tags", None))
        self._settings = DecodingSettings(
            reader, frozenset(ends), tag_tokens, threshold, closing, exits
        )
        self.grammars = GrammarCompiler(tokenizer, tag_tokens, ends)
        self._pad = tokenizer.pad_token_id or 0

        # A generation is in one of these at a time. `_saved` has, for each fast answer in the
        # batch, the cache and mask of its prompt, from which the slow answer begins; for each trial
        # answer, those of its thinking.
        self._waiting: deque[Generation] = deque()
        self._joining: list[Generation] = []
        self._batch: Batch[AnswerSequence] = Batch(runner)
        self._saved: dict[AnswerSequence, tuple[Any, Tensor]] = {}
        self._failed: list[tuple[Generation, Exception]] = []

        self._outbox = Outbox()
        self._rate = TokenRate()
        self._wakes = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="flexalign-engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes jobs: the thread runs and :meth:`stop` was not called."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return len(self._batch.sequences)

    @property
    def waiting(self) -> int:
        """Answers that wait for a row of the batch."""
        return len(self._waiting)

    @property
    def tokens_written(self) -> int:
        """Tokens written so far, rejected ones included."""
        return self._rate.total

    @property
    def tokens_per_second(self) -> float:
        """Tokens written in the last 10 s, per second."""
        return self._rate.per_second

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after its current step; answers that have not ended fail."""
        with self._wakes:
            self._is_stopping = True
            self._wakes.notify()
        if self._thread.is_alive():
            self._thread.join()

    def check(self, dial: Dial | None) -> None:
        """Refuse a dial that cannot be served.

        Raises:
            ConfigError: If it depends on thinking tags that are not single tokens, or closes the
                thinking of a model that shows no tags, or at a piece of its closing tag.
        """
        if isinstance(dial, Exit):
            if self._settings.exits is None:
                raise ConfigError(self._exit_error)
            require_marker(self._settings.exits.reader, dial.marker)
        if isinstance(dial, Schedule) and dial.follows_thinking and self._settings.tags is None:
            raise ConfigError(self._tag_error)

    def check_thinking(self, logits: LogitsSettings) -> None:
        """Refuse limits on the thinking that cannot be applied.

        Raises:
            ConfigError: If the thinking's end is not found in token ids.
        """
        if logits.limits_thinking and self._settings.closing is None:
            raise ConfigError(self._closing_error)

    def has_room(self, jobs: int) -> bool:
        """Whether the queue has room for this many more jobs."""
        return self.waiting + jobs <= self._limits.queue

    def submit(self, jobs: Sequence[Job], loop: asyncio.AbstractEventLoop) -> list[Generation]:
        """Add jobs to the queue; jobs with the same prompt share its prefill.

        Raises:
            ServingError: If the thread has ended.
        """
        generations = [Generation(job, loop, self._outbox) for job in jobs]
        with self._wakes:
            if not self.is_alive:
                raise ServingError("the engine has stopped; restart the server.")
            self._waiting.extend(generations)
            self._wakes.notify()
        return generations

    def _find_tags(self, tokenizer: Any, tags: ThinkingTags) -> TagTokens | None:
        try:
            return TagTokens(tokenizer, tags)
        except ConfigError as error:
            self._tag_error = str(error)  # raised by `check`, for a dial that needs the tags
            return None

    def _find_closing(self, tokenizer: Any, tags: ThinkingTags) -> ClosingTokens | None:
        try:
            return ClosingTokens.of(tokenizer, tags)
        except ConfigError as error:
            self._closing_error = str(error)  # raised by `check_thinking`
            return None

    def _find_exits(self, tokenizer: Any, tags: ThinkingTags | None) -> ExitTokens | None:
        try:
            return ExitTokens.of(tokenizer, tags)
        except ConfigError as error:
            self._exit_error = str(error)  # raised by `check`, for a dial with exits
            return None

    def _run(self) -> None:
        """Run steps until :meth:`stop` is called; then fail every answer that has not ended."""
        reason = "the server is shutting down; ask again later."
        try:
            with evaluating(self._runner.model), torch.inference_mode():
                self._loop()
        except BaseException:
            reason = "the engine has failed; ask again once the server has been restarted."
            _log.critical("the engine has failed, and ends", exc_info=True)

        # Under the lock: a job is either submitted before this and fails here, or is refused.
        with self._wakes:
            self._is_stopping = True
            left = [*self._under_way(), *self._waiting, *(one for one, _ in self._failed)]
        for generation in left:
            generation.deliver(ServingError(reason))
        self._outbox.send()

    def _loop(self) -> None:
        while True:
            with self._wakes:
                self._wakes.wait_for(
                    lambda: self._is_stopping or bool(self._waiting or self._batch.sequences)
                )
                if self._is_stopping:
                    return

            try:
                self._step()
            except Exception as error:
                _log.exception("a step failed, and the answers in it with it")
                self._fail(self._under_way(), error)
                self._batch.clear()
                self._saved.clear()
                self._joining = []

            # The input or the device is at fault. If the model fails at a token of our own, it is
            # the device, and the engine ends.
            if self._failed:
                require_working(self._runner, self._pad)
                for generation, cause in self._failed:
                    generation.deliver(cause)
                self._failed = []
            self._outbox.send()

    def _under_way(self) -> list[Generation]:
        sequences = (*self._batch.sequences, *self._saved)
        return [one.generation for one in sequences] + self._joining

    def _fail(self, generations: Sequence[Generation], error: Exception) -> None:
        """Note failed answers; the error is delivered after the model has been tested."""
        self._failed += [(generation, error) for generation in generations]

    def _step(self) -> None:
        """Remove cancelled sequences, admit waiting ones, and write one token of each."""
        self._drop_cancelled()
        self._joining = self._next_in_line()
        self._admit(self._joining)
        self._joining = []
        if not self._batch.sequences:
            return

        # One transfer and one synchronisation for the whole batch; tokens are chosen on the CPU.
        logits = self._batch.step().cpu()
        likeliest = logits.argmax(-1).tolist()

        sequences = self._batch.sequences
        staying, leaving, reading = [], [], []
        for place, sequence in enumerate(sequences):
            try:
                continues = sequence.accept(logits[place : place + 1], likeliest[place])
            except Exception as error:
                _log.exception("an answer failed")
                self._fail([sequence.generation], error)
                continues = False
            if continues and sequence.wants_trial:
                self._saved[sequence] = self._batch.copy_row(place)
                sequence.begin_trial()
                if self._runner.reads_at_lambda:
                    reading.append(sequence)
                    continue
            if continues:
                staying.append(place)
            else:
                leaving.append(sequence)
        self._batch.keep(staying)
        self._rate.add(len(sequences))
        for sequence in reading:
            self._read_again(sequence)

        # A rejected fast answer joins again at its prompt, as a slow one; a rejected trial answer
        # at the thinking before it.
        for sequence in leaving:
            saved = self._saved.get(sequence)
            if saved is not None and sequence.is_rejected:
                sequence.go_slow()
                self._batch.add([sequence], *saved)
            self._saved.pop(sequence, None)

    def _drop_cancelled(self) -> None:
        staying = []
        for place, sequence in enumerate(self._batch.sequences):
            if sequence.generation.is_cancelled:
                sequence.end("cancelled")
                self._saved.pop(sequence, None)
            else:
                staying.append(place)
        self._batch.keep(staying)

        gone: list[Generation] = []
        waiting: deque[Generation] = deque()
        with self._wakes:
            for generation in self._waiting:
                # Read once: another thread may cancel it at any time.
                (gone if generation.is_cancelled else waiting).append(generation)
            self._waiting = waiting
        for generation in gone:
            AnswerSequence(generation, self._settings).end("cancelled")

    def _next_in_line(self) -> list[Generation]:
        """Take jobs from the queue, up to the free rows and to what one step may prefill."""
        chosen: list[Generation] = []
        longest = 0
        with self._wakes:
            while self._waiting and self.running + len(chosen) < self._limits.rows:
                generation = self._waiting[0]
                # Prompts are padded to the longest, and equal ones are one row.
                longest = max(longest, *map(len, generation.job.prompts))
                prompts = {one.job.prompts for one in chosen} | {generation.job.prompts}
                if chosen and longest * len(prompts) > self._limits.prefill_tokens:
                    break
                chosen.append(self._waiting.popleft())
        return chosen

    def _admit(self, generations: list[Generation]) -> None:
        """Prefill prompts together; if that fails, one by one."""
        if not generations:
            return
        try:
            self._prefill([AnswerSequence(one, self._settings) for one in generations])
        except Exception as error:
            if len(generations) == 1:
                _log.exception("a prompt could not be prefilled")
                self._fail(generations, error)
                return
            for generation in generations:
                self._admit([generation])

    def _prefill(self, sequences: list[AnswerSequence]) -> None:
        """Run all prompts without their last tokens, and add the sequences to the batch.

        A prompt of one token is prefilled as one column of padding.
        """
        # Answers to one prompt share its row of the prefill.
        own_prompts = [one.generation.job.prompts for one in sequences]
        prompts = list(dict.fromkeys(own_prompts))
        width = max(2, *(len(p) for own in prompts for p in own)) - 1
        ids, mask = self._stacked(
            [[[self._pad] * (width + 1 - len(p)) + list(p[:-1]) for p in own] for own in prompts],
            [[[0] * (width + 1 - len(p)) + [1] * (len(p) - 1) for p in own] for own in prompts],
        )

        # A row is prefilled for every dial that continues from it: each sequence's own, and the
        # slow dial of those that begin fast.
        rows = torch.tensor([prompts.index(prompt) for prompt in own_prompts])
        phases = [(rows[i : i + 1], _beginning([one])) for i, one in enumerate(sequences)]
        slow = [
            (one, rows[i : i + 1], RowDials.following([one.slow_dial]))
            for i, one in enumerate(sequences)
            if one.slow_dial is not None
        ]
        phases += [(row, dial) for _, row, dial in slow]

        # The batch changes last: if anything above fails, no sequence has joined.
        cache = self._runner.prefill(ids, mask, phases)
        saved = {one: (self._runner.fork(cache, row, dial), mask[row]) for one, row, dial in slow}
        own_cache = self._runner.fork(cache, rows, _beginning(sequences))
        self._batch.add(sequences, own_cache, mask[rows])
        self._saved |= saved

    def _read_again(self, sequence: AnswerSequence) -> None:
        """Prefill a sequence so far at the λ of its trial answer, and add it to the batch."""
        written = sequence.ids[:-1]
        ids, mask = self._stacked([[written]], [[[1] * len(written)]])
        row = torch.tensor([0])
        dials = RowDials.following([sequence.dial])
        cache = self._runner.prefill(ids, mask, [(row, dials)])
        self._batch.add([sequence], self._runner.fork(cache, row, dials), mask)

    def _stacked(self, *values: list[list[list[int]]]) -> list[Tensor]:
        """Return values ``(B, prompts, T)`` as tensors, without the axis where there is one prompt."""
        device = self._runner.model.device
        tensors = [torch.tensor(value, device=device) for value in values]
        return [one[:, 0] if self._runner.prompts == 1 else one for one in tensors]


def _beginning(sequences: Sequence[AnswerSequence]) -> RowDials:
    """Return the dials of sequences that have no token yet, with λ of their first token."""
    dials = RowDials.following([one.cache_dial for one in sequences])
    dials.first = torch.tensor([one.lam() for one in sequences], dtype=torch.float64)
    return dials


def require_working(runner: Runner, token: int) -> None:
    """Run one fixed token through a model, to test it after a failure.

    A prompt that needs too much memory fails alone. After a fault of the device every step fails,
    and the engine must end.

    Args:
        runner: The model that is tested.
        token: A token id.

    Raises:
        Exception: The error that the model raises, if it does.
    """
    batch: Batch[_ProbeSequence] = Batch(runner)
    probe = _ProbeSequence(token)
    ids = next_tokens([token], runner.prompts).to(runner.model.device)
    mask = torch.zeros_like(ids)
    dials = RowDials.following([Fixed(probe.lam())])
    batch.add([probe], runner.prefill(ids, mask, [(torch.tensor([0]), dials)]), mask)
    batch.step()


@dataclass
class _ProbeSequence:
    """A sequence of one token, at a λ that needs both streams, or both models of a pair."""

    next_token: int | tuple[int, ...]

    def lam(self) -> float:
        return 0.5


class TokenRate:
    """Counts tokens: one thread adds, any thread reads.

    Attributes:
        total: Tokens so far.
    """

    def __init__(self) -> None:
        """Start the count at 0."""
        self.total = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def add(self, tokens: int) -> None:
        """Count tokens that have just been written."""
        with self._lock:
            self.total += tokens
            self._recent.append((time.monotonic(), tokens))
            self._forget()

    @property
    def per_second(self) -> float:
        """Tokens of the last 10 s, per second."""
        with self._lock:
            self._forget()
            return sum(tokens for _, tokens in self._recent) / _SECONDS

    def _forget(self) -> None:
        since = time.monotonic() - _SECONDS
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
