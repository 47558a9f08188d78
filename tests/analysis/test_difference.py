"""What a pair's dial turns, against a dense float64 recomputation and made-up variations."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch

from flexalign.analysis.difference import measure_difference, one_model_pair, propose_gate
from flexalign.data import split_tokens
from flexalign.errors import DataError
from flexalign.miniature import make_traces
from flexalign.models.pair import ModelPair

ROWS = [
    ([5, 6, 7], [20, 21, 22, 23, 24]),
    ([8], [30, 31]),
    ([9, 10], []),
    ([11, 12, 13, 14], [40, 41, 42, 43, 44, 45, 46, 47, 48]),
]


def dense(pair, rows):
    """Both models' float64 distributions at every response token, and where it stands."""
    found = []
    for prompt, response in rows:
        ids = {"input_ids": torch.tensor([prompt + response])}
        sides = [pair.logits(side, **ids)[0].double() for side in ("reference", "aligned")]
        for position in range(len(prompt), len(prompt) + len(response)):
            before, after = (side[position - 1].softmax(-1) for side in sides)
            found.append((before, after, (prompt + response)[:position]))
    return found


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 256), (2, 3), (16, 1)])
@pytest.mark.parametrize("kind", ["pair", "shared_pair"])
def test_equals_dense_recomputation(kind, batch_size, chunk_size, request):
    pair = request.getfixturevalue(kind)
    seen = []
    found = measure_difference(
        pair,
        ROWS,
        batch_size=batch_size,
        chunk_size=chunk_size,
        shown=500,
        progress=lambda *count: seen.append(count),
    )
    places = dense(pair, ROWS)
    variations = [float((after - before).abs().sum() / 2) for before, after, _ in places]
    assert (found.rows, found.tokens) == (4, len(places)) == (4, 16)
    assert found.variation == pytest.approx(np.mean(variations), rel=1e-5)
    assert found.gate == pytest.approx(propose_gate(np.array(variations))[0], rel=1e-5)
    assert found.share == pytest.approx(np.mean([value > found.gate for value in variations]))
    assert seen[-1] == (4, 4)

    sums = [sum(parts) for parts in list(zip(*places, strict=True))[:2]]
    change = sums[1] - sums[0]
    for changes, order in ((found.falls, change.argsort()), (found.rises, -change)):
        order = order if changes is found.falls else order.argsort()
        top = int(order[0])
        assert changes[0].token == pair.tokenizer.decode([top])
        assert changes[0].reference == pytest.approx(float(sums[0][top]) * 1000 / 16, rel=1e-5)
        assert changes[0].aligned == pytest.approx(float(sums[1][top]) * 1000 / 16, rel=1e-5)
        assert changes[0].log_change == pytest.approx(math.log(sums[1][top] / sums[0][top]), 1e-4)
    assert len(found.falls) + len(found.rises) == 320

    groups = Counter()
    for (before, after, _), variation in zip(places, variations, strict=True):
        if variation > found.gate:
            groups[int((after - before).argmin()), int((after - before).argmax())] += variation
    (falls, rises), total = groups.most_common(1)[0]
    shift = found.shifts[0]
    assert (shift.falls, shift.rises) == tuple(pair.tokenizer.decode([t]) for t in (falls, rises))
    assert shift.variation * shift.positions == pytest.approx(total, rel=1e-5)
    assert sum(shift.positions for shift in found.shifts) == round(found.share * 16)
    members = [
        (before, after, context, variation)
        for (before, after, context), variation in zip(places, variations, strict=True)
        if variation > found.gate
        and (int((after - before).argmin()), int((after - before).argmax())) == (falls, rises)
    ]
    assert shift.falls_reference == pytest.approx(np.mean([m[0][falls] for m in members]), rel=1e-5)
    assert shift.rises_aligned == pytest.approx(np.mean([m[1][rises] for m in members]), rel=1e-5)
    assert shift.context == pair.tokenizer.decode(max(members, key=lambda m: m[3])[2][-12:])


def test_names_the_one_token_that_was_turned_down(tiny_model, tiny_tokenizer):
    """The head's bias is all that differs, in one token."""
    token = tiny_tokenizer.convert_tokens_to_ids("=")
    reference = tiny_model("phi")
    aligned = copy.deepcopy(reference)
    with torch.no_grad():
        reference.lm_head.bias[token] = 4
        aligned.lm_head.bias[token] = 2
    found = measure_difference(ModelPair.of(reference, aligned, tiny_tokenizer), ROWS)
    assert [change.token for change in found.falls] == ["="]
    assert {shift.falls for shift in found.shifts} == {"="}
    assert found.falls[0].log_change < -1


def test_equal_models_have_no_gate(tiny_model, tiny_tokenizer):
    model = tiny_model()
    pair = ModelPair(model, copy.deepcopy(model), tiny_tokenizer, 320)
    found = measure_difference(pair, ROWS)
    assert (found.gate, found.share, found.variation) == (None, 0.0, 0.0)
    assert (found.falls, found.rises, found.shifts) == ((), (), ())


@pytest.mark.parametrize("noise", [1e-4, 3e-3])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_gate_lies_between_noise_and_difference(noise, share):
    rng = np.random.default_rng(0)
    count = 20_000
    quiet = rng.lognormal(math.log(noise), 0.5, count)
    loud = rng.normal(0.15, 0.03, round(count * share)).clip(0.03)
    gate, floor, separation = propose_gate(np.concatenate([quiet, loud]))
    assert np.mean(quiet > gate) < 1e-3
    assert np.mean(loud > gate) > 0.97
    assert np.quantile(quiet, 0.9) < floor < gate
    assert separation > 3


def test_noise_alone_stands_out_of_nothing():
    variations = np.random.default_rng(0).lognormal(math.log(3e-3), 0.7, 20_000)
    gate, floor, separation = propose_gate(variations)
    assert separation < 1.1
    assert floor <= gate


def test_no_response_tokens(pair):
    with pytest.raises(DataError, match="no response tokens"):
        measure_difference(pair, [([5, 6], [])])


def test_the_miniatures_dial_turns_its_repetitions():
    pair = ModelPair.load("miniature")
    rows = list(split_tokens(make_traces(40, seed=7), pair.tokenizer))
    found = measure_difference(pair, rows)
    assert found.falls[0].token == "again"
    assert found.shifts[0].falls == "again"


@torch.no_grad()
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 256), (3, 2)])
def test_two_prompts_are_compared_on_the_same_response(
    tiny_model, tiny_tokenizer, batch_size, chunk_size
):
    """The prompts differ in length, and either may be the longer one."""
    model = tiny_model(initializer_range=0.1)
    aligned = [[50, 51, 52, 53, 5, 6, 7], [60], [9, 10, 11], [11]]
    rows = [(*row, prompt) for row, prompt in zip(ROWS, aligned, strict=True)]
    pair = one_model_pair(model, tiny_tokenizer)
    found = measure_difference(pair, rows, batch_size=batch_size, chunk_size=chunk_size)

    variations = []
    for prompt, response, other in rows:
        before, after = (
            model(torch.tensor([own + response])).logits[0, len(own) - 1 : -1].double().softmax(-1)
            for own in (prompt, other)
        )
        variations += ((after - before).abs().sum(-1) / 2).tolist()
    assert found.tokens == len(variations) == 16
    assert found.variation == pytest.approx(np.mean(variations), rel=1e-5)
    assert found.gate == pytest.approx(propose_gate(np.array(variations))[0], rel=1e-5)


def test_equal_prompts_do_not_differ(tiny_model, tiny_tokenizer):
    pair = one_model_pair(tiny_model(), tiny_tokenizer)
    found = measure_difference(pair, [(prompt, text, prompt) for prompt, text in ROWS])
    assert (found.variation, found.gate) == (pytest.approx(0, abs=1e-6), None)
