"""Aligning the miniature's reference by reinforcement learning and by supervised training."""

import copy
import dataclasses
import json
import random

import pytest
import torch

from flexalign.errors import ConfigError
from flexalign.miniature import REFERENCE, folder, make_questions
from flexalign.miniature.align import (
    RECORD,
    Reinforcement,
    align,
    alignment_options,
    card,
    reinforce,
    reward_function,
)
from flexalign.miniature.build import ALIGNED_SCHOOLING, Schooling, teach
from flexalign.miniature.demo import load_pair
from flexalign.miniature.measure import branch_probabilities
from flexalign.miniature.world import sample_trace
from flexalign.models.loading import fingerprint, load_model, load_tokenizer

SHORT = Reinforcement(steps=2, groups=2, group_size=2, longest=24)


@pytest.fixture(scope="module")
def reference():
    return load_model(str(folder("reference")))


def reinforced(reference, options, seed=0):
    model = copy.deepcopy(reference)
    reinforce(model, load_tokenizer(str(folder("reference"))), options, seed, callbacks=[])
    return model.state_dict()


def differing(one, other):
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def test_a_response_is_worth_its_rightness_less_the_cost_of_its_tokens():
    reward = reward_function(Reinforcement(cost=0.01), seed=0)
    texts = [
        "<think> #1 3 + 4 = 7 ; </think> 7",  # right, 10 tokens
        "<think> #1 3 + 4 = 8 ; </think> 8",  # wrong
        "<think> </think> 7",  # right, 3 tokens
        "<think> #1 3 + 4 = 7 ;",  # cut off
    ]
    found = reward(
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        terms=[[3, 4]] * 4,
        prompts=None,
    )
    assert found == pytest.approx([0.90, -0.10, 0.97, -0.08])


def test_the_controls_do_not_read_the_response():
    right, wrong = ("<think> </think> 7", "<think> </think> 8")
    for name, values in (("constant", {0.0}), ("random", {0.0, 1.0})):
        options = Reinforcement(reward=name)
        found = [
            reward_function(options, seed=4)(
                completions=[[{"content": text}] for text in texts], terms=[[3, 4]] * 40
            )
            for texts in ([right] * 40, [wrong] * 40)
        ]
        assert found[0] == found[1]
        assert set(found[0]) == values


def test_grpo_learns_from_the_reward_and_the_same_seed_learns_the_same(reference):
    before = reference.state_dict()
    options = dataclasses.replace(SHORT, cost=0.1, longest=40, group_size=4)
    first, second = (reinforced(reference, options, seed=3) for _ in range(2))
    assert differing(first, before)
    assert not differing(first, second)
    assert differing(first, reinforced(reference, options, seed=4))


def test_a_constant_reward_changes_nothing_and_a_random_one_does(reference):
    before = reference.state_dict()
    constant = dataclasses.replace(SHORT, reward="constant")
    assert not differing(reinforced(reference, constant), before)
    by_coin = dataclasses.replace(SHORT, reward="random", group_size=4)
    assert differing(reinforced(reference, by_coin), before)


@pytest.mark.slow
def test_a_high_cost_shortens_the_responses(reference):
    """Where rightness is worth little beside the cost, the trained model writes fewer passes."""
    options = Reinforcement(cost=1.0, steps=6, groups=4, group_size=4, learning_rate=1e-3)
    model = copy.deepcopy(reference)
    tokenizer = load_tokenizer(str(folder("reference")))
    reinforce(model, tokenizer, options, 0, callbacks=[])
    questions = make_questions(30, 5)
    traces = [sample_trace(one, REFERENCE, random.Random(i)) for i, one in enumerate(questions)]

    def logits_of(one):
        return lambda ids, mask: one(input_ids=ids, attention_mask=mask).logits

    found = branch_probabilities(
        {"before": logits_of(reference), "after": logits_of(model)}, tokenizer, questions, traces
    )
    goes_on = {name: values["again"].mean for name, values in found.items()}
    assert goes_on["after"] < goes_on["before"] - 0.02


def test_an_aligned_folder_is_a_model_with_its_card_and_its_record(tmp_path):
    output = tmp_path / "rl" / "seed=0"
    options = dataclasses.replace(SHORT, cost=0.1, longest=40, group_size=4)
    record = align(output, options, seed=0, questions=8)
    assert json.loads((output / RECORD).read_text(encoding="utf-8")) == record
    assert fingerprint(output) != fingerprint(folder("reference"))

    _, _, tokenizer = load_pair()
    ids = tokenizer("3 + 4 ?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert load_model(str(output))(input_ids=ids).logits.shape[-1] == len(tokenizer)

    text = (output / "README.md").read_text(encoding="utf-8")
    assert "`flexalign miniature align --method grpo --seed 0 --steps 2 --cost 0.1`" in text
    assert str(tmp_path) not in text
    for side in ("reference", "aligned"):
        low, mean, high = record[side]["accuracy"]
        assert low <= mean <= high
        assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in text
    change = record["change"]["tokens"][1]
    tokens = [record[side]["tokens"][1] for side in ("reference", "aligned")]
    assert change == pytest.approx(tokens[1] - tokens[0])

    with pytest.raises(ConfigError, match="is not empty"):
        align(output, options, seed=0)


def test_sft_is_the_training_of_the_model_that_ships(tmp_path, monkeypatch):
    seen = []

    def watched(model, schooling, seed):
        seen.append((schooling, seed))
        teach(model, dataclasses.replace(schooling, batch_size=2), seed, callbacks=[])

    monkeypatch.setattr("flexalign.miniature.align.teach", watched)
    record = align(tmp_path / "sft", alignment_options("sft", None, 1, None), seed=5, questions=4)
    assert seen == [(dataclasses.replace(ALIGNED_SCHOOLING, steps=1), 6)]
    assert (record["method"], record["seed"]) == ("sft", 5)
    assert "--method sft --seed 5 --steps 1`" in card(record)


def test_options_that_are_not_given_are_the_methods_own():
    assert alignment_options("grpo", None, None, None) == Reinforcement()
    assert alignment_options("sft", None, None, None) == ALIGNED_SCHOOLING
    assert isinstance(alignment_options("sft", None, 3, None), Schooling)
    chosen = alignment_options("grpo", 0.02, 7, "right")
    assert (chosen.cost, chosen.steps, chosen.reward) == (0.02, 7, "right")
    assert alignment_options("grpo", None, None, "constant").cost == 0.0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("dpo", None, None, None), "take grpo or sft"),
        (("grpo", None, 0, None), "--steps must be"),
        (("grpo", -0.1, None, None), "--cost must be"),
        (("grpo", float("nan"), None, None), "--cost must be"),
        (("grpo", None, None, "short"), "take right, constant, random"),
        (("grpo", 0.1, None, "constant"), "that reward has no cost"),
        (("sft", 0.1, None, None), "--cost is of --method grpo"),
        (("sft", None, None, "right"), "--reward is of --method grpo"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(given, reason):
    with pytest.raises(ConfigError, match=reason):
        alignment_options(*given)
