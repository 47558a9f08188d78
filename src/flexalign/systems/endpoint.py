"""A server of OpenAI's protocol as a system: several requests at a time, each with its dial."""

import json
import threading
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any, Generic

from flexalign.data.client import Endpoint, EndpointResponse
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import (
    ConfigError,
    RequestRefusedError,
    ServerUnusableError,
    ServingError,
)
from flexalign.lambdas import Exit, Setting
from flexalign.systems.open import Answer, Asked, Failure, Messages, Request, SystemOptions

_IN_A_ROW = 8
"""Consecutive failed requests at which a server is given up, if there are fewer workers."""


class EndpointBackend:
    """A server. A request that fails after all tries loses only its sample; a later run repeats it."""

    def __init__(self, url: str, options: SystemOptions) -> None:
        """Check the options; the server is not called before the first sample.

        Raises:
            ConfigError: If the address is not a URL, the tokenizer does not exist, or the thinking is
                limited, which not every server can do.
        """
        options.logits.refuse_thinking_limits("a server")
        self._url, self._options = url, options
        self._tokenizer: Any = None
        if options.tokenizer is not None:
            from flexalign.models.loading import load_tokenizer

            self._tokenizer = load_tokenizer(options.tokenizer)
        self._tags = ThinkingTags()
        self._unnamed = Endpoint(
            url,
            "",
            options.max_new_tokens,
            options.temperature,
            options.top_p,
            options.logits,
            concurrency=options.concurrency,
            attempts=options.attempts,
            pause_seconds=options.pause_seconds,
            timeout_seconds=options.timeout_seconds,
            api_key=options.api_key,
            on_retry=options.on_retry,
        )

    def describe(self) -> dict[str, Any]:
        """Return the address, the model's name there, the tokenizer and the thinking tags."""
        return {
            "kind": "url",
            "url": self._url,
            "model": self._options.model_name,
            "tokenizer": self._options.tokenizer,
            "thinking_tags": [self._tags.open, self._tags.close],
        }

    def render(self, messages: Messages) -> str:
        """Return the conversation as JSON; the server applies the chat template."""
        return json.dumps(messages, ensure_ascii=False)

    def run(
        self, requests: Sequence[Asked], done: Collection[Hashable]
    ) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
        """Answer the requests that are not done, `concurrency` at a time.

        Raises:
            ConfigError: If the server has not exactly one model, and none is named.
            ServingError: If the server cannot be reached; all of the first requests, or many in a
                row, fail; or one fails as every other would: a key or an address that is refused, an
                answer that is not JSON, tokens that nobody counts, no `dial` where one was asked.
        """
        missing = [request for request in requests if request.key not in done]
        if not missing:
            return

        waiting: SimpleQueue[Asked] = SimpleQueue()
        for request in missing:
            waiting.put(request)
        answered: SimpleQueue[tuple[Asked, Answer | Failure] | BaseException] = SimpleQueue()
        given_up = threading.Event()
        server = self.endpoint

        workers = min(self._options.concurrency, len(missing))
        outcomes = _Outcomes(answered, given_up, max(_IN_A_ROW, workers))
        for _ in range(workers):
            arguments = (server, waiting, outcomes)
            threading.Thread(target=self._work, args=arguments, daemon=True).start()
        try:
            yield from _collected(
                answered,
                len(missing),
                outcomes.most_in_a_row,
                self._url,
                at_once=workers if len(missing) == len(requests) else 0,
            )
        finally:
            given_up.set()

    def release(self) -> None:
        """Do nothing: no weights are loaded."""

    def _work(
        self,
        server: Endpoint,
        waiting: "SimpleQueue[Asked]",
        outcomes: "_Outcomes[Asked]",
    ) -> None:
        while not outcomes.given_up.is_set():
            try:
                request = waiting.get_nowait()
            except Empty:
                return
            try:
                outcomes.put(request, self._ask(server, request))
            except BaseException as error:
                outcomes.answered.put(error)
                outcomes.given_up.set()
                return

    def _ask(self, server: Endpoint, request: Request) -> Answer | Failure:
        dial: dict[str, Any] = {}
        setting = request.setting
        if setting.dial is not None:
            dial["lambda"] = setting.policy if setting.lam is None else setting.lam
        try:
            response = server.ask(request.messages, request.seed, **dial)
            self._require_turned(setting, response.dial)
            return self._read(response)
        except ServerUnusableError:
            raise
        except ServingError as error:
            return Failure(str(error), is_final=isinstance(error, RequestRefusedError))

    def _require_turned(self, setting: Setting, reported: Mapping[str, Any]) -> None:
        """Check that an answer reports a dial where one was asked, λ = 0 too.

        A server of another kind ignores `lambda`, and would answer every setting alike.

        Raises:
            ServerUnusableError: If it does not.
        """
        if isinstance(setting.dial, Exit) and reported.get("policy") != "exit":
            raise ServerUnusableError(
                f"{self._url} does not report the policy {setting.id}: exits are served by "
                "flexalign serve with --engine local alone."
            )
        if setting.dial is not None and not reported:
            raise ServerUnusableError(
                f"{self._url} did not say that it turned λ (its answer to {setting.id} has no "
                "`dial`); ask it without --lambda, --policy and --effort, or serve the model with "
                "flexalign serve."
            )

    def _read(self, response: EndpointResponse) -> Answer:
        text = response.text.encode(
            errors="replace"
        ).decode()  # half a surrogate pair is not valid text
        thinking, tokens = response.thinking_tokens, response.tokens
        if self._tokenizer is not None:
            thinking = self._tags.count_tokens(text, self._tokenizer)
            if tokens is None:
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
                tokens = len(ids)

        if tokens is None:
            raise ServerUnusableError(
                f"{self._url} does not count the tokens of its responses (usage); name its "
                "model's tokenizer with --tokenizer."
            )
        if thinking is None and not self._tags.split(text).thinking:
            thinking = 0

        dial = response.dial
        return Answer(
            text,
            tokens,
            thinking,
            int(dial.get("rejected_tokens") or 0),
            response.truncated,
            dial.get("route"),
            dial.get("confidence"),
        )

    @cached_property
    def endpoint(self) -> Endpoint:
        """The server and the model's name there; if none is given, the server's only model.

        Raises:
            ConfigError: If none is given and the server has not exactly one model.
            ServingError: If the server cannot be reached.
        """
        name = self._options.model_name
        if name is None:
            models = self._unnamed.models()
            if len(models) != 1:
                listed = ", ".join(models) or "none"
                raise ConfigError(
                    f"{self._url} has {len(models)} models ({listed}); name one with --model-name."
                )
            [name] = models
        return self._unnamed.for_model(name)


class _Outcomes(Generic[Asked]):
    """The outcomes in the order in which they came, and whether the server is given up.

    The workers count the failures themselves: whoever reads the outcomes may be grading while a
    server that is down refuses one request after the other.
    """

    def __init__(
        self,
        answered: "SimpleQueue[tuple[Asked, Answer | Failure] | BaseException]",
        given_up: threading.Event,
        most_in_a_row: int,
    ) -> None:
        self.answered, self.given_up, self.most_in_a_row = answered, given_up, most_in_a_row
        self._lock = threading.Lock()
        self._in_a_row = 0

    def put(self, request: Asked, answer: Answer | Failure) -> None:
        """Add an outcome; the server is given up when too many in a row have failed."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if isinstance(answer, Failure) else 0
            self.answered.put((request, answer))
            if self._in_a_row >= self.most_in_a_row:
                self.given_up.set()


def _collected(
    answered: "SimpleQueue[tuple[Asked, Answer | Failure] | BaseException]",
    expected: int,
    most_in_a_row: int,
    url: str,
    at_once: int = 0,
) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
    """Yield outcomes as they arrive, in batches of those that are there.

    Args:
        answered: The outcomes.
        expected: How many there will be.
        most_in_a_row: Consecutive failures at which the server is given up.
        url: Its address.
        at_once: Requests that are sent first. If all of these fail, no later one is waited for: the
            cause is the server's or the run's. 0 for a run that has answers already.

    Raises:
        ServingError: If the first requests, or this many in a row, failed.
    """
    in_a_row, left = 0, expected
    while left:
        batch = [answered.get()]
        while not answered.empty():
            batch.append(answered.get())
        outcomes = [item for item in batch if not isinstance(item, BaseException)]
        if outcomes:
            yield outcomes

        for item in batch:
            if isinstance(item, BaseException):
                raise item
            request, answer = item
            # Counted one by one, as the size of a batch depends on timing.
            left -= 1
            in_a_row = in_a_row + 1 if isinstance(answer, Failure) else 0
            if isinstance(answer, Failure) and in_a_row == at_once == expected - left:
                raise ServingError(answer.reason)
            if isinstance(answer, Failure) and in_a_row == most_in_a_row and left:
                raise ServingError(
                    f"{in_a_row} requests in a row got no response, the last for "
                    f"{request.label} ({answer.reason}); {url} is given up, and "
                    "what came before is saved."
                )
