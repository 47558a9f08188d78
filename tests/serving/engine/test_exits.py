"""Early exits in the engine: the same as the library's, whatever else runs."""

from collections.abc import Callable
from typing import Any

import pytest

from flexalign.generation import TwoModelDecoder
from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaModel
from flexalign.lambdas import Exit, Fixed
from flexalign.miniature import make_questions
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.models.pair import ModelPair
from flexalign.serving.engine import Engine, InRaRunner, Job
from flexalign.serving.engine.batch import LoRARunner, PairRunner, PlainRunner
from flexalign.systems.dials import load_dial

QUESTIONS = [[{"role": "user", "content": one.text}] for one in make_questions(5, 20_000)]
LIMIT = 140
KINDS = ("pair", "LoRA", "InRa")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("miniature:reference")


def runner_of(kind: str) -> Any:
    if kind == "model":
        return PlainRunner(load_model("miniature:reference"))
    if kind == "pair":
        return PairRunner(
            TwoModelDecoder(ModelPair.load("miniature:reference", "miniature:aligned"))
        )
    if kind == "LoRA":
        return LoRARunner(load_dial("miniature:reference", "miniature:dial"))
    return InRaRunner(InRaModel.from_pretrained("miniature:reference", "miniature:fast"))


def job_of(tokenizer: Any, place: int, dial: Any, **more: Any) -> Job:
    ids = tokenizer.apply_chat_template(
        QUESTIONS[place], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    settings = {"temperature": 1.0, "seed": place, "stops_after_thinking": True} | more
    return Job(tuple(ids), dial, LIMIT, **settings)


@pytest.mark.parametrize(
    "kind", ["model", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_each_answer_is_the_librarys(
    kind: str, engine: Callable[..., Engine], write: Any, tokenizer: Any
):
    """Beside answers with other dials, which join and leave."""
    runner = runner_of(kind)
    fast = {"LoRA": 3.0}.get(kind, 1.0)
    policies = [
        Exit(threshold, marker=";", fast_lambda=fast)
        for threshold in ((0.5, 0.97, 0.99, 1.0) if kind == "InRa" else (0.99997, 0.99999, 1.0))
    ]
    other = None if kind == "model" else Fixed(0.0)
    cases = [(place, policy) for policy in policies for place in range(len(QUESTIONS))]
    cases = [one for case in cases for one in (case, (case[0], other))][:14]
    jobs = [job_of(tokenizer, place, dial) for place, dial in cases]
    answers = write(engine(runner, tokenizer=tokenizer, rows=5), jobs)
    routes = set()
    for (place, dial), job, answer in zip(cases, jobs, answers, strict=True):
        asked = {} if dial is None else {"lam": [dial]}
        [expected] = generate_responses(
            runner.model,
            tokenizer,
            [QUESTIONS[place]],
            max_new_tokens=LIMIT,
            seeds=[job.seed],
            **asked,
        )
        assert answer.ended.token_ids == expected.token_ids
        assert answer.text == expected.text
        assert answer.ended.route == expected.route
        assert answer.ended.rejected_tokens == expected.rejected_tokens
        assert [one.token for one in answer.tokens] == list(expected.token_ids)
        if expected.confidence is not None:
            assert answer.ended.confidence == pytest.approx(expected.confidence, rel=1e-3)
            assert answer.ended.lam == (fast if expected.route == "fast" else 0.0)
        routes.add(expected.route)
    assert {"fast", "slow"} <= routes
