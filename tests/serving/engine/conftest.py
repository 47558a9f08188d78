"""An engine over a tiny dial, and a way to ask it."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from contract.subjects import stir
from flexalign.data.thinking import ThinkingTags
from flexalign.inra import InRaModel
from flexalign.serving.engine import (
    Ended,
    Engine,
    EngineLimits,
    Generation,
    InRaRunner,
    Job,
    WrittenToken,
)


class Written(NamedTuple):
    """A whole answer."""

    text: str
    ended: Ended
    tokens: list[WrittenToken]
    pieces: int


async def collect(generation: Generation) -> Written:
    text, tokens, pieces = "", [], 0
    async for piece in generation.pieces():
        text, pieces = text + piece.text, pieces + 1
        tokens += piece.tokens
    assert piece.ended is not None
    return Written(text, piece.ended, tokens, pieces)


@pytest.fixture(scope="session")
def dial(tiny_model: Any, tiny_tokenizer: Any) -> InRaModel:
    """Its two streams disagree often."""
    model = InRaModel.create(tiny_model(initializer_range=0.1))
    stir(model.adapter, 0.2, seed=2)
    model.inra_config = replace(model.inra_config, lambda_range=(-2, 4))
    model.tokenizer = tiny_tokenizer
    return model


@pytest.fixture
def engine(dial: InRaModel, tiny_tokenizer: Any) -> Iterator[Callable[..., Engine]]:
    """Start engines; they are stopped in the end."""
    started = []

    def start(
        runner: Any = None, ends: Sequence[int] = (), tokenizer: Any = None, **limits: int
    ) -> Engine:
        tokenizer = tokenizer or tiny_tokenizer
        engine = Engine(
            runner or InRaRunner(dial),
            tokenizer,
            ThinkingTags(),
            [tokenizer.eos_token_id, *ends],
            EngineLimits(**limits),
        )
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture
def write() -> Callable[[Engine, Sequence[Job]], list[Any]]:
    """Submit jobs a little apart, so that some join others under way, and wait for them all."""

    def run(engine: Engine, jobs: Sequence[Job]) -> list[Any]:
        async def ask() -> list[Any]:
            generations = []
            for job in jobs:
                generations += engine.submit([job], asyncio.get_running_loop())
                await asyncio.sleep(0.002)
            return await asyncio.gather(*map(collect, generations), return_exceptions=True)

        return asyncio.run(ask())

    return run
