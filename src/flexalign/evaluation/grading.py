"""Grades responses: finds the answer, normalises it and compares it with the known one."""

import atexit
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from threading import Timer
from time import monotonic
from types import TracebackType
from typing import IO, Literal, NamedTuple, Self, cast

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.evaluation.answers import (
    expected_answer,
    find_boxed,
    find_boxes,
    find_stated,
    is_left_undone,
    is_plain,
    plain_verdict,
)
from flexalign.evaluation.equality import EQUAL, READY, UNPARSED

_START_SECONDS = 120.0

Status = Literal["correct", "wrong", "unparsed", "truncated", "no_answer"]


class Answered(NamedTuple):
    """A response to be graded.

    Attributes:
        response: The response without special tokens, but with thinking tags.
        gold: The known answer.
        truncated: Whether the response was cut off by the limit on tokens.
        opened: Whether the prompt had already opened the thinking tag.
    """

    response: str
    gold: str
    truncated: bool = False
    opened: bool = False


@dataclass(frozen=True)
class Grade:
    """The grade of one response.

    Attributes:
        correct: Whether its answer equals the known one.
        status: `correct` or `wrong` if an answer was found and parsed; `unparsed` if there is text
            after the thinking but no answer was found in it, or the answer could not be parsed
            within the time limit; `no_answer` if the response ended without text after the
            thinking; `truncated` if it was cut off by the limit on tokens before a complete
            answer.
        extracted: The answer as written in the response; None if there is none.
    """

    correct: bool
    status: Status
    extracted: str | None


class Grader:
    r"""Grades responses, with math-verify in worker processes under a hard time limit.

    Only the text after the thinking can have an answer: a right number within the thinking does not
    count, and neither does a response whose thinking is not closed. The answer is the first that
    exists of: the contents of the last ``\boxed{}``, or of the last ones if they form one list; the
    first expression after ``####`` or "answer is"; the last expression; the text, if it is a single
    line. Expressions are taken whole, so that ``3/4`` is not read as 3. If the last box is not
    closed, there is no answer. If the response was cut off, only a complete ``\boxed{}`` is graded,
    as any other answer may be incomplete.

    Numbers, words, choices such as ``(B)``, times, ratios and numerals with a base are compared as
    such, after light normalisation (white space, a final full stop, ``$``, ``\text{}``, thousands
    commas, trailing zeros). Everything else is compared as mathematics, exact values exactly.
    Verdicts are cached, so that an answer that many samples have is compared once. Processes start
    when they are first needed.

    ::

        with Grader(workers=2) as grader:
            grades = grader.grade_many([Answered(response, gold), …])
    """

    def __init__(
        self, *, workers: int = 1, seconds: float = 5.0, tags: ThinkingTags | None = None
    ) -> None:
        """Prepare a grader; nothing is started yet.

        Args:
            workers: Number of processes that compare.
            seconds: Time limit of each comparison. A process that exceeds it is killed and
                replaced, and the answer counts as unparsed.
            tags: The thinking tags; `<think>` and `</think>` if not given.

        Raises:
            ConfigError: If `workers` is less than 1, or `seconds` is not positive.
        """
        if workers < 1 or seconds <= 0:
            raise ConfigError(
                f"a grader needs at least one worker and a positive limit of seconds, "
                f"got workers={workers}, seconds={seconds}."
            )
        self._pool = WorkerPool(workers, seconds)
        self._tags = tags or ThinkingTags()
        self._verdicts: dict[tuple[str, str], str] = {}

    def __enter__(self) -> Self:
        """Return the grader; the end of the `with` statement ends the processes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes."""
        self.close()

    def close(self) -> None:
        """End the worker processes. A later grade starts new ones."""
        self._pool.close()

    def grade(
        self, response: str, gold: str, *, truncated: bool = False, opened: bool = False
    ) -> Grade:
        """Grade one response; the arguments are those of `Answered`."""
        return self.grade_many([Answered(response, gold, truncated, opened)])[0]

    def grade_many(self, items: Iterable[Answered]) -> list[Grade]:
        """Grade responses; returns grades in order. Comparisons run in all workers in parallel."""
        read = [self._read(item) for item in items]
        self._compare(read)
        return [self._judge(each) for each in read]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Whether each known answer can be parsed, so that a response can match it."""
        expected = [expected_answer(gold) for gold in golds]

        # Only answers that need the parser and are the same in a box; each must equal itself.
        doubtful = {text for text in expected if text.strip() and not is_plain(text)}
        doubtful = {text for text in doubtful if find_boxed(f"\\boxed{{{text}}}") == text.strip()}
        verdicts = dict(
            zip(
                sorted(doubtful),
                self._pool.compare_many([(text, text) for text in sorted(doubtful)]),
                strict=True,
            )
        )
        return [is_plain(text) or verdicts.get(text) == EQUAL for text in expected]

    def _read(self, item: Answered) -> "_Read":
        answer = self._answer(item)
        expected = expected_answer(item.gold)
        boxes = find_boxes(answer)
        if boxes.open:
            return _Read(item, None, expected)

        found = boxes.answer
        if found is None and not item.truncated and answer.strip():
            found = find_stated(answer.strip(), expected=expected)
            return _Read(item, found, expected, bool(found and is_left_undone(found, expected)))
        return _Read(item, found, expected)

    def _answer(self, item: Answered) -> str:
        """Return the text after the thinking; empty if any thinking is not closed."""
        answer = self._tags.split(item.response, opened=item.opened).answer
        answer = answer.rpartition(self._tags.close)[2]
        return "" if self._tags.open in answer else answer

    def _compare(self, read: Iterable["_Read"]) -> None:
        """Let the workers compare, once each, the pairs that plain comparison cannot decide."""
        asked = dict.fromkeys(
            (each.found, each.expected)
            for each in read
            if each.found is not None
            and not each.undone
            and (each.found, each.expected) not in self._verdicts
            and plain_verdict(each.found, each.expected) is None
        )
        verdicts = self._pool.compare_many(list(asked)) if asked else []
        self._verdicts |= zip(asked, verdicts, strict=True)

    def _judge(self, read: "_Read") -> Grade:
        found, expected = read.found, read.expected
        if found is None:
            if read.item.truncated:
                return Grade(False, "truncated", None)
            some = self._answer(read.item).strip()
            return Grade(False, "unparsed" if some else "no_answer", None)
        if read.undone:
            return Grade(False, "wrong", found)

        plain = plain_verdict(found, expected)
        verdict = self._verdicts[found, expected] if plain is None else None
        if plain or verdict == EQUAL:
            return Grade(True, "correct", found)
        return Grade(False, "unparsed" if verdict == UNPARSED else "wrong", found)


class _Read(NamedTuple):
    """A response with its answer found.

    Attributes:
        item: The response and the known answer.
        found: The answer as written in the response; None if there is none.
        expected: The known answer, without its box or its working.
        undone: Whether the answer is arithmetic that is not carried out, instead of a number.
    """

    item: Answered
    found: str | None
    expected: str
    undone: bool = False


def grade(
    response: str,
    gold: str,
    *,
    truncated: bool = False,
    tags: ThinkingTags | None = None,
    opened: bool = False,
) -> Grade:
    """Grade one response with a shared :class:`Grader`.

    Args:
        response: The response without special tokens, but with thinking tags.
        gold: The known answer; with a working, it ends in ``#### answer``.
        truncated: Whether the response was cut off by the limit on tokens.
        tags: The thinking tags; `<think>` and `</think>` if not given.
        opened: Whether the prompt had already opened the tag.
    """
    grader = _shared(tags or ThinkingTags())
    return grader.grade(response, gold, truncated=truncated, opened=opened)


@lru_cache(maxsize=4)
def _shared(tags: ThinkingTags) -> Grader:
    grader = Grader(tags=tags)
    atexit.register(grader.close)
    return grader


class WorkerPool:
    """Compares answers in worker processes, which are started when needed.

    A process that exceeds the time limit is killed and replaced, and its verdict is `UNPARSED`. If
    a process dies, a new one gets the same request once more. Other comparisons are not affected.
    Safe to use from several threads.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        """Prepare a pool of `workers` processes, with `seconds` for each comparison."""
        self._seconds = seconds
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker())
        self._workers = workers

    def compare(self, found: str, expected: str) -> str:
        """Compare one pair: returns `EQUAL`, `UNEQUAL` or `UNPARSED`."""
        worker = self._idle.get()
        try:
            return worker.ask(found, expected, self._seconds)
        finally:
            self._idle.put(worker)

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Compare pairs of a found and an expected answer; returns verdicts in order."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(lambda pair: self.compare(*pair), pairs))

    def close(self) -> None:
        """End all processes; a later comparison starts new ones."""
        workers = [self._idle.get() for _ in range(self._workers)]
        for worker in workers:
            worker.stop()
            self._idle.put(worker)


class _Worker:
    """One worker process, which is started by the first request."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, found: str, expected: str, seconds: float) -> str:
        """Return the verdict on one pair.

        If the process dies before the time limit, the pair is asked once more, as the cause may not
        be this pair.
        """
        request = json.dumps({"found": found, "expected": expected, "seconds": seconds}) + "\n"
        for _ in range(2):
            process = self._process or self._start()
            start = monotonic()
            reply = self._exchange(process, request, seconds)
            if reply:
                return reply
            if monotonic() - start >= seconds:
                break
        return UNPARSED

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flexalign.evaluation.equality"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if self._exchange(process, "", _START_SECONDS) != READY:
            raise ConfigError(
                "the process that compares answers does not start; see why with: "
                f"{sys.executable} -P -m flexalign.evaluation.equality"
            )
        return process

    def _exchange(self, process: subprocess.Popen[str], request: str, seconds: float) -> str | None:
        """Send a request and read its reply; None if the process ended without one."""
        requests, replies = cast("tuple[IO[str], IO[str]]", (process.stdin, process.stdout))
        limit = Timer(seconds, process.kill)
        limit.daemon = True
        limit.start()
        try:
            requests.write(request)
            requests.flush()
            reply = replies.readline().strip()
        except OSError:
            reply = ""
        finally:
            limit.cancel()
        if not reply:
            self.stop()
        return reply or None
