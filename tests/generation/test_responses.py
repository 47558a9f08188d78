"""Batches change nothing: every response is what the model alone would have written."""

import copy

import pytest
import torch

from flexalign.errors import ConfigError, DataError, LambdaError
from flexalign.generation.responses import generate_responses
from flexalign.lambdas import Fixed

QUESTION = [{"role": "user", "content": "what is one plus two"}]
PROMPTS = ["one and two", QUESTION, "1+2=", "the answer is six because one and two make three"]


def alone(model, tokenizer, prompt, limit, ends=()):
    """Greedy decoding without batch, padding or cache."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    written = []
    for _ in range(limit):
        logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            return written
        written.append(token)
    return written


@pytest.fixture
def model(tiny_model, tiny_tokenizer):
    model = tiny_model()
    model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
    return model


def test_batched_greedy_equals_one_by_one(model, tiny_tokenizer):
    expected = [alone(model, tiny_tokenizer, prompt, 9) for prompt in PROMPTS]
    for batch_size in (1, 3, 32):
        responses = generate_responses(
            model,
            tiny_tokenizer,
            PROMPTS,
            max_new_tokens=9,
            temperature=0,
            batch_size=batch_size,
        )
        assert [list(response.token_ids) for response in responses] == expected
        assert [response.text for response in responses] == [
            tiny_tokenizer.decode(ids) for ids in expected
        ]


def test_the_end_token_is_left_out_and_no_cut_off(model, tiny_tokenizer):
    written = [alone(model, tiny_tokenizer, prompt, 9) for prompt in PROMPTS]
    end = written[0][3]
    model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, end]
    expected = [alone(model, tiny_tokenizer, prompt, 9, ends=(end,)) for prompt in PROMPTS]
    responses = generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    assert [list(response.token_ids) for response in responses] == expected
    assert [response.tokens for response in responses] == [len(ids) for ids in expected]
    assert [response.truncated for response in responses] == [len(ids) == 9 for ids in expected]
    assert not responses[0].truncated
    assert len(responses[0].token_ids) <= 3


def test_special_tokens_go_and_thinking_tags_stay(model, tiny_tokenizer):
    script = tiny_tokenizer("<think>one<|im_start|> two</think> six<|im_end|>")["input_ids"]
    prompt = tiny_tokenizer("one")["input_ids"]

    def next_token(batch_id, ids):
        return [script[len(ids) - len(prompt)]]

    (response,) = generate_responses(
        model,
        tiny_tokenizer,
        ["one"],
        max_new_tokens=40,
        temperature=0,
        prefix_allowed_tokens_fn=next_token,
    )
    assert response.text == "<think>one two</think> six"
    assert list(response.token_ids) == script[:-1]
    assert not response.truncated


def test_the_seed_decides_and_nothing_else_is_disturbed(model, tiny_tokenizer):
    def sample(seed):
        return generate_responses(
            model, tiny_tokenizer, PROMPTS, max_new_tokens=12, batch_size=2, seed=seed
        )

    before = torch.get_rng_state()
    first = sample(1)
    torch.rand(5)
    assert sample(1) == first
    assert sample(2) != first
    torch.set_rng_state(before)
    sample(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_checkpoint_says_of_sampling_is_left_out(model, tiny_tokenizer):
    plain = generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.1)
    assert generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=12) == plain
    greedy = generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, temperature=0)
    assert generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, top_k=1) == greedy


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(
    tiny_model, tiny_tokenizer
):
    model = tiny_model("llama", attention_dropout=0.5)
    still = generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    model.train()
    model.lm_head.eval()
    training = generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    assert training == still
    assert model.training
    assert not model.lm_head.training


def test_progress_counts_responses(model, tiny_tokenizer):
    seen = []
    generate_responses(
        model,
        tiny_tokenizer,
        PROMPTS,
        max_new_tokens=2,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 4), (4, 4)]
    assert generate_responses(model, tiny_tokenizer, [], max_new_tokens=2) == []


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"temperature": -1.0}, "0 is greedy"),
        ({"temperature": float("nan")}, "0 is greedy"),
        ({"top_p": 0.0}, "at most 1"),
    ],
)
def test_bad_settings(model, tiny_tokenizer, settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        generate_responses(model, tiny_tokenizer, PROMPTS, **{"max_new_tokens": 2, **settings})


def test_bad_prompts(model, tiny_tokenizer):
    with pytest.raises(DataError, match="is empty"):
        generate_responses(model, tiny_tokenizer, ["one", ""], max_new_tokens=2)
    with pytest.raises(LambdaError, match="one for each"):
        generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=2, lam=[0.0, 1.0])


def test_one_dial_has_one_name(model, tiny_tokenizer):
    with pytest.raises(ConfigError, match="give lam or policy, not both"):
        generate_responses(
            model, tiny_tokenizer, PROMPTS, max_new_tokens=2, lam=1.0, policy=Fixed(1.0)
        )


def test_a_tokenizer_that_names_no_padding_and_no_end_is_enough(model, tiny_tokenizer):
    whole = generate_responses(model, tiny_tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    bare = copy.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    found = generate_responses(model, bare, PROMPTS, max_new_tokens=9, temperature=0)
    assert [one.token_ids for one in found] == [one.token_ids for one in whole]
    bare.eos_token = None
    model.generation_config.eos_token_id = None
    endless = generate_responses(model, bare, PROMPTS, max_new_tokens=9, temperature=0)
    assert [one.tokens for one in endless] == [9] * len(PROMPTS)
    assert all(one.truncated for one in endless)
