"""Limits, penalties and biases, held against transformers' own generate and against their formulas."""

from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError
from flexalign.generation.penalties import OccurrencePenalty, logits_processors
from flexalign.generation.seeded import SeededSampling

PROMPT, VOCABULARY = 3, 17


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[1, 2, 2, 5, 5, 7], [0, 1, 3, 3, 4, 3]])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))


def test_occurrences_are_counted_in_the_response_alone(ids: torch.Tensor, logits: torch.Tensor):
    found = OccurrencePenalty(PROMPT, 0.7, 0.2)(ids, logits.double())
    for row in range(2):
        for token in range(VOCABULARY):
            count = ids[row, PROMPT:].tolist().count(token)
            expected = logits[row, token].double() - 0.7 * (count > 0) - 0.2 * count
            assert found[row, token].item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_repetition_counts_in_prompt_and_response(ids: torch.Tensor, logits: torch.Tensor):
    found = logits_processors(LogitsSettings(repetition_penalty=1.5), PROMPT)(ids, logits.clone())
    for row in range(2):
        for token in range(VOCABULARY):
            logit = logits[row, token]
            changed = logit / 1.5 if logit > 0 else logit * 1.5
            assert found[row, token] == (changed if token in ids[row] else logit)


def test_biases_are_added(ids: torch.Tensor, logits: torch.Tensor):
    settings = LogitsSettings(logit_bias=((3, 2.5), (16, -100.0)))
    found = logits_processors(settings, PROMPT)(ids, logits.clone())
    expected = logits.clone()
    expected[:, 3] += 2.5
    expected[:, 16] -= 100
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(4, 1.0, 0.0), (6, 0.7, 0.1), (0, 1, 0.3)])
def test_the_limits_leave_the_tokens_that_transformers_leaves(
    logits: torch.Tensor, top_k: int, top_p: float, min_p: float
):
    scores, draws = logits[:1] / 0.8, 4000
    for limit, used in (
        (TopKLogitsWarper(top_k or VOCABULARY), top_k),
        (TopPLogitsWarper(top_p), top_p < 1),
        (MinPLogitsWarper(min_p), min_p),
    ):
        scores = limit(None, scores) if used else scores
    expected = scores.softmax(-1)[0]

    sampling = SeededSampling(range(draws), 0.8, top_p, top_k, min_p)
    drawn = sampling(torch.zeros(draws, 1, dtype=torch.long), logits[:1].expand(draws, -1))
    shares = torch.bincount(drawn.argmax(-1), minlength=VOCABULARY) / draws
    assert set(shares.nonzero().flatten().tolist()) == set(expected.nonzero().flatten().tolist())
    assert torch.allclose(shares, expected, atol=0.04)


def test_some_rows_keep_their_limits(logits: torch.Tensor):
    sampling = SeededSampling([1, 2], 1.0, 1.0, 1)
    start = torch.zeros(2, 1, dtype=torch.long)
    sampling(start, logits)
    kept = sampling.keep(torch.tensor([1]))(start[:1], logits[1:])
    assert kept.argmax() == logits[1].argmax()


def test_settings_without_effect_are_not_told():
    assert LogitsSettings().to_json() == {}
    assert not logits_processors(LogitsSettings(top_k=3, min_p=0.1), 0)
    asked = LogitsSettings(top_k=20, presence_penalty=0.5, logit_bias=((3, 1.0),))
    assert asked.to_json() == {"top_k": 20, "presence_penalty": 0.5, "logit_bias": {"3": 1.0}}


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": True},
        {"min_p": 1.5},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": float("nan")},
    ],
)
def test_a_value_out_of_its_range_is_refused(given: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"^{next(iter(given))} must be"):
        LogitsSettings(**given)
