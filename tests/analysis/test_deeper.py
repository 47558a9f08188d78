"""What λ < 0 changes: the first-order figures against the exact derivative of a world that is counted out."""

import numpy as np
import pytest
import torch

from flexalign.analysis.deeper import DeeperThinking, LengthAndAccuracy, ScoredTokens, think_deeper
from flexalign.analysis.difference import measure_difference
from flexalign.data import split_tokens
from flexalign.fusion import fuse
from flexalign.miniature import make_traces
from flexalign.models.pair import ModelPair
from flexalign.statistics import Interval

# A world: up to three passes, each followed by another one or not; then an answer, which is right with
# a probability that grows with the passes and that the aligned model may have another way.
PASSES = 3


def logit(p):
    return np.log(p) - np.log1p(-p)


def fused(low, high, lam):
    return 1 / (1 + np.exp(-(lam * logit(high) + (1 - lam) * logit(low))))


def responses(again, right):
    """All responses of the world as (choices, probability): passes that go on, and the answer."""
    for passes in range(PASSES + 1):
        goes_on = [True] * passes + [False] * (passes < PASSES)
        chance = np.prod([again if choice else 1 - again for choice in goes_on])
        for is_right in (True, False):
            end = right(passes)
            yield goes_on, is_right, chance * (end if is_right else 1 - end)


def expected(again, right):
    """The exact mean tokens and accuracy; a response has its choices and one token of answer."""
    found = list(responses(again, right))
    tokens = sum(chance * (len(choices) + 1) for choices, _, chance in found)
    return tokens, sum(chance for _, is_right, chance in found if is_right)


def reference_right(passes):
    return (passes + 1) / (PASSES + 2)


def score(event, low, high):
    """The derivative of the log-probability of a choice, by the difference of its logits."""
    return (float(event) - low) * (logit(high) - logit(low))


def counted_out(low, high, skill):
    """Every response of the reference (again: 1/2), as often as its probability is: N rows."""
    rows, right = [], []
    for choices, is_right, chance in responses(0.5, reference_right):
        tokens = [(score(c, low, high), abs(high - low), 0) for c in choices]
        own = reference_right(sum(choices))
        other = skill(own)
        variation = abs(other - own)
        tokens.append((score(is_right, own, other), variation, 1 if variation else -1))
        count = chance * 40 * 10
        assert count == pytest.approx(round(count))
        rows += [tokens] * round(count)
        right += [is_right] * round(count)
    lengths = [len(tokens) for tokens in rows]
    table = ScoredTokens(
        row=np.repeat(np.arange(len(rows)), lengths),
        left=np.concatenate([np.arange(n, 0, -1) for n in lengths]),
        score=np.array([token[0] for tokens in rows for token in tokens]),
        variation=np.array([token[1] for tokens in rows for token in tokens]),
        shift=np.array([token[2] for tokens in rows for token in tokens]),
    )
    return table, lengths, right


NAMES = [("again", ";"), ("wrong", "right")]


@pytest.mark.parametrize(("high", "loss"), [(0.3, 0.0), (0.3, 0.05), (0.6, 0.05)])
def test_the_change_is_the_exact_derivative(high, loss):
    def skill(own):
        return own + loss

    table, lengths, right = counted_out(0.5, high, skill)
    found = think_deeper(
        table, lengths, list(range(len(lengths))), NAMES.__getitem__, right, lam=-1.0
    )

    def at(lam, *, length=True, rest=True):
        again = fused(0.5, high, lam) if length else 0.5

        def answer(passes):
            own = reference_right(passes)
            return fused(own, skill(own), lam) if rest else own

        return np.array(expected(again, answer))

    step = 1e-5
    for part, kind in (
        (found.whole, {}),
        (found.length, {"rest": False}),
        (found.rest, {"length": False}),
    ):
        slope = (at(-step, **kind) - at(step, **kind)) / (2 * step)
        assert part.tokens.mean == pytest.approx(slope[0], abs=1e-6)
        assert part.accuracy.mean == pytest.approx(slope[1], abs=1e-6)
    assert found.decisions == (("again", ";"),)
    assert found.tokens == pytest.approx(expected(0.5, reference_right)[0])
    at_choices = table.shift == 0
    assert found.share == pytest.approx(table.variation[at_choices].sum() / table.variation.sum())


def test_the_verdict_is_of_the_intervals():
    table, lengths, right = counted_out(0.5, 0.3, lambda own: own)
    found = think_deeper(table, lengths, list(range(len(lengths))), NAMES.__getitem__, right)
    assert (found.verdict, found.share) == ("pays", pytest.approx(1))
    assert found.whole.accuracy.low > 0
    assert "together" in found.sentence
    assert found.sentence.endswith("thinking deeper pays.")
    assert "100% of the difference is at decisions of length ('again' → ';')" in found.sentence
    table, lengths, right = counted_out(0.5, 0.3, lambda own: own + 0.1)
    found = think_deeper(table, lengths, list(range(len(lengths))), NAMES.__getitem__, right)
    assert found.verdict == "costs tokens only"
    assert found.sentence.endswith("what it gains in length is lost at other tokens.")
    assert think_deeper(table, lengths, ["one"] * len(lengths), NAMES.__getitem__, right) is None
    unknown = think_deeper(table, lengths, list(range(len(lengths))), NAMES.__getitem__)
    assert (unknown.verdict, unknown.whole.accuracy) == ("not decided", None)
    assert unknown.to_json()["whole"]["accuracy"] is None
    assert "not every response has a known answer" in unknown.sentence


@pytest.mark.parametrize(
    ("whole", "rest", "variation", "verdict"),
    [
        ((0.1, 0.2, 0.3), (-0.1, 0.0, 0.1), 0.1, "pays"),
        ((-0.1, 0.0, 0.1), (-0.3, -0.2, -0.1), 0.1, "costs tokens only"),
        ((-0.3, -0.2, -0.1), (-0.1, 0.0, 0.1), 0.1, "costs tokens only"),
        ((-0.1, 0.0, 0.1), (-0.1, 0.0, 0.1), 0.1, "not decided"),
        ((0.1, 0.2, 0.3), (-0.1, 0.0, 0.1), 0.6, "not decided"),
    ],
)
@pytest.mark.parametrize("available", [None, 200, 1000])
def test_each_verdict(whole, rest, variation, verdict, available):
    none = Interval(0.0, 0.0, 0.0)
    found = DeeperThinking(
        -0.25,
        10.0,
        LengthAndAccuracy(none, Interval(*whole)),
        LengthAndAccuracy(none, none),
        LengthAndAccuracy(none, Interval(*rest)),
        variation,
        0.5,
        (),
        200,
        available,
    )
    assert found.verdict == verdict
    assert found.to_json()["verdict"] == verdict
    assert ("another token at 60% of the places" in found.sentence) is (variation > 0.5)
    if verdict == "not decided" and variation < 0.5:
        of_all = "on 200 of 1,000 responses; more decide it: --limit 1000."
        assert found.sentence.endswith(of_all) is (available == 1000)
        assert found.sentence.endswith("all 200 responses; sample more.") is (available != 1000)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pair", "shared_pair"])
def test_scores_are_the_derivative_of_the_fused_log_probability(kind, request):
    """The whole change of the length, from naive float64 scores by a central difference."""
    pair = request.getfixturevalue(kind)
    rng = np.random.default_rng(3)
    rows = [([5, 6, 7 + n], rng.integers(20, 60, 3 + n % 5).tolist()) for n in range(12)]
    found = measure_difference(pair, rows, batch_size=5, chunk_size=4).deeper
    assert found.whole.accuracy is None
    step, scores = 1e-4, []
    for prompt, response in rows:
        ids = {"input_ids": torch.tensor([prompt + response])}
        sides = [pair.logits(side, **ids)[0].double() for side in ("reference", "aligned")]
        for place, token in enumerate(response):
            both = [side[len(prompt) + place - 1] for side in sides]
            up, down = (fuse(*both, lam).log_softmax(-1)[token].item() for lam in (step, -step))
            scores.append(((up - down) / (2 * step), len(response) - place))
    # No shift has enough positions here, so that all of them are the rest, with one mean length.
    mean = np.mean([left for _, left in scores])
    change = -0.25 * sum(score * (left - mean) for score, left in scores) / len(rows)
    assert found.decisions == ()
    assert found.whole.tokens.mean == pytest.approx(change, rel=1e-3, abs=1e-5)


def graded(count, seed):
    """Traces of the reference's world, and whether each is right."""
    rows = make_traces(count, seed=seed)
    return rows, [row["completion"][0]["content"].split()[-1] == row["answer"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aligned", "verdict"),
    [("miniature:concise", "pays"), ("miniature:aligned", "costs tokens only")],
)
def test_the_miniatures_pairs_tell_when_thinking_deeper_pays(aligned, verdict):
    """Both pairs differ in the habit of going over a line again; one of them in the errors too."""
    pair = ModelPair.load("miniature:reference", aligned)
    rows, right = graded(1000, seed=0)  # the traces of docs/which-dial.md
    found = measure_difference(
        pair, list(split_tokens(rows, pair.tokenizer)), batch_size=64, right=right
    ).deeper
    assert ("again", ";") in found.decisions
    assert found.verdict == verdict
    assert found.whole.tokens.low > 0
    assert found.length.accuracy.low > 0
    if aligned == "miniature:concise":
        assert found.share > 0.9
        assert found.rest.accuracy.mean == pytest.approx(0, abs=0.002)
    else:
        assert found.rest.accuracy.high < 0
