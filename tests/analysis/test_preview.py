import pytest
import torch

from flexalign.analysis.preview import preview
from flexalign.errors import ConfigError, DataError
from flexalign.models.pair import ModelPair

ROWS = [([1, 2, 3], [4, 5, 6, 7]), ([2], [9, 8]), ([3, 4], [1, 2, 3])]


@pytest.fixture
def pair(tiny_pair):
    return ModelPair.load(*tiny_pair)


def twin(pair, lam, top_k):
    """Equation 5 in float64, token by token, one row at a time."""
    divergence = outside = mass = count = 0.0
    for prompt, response in ROWS:
        ids = torch.tensor([prompt + response])
        sides = [pair.logits(side, input_ids=ids)[0].double() for side in ("reference", "aligned")]
        for place in range(len(prompt) - 1, ids.shape[1] - 1):
            one, other = (side[place] for side in sides)
            p = torch.softmax((1 - lam) * one + lam * other, -1)
            q = torch.softmax(one, -1)
            divergence += float((p * (p.log() - q.log())).sum())
            own = {*one.topk(top_k).indices.tolist(), *other.topk(top_k).indices.tolist()}
            outside += int(p.argmax()) not in own
            mass += 1 - sum(float(p[token]) for token in own)
            count += 1
    return divergence / count, outside / count, mass / count


def test_every_lambda_equals_a_twin_in_float64(pair):
    lams = [-1.0, 0.0, 0.5, 2.0, 8.0]
    found = preview(pair, ROWS, lams=lams, top_k=2, batch_size=2, chunk_size=3)
    assert found.tokens == 9
    for row, lam in zip(found.rows, lams, strict=True):
        assert (row.divergence, row.outside, row.mass_outside) == pytest.approx(
            twin(pair, lam, 2), abs=1e-4
        )
    assert found.rows[1].divergence == pytest.approx(0, abs=1e-6)


def test_the_leaving_lambda_is_the_first_above_one_with_a_choice_outside(pair):
    found = preview(pair, ROWS, lams=[1.0, 3.0, 10.0, 40.0, 200.0], top_k=1)
    left = [row.lam for row in found.rows if row.lam > 1 and row.outside > 0]
    assert found.leaves_at == (left[0] if left else None)
    assert found.to_json()["rows"][0]["lambda"] == 1.0


def test_what_cannot_be_read_is_refused(pair):
    with pytest.raises(DataError, match="no response tokens"):
        preview(pair, [([1], [])])
    with pytest.raises(ConfigError, match="at least one λ"):
        preview(pair, ROWS, lams=[])
    with pytest.raises(ConfigError, match="top_k"):
        preview(pair, ROWS, top_k=0)
