"""The same policies over a pair: fast is the aligned model, slow the reference."""

import torch

from flexalign.generation import TwoModelDecoder
from flexalign.generation.responses import generate_responses
from flexalign.lambdas import Adaptive, Route

PROMPTS = ["one and two", "1+2=", "the answer is six because one and two make three"]
STEPS = 8


def test_each_row_goes_its_way(pair, naive, tiny_tokenizer):
    decoder = TwoModelDecoder(pair)
    rows = [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    fast = [naive(pair, ids, 1.0, STEPS) for ids in rows]
    end = fast[0][2]
    decoder.generation_config.eos_token_id = [end, tiny_tokenizer.eos_token_id]
    ends = decoder.generation_config.eos_token_id
    fast, slow, half = (
        [naive(pair, ids, lam, STEPS, ends=ends) for ids in rows] for lam in (1.0, 0.0, 0.5)
    )
    responses = generate_responses(
        decoder,
        tiny_tokenizer,
        PROMPTS,
        max_new_tokens=STEPS,
        temperature=0,
        policy=[Adaptive(0), 0.5, Adaptive(1)],
    )

    def body(tokens):
        return tokens[:-1] if tokens[-1] in ends else tokens

    assert [response.route for response in responses] == ["fast", None, "slow"]
    expected = [body(fast[0]), body(half[1]), body(slow[2])]
    assert [list(response.token_ids) for response in responses] == expected
    assert [response.rejected_tokens for response in responses[:2]] == [0, 0]
    assert responses[2].rejected_tokens > 0
    assert responses[2].tokens == len(expected[2]) + responses[2].rejected_tokens


def test_a_route_draws_from_the_seed(pair, tiny_tokenizer):
    def ways(seed):
        responses = generate_responses(
            TwoModelDecoder(pair),
            tiny_tokenizer,
            PROMPTS * 8,
            max_new_tokens=1,
            seed=seed,
            policy=Route(0.5),
        )
        return [response.route for response in responses]

    assert ways(1) == ways(1) != ways(2)
    assert set(ways(1)) == {"fast", "slow"}


def test_several_slow_samples_go_on_from_one_prefill(pair, tiny_tokenizer):
    decoder = TwoModelDecoder(pair)
    ids = torch.tensor([tiny_tokenizer(PROMPTS[0])["input_ids"]])
    settings = {"do_sample": True, "top_k": 1, "max_new_tokens": STEPS, "num_return_sequences": 2}
    slow = decoder.generate(ids, policy=Adaptive(1), **settings)
    assert torch.equal(slow, decoder.generate(ids, lam=0, **settings))
