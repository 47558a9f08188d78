"""Two-model decoding equals equation 5 recomputed from nothing at every token."""

import pytest
import torch

from families import MUST_PASS, family_model
from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.generation import PairCache, TwoModelDecoder, generate_responses
from flexalign.lambdas import Schedule
from flexalign.models.pair import ModelPair
from twin import fuse64

PROMPTS = ["one and two", "1+2=", "the answer is six because one and two make three and three more"]
MIXED = [0.5, 2.0, -0.7]
STEPS = 10
GATE = 0.42
"""Between the total variations that these pairs have."""


@pytest.fixture
def inputs(tiny_tokenizer):
    return tiny_tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")


def rows(tokenizer):
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def written(output, inputs):
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def greedy(decoder, inputs, **settings):
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, **settings}
    return written(decoder.generate(**inputs, **settings), inputs)


@torch.no_grad()
def log_probabilities(decoder, ids):
    return decoder(input_ids=ids, lam=2.0).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("kind", ["pair", "shared_pair"])
def test_equals_recomputation(kind, gate, request, naive, inputs, tiny_tokenizer):
    pair = request.getfixturevalue(kind)
    expected = [
        naive(pair, ids, lam, STEPS, gate)
        for ids, lam in zip(rows(tiny_tokenizer), MIXED, strict=True)
    ]
    decoder = TwoModelDecoder(pair)
    for lam in (MIXED, torch.tensor(MIXED)):
        assert greedy(decoder, inputs, lam=lam, gate=gate) == expected


def test_the_gate_matters_in_the_test_above(pair, naive, tiny_tokenizer):
    ids = rows(tiny_tokenizer)
    plain, gated = ([naive(pair, row, 2.0, STEPS, gate) for row in ids] for gate in (None, GATE))
    assert plain != gated
    assert gated != [naive(pair, row, 1.0, STEPS) for row in ids]


@pytest.mark.parametrize(("lam", "side"), [(0.0, "reference"), (1.0, "aligned")])
@pytest.mark.parametrize("kind", ["pair", "shared_pair"])
def test_the_ends_are_the_models_alone_and_only_one_runs(
    kind, lam, side, request, inputs, monkeypatch
):
    pair = request.getfixturevalue(kind)
    with pair.running(side) as model:
        alone = written(
            model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None),
            inputs,
        )
    entered = []
    running = pair.running
    monkeypatch.setattr(pair, "running", lambda side: entered.append(side) or running(side))
    assert greedy(TwoModelDecoder(pair), inputs, lam=lam) == alone
    assert set(entered) == {side}
    mixed = greedy(TwoModelDecoder(pair), inputs, lam=[lam, 0.5, lam])
    assert (mixed[0], mixed[2]) == (alone[0], alone[2])
    assert set(entered) == {"reference", "aligned"}


def test_without_caches_the_same(pair, inputs):
    decoder = TwoModelDecoder(pair)
    cached = greedy(decoder, inputs, lam=MIXED)
    assert greedy(decoder, inputs, lam=MIXED, use_cache=False) == cached


def test_logits_are_equation_5(pair, inputs):
    decoder = TwoModelDecoder(pair)
    sides = [pair.logits(side, **inputs).double() for side in ("reference", "aligned")]
    width = inputs["input_ids"].shape[1]
    for lam in (0.3, torch.tensor(MIXED), torch.rand(3, width)):
        fused = decoder(**inputs, lam=lam).logits.double()
        torch.testing.assert_close(fused, fuse64(*sides, lam), atol=1e-5, rtol=0)


def test_a_forward_pass_goes_on_from_the_caches(pair, inputs):
    ids = inputs["input_ids"][2:]
    decoder = TwoModelDecoder(pair)
    first = decoder(input_ids=ids[:, :-2], lam=2.0, use_cache=True)
    assert isinstance(first.past_key_values, PairCache)
    rest = decoder(input_ids=ids[:, -2:], lam=2.0, past_key_values=first.past_key_values)
    whole = decoder(input_ids=ids, lam=2.0).logits[:, -2:]
    torch.testing.assert_close(rest.logits, whole, atol=1e-5, rtol=0)


def test_beams_search_the_fused_distribution(pair, tiny_tokenizer):
    """One step deep, every beam is known: the best token pairs of the fused model."""
    decoder = TwoModelDecoder(pair)
    ids = torch.tensor([rows(tiny_tokenizer)[0]])
    count = 4
    found = decoder.generate(
        ids, lam=2.0, num_beams=count, num_return_sequences=count, max_new_tokens=2,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    first = log_probabilities(decoder, ids)
    scores = {}
    for token in first.topk(count).indices.tolist():
        longer = torch.cat([ids, torch.tensor([[token]])], -1)
        second = log_probabilities(decoder, longer)
        scores |= {(token, i): float(first[token] + second[i]) for i in range(len(second))}
    best = sorted(scores, key=scores.get, reverse=True)[:count]
    assert [tuple(row) for row in found[:, -2:].tolist()] == best


def test_longer_beams_equal_those_without_caches(pair, inputs):
    decoder = TwoModelDecoder(pair)
    settings = {"lam": MIXED, "num_beams": 3, "max_new_tokens": 6}
    assert greedy(decoder, inputs, **settings) == greedy(
        decoder, inputs, **settings, use_cache=False
    )


def test_every_sample_of_a_prompt_has_its_prompts_lambda(pair, inputs):
    decoder = TwoModelDecoder(pair)
    samples = decoder.generate(
        **inputs, lam=MIXED, num_return_sequences=2, do_sample=True, top_k=1, max_new_tokens=STEPS,
        eos_token_id=None,
    )  # fmt: skip
    expected = greedy(decoder, inputs, lam=MIXED)
    assert written(samples, inputs) == [row for row in expected for _ in range(2)]


def test_a_schedule_goes_by_the_generated_token(pair, naive, inputs, tiny_tokenizer):
    schedule = Schedule.parse({"kind": "linear", "start": -1, "end": 3, "steps": 8})
    decoder = TwoModelDecoder(pair)
    ids = rows(tiny_tokenizer)
    scheduled = [naive(pair, row, lambda step, _: schedule.at(step), STEPS) for row in ids]
    assert greedy(decoder, inputs, lam=schedule) == scheduled
    mixed = greedy(decoder, inputs, lam=[0.5, schedule, 0.5])
    assert mixed[1] == scheduled[1]
    assert mixed[0] == naive(pair, ids[0], 0.5, STEPS)


def test_a_generation_goes_on_from_the_caches_it_returned(pair, inputs):
    decoder = TwoModelDecoder(pair)
    whole = greedy(decoder, inputs, lam=MIXED)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": STEPS // 2}
    first = decoder.generate(
        **inputs, lam=[0, 0, 0], return_dict_in_generate=True, max_new_tokens=1
    )
    assert len(first.past_key_values.caches()) == 2
    half = decoder.generate(**inputs, lam=MIXED, return_dict_in_generate=True, **settings)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS // 2).long()], -1)
    rest = decoder.generate(
        half.sequences,
        attention_mask=mask,
        past_key_values=half.past_key_values,
        lam=MIXED,
        **settings,
    )
    assert written(rest, inputs) == whole


def test_a_thinking_schedule_sees_the_tags(pair, naive, tiny_tokenizer):
    """The script forces the tags; between them the free tokens show which λ was used."""
    schedule = Schedule.parse(
        {"kind": "thinking", "think": 0.0, "answer": 2.0, "budget": 2, "end": -1.5}
    )
    opening, closing = tiny_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    everything = list(range(len(tiny_tokenizer)))
    plain = rows(tiny_tokenizer)[0]
    for ids, script, lams in (
        (plain, {1: opening, 5: closing}, [2, 2, 0, -0.75, -1.5, -1.5, 2, 2]),
        ([*plain, opening], {2: closing}, [0, -0.75, -1.5, 2, 2, 2, 2, 2]),
    ):
        expected = []
        for step, lam in enumerate(lams):
            free = naive(pair, ids + expected, float(lam), 1)
            expected.append(script.get(step, free[0]))
        output = TwoModelDecoder(pair).generate(
            torch.tensor([ids]),
            lam=schedule,
            max_new_tokens=len(lams),
            do_sample=False,
            eos_token_id=None,
            prefix_allowed_tokens_fn=lambda _, sequence, script=script, start=len(ids): (
                [script[len(sequence) - start]] if len(sequence) - start in script else everything
            ),
        )
        assert output[0, len(ids) :].tolist() == expected


def test_responses_take_one_lambda_per_prompt(pair, naive, tiny_tokenizer):
    responses = generate_responses(
        TwoModelDecoder(pair), tiny_tokenizer, PROMPTS, max_new_tokens=STEPS, temperature=0,
        batch_size=2, lam=MIXED,
    )  # fmt: skip
    for response, ids, lam in zip(responses, rows(tiny_tokenizer), MIXED, strict=True):
        end = tiny_tokenizer.eos_token_id
        expected = naive(pair, ids, lam, STEPS, ends=(end,))
        assert list(response.token_ids) == [token for token in expected if token != end]


def test_padded_widths_never_come_out(tiny_model, tiny_tokenizer, inputs):
    pair = ModelPair.of(
        tiny_model(vocab_size=400), tiny_model(vocab_size=384, seed=1), tiny_tokenizer
    )
    decoder = TwoModelDecoder(pair)
    assert decoder(**inputs, lam=2.0).logits.shape[-1] == len(tiny_tokenizer)
    for lam in (0.0, 2.0):
        output = decoder.generate(**inputs, lam=lam, do_sample=True, top_k=0, max_new_tokens=30)
        assert int(output.max()) < len(tiny_tokenizer)


@pytest.mark.parametrize("family", MUST_PASS)
def test_every_family_decodes_as_recomputed(family, naive, tiny_tokenizer):
    pair = ModelPair.of(family_model(family, 0), family_model(family, 1), tiny_tokenizer)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    lams = [0.4, 1.7]
    expected = [naive(pair, row, lam, 5) for row, lam in zip(prompts, lams, strict=True)]
    assert greedy(TwoModelDecoder(pair), inputs, lam=lams, max_new_tokens=5) == expected


@pytest.mark.parametrize(
    ("settings", "error", "remedy"),
    [
        ({"lam": [1.0, 2.0]}, LambdaError, "one for each prompt"),
        ({"lam": float("nan")}, LambdaError, "finite"),
        ({"lam": torch.zeros(2, 4)}, LambdaError, r"\(3,\)"),
        ({"lam": 2.0, "gate": 2.0}, ConfigError, "in \\[0, 1\\]"),
        ({"past_key_values": PairCache()}, ConfigError, "return_dict_in_generate"),
        ({"prompt_lookup_num_tokens": 3}, ConfigError, "assisted"),
    ],
)
def test_bad_settings(pair, inputs, settings, error, remedy):
    with pytest.raises(error, match=remedy):
        TwoModelDecoder(pair).generate(**inputs, **settings, max_new_tokens=2)


def test_no_prompt(pair):
    with pytest.raises(ConfigError, match="input_ids"):
        TwoModelDecoder(pair).generate(lam=0.5, max_new_tokens=2)


def test_recurrent_models_are_refused_by_name(tiny_tokenizer, inputs):
    pair = ModelPair.of(family_model("mamba", 0), family_model("mamba", 1), tiny_tokenizer)
    inputs = {"input_ids": torch.arange(5, 9)[None]}
    with pytest.raises(UnsupportedModelError, match=r"mamba.*use_cache=False"):
        TwoModelDecoder(pair).generate(**inputs, lam=0.5, max_new_tokens=2)


def test_responses_are_padded_as_the_tokenizer_says_where_no_model_does(pair, inputs):
    for model in (pair.reference, pair.aligned):
        model.generation_config.pad_token_id = None
    decoder = TwoModelDecoder(pair)
    assert decoder.generation_config.pad_token_id == pair.tokenizer.pad_token_id
    whole = greedy(decoder, inputs, lam=MIXED, max_new_tokens=6)
    ends = [row[2] for row in whole]
    cut = greedy(decoder, inputs, lam=MIXED, max_new_tokens=6, eos_token_id=ends[0])
    end = whole[0].index(ends[0]) + 1
    assert cut[0][:end] == whole[0][:end]
    assert set(cut[0][end:]) <= {pair.tokenizer.pad_token_id}


def test_lambda_is_checked_where_it_enters_and_not_at_every_token(pair, inputs, monkeypatch):
    decoder = TwoModelDecoder(pair)
    expected = greedy(decoder, inputs, lam=MIXED)
    with pytest.raises(LambdaError, match="finite"):
        decoder(**inputs, lam=float("nan"))

    def refuse(lam):
        raise AssertionError("λ was checked again")

    for name in ("flexalign.fusion.as_lambda", "flexalign.generation.two_model.as_lambda"):
        monkeypatch.setattr(name, refuse)
    assert greedy(decoder, inputs, lam=MIXED) == expected
