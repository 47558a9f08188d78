"""One model under two prompts equals equation 5 recomputed from two plain forward passes."""

from typing import Any

import pytest
import torch

from families import FAMILIES, family_config, family_model
from flexalign.data.logits import LogitsSettings
from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import Opening, RenderedPrompt
from flexalign.errors import ConfigError, DataError, LambdaError, UnsupportedModelError
from flexalign.generation import TwoPromptDecoder, generate_responses
from flexalign.generation.two_prompts import padded_prompts
from flexalign.lambdas import Adaptive, Route, Schedule
from flexalign.models.prompted import PairRendering, PromptPair, TwoPrompts
from twin import fuse64

ASKED = [
    [{"role": "user", "content": "one and two"}],
    [
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "12+34= check"},
    ],
    [{"role": "user", "content": "the answer is six because one and two make three"}],
]
PROMPTS = PromptPair(
    PromptSettings(), PromptSettings({"enable_thinking": False}, "the answer is one and two.")
)
MIXED = [0.5, 2.0, -0.7]
STEPS = 10
GATE = 0.42
"""Between the total variations that the two prompts have."""

RECURRENT = ("mamba", "jamba", "qwen3_next")


@pytest.fixture
def rendering(hybrid_tokenizer: Any) -> PairRendering:
    return PairRendering(hybrid_tokenizer, PROMPTS)


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return tiny_model(initializer_range=0.15)


@pytest.fixture
def decoder(model: Any, rendering: PairRendering) -> TwoPromptDecoder:
    return TwoPromptDecoder(model, rendering)


@torch.no_grad()
def recompute(
    model: Any,
    prompts: TwoPrompts,
    lam: Any,
    steps: int = STEPS,
    gate: float | None = None,
    ends: tuple[int, ...] = (),
) -> list[int]:
    """Decode one row greedily: two plain forward passes per token, without cache or padding."""
    written: list[int] = []
    for step in range(steps):
        sides = [
            model(torch.tensor([side.ids + written]), use_cache=False).logits[0, -1].double()
            for side in (prompts.reference, prompts.aligned)
        ]
        reference, aligned = (side.log_softmax(-1) for side in sides)
        here = lam(step) if callable(lam) else lam
        written.append(int(fuse64(reference, aligned, here, gate).argmax()))
        if written[-1] in ends:
            break
    return written


def greedy(decoder: TwoPromptDecoder, inputs: dict[str, Any], **settings: Any) -> list[list[int]]:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, **settings}
    output = decoder.generate(**inputs, **settings)
    return [row[inputs["input_ids"].shape[1] :] for row in output.tolist()]


def alone(model: Any, prompt: RenderedPrompt, steps: int = STEPS) -> list[int]:
    """What transformers itself writes to one prompt."""
    ids = torch.tensor([prompt.ids])
    output = model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return list(output[0, len(prompt.ids) :].tolist())


def test_both_prompts_are_padded_to_one_width(decoder: TwoPromptDecoder) -> None:
    inputs = decoder.encode(ASKED)
    shapes = {tuple(value.shape) for value in inputs.values()}
    assert len(shapes) == 1
    for row, asked in enumerate(ASKED):
        both = decoder.rendering.both(asked)
        assert len(both.aligned.ids) > len(both.reference.ids)
        for ids, mask, side in (
            ("input_ids", "attention_mask", both.reference),
            ("aligned_ids", "aligned_mask", both.aligned),
        ):
            real = inputs[mask][row].bool()
            assert inputs[ids][row][real].tolist() == side.ids
            assert real.tolist() == sorted(real.tolist())


@pytest.mark.parametrize("gate", [None, GATE])
def test_equals_recomputation(decoder: TwoPromptDecoder, model: Any, gate: float | None) -> None:
    both = [decoder.rendering.both(asked) for asked in ASKED]
    expected = [
        recompute(model, prompts, lam, gate=gate) for prompts, lam in zip(both, MIXED, strict=True)
    ]
    for lam in (MIXED, torch.tensor(MIXED)):
        assert greedy(decoder, decoder.encode(ASKED), lam=lam, gate=gate) == expected
    # Each row by itself, and without caches.
    for asked, lam, row in zip(ASKED, MIXED, expected, strict=True):
        assert greedy(decoder, decoder.encode([asked]), lam=lam, gate=gate) == [row]
    inputs = decoder.encode(ASKED)
    assert greedy(decoder, inputs, lam=MIXED, gate=gate, use_cache=False) == expected
    assert greedy(decoder, inputs, lam=MIXED, gate=gate, prefill_chunk_size=7) == expected


def test_gate_and_lambda_matter_in_the_test_above(decoder: TwoPromptDecoder, model: Any) -> None:
    both = [decoder.rendering.both(asked) for asked in ASKED]
    rows = {
        setting: [recompute(model, prompts, setting[0], gate=setting[1]) for prompts in both]
        for setting in [(0.0, None), (0.5, None), (1.0, None), (2.0, None), (2.0, GATE)]
    }
    assert len({str(row) for row in rows.values()}) == len(rows)


def test_either_prompt_may_be_the_longer_one(model: Any, hybrid_tokenizer: Any) -> None:
    """Transformers leaves out the mask of a prompt without padding: here that of the reference."""
    told = PromptPair(PROMPTS.aligned, PROMPTS.reference)
    decoder = TwoPromptDecoder(model, PairRendering(hybrid_tokenizer, told))
    for asked in ASKED:
        both = decoder.rendering.both(asked)
        assert len(both.reference.ids) > len(both.aligned.ids)
        for lam in (0.0, 0.5, 1.0, 2.0):
            settings = [{}, {"use_cache": False}, {"prefill_chunk_size": 7}]
            found = [greedy(decoder, decoder.encode([asked]), lam=lam, **how) for how in settings]
            assert found == [[recompute(model, both, lam)]] * 3


@pytest.mark.parametrize(("lam", "side"), [(0.0, "reference"), (1.0, "aligned")])
def test_the_ends_are_the_model_under_one_prompt_which_alone_runs(
    decoder: TwoPromptDecoder, model: Any, lam: float, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(model, getattr(decoder.rendering.both(asked), side)) for asked in ASKED]
    stacked: list[int] = []
    forward = model.model.forward

    def counted(**inputs: Any) -> Any:
        stacked.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", counted)
    assert greedy(decoder, decoder.encode(ASKED), lam=lam) == expected
    assert set(stacked) == {3}
    stacked.clear()
    mixed = greedy(decoder, decoder.encode(ASKED), lam=[lam, 0.5, lam])
    assert (mixed[0], mixed[2]) == (expected[0], expected[2])
    assert set(stacked) == {4}  # only the row between the ends runs twice


@pytest.mark.parametrize("lam", [0.3, torch.tensor(MIXED)])
def test_logits_are_equation_5(decoder: TwoPromptDecoder, model: Any, lam: Any) -> None:
    inputs = decoder.encode(ASKED)
    fused = decoder(**inputs, lam=lam, logits_to_keep=1).logits[:, -1].double()
    for row, asked in enumerate(ASKED):
        both = decoder.rendering.both(asked)
        with torch.no_grad():
            sides = [
                model(torch.tensor([side.ids])).logits[0, -1].double()
                for side in (both.reference, both.aligned)
            ]
        here = lam if isinstance(lam, float) else float(lam[row])
        # Without positions of its own, a forward pass counts columns; rotary ones are relative.
        torch.testing.assert_close(fused[row], fuse64(*sides, here), atol=1e-4, rtol=0)


def test_beams_and_samples_have_their_prompts(decoder: TwoPromptDecoder, model: Any) -> None:
    inputs = decoder.encode(ASKED)
    settings: dict[str, Any] = {"lam": MIXED, "num_beams": 3, "max_new_tokens": 6}
    beams = greedy(decoder, inputs, **settings)
    assert beams == greedy(decoder, inputs, **settings, use_cache=False)
    assert beams == [
        greedy(decoder, decoder.encode([asked]), **{**settings, "lam": lam})[0]
        for asked, lam in zip(ASKED, MIXED, strict=True)
    ]
    expected = greedy(decoder, inputs, lam=MIXED)
    samples = greedy(decoder, inputs, lam=MIXED, num_return_sequences=2, do_sample=True, top_k=1)
    assert samples == [row for row in expected for _ in range(2)]


def test_a_schedule_goes_by_the_generated_token(decoder: TwoPromptDecoder, model: Any) -> None:
    schedule = Schedule.parse({"kind": "linear", "start": -1, "end": 3, "steps": 8})
    both = [decoder.rendering.both(asked) for asked in ASKED]
    expected = [recompute(model, prompts, schedule.at) for prompts in both]
    inputs = decoder.encode(ASKED)
    assert greedy(decoder, inputs, lam=schedule) == expected
    mixed = greedy(decoder, inputs, lam=[1.0, schedule, 0.5])
    assert mixed[1] == expected[1]
    assert mixed[2] == recompute(model, both[2], 0.5)


def test_a_thinking_schedule_follows_the_references_prompt(
    decoder: TwoPromptDecoder, model: Any
) -> None:
    """The reference's prompt leaves the thinking open, and the aligned one has closed it."""
    schedule = Schedule.parse({"kind": "thinking", "think": 2.0, "answer": -0.7})
    (closing,) = decoder.tokenizer("</think>", add_special_tokens=False)["input_ids"]
    both = decoder.rendering.both(ASKED[0])
    first = recompute(model, both, 2.0, steps=2)
    everything = list(range(len(decoder.tokenizer)))
    inputs = decoder.encode(ASKED[:1])
    start = inputs["input_ids"].shape[1] + 2
    (found,) = greedy(
        decoder,
        inputs,
        lam=schedule,
        max_new_tokens=5,
        prefix_allowed_tokens_fn=lambda _, ids: [closing] if len(ids) == start else everything,
    )
    written = [*first, closing]
    for _ in range(2):
        after = _with(both, written)
        written += recompute(model, after, -0.7, steps=1)
    assert found == written


def _with(prompts: TwoPrompts, written: list[int]) -> TwoPrompts:
    """Both prompts with the same tokens after them."""
    sides = (prompts.reference, prompts.aligned)
    return TwoPrompts(
        *(RenderedPrompt("", side.ids + written, Opening.FREE, None) for side in sides)
    )


def test_a_sweep_has_one_prefill(decoder: TwoPromptDecoder, model: Any) -> None:
    inputs = decoder.encode(ASKED)
    lams = [0.0, 0.5, 1.0, 2.0]
    output = decoder.sweep(
        **inputs, lams=lams, max_new_tokens=STEPS, do_sample=False, eos_token_id=None
    )
    rows = [row[inputs["input_ids"].shape[1] :] for row in output.tolist()]
    assert rows == [
        recompute(model, decoder.rendering.both(asked), lam) for asked in ASKED for lam in lams
    ]


def test_a_generation_goes_on_from_the_cache_it_returned(decoder: TwoPromptDecoder) -> None:
    inputs = decoder.encode(ASKED)
    whole = greedy(decoder, inputs, lam=MIXED)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    half = decoder.generate(
        **inputs, lam=MIXED, return_dict_in_generate=True, max_new_tokens=STEPS // 2, **settings
    )
    new = half.sequences[:, inputs["input_ids"].shape[1] :]
    ones = torch.ones_like(new)
    rest = decoder.generate(
        half.sequences,
        aligned_ids=torch.cat([inputs["aligned_ids"], new], 1),
        attention_mask=torch.cat([inputs["attention_mask"], ones], 1),
        aligned_mask=torch.cat([inputs["aligned_mask"], ones], 1),
        past_key_values=half.past_key_values,
        lam=MIXED,
        max_new_tokens=STEPS // 2,
        **settings,
    )
    assert rest[:, inputs["input_ids"].shape[1] :].tolist() == whole


def test_each_row_of_a_policy_goes_its_way(decoder: TwoPromptDecoder, model: Any) -> None:
    both = [decoder.rendering.both(asked) for asked in ASKED]
    end = recompute(model, both[0], 1.0)[2]
    decoder.generation_config.eos_token_id = [end, *decoder.rendering.stop_ids]
    ends = tuple(decoder.generation_config.eos_token_id)
    expected = [
        recompute(model, prompts, lam, ends=ends)
        for prompts, lam in zip(both, (1.0, 0.5, 0.0), strict=True)
    ]
    responses = generate_responses(
        decoder, decoder.tokenizer, both, max_new_tokens=STEPS, temperature=0, batch_size=3,
        policy=[Adaptive(0), 0.5, Adaptive(1)],
    )  # fmt: skip
    assert [response.route for response in responses] == ["fast", None, "slow"]
    bodies = [row[:-1] if row[-1] in ends else row for row in expected]
    assert [list(response.token_ids) for response in responses] == bodies
    assert responses[2].rejected_tokens > 0

    ways = generate_responses(
        decoder, decoder.tokenizer, both * 4, max_new_tokens=1, policy=Route(0.5)
    )
    assert {response.route for response in ways} == {"fast", "slow"}


def test_responses_are_those_of_their_rows(decoder: TwoPromptDecoder, model: Any) -> None:
    both = [decoder.rendering.both(asked) for asked in ASKED]
    responses = generate_responses(
        decoder, decoder.tokenizer, both, max_new_tokens=STEPS, temperature=0, batch_size=2,
        lam=MIXED,
    )  # fmt: skip
    ends = tuple(decoder.rendering.stop_ids)
    for response, prompts, lam in zip(responses, both, MIXED, strict=True):
        expected = recompute(model, prompts, lam, ends=ends)
        assert list(response.token_ids) == [token for token in expected if token not in ends]


def test_penalties_count_the_references_prompt(decoder: TwoPromptDecoder) -> None:
    """A batch is padded to its longest prompt, of either side, and no row depends on another."""
    both = [decoder.rendering.both(asked) for asked in ASKED]
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "temperature": 0, "lam": 0.5}
    logits = LogitsSettings(repetition_penalty=1.5, frequency_penalty=0.5)
    tokenizer = decoder.tokenizer
    together = generate_responses(decoder, tokenizer, both, logits=logits, **settings)
    alone = [generate_responses(decoder, tokenizer, [p], logits=logits, **settings) for p in both]
    assert together == [one for (one,) in alone]
    assert together != generate_responses(decoder, tokenizer, both, **settings)


def test_stop_tokens_of_both_templates_end_a_response(model: Any, hybrid_tokenizer: Any) -> None:
    hybrid_tokenizer.chat_template = hybrid_tokenizer.chat_template.replace(
        "{% endgeneration %}<|im_end|>", "{% endgeneration %}{{ stop or '<|im_end|>' }}"
    )
    prompts = PromptPair(aligned=PromptSettings({"stop": "<|bos|>"}))
    decoder = TwoPromptDecoder(model, PairRendering(hybrid_tokenizer, prompts))
    ends = hybrid_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|bos|>"])
    assert set(ends) <= set(decoder.generation_config.eos_token_id)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in RECURRENT])
def test_every_family_decodes_as_recomputed(
    family: str, hybrid_tokenizer: Any, rendering: PairRendering
) -> None:
    """Windows are shorter than both prompts, and the prompts' lengths differ on both sides."""
    config = family_config(family)
    windows: dict[str, Any] = {}
    if hasattr(config, "sliding_window"):
        windows = {"sliding_window": 4}
        if hasattr(config, "use_sliding_window"):
            windows |= {"use_sliding_window": True, "max_window_layers": 0}
    model = family_model(family, **windows)
    decoder = TwoPromptDecoder(model, rendering)
    rows = [
        ([5, 6, 7, 8, 9, 10], [5, 6, 7]),
        ([11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27, 12, 13]),
        ([30], [31, 32]),
    ]
    both = [
        TwoPrompts(*(RenderedPrompt("", ids, Opening.FREE, 2) for ids in sides)) for sides in rows
    ]
    lams = [0.4, 1.7, 1.0]
    expected = [recompute(model, p, lam, 7) for p, lam in zip(both, lams, strict=True)]
    inputs = padded_prompts(both, 0, torch.device("cpu"))
    assert greedy(decoder, inputs, lam=lams, max_new_tokens=7) == expected


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_are_refused_by_name(family: str, rendering: PairRendering) -> None:
    with pytest.raises(UnsupportedModelError, match="no recurrent ones"):
        TwoPromptDecoder(family_model(family), rendering)


def test_a_prompt_longer_than_the_context_is_refused(
    tiny_model: Any, rendering: PairRendering
) -> None:
    both = rendering.both(ASKED[0])
    reference, aligned = len(both.reference.ids), len(both.aligned.ids)
    model = tiny_model(max_position_embeddings=reference)
    decoder = TwoPromptDecoder(model, rendering)
    with pytest.raises(DataError, match=f"{aligned} tokens under the aligned prompt alone"):
        decoder.generate(**decoder.encode(ASKED[:1]), lam=0.0, max_new_tokens=1)
    rendering.context = reference - 1
    with pytest.raises(DataError, match="tokens for the reference and"):
        rendering.both(ASKED[0])


@pytest.mark.parametrize(
    ("settings", "error", "remedy"),
    [
        ({"lam": [1.0, 2.0]}, LambdaError, "one for each prompt"),
        ({"lam": float("nan")}, LambdaError, "finite"),
        ({"lam": 2.0, "gate": 2.0}, ConfigError, "in \\[0, 1\\]"),
        ({"aligned_ids": None}, ConfigError, "aligned_ids"),
        ({"aligned_ids": torch.ones(3, 2).long()}, ConfigError, "left padded to one width"),
        ({"prompt_lookup_num_tokens": 3}, ConfigError, "assisted"),
        ({"cache_implementation": "static"}, ConfigError, "dynamic cache"),
    ],
)
def test_bad_settings(
    decoder: TwoPromptDecoder, settings: dict[str, Any], error: type[Exception], remedy: str
) -> None:
    with pytest.raises(error, match=remedy):
        decoder.generate(**{**decoder.encode(ASKED), **settings}, max_new_tokens=2)


def test_an_adapted_model_keeps_its_adapter(tiny_model: Any, rendering: PairRendering) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(tiny_model(initializer_range=0.1), config).eval()
    decoder = TwoPromptDecoder(adapted, rendering)
    both = rendering.both(ASKED[0])
    (found,) = greedy(decoder, decoder.encode(ASKED[:1]), lam=2.0)
    assert found == recompute(adapted, both, 2.0)
