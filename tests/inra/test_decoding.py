"""What generate writes is equation 5, recomputed from nothing at every token."""

import threading
from functools import wraps

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from flexalign.errors import ConfigError, LambdaError
from flexalign.inra import BASE, BOTH, StreamCache
from flexalign.lambdas import Fixed, Schedule

MIXED = [0.5, 2.0, -0.7]
STEPS = 8
GATE = 0.42
"""Between the total variations that the two streams have."""
LINEAR = Schedule.parse({"kind": "linear", "start": -1, "end": 3, "steps": 6})


@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize(
    "lam", [MIXED, torch.tensor(MIXED), [0.0, 1.0, 0.4], [0, 0, 0], 1, Fixed(0.3)], ids=str
)
def test_equals_recomputation(model, greedy, naive, rows, lam, gate):
    per_row = [lam] * 3 if isinstance(lam, int | Fixed) else list(lam)
    per_row = [part.lam if isinstance(part, Fixed) else float(part) for part in per_row]
    expected = [naive(model, ids, one, STEPS, gate) for ids, one in zip(rows, per_row, strict=True)]
    assert greedy(model, lam=lam, gate=gate, max_new_tokens=STEPS) == expected
    assert greedy(model, lam=lam, gate=gate, max_new_tokens=STEPS, use_cache=False) == expected


def test_the_settings_of_the_test_above_differ(model, naive, rows):
    written = [naive(model, rows[1], lam, STEPS) for lam in (0, 0.5, 1, 2)]
    assert len({tuple(tokens) for tokens in written}) == 4
    gated = [naive(model, ids, 2.0, STEPS, gate=GATE) for ids in rows]
    assert gated != [naive(model, ids, 2.0, STEPS) for ids in rows]
    assert gated != [naive(model, ids, 1.0, STEPS) for ids in rows]


def test_a_schedule_counts_generated_tokens(model, greedy, naive, rows):
    dials = [LINEAR, 0.5, {"kind": "piecewise", "points": [[2, 0], [2, 1]]}]
    expected = [
        naive(model, rows[0], LINEAR.at, STEPS),
        naive(model, rows[1], 0.5, STEPS),
        naive(model, rows[2], lambda step: 0.0 if step < 2 else 1.0, STEPS),
    ]
    assert greedy(model, lam=dials, max_new_tokens=STEPS) == expected
    table = torch.tensor([[LINEAR.at(step), 0.5] for step in range(STEPS)]).T[[0, 1, 1]]
    expected[2] = naive(model, rows[2], 0.5, STEPS)
    assert greedy(model, lam=table, max_new_tokens=STEPS) == expected
    assert greedy(model, policy=LINEAR, max_new_tokens=2)[0] == expected[0][:2]


def test_a_thinking_schedule_sees_the_tags(model, rows, tiny_tokenizer, monkeypatch):
    """A logits processor forces the tags; what matters is the λ that forward is given."""
    forward = model.forward
    opening, closing = tiny_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    schedule = {"kind": "thinking", "think": 0.0, "answer": 2.0, "budget": 2, "end": -1.5}
    for start, script, lams in (
        ([], {1: opening, 5: closing}, [2, 2, 0, -0.75, -1.5, -1.5, 2, 2]),
        ([opening], {2: closing}, [0, -0.75, -1.5, 2, 2, 2, 2, 2]),
    ):
        ids = rows[0] + start
        seen = []

        @wraps(forward)
        def spy(*args, seen=seen, **kwargs):
            seen.append(kwargs["lam"].tolist())
            return forward(*args, **kwargs)

        def force(tokens, scores, script=script, prompt=len(ids)):
            forced = script.get(tokens.shape[1] - prompt)
            if forced is not None:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, forced] = 0
            return scores

        monkeypatch.setattr(model, "forward", spy)
        model.generate(
            torch.tensor([ids, ids]),
            attention_mask=torch.ones(2, len(ids)).long(),
            lam=[schedule, 0.25],
            max_new_tokens=len(lams),
            eos_token_id=None,
            logits_processor=LogitsProcessorList([force]),
        )
        assert seen == [[lam, 0.25] for lam in lams]


def test_sampling_is_the_base_at_zero(model, inputs):
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": STEPS}
    written = []
    for sampler, dial in ((model, {"lam": 0.0}), (model.base, {})):
        torch.manual_seed(5)
        written.append(sampler.generate(**inputs, **settings, **dial))
    assert torch.equal(*written)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("lam", [0.0, [0.0, 0.6, 1.0], MIXED], ids=str)
def test_beams_reorder_both_streams(model, inputs, lam, samples):
    settings = {"num_beams": 3, "num_return_sequences": samples, "max_new_tokens": STEPS}
    written = model.generate(**inputs, lam=lam, **settings)
    assert torch.equal(written, model.generate(**inputs, lam=lam, **settings, use_cache=False))
    if lam == 0.0:
        assert torch.equal(written, model.base.generate(**inputs, **settings))


def test_samples_of_a_prompt_follow_its_lambda(model, greedy, naive, rows):
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    written = greedy(model, lam=[0.0, 2.0, LINEAR], max_new_tokens=STEPS, **settings)
    for number, lam in enumerate((0.0, 2.0, LINEAR.at)):
        expected = naive(model, rows[number], lam, STEPS)
        assert written[2 * number : 2 * number + 2] == [expected, expected]


def test_stop_strings_and_streaming(model, tiny_tokenizer, rows):
    class Collect(BaseStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts += value.flatten().tolist()

        def end(self):
            self.ended = True

    prompt = torch.tensor([rows[0]])
    whole = model.generate(prompt, lam=0.5, max_new_tokens=STEPS, eos_token_id=None)[0]
    third = tiny_tokenizer.decode(whole[len(rows[0]) + 2])
    streamer = Collect()
    stopped = model.generate(
        prompt,
        lam=0.5,
        max_new_tokens=STEPS,
        eos_token_id=None,
        stop_strings=[third],
        tokenizer=tiny_tokenizer,
        streamer=streamer,
    )[0]
    assert len(rows[0]) < len(stopped) <= len(rows[0]) + 3
    assert torch.equal(stopped, whole[: len(stopped)])
    assert streamer.parts == stopped.tolist()
    assert streamer.ended


@pytest.mark.parametrize(
    ("lam", "stacked"),
    [(0, 3), (1, 3), (0.5, 6), ([0, 1, 0.5], 4), ([0, LINEAR, 1], 4), ([0, 0, 1], 3)],
    ids=str,
)
def test_a_stream_that_no_token_needs_is_skipped(model, greedy, passes, lam, stacked):
    greedy(model, lam=lam, max_new_tokens=2)
    assert {rows for rows, _ in passes} == {stacked}


def test_both_streams_are_kept_where_the_cache_is_returned(model, inputs, passes):
    output = model.generate(**inputs, lam=0, max_new_tokens=2, return_dict_in_generate=True)
    assert {rows for rows, _ in passes} == {6}
    assert output.past_key_values.plan.streams.tolist() == [BOTH] * 3


def test_a_generation_goes_on_from_its_cache_at_another_lambda(model, greedy, inputs, naive, rows):
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": STEPS // 2}
    half = model.generate(**inputs, lam=0, **settings, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS // 2).long()], -1)
    rest = model.generate(
        half.sequences,
        attention_mask=mask,
        past_key_values=half.past_key_values,
        lam=MIXED,
        **settings,
    )
    for number, lam in enumerate(MIXED):
        first = naive(model, rows[number], 0.0, STEPS // 2)
        expected = first + naive(model, rows[number] + first, lam, STEPS // 2)
        assert rest[number, inputs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("held", [BASE, torch.tensor([1, 2, 3])], ids=str)
def test_a_missing_stream_catches_up(model, greedy, inputs, passes, held):
    expected = greedy(model, lam=MIXED, max_new_tokens=STEPS)
    passes.clear()
    cache = model.prefill(*(value[:, :-2] for value in inputs.values()), streams=held)
    assert greedy(model, lam=MIXED, max_new_tokens=STEPS, past_key_values=cache) == expected
    missing = 3 if held is BASE else 2
    assert passes[1][0] == missing


def test_samples_from_one_prefill(model, greedy, inputs):
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": STEPS}
    cache = model.prefill(*(value[:, :-1] for value in inputs.values()))
    expected = greedy(model, lam=MIXED, **settings)
    assert greedy(model, lam=MIXED, past_key_values=cache, **settings) == expected


def test_a_sweep_prefills_once_and_writes_what_separate_runs_write(model, greedy, inputs, passes):
    lams = [0.0, 0.5, LINEAR, 1.0]
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": STEPS}
    swept = model.sweep(**inputs, lams=lams, **settings)
    prompts, width = inputs["input_ids"].shape
    assert passes[0] == (2 * prompts, width - 1)
    assert set(passes[1:]) == {(prompts * 6, 1)}, "λ=0 and λ=1 take one stream, the others two"
    for number, lam in enumerate(lams):
        assert swept[number :: len(lams), width:].tolist() == greedy(
            model, lam=lam, max_new_tokens=STEPS
        )


def test_a_sweep_of_the_ends_alone_and_of_one_token(model, rows):
    for prompt in (torch.tensor([rows[0]]), torch.tensor([rows[0][:1]])):
        swept = model.sweep(prompt, lams=torch.tensor([0.0, 0.0]), max_new_tokens=3)
        alone = model.base.generate(
            prompt, max_new_tokens=3, attention_mask=torch.ones_like(prompt)
        )
        assert torch.equal(swept, alone.expand(2, -1))


def test_a_sweep_of_several_samples_whose_cache_is_returned(model, inputs):
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 3}
    swept = model.sweep(**inputs, lams=[0, 2], **settings, return_dict_in_generate=True)
    assert swept.past_key_values.plan.streams.tolist() == [BOTH] * 12
    expected = model.generate(**inputs, lam=2, **settings)
    assert torch.equal(swept.sequences.reshape(3, 2, 2, -1)[:, 1].flatten(0, 1), expected)


def test_prefill_in_chunks(model, greedy):
    settings = {"lam": MIXED, "max_new_tokens": STEPS}
    assert greedy(model, **settings, prefill_chunk_size=4) == greedy(model, **settings)


def test_embeddings_in_the_place_of_tokens(model, rows):
    tokens = torch.tensor([rows[0]])
    embeddings = model.base.get_input_embeddings()(tokens)
    settings = {"lam": LINEAR, "max_new_tokens": STEPS, "eos_token_id": None}
    written = model.generate(inputs_embeds=embeddings, **settings)
    assert torch.equal(written, model.generate(tokens, **settings)[:, len(rows[0]) :])


def test_threads_do_not_see_each_other(model, greedy):
    expected = {lam: greedy(model, lam=lam, max_new_tokens=STEPS) for lam in (0.0, 0.5, 2.0)}
    found = {}

    def run(lam):
        found[lam] = [greedy(model, lam=lam, max_new_tokens=STEPS) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(lam,)) for lam in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {lam: [written] * 3 for lam, written in expected.items()}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lam": float("nan")}, LambdaError, "finite"),
        ({"lam": True}, LambdaError, "finite number"),
        ({"lam": [0.1, 0.2]}, LambdaError, "2 λ for 3 prompts"),
        ({"lam": torch.zeros(2)}, LambdaError, "does not fit 3 prompts"),
        ({"lam": {"kind": "lineal"}}, ConfigError, "did you mean 'linear'"),
        ({"lam": {"policy": "fixd", "lambda": 1}}, ConfigError, "did you mean 'fixed'"),
        ({"lam": 0.5, "policy": 0.5}, ConfigError, "not both"),
        ({"gate": 2.0}, ConfigError, r"in \[0, 1\]"),
        ({"assistant_model": object()}, ConfigError, "assisted decoding"),
        ({"prompt_lookup_num_tokens": 3}, ConfigError, "assisted decoding"),
        ({"cache_implementation": "static"}, ConfigError, "'static' is not available"),
        ({"past_key_values": DynamicCache()}, ConfigError, "DynamicCache"),
        ({"output_hidden_states": True}, ConfigError, "output_hidden_states"),
    ],
)
def test_bad_settings_are_refused_before_any_token(model, greedy, passes, settings, error, message):
    with pytest.raises(error, match=message):
        greedy(model, max_new_tokens=2, **settings)
    assert passes == []


def test_other_refusals(model, inputs, greedy):
    with pytest.raises(ConfigError, match="needs input_ids"):
        model.generate(lam=0.5)
    with pytest.raises(LambdaError, match="at least one"):
        model.sweep(**inputs, lams=[])
    with pytest.raises(ConfigError, match="leave past_key_values out"):
        model.sweep(**inputs, lams=[1], past_key_values=model.new_cache())
    with pytest.raises(ConfigError, match="2 rows of"):
        greedy(model, past_key_values=model.prefill(inputs["input_ids"][:2]))
    with pytest.raises(ConfigError, match="one token more"):
        greedy(model, past_key_values=model.prefill(**inputs))
    thinking = {"kind": "thinking", "think": 0, "answer": 1}
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        greedy(model, lam=thinking, prefill_chunk_size=2)
    model.tokenizer = None
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        greedy(model, lam=thinking)


def test_an_empty_cache_of_the_model_is_filled(model, greedy):
    cache = model.new_cache()
    assert isinstance(cache, StreamCache)
    written = greedy(model, lam=0, max_new_tokens=2, past_key_values=cache)
    assert written == greedy(model, lam=0, max_new_tokens=2)
    assert cache.plan is not None
    assert cache.plan.streams.tolist() == [BOTH] * 3
