"""Whether a response is right: its answer found, normalised and compared with the known one."""

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
        response: The response, special tokens removed, thinking tags kept.
        gold: The known answer.
        truncated: Whether the limit on tokens cut the response off.
        opened: Whether the prompt had already opened the thinking tag.
    """

    response: str
    gold: str
    truncated: bool = False
    opened: bool = False


@dataclass(frozen=True)
class Grade:
    """What became of one response.

    Attributes:
        correct: Whether its answer equals the known one.
        status: `correct` and `wrong` speak of an answer that was found and understood;
            `unparsed` means that there is text after the thinking but no answer could be made
            out in it, or no mathematics of the answer within the limit of time; `no_answer`
            that the response ended without any text there, `truncated` that the limit on tokens
            cut it off before a complete answer.
        extracted: The answer found, as it stands in the response.
    """

    correct: bool
    status: Status
    extracted: str | None


class Grader:
    r"""Grades responses, with math-verify in worker processes under a hard limit of time.

    The answer is looked for after the thinking only: a right number that a model merely thought
    of earns nothing, and a thinking that is never closed is no answer. It is, in this order, what
    stands in the last ``\boxed{}``, or in the last ones where they are one list; the first
    expression after ``####`` or "answer is"; the last expression; the text, if it is a single
    line. Expressions are taken whole, so that ``3/4`` is no 3. A last box that is never closed
    withdraws the answer. Of a response that was cut off only a complete ``\boxed{}`` is graded,
    since any other answer may lack its end.

    Numbers, words, choices such as ``(B)``, times, ratios and numerals with a base are compared as
    such, after light normalisation (white space, a final full stop, ``$``, ``\text{}``, thousands
    commas, trailing zeros). Everything else is compared as mathematics, exact values exactly;
    verdicts are remembered, so that an answer that many samples give is compared once. Processes
    start when first needed.

    ::

        with Grader(workers=2) as grader:
            grades = grader.grade_many([Answered(response, gold), …])
    """

    def __init__(
        self, *, workers: int = 1, seconds: float = 5.0, tags: ThinkingTags | None = None
    ) -> None:
        """Prepare a grader; nothing is started yet.

        Args:
            workers: How many processes compare.
            seconds: The limit for each comparison. A process over it is killed and replaced, and
                the answer counts as unparsed.
            tags: The thinking tags; `<think>` and `</think>` if not given.

        Raises:
            ConfigError: If there is no worker, or no time.
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
        """Use it in a `with` statement, which ends the processes."""
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
        """Grade responses, in order; comparisons run in all workers at once."""
        read = [self._read(item) for item in items]
        self._compare(read)
        return [self._judge(each) for each in read]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Whether each known answer can be parsed, so that some response can match it."""
        expected = [expected_answer(gold) for gold in golds]
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
        """What follows the thinking; nothing if a thinking, also a later one, is never closed."""
        answer = self._tags.split(item.response, opened=item.opened).answer
        answer = answer.rpartition(self._tags.close)[2]
        return "" if self._tags.open in answer else answer

    def _compare(self, read: Iterable["_Read"]) -> None:
        """Have mathematics decide, once each, what plain comparison cannot."""
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
        found: The answer as it stands in the response; None if there is none.
        expected: The known answer, taken out of its box or its working.
        undone: Whether it is arithmetic that was not carried out, stated for a number.
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
    """Grade one response as :class:`Grader` does, by a grader that all callers share.

    Args:
        response: The response, special tokens removed, thinking tags kept.
        gold: The known answer; a worked one ends in ``#### answer``.
        truncated: Whether the limit on tokens cut the response off.
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
    """Compares answers in processes of its own, which are started when needed.

    A process that runs over the limit is killed and replaced; what it was asked counts as
    `UNPARSED`. One that dies is replaced and asked once more. Nothing else is lost. Safe to use
    from several threads.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        """Make room for `workers` processes with `seconds` for each comparison."""
        self._seconds = seconds
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker())
        self._workers = workers

    def compare(self, found: str, expected: str) -> str:
        """One of `EQUAL`, `UNEQUAL` and `UNPARSED`."""
        worker = self._idle.get()
        try:
            return worker.ask(found, expected, self._seconds)
        finally:
            self._idle.put(worker)

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The verdicts on pairs of a found and an expected answer, in order."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(lambda pair: self.compare(*pair), pairs))

    def close(self) -> None:
        """End all processes; a later comparison starts new ones."""
        workers = [self._idle.get() for _ in range(self._workers)]
        for worker in workers:
            worker.stop()
            self._idle.put(worker)


class _Worker:
    """One process, or the place of one that is not started yet."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, found: str, expected: str, seconds: float) -> str:
        """Ask once more if the process died before its time: that may not be the answer's fault."""
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
        """Send a request and read its reply; None if the process did not live to give one."""
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
