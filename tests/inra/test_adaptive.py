"""An adaptive batch is what each way alone would have written, and its confidence is recomputed."""

from dataclasses import replace

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from flexalign.errors import ConfigError
from flexalign.generation.seeded import SeededSampling
from flexalign.lambdas import Adaptive, Route

STEPS = 12


def solo(model, ids, lam, end=None):
    """Greedy tokens of one prompt alone, each with its probability, in float64."""
    written, probabilities = [], []
    for _ in range(STEPS):
        with torch.no_grad():
            logits = model(torch.tensor([ids + written]), lam=lam).logits[0, -1].double()
        written.append(int(logits.argmax()))
        probabilities.append(float(logits.softmax(-1).max()))
        if written[-1] == end:
            break
    return written, probabilities


@pytest.fixture
def end(model, rows):
    """A token that ends the first prompt's fast answer."""
    return solo(model, rows[0], 1.0)[0][3]


@pytest.fixture
def run(model, inputs, end, tiny_tokenizer):
    def generate(policy, **options):
        settings = {"do_sample": False, "max_new_tokens": STEPS, "return_dict_in_generate": True}
        settings |= {"eos_token_id": end, "pad_token_id": tiny_tokenizer.pad_token_id}
        return model.generate(policy=policy, **(inputs | settings | options))

    return generate


@pytest.fixture
def answers(inputs, tiny_tokenizer):
    def cut(sequences):
        pad = tiny_tokenizer.pad_token_id
        rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [[token for token in row if token != pad] for row in rows]

    return cut


def expected(model, rows, end, measure):
    found = []
    for ids in rows:
        fast, probabilities = solo(model, ids, 1.0, end)
        product = float(torch.tensor(probabilities, dtype=torch.float64).prod())
        confidence = product if measure == "answer_probability" else min(probabilities)
        found.append((fast, confidence, fast[-1] == end))
    return found


@pytest.mark.parametrize("measure", ["answer_probability", "min_token_probability"])
def test_each_row_goes_its_way(model, run, answers, rows, end, measure):
    fast = expected(model, rows, end, measure)
    assert any(whole for *_, whole in fast)
    every = run(Adaptive(0, measure))
    for row, (tokens, confidence, whole) in enumerate(fast):
        assert every.route[row] == ("fast" if whole else "slow")
        assert every.confidence[row] == pytest.approx(confidence, rel=1e-4)
        if whole:
            assert answers(every.sequences)[row] == tokens
            assert every.rejected_tokens[row] == 0
        else:
            assert answers(every.sequences)[row] == solo(model, rows[row], 0.0, end)[0]
            assert every.rejected_tokens[row] == STEPS
    none = run(Adaptive(1, measure))
    assert none.route == ["slow"] * 3
    assert answers(none.sequences) == [solo(model, ids, 0.0, end)[0] for ids in rows]
    assert all(0 < tokens <= STEPS for tokens in none.rejected_tokens)
    assert all(confidence < 1 for confidence in none.confidence)


def test_the_threshold_is_where_the_way_changes(model, run, rows, end):
    _, confidence, _ = expected(model, rows, end, "answer_probability")[0]
    assert run(Adaptive(confidence * 0.999)).route[0] == "fast"
    assert run(Adaptive(min(1, confidence * 1.001))).route[0] == "slow"


def test_batch_mates_and_other_policies_change_nothing(model, run, answers, rows, end):
    mixed = run([Adaptive(0), 0.5, Route(0)])
    assert answers(mixed.sequences)[0] == solo(model, rows[0], 1.0, end)[0]
    assert answers(mixed.sequences)[1] == solo(model, rows[1], 0.5, end)[0]
    assert answers(mixed.sequences)[2] == solo(model, rows[2], 1.0, end)[0]
    assert mixed.route == ["fast", None, "fast"]
    assert mixed.confidence[1:] == [None, None]
    assert mixed.rejected_tokens == [0, 0, 0]


def test_the_prompts_are_read_once(run, inputs, passes):
    run(Adaptive(1))
    prompts, width = inputs["input_ids"].shape
    assert passes[0] == (2 * prompts, width - 1)
    assert set(passes[1:]) == {(prompts, 1)}, "one stream for each of the two ways"


def test_without_a_cache_and_of_one_token(model, run, answers, rows):
    assert run(Adaptive(0), use_cache=False).route == run(Adaptive(0)).route
    short = {"input_ids": torch.tensor([rows[0][:1]]), "attention_mask": torch.ones(1, 1).long()}
    assert run(Adaptive(1), **short).route == ["slow"]


def test_the_threshold_may_be_the_adapters_own(model, run):
    assert run(Adaptive(0)).route[0] == "fast"
    model.inra_config = replace(model.inra_config, calibration={"threshold": 1.0})
    assert run("auto").route == ["slow"] * 3
    model.inra_config = replace(model.inra_config, calibration={"threshold": 0.0})
    assert run("auto").route[0] == "fast"


def test_agreement_with_one_likely_token_is_certain(model, run, answers, rows, end):
    """Scaled logits make the samples greedy, so all agree; an answer cut off never does."""
    model.base.get_output_embeddings().weight.data *= 1000
    output = run(Adaptive(1, "agreement", samples=3))
    for row, ids in enumerate(rows):
        fast, _ = solo(model, ids, 1.0, end)
        if fast[-1] == end:
            assert (output.route[row], output.confidence[row]) == ("fast", 1.0)
            assert output.rejected_tokens[row] == 3 * (len(fast) - 1)
        else:
            assert (output.route[row], output.confidence[row]) == ("slow", 0.0)
            assert output.rejected_tokens[row] == STEPS


def test_several_samples_of_a_prompt(run, answers):
    one = run(Adaptive(0))
    two = run(Adaptive(0), num_return_sequences=2, do_sample=True, top_k=1)
    assert two.route == [way for way in one.route for _ in range(2)]
    assert answers(two.sequences)[::2] == answers(one.sequences)
    assert answers(two.sequences)[1::2] == answers(one.sequences)


class Collect(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        self.parts += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("threshold", [0, 1])
def test_a_streamer_sees_the_way_taken_alone(run, rows, threshold):
    streamer = Collect()
    prompt = {"input_ids": torch.tensor([rows[0]])}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    output = run(Adaptive(threshold), streamer=streamer, **prompt)
    assert output.route == [("fast", "slow")[threshold]]
    assert streamer.parts == output.sequences[0].tolist()
    assert streamer.ended == 1


def test_every_row_keeps_its_own_seed_on_the_slow_way(model, run, answers):
    def sampled(policy):
        return run(policy, logits_processor=[SeededSampling([5, 6, 7])])

    expected = answers(sampled([0, 0, 0]).sequences)
    output = sampled([Adaptive(0), Adaptive(1), Adaptive(1)])
    assert output.route == ["fast", "slow", "slow"]
    assert answers(output.sequences)[1:] == expected[1:]
    assert answers(output.sequences)[0] == answers(run(Adaptive(0)).sequences)[0]


def test_refusals(model, run, inputs, passes):
    with pytest.raises(ConfigError, match="one prompt at a time"):
        run(Adaptive(), streamer=Collect())
    with pytest.raises(ConfigError, match="past_key_values is not available"):
        run(Adaptive(), past_key_values=model.new_cache())
    with pytest.raises(ConfigError, match="output_scores is not available"):
        run(Adaptive(), output_scores=True)
    with pytest.raises(ConfigError, match="chooses a way"):
        model.sweep(**inputs, lams=[Adaptive()])
    model.tokenizer = None
    with pytest.raises(ConfigError, match="agreement needs the tokenizer"):
        run(Adaptive(measure="agreement"))
    assert passes == []
