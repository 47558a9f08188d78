"""The service: encodes prompts, submits them to the engine and collects the pieces of the answers.

It takes requests of :mod:`flexalign.serving.requests` and does not depend on HTTP or on a protocol's
JSON. A request that it refuses raises :class:`~flexalign.serving.errors.ApiError`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from starlette.concurrency import run_in_threadpool

from flexalign.data.rendering import Rendering
from flexalign.data.template_arguments import require_read
from flexalign.data.thinking import ThinkingTags
from flexalign.data.traces import derive_seed
from flexalign.errors import ConfigError, DataError
from flexalign.generation.text import ResponseText
from flexalign.lambdas import thinking_lambda
from flexalign.models.prompted import PairRendering
from flexalign.serving.engine import AnswerPiece, Engine, Generation, Grammar, Job
from flexalign.serving.errors import ApiError, as_sent
from flexalign.serving.metrics import Metrics
from flexalign.serving.requests import (
    AnswerDraft,
    ChatRequest,
    CompletionRequest,
    RunningRequest,
    TokenIds,
    Usage,
)
from flexalign.serving.tools import ToolAnswers, ToolParser


@dataclass(frozen=True)
class ServedModel:
    """The model that a service answers with.

    Attributes:
        name: Its name in requests.
        tokenizer: Its tokenizer.
        tags: The tags around its thinking.
        context: The most tokens of a prompt and its answer together.
        vocabulary: The number of token ids.
        rendering: Renders conversations under both prompts, if the model is asked under two.
    """

    name: str
    tokenizer: Any
    tags: ThinkingTags
    context: int
    vocabulary: int
    rendering: PairRendering | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """The tokens of a prompt.

    Attributes:
        ids: Its tokens; of two prompts, the reference's.
        opened: Whether it leaves the thinking open.
        aligned: The tokens of the aligned prompt, where the model is asked under two.
    """

    ids: TokenIds
    opened: bool
    aligned: TokenIds | None = None

    def __len__(self) -> int:
        """Return its number of tokens; of two prompts, those of the longer one."""
        return max(len(self.ids), len(self.aligned or ()))

    @property
    def told(self) -> str:
        """Which of two prompts is the longer one, for messages; empty where there is one."""
        if self.aligned is None:
            return ""
        side = "aligned" if len(self.aligned) > len(self.ids) else "reference"
        return f" under the {side} prompt"


class Service:
    """Answers requests with an engine."""

    def __init__(self, model: ServedModel, engine: Engine, queue: int) -> None:
        """Serve a model.

        Args:
            model: The model.
            engine: The engine that runs it, started.
            queue: The most answers that wait in the engine.
        """
        self.model = model
        self.engine = engine
        self.metrics = Metrics(engine)
        self._queue = queue
        self._reader = ResponseText(model.tokenizer, model.tags)
        self._tools = ToolParser(model.tokenizer, self._reader)

    async def begin(self, request: ChatRequest | CompletionRequest) -> RunningRequest:
        """Check a request against the model and submit it to the engine.

        Raises:
            ApiError: If the request names another model, the engine does not serve the dial, a
                prompt is empty or too long, or the queue is full.
        """
        since = monotonic()
        choice, sampling = request.choice, request.sampling
        self._require_model(request.model)
        self._require_tokens([token for token, _ in sampling.logits.logit_bias], "logit_bias")
        try:
            self.engine.check(choice.dial)
        except ConfigError as error:
            raise ApiError(400, f"lambda: {error}", param="lambda", code="invalid_dial") from error
        try:
            self.engine.check_thinking(sampling.logits)
        except ConfigError as error:
            limits = sampling.logits
            name = "end_of_thinking_bias" if limits.thinking_budget is None else "thinking_budget"
            raise ApiError(400, str(error), param=name) from error

        # Templates and tokenizers take milliseconds; a thread keeps the event loop free.
        if isinstance(request, ChatRequest):
            prompts = [await run_in_threadpool(self._encode_chat, request)]
        else:
            prompts = [await run_in_threadpool(self._encode, prompt) for prompt in request.prompts]

        grammar = None
        if isinstance(request, ChatRequest) and request.schema is not None:
            grammar = await run_in_threadpool(self._grammar, request.schema, prompts[0])

        jobs = [(prompt, job) for prompt in prompts for job in self._jobs(prompt, request, grammar)]
        self._require_room(len(jobs))

        # A prompt with several answers is counted once, with the first of them.
        drafts = []
        for index, (prompt, _) in enumerate(jobs):
            counted = 0 if index % sampling.n else len(prompt)
            drafts.append(AnswerDraft(index, counted, prompt.opened))
        generations = self.engine.submit([job for _, job in jobs], asyncio.get_running_loop())
        self.metrics.began(choice.dial, sum(map(len, prompts)))
        tools = None
        if isinstance(request, ChatRequest) and request.tools:
            tools = ToolAnswers(self._tools, request.tools, prompts[0].ids, bool(sampling.stop))
        return RunningRequest(sampling, choice, drafts, generations, since, tools)

    async def pieces(
        self, running: RunningRequest
    ) -> AsyncIterator[tuple[AnswerDraft, AnswerPiece]]:
        """Yield the pieces of all answers in the order they arrive.

        Each is added to its draft and to the metrics first.
        """
        is_first = True
        async for index, piece in _merged(running.generations):
            draft = running.drafts[index]
            draft.take(piece)
            if is_first and piece.text:
                is_first = False
                self.metrics.first_text(running.since)
            if piece.ended is not None:
                self.metrics.ended(piece.ended, running.choice.report.get("policy"))
                running.report_routes()
            yield draft, piece

    async def finish(self, running: RunningRequest) -> None:
        """Wait until all answers have ended."""
        async for _ in self.pieces(running):
            pass

    def usage(self, running: RunningRequest) -> Usage:
        """Count the tokens of the answers that have ended."""
        prompt = written = thinking = rejected = 0
        for draft in running.drafts:
            ended = draft.ended
            if ended is None:
                continue
            prompt += draft.prompt_tokens
            rejected += ended.rejected_tokens
            written += len(ended.token_ids) + ended.rejected_tokens
            text = self._reader.read(ended.token_ids)
            thinking += self.model.tags.count_tokens(
                text, self.model.tokenizer, opened=draft.opened
            )
        return Usage(prompt, written, thinking, rejected)

    def _require_model(self, asked: str | None) -> None:
        name = self.model.name
        if asked not in (None, name):
            raise ApiError(
                404,
                f"there is no model {asked!r:.200} here; this server has {name!r}.",
                param="model",
                code="model_not_found",
            )

    def _encode_chat(self, request: ChatRequest) -> EncodedPrompt:
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            raise ApiError(
                400,
                "messages: this model has no chat template; send a prompt to /v1/completions.",
                param="messages",
            )
        arguments = self._template_arguments(request)
        blamed = "messages, chat_template_kwargs or tools" if arguments else "messages"
        try:
            messages = [dict(message) for message in request.messages]
            if self.model.rendering is not None:
                both = self.model.rendering.both(messages)
                opened = both.opens_at(thinking_lambda(request.choice.dial))
                return EncodedPrompt(tuple(both.reference.ids), opened, tuple(both.aligned.ids))
            return self._encoded(tuple(Rendering(tokenizer).prompt(messages, **arguments).ids))
        except DataError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        except Exception as error:  # a template is a program, and these are its arguments
            raise ApiError(
                400,
                f"{blamed}: the chat template fails on them ({error!r:.200}); send others.",
                param="messages",
            ) from error

    def _template_arguments(self, request: ChatRequest) -> dict[str, Any]:
        """Return the arguments of the chat template that a request gives; check their names."""
        arguments = dict(request.template)
        if request.tools:
            self._tools.require_tools()
        try:
            if (arguments or request.tools) and self.model.rendering is not None:
                raise ConfigError(
                    "chat_template_kwargs, tools: this server asks its model under two prompts, whose "
                    "arguments are the operator's; leave them out."
                )
            require_read(self.model.tokenizer, arguments, "chat_template_kwargs")
        except ConfigError as error:
            raise ApiError(
                400, str(error), param="chat_template_kwargs", code="invalid_value"
            ) from error
        return arguments | ({"tools": list(request.tools)} if request.tools else {})

    def _encoded(self, ids: TokenIds) -> EncodedPrompt:
        return EncodedPrompt(ids, self._reader.is_opened_by(ids))

    def _encode(self, prompt: str | TokenIds) -> EncodedPrompt:
        if self.model.rendering is not None:
            raise ApiError(
                400,
                "prompt: this server asks its model under two prompts, which only messages can "
                "have; send them to /v1/chat/completions.",
                param="prompt",
            )
        if isinstance(prompt, str):
            return self._encoded(tuple(self.model.tokenizer(prompt)["input_ids"]))
        self._require_tokens(prompt, "prompt")
        return self._encoded(prompt)

    def _require_tokens(self, tokens: Sequence[int], key: str) -> None:
        outside = [token for token in tokens if not 0 <= token < self.model.vocabulary]
        if outside:
            raise ApiError(
                400,
                f"{key} has the token id {as_sent(outside[0])}; this model's are 0 to "
                f"{self.model.vocabulary - 1}.",
                param=key,
            )

    def _grammar(self, schema: object, prompt: EncodedPrompt) -> Grammar:
        try:
            return self.engine.grammars.compile(schema, opened=prompt.opened)
        except ConfigError as error:
            told = str(error)
            told = told if told.startswith("response_format") else f"response_format: {told}"
            raise ApiError(400, told, param="response_format", code="invalid_value") from error

    def _jobs(
        self,
        prompt: EncodedPrompt,
        request: ChatRequest | CompletionRequest,
        grammar: Grammar | None,
    ) -> Iterator[Job]:
        """Yield a job for each answer to one prompt; the first has the request's own seed."""
        sampling = request.sampling
        if not prompt.ids or prompt.aligned == ():
            raise ApiError(400, "prompt is empty: there is no token to go on from.", param="prompt")

        room = self.model.context - len(prompt)
        limit = sampling.max_tokens if sampling.max_tokens is not None else max(room, 1)
        if limit > room:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens{prompt.told} and may get {limit} more; this "
                f"server's context is {self.model.context}. Shorten the prompt, or ask for fewer "
                "max_tokens.",
                code="context_length_exceeded",
            )

        for number in range(sampling.n):
            seed = sampling.seed if number == 0 else derive_seed(sampling.seed, number)
            yield Job(
                prompt.ids,
                request.choice.dial,
                limit,
                sampling.temperature,
                sampling.top_p,
                seed,
                sampling.stop,
                sampling.logprobs,
                # A completion has no thinking: its text is the model's as it is.
                stops_after_thinking=isinstance(request, ChatRequest),
                aligned=prompt.aligned,
                opened=prompt.opened,
                logits=sampling.logits,
                grammar=grammar,
            )

    def _require_room(self, jobs: int) -> None:
        # A request larger than the whole queue can never be served: 400, not 429.
        if jobs > self._queue:
            raise ApiError(
                400,
                f"n: the request asks for {jobs} answers, n to each prompt, and this server takes "
                f"{self._queue} at most; ask for fewer.",
                param="n",
            )
        if not self.engine.has_room(jobs):
            raise ApiError(
                429,
                "too many requests wait already; ask again later.",
                code="queue_full",
                headers={"retry-after": "1"},
            )


async def _merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, AnswerPiece]]:
    """Yield (index, piece) of several generations, in the order the pieces arrive."""
    if len(generations) == 1:
        async for piece in generations[0].pieces():
            yield 0, piece
        return

    queue: asyncio.Queue[tuple[int, AnswerPiece | Exception]] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for one in generation.pieces():
                queue.put_nowait((index, one))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(generations)]
    left = len(tasks)
    try:
        while left:
            index, given = await queue.get()
            if isinstance(given, Exception):
                raise given
            left -= given.ended is not None
            yield index, given
    finally:
        # Also reached when the client disconnects and the iteration is closed early.
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
