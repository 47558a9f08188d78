"""The contract of an InRa model, one set of checks for every family."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.subjects import LAMBDAS, SERVED, Subject, inserted, subject_of
from flexalign.inra import InRaModel

TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:λ .*leaves:UserWarning")

every_family = pytest.mark.parametrize("subject", SERVED, indirect=True)


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found.detach().double() - expected.double()).abs().max()) <= TOLERANCE


@every_family
def test_a_fresh_adapter_is_the_identity_and_leaves_it_slowly(subject: Subject) -> None:
    base = copy.deepcopy(subject.base)
    model = InRaModel.create(base)
    before = subject.plain()[subject.real]
    assert_near(model(**subject.batch, lam=1.0).logits[subject.real], before)

    loss = model(**subject.batch, lam=1.0).logits[subject.real].logsumexp(-1).sum()
    loss.backward()
    gradients = {p: p.grad for p in model.adapter.parameters() if p.grad is not None}
    size = torch.stack([grad.norm() for grad in gradients.values()]).norm()
    assert size > 0
    moved = []
    for _ in range(2):
        with torch.no_grad():
            for parameter, gradient in gradients.items():
                parameter -= 1e-4 * gradient / size
            after = model(**subject.batch, lam=1.0).logits[subject.real]
        moved.append(float((after - before).norm() / before.norm()))
    assert 0 < moved[0] < 0.01
    assert moved[1] / moved[0] == pytest.approx(2, rel=0.1), "it leaves the identity by a jump"


@every_family
@torch.no_grad()
def test_each_stream_is_the_model_that_it_stands_for(subject: Subject) -> None:
    hidden = subject.model.stream_hidden(**subject.batch)
    base, adapter = (subject.model.head(stream)[subject.real] for stream in hidden)
    assert_near(base, subject.plain()[subject.real])
    expected = inserted(subject.base, subject.model.adapter[0])(
        **subject.batch, use_cache=False
    ).logits[subject.real]
    assert_near(adapter, expected)
    assert float((base - expected).abs().max()) > 100 * TOLERANCE, "the adapter does something"


@every_family
@torch.no_grad()
def test_one_batch_of_lambdas_is_the_mix_of_two_passes(subject: Subject) -> None:
    batch = {key: value[:1].expand(len(LAMBDAS), -1) for key, value in subject.batch.items()}
    mixed = subject.model(**batch, lam=LAMBDAS).logits
    base = subject.model(**batch, lam=0.0).logits.double()
    adapter = subject.model(**batch, lam=1.0).logits.double()
    for row, lam in enumerate(LAMBDAS):
        real = batch["attention_mask"][row].bool()
        expected = (1 - lam) * base[row] + lam * adapter[row]
        assert_near(mixed[row][real], expected[real])


@every_family
@torch.no_grad()
def test_cached_is_uncached(subject: Subject) -> None:
    lam = torch.tensor([0.0, 0.5, 2.0])
    whole = subject.model(**subject.batch, lam=lam).logits
    cache = subject.model.new_cache()
    steps = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 9)):
        part = {
            "input_ids": subject.tokens[:, start:end],
            "attention_mask": subject.mask[:, :end],
            "position_ids": subject.positions[:, start:end],
        }
        steps.append(subject.model(**part, past_key_values=cache, lam=lam).logits)
    assert_near(torch.cat(steps, 1)[subject.real], whole[subject.real])


@every_family
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(subject: Subject) -> None:
    lam = torch.tensor([0.5, 0.0, 2.0])
    together = subject.model(**subject.batch, lam=lam).logits
    for row in range(len(lam)):
        real = subject.real[row]
        tokens = subject.tokens[row, real][None]
        alone = subject.model(tokens, torch.ones_like(tokens), lam=lam[row].item()).logits[0]
        assert_near(together[row][real], alone)


@every_family
@torch.no_grad()
def test_save_and_load(subject: Subject, tmp_path: Path) -> None:
    subject.model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "inra_config.json",
        "inra_adapter.safetensors",
    }
    loaded = InRaModel.from_pretrained(copy.deepcopy(subject.base), tmp_path)
    expected = subject.model(**subject.batch, lam=0.7).logits
    assert torch.equal(loaded(**subject.batch, lam=0.7).logits, expected)


@every_family
def test_gradients_reach_the_adapter_alone(subject: Subject) -> None:
    subject.model.zero_grad()
    subject.model(**subject.batch, lam=0.5).logits[subject.real].logsumexp(-1).sum().backward()
    assert all(parameter.grad is None for parameter in subject.base.parameters())
    gradients = [parameter.grad for parameter in subject.model.adapter.parameters()]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 1
    subject.model.zero_grad()


@every_family
@torch.no_grad()
def test_eager_attention_is_sdpa_attention(subject: Subject, tmp_path: Path) -> None:
    base = copy.deepcopy(subject.base)
    subject.model.save_pretrained(tmp_path)
    model = InRaModel.from_pretrained(base, tmp_path)
    lam = [0.0, 0.5, 2.0]
    before = model(**subject.batch, lam=lam).logits[subject.real]
    base.set_attn_implementation("eager")
    assert_near(model(**subject.batch, lam=lam).logits[subject.real], before)
