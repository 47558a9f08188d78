import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from flexalign.errors import ConfigError
from flexalign.generation import generate_responses
from flexalign.generation.seeded import SeededSampling, _mixed

DRAWS = 40_000


def _draw(sampling: SeededSampling, logits: torch.Tensor, index: int = 0) -> torch.Tensor:
    """The tokens chosen after `index` generated ones; the first call tells the prompt's length."""
    rows = len(logits)
    for step in range(index + 1):
        scores = sampling(torch.zeros(rows, 3 + step, dtype=torch.long), logits)
    assert bool(((scores == 0).sum(-1) == 1).all())
    return scores.argmax(-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5)])
def test_frequencies_are_those_of_transformers_warpers(temperature: float, top_p: float) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0]
    over_seeds = _draw(SeededSampling(range(DRAWS), temperature, top_p), logits.expand(DRAWS, -1))
    frequencies = torch.bincount(over_seeds, minlength=12) / DRAWS
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert bool(((frequencies - expected).abs() <= 4.5 * error).all())


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-320, 1.0), (1e-38, 0.5), (1.0, 1e-320)])
def test_next_to_nothing_leaves_the_likeliest(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[4.0, 30.0, 31.0, -torch.inf]]).expand(100, -1)
    assert set(_draw(SeededSampling(range(100), temperature, top_p), logits).tolist()) == {2}


def test_one_seed_draws_independently_at_every_token() -> None:
    logits = torch.zeros(1, 2)
    sampling = SeededSampling([7])
    drawn = torch.tensor(
        [
            int(sampling(torch.zeros(1, 5 + i, dtype=torch.long), logits).argmax())
            for i in range(4000)
        ]
    ).double()
    assert abs(float(drawn.mean()) - 0.5) < 4.5 * 0.5 / 4000**0.5
    centred = drawn - drawn.mean()
    correlation = float((centred[1:] * centred[:-1]).mean() / centred.var())
    assert abs(correlation) < 4.5 / 4000**0.5


def test_a_row_follows_its_seed_and_not_its_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    together = _draw(SeededSampling([5, 9, 5, 1, 2, 3], 0.8, 0.95), logits, index=4)
    for row, seed in enumerate([5, 9, 5, 1, 2, 3]):
        alone = _draw(SeededSampling([seed], 0.8, 0.95), logits[row : row + 1], index=4)
        assert int(alone) == int(together[row])
    rows = torch.tensor([4, 1])
    kept = SeededSampling([5, 9, 5, 1, 2, 3], 0.8, 0.95).keep(rows)
    assert _draw(kept, logits[rows], index=4).tolist() == together[rows].tolist()


def test_bits_are_those_of_splitmix64() -> None:
    def reference(state: int) -> int:
        mask = (1 << 64) - 1
        z = (state + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    states = [0, 1, 2**31 - 1, 123456789, 2**62 + 5]
    found = [int(bits) % 2**64 for bits in _mixed(torch.tensor(states))]
    assert found == [reference(state) for state in states]


def test_responses_do_not_depend_on_batch_mates(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model()
    prompts = [[{"role": "user", "content": "one plus two " * n}] for n in (1, 4, 2, 3)]
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.9}
    seeds = [11, 12, 13, 14]
    together = generate_responses(model, tiny_tokenizer, prompts, seeds=seeds, **options)
    for prompt, seed, response in zip(prompts, seeds, together, strict=True):
        [alone] = generate_responses(model, tiny_tokenizer, [prompt], seeds=[seed], **options)
        assert alone == response
    again = generate_responses(model, tiny_tokenizer, prompts, seeds=[1, 2, 3, 4], **options)
    assert again != together


def test_there_is_a_seed_for_every_prompt(tiny_model, tiny_tokenizer) -> None:
    with pytest.raises(ConfigError, match="1 seeds for 2 prompts"):
        generate_responses(tiny_model(), tiny_tokenizer, ["a", "b"], max_new_tokens=1, seeds=[1])
