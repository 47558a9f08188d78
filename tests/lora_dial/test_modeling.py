"""What a LoRA dial writes is what plain models with W + λ·s·B·A write, one per λ."""

from functools import wraps

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from contract.subjects import put_lora
from families import family_model
from flexalign import LoRADial
from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.generation.policies import RoutedOutput
from flexalign.generation.row_lambdas import RowDials
from flexalign.lambdas import Adaptive, Fixed, Schedule
from flexalign.lora_dial import LoRADialConfig

MIXED = [0.5, 3.0, -1.0]
STEPS = 8
LINEAR = Schedule.parse({"kind": "linear", "start": -1, "end": 3, "steps": 6})


@pytest.mark.parametrize(
    "lam", [MIXED, torch.tensor(MIXED), [0.0, 1.0, 0.4], [0, 0, 0], 1, Fixed(0.3)], ids=str
)
def test_equals_plain_models(dial, greedy, naive, rows, lam):
    per_row = [lam] * 3 if isinstance(lam, int | Fixed) else list(lam)
    per_row = [part.lam if isinstance(part, Fixed) else float(part) for part in per_row]
    expected = [naive(dial, ids, one, STEPS) for ids, one in zip(rows, per_row, strict=True)]
    assert greedy(dial, lam=lam, max_new_tokens=STEPS) == expected
    assert greedy(dial, lam=lam, max_new_tokens=STEPS, use_cache=False) == expected


def test_the_settings_of_the_test_above_differ(dial, naive, rows):
    written = [naive(dial, rows[1], lam, STEPS) for lam in (0, 0.5, 1, 3)]
    assert len({tuple(tokens) for tokens in written}) == 4


def test_the_default_is_the_configs(dial, greedy):
    assert greedy(dial, max_new_tokens=4) == greedy(dial, lam=1.0, max_new_tokens=4)


def test_a_schedule_leaves_what_is_cached_at_its_own_lambda(dial, greedy, naive, rows):
    dials = [LINEAR, 0.5, {"kind": "piecewise", "points": [[2, 0], [2, 3]]}]
    expected = [
        naive(dial, rows[0], LINEAR.at, STEPS),
        naive(dial, rows[1], 0.5, STEPS),
        naive(dial, rows[2], lambda step: 0.0 if step < 2 else 3.0, STEPS),
    ]
    assert greedy(dial, lam=dials, max_new_tokens=STEPS) == expected
    assert expected[2] != naive(dial, rows[2], 3.0, STEPS)


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ([0.5, 1.0], "^2 λ for 3 rows; give one number"),
        (torch.ones(4), "^4 λ for 3 rows"),
        (torch.ones(3, 2), r"^λ of shape \(3, 2\) does not fit 3 rows of 5 tokens"),
        (torch.ones(5, 3), r"^λ of shape \(5, 3\) does not fit"),
    ],
    ids=str,
)
def test_a_forward_says_how_many_lambda_it_takes(dial, lam, message):
    with pytest.raises(LambdaError, match=message):
        dial(torch.ones(3, 5, dtype=torch.long), lam=lam)


def test_lambda_by_token_in_one_forward(dial, rows):
    tokens = torch.tensor([rows[2]])
    lam = torch.linspace(-1, 3, tokens.shape[1])[None]
    whole = dial(tokens, lam=lam).logits
    cache, steps = DynamicCache(config=dial.config), []
    for place in range(tokens.shape[1]):
        step = dial(tokens[:, place : place + 1], lam=float(lam[0, place]), past_key_values=cache)
        steps.append(step.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    last = dial(tokens, lam=lam, logits_to_keep=2).logits
    assert torch.allclose(last, whole[:, -2:], atol=1e-5)


def test_a_thinking_schedule_sees_the_tags(dial, tiny_tokenizer, monkeypatch):
    opening = tiny_tokenizer.convert_tokens_to_ids("<think>")
    schedule = {"kind": "thinking", "think": 0.0, "answer": 2.0}
    forward, seen = dial.forward, []

    @wraps(forward)
    def watched(*args, **kwargs):
        seen.append(kwargs["lam"].tolist())
        return forward(*args, **kwargs)

    monkeypatch.setattr(dial, "forward", watched)
    dial.generate(torch.tensor([[7, 8, opening], [7, 8, 9]]), lam=schedule, max_new_tokens=1)
    assert seen == [[0.0, 2.0]]


def test_a_sweep_is_one_batch_with_a_prefill_for_each_lambda(dial, greedy, inputs, passes):
    lams = [0.0, 1.0, 3.0]
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    written = dial.sweep(**inputs, lams=lams, **settings)
    width = inputs["input_ids"].shape[1]
    assert passes == [(9, width)] + [(9, 1)] * (STEPS - 1)
    for place, lam in enumerate(lams):
        expected = greedy(dial, lam=lam, max_new_tokens=STEPS)
        assert written[place::3, width:].tolist() == expected
    with pytest.raises(LambdaError, match="at least one"):
        dial.sweep(**inputs, lams=[])
    with pytest.raises(ConfigError, match="cache of its own"):
        dial.sweep(**inputs, lams=[1], past_key_values=DynamicCache())


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_adaptive_between_two_lambdas(dial, greedy, threshold):
    policy = Adaptive(threshold, fast_lambda=3.0, slow_lambda=0.5)
    expected = greedy(dial, lam=3.0 if threshold == 0 else 0.5, max_new_tokens=STEPS)
    # Without an end a fast answer is never accepted, so it may end anywhere.
    every = list(range(dial.config.vocab_size))
    if threshold == 0:
        written = greedy(dial, policy=policy, max_new_tokens=STEPS, eos_token_id=every)
        assert [row[:1] for row in written] == [row[:1] for row in expected]
    else:
        assert greedy(dial, policy=policy, max_new_tokens=STEPS) == expected


def test_a_policy_prefills_once_for_each_lambda(dial, inputs, passes):
    policies = [
        Adaptive(1.0, fast_lambda=3.0, slow_lambda=0.5),
        0.5,
        {"policy": "route", "share": 0},
    ]
    output = dial.generate(
        **inputs,
        policy=policies,
        max_new_tokens=2,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert isinstance(output, RoutedOutput)
    assert output.route == ["slow", None, "fast"]
    # Row 0 at 3 and 0.5, row 1 at 0.5, row 2 at 1; all but the last token of each.
    assert passes[0] == (4, inputs["input_ids"].shape[1] - 1)
    assert all(tokens == 1 for _, tokens in passes[1:])


def test_prefilled_rows_are_told_apart_by_lambda(dial, inputs):
    rows = torch.arange(3)
    cache = dial.prefill_phases(
        *inputs.values(), [(rows, RowDials.of(0.0, 3)), (rows[1:], RowDials.of(2.0, 2))]
    )
    assert len(cache.places) == 5
    forked = dial.fork_cache(cache, rows[1:2], RowDials.of(2.0, 1))
    alone = dial.prefill_phases(
        inputs["input_ids"][1:2], inputs["attention_mask"][1:2], [(rows[:1], RowDials.of(2.0, 1))]
    )
    mine, theirs = forked.layers[1].keys, alone.cache.layers[1].keys
    assert torch.allclose(mine, theirs, atol=1e-6)
    with pytest.raises(ConfigError, match="prompt 0 was not prefilled at λ = 2"):
        dial.fork_cache(cache, rows[:1], RowDials.of(2.0, 1))


def test_a_cache_is_continued_at_another_lambda(dial, rows, naive):
    ids = torch.tensor([rows[0]])
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = dial.generate(ids, lam=0.0, max_new_tokens=3, **settings)
    more = dial.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        lam=3.0,
        max_new_tokens=3,
        **settings,
    )
    # The last token of the first part has not been read yet.
    expected = naive(dial, rows[0], lambda step: 0.0 if step < 3 else 3.0, 6)
    assert more.sequences[0, ids.shape[1] :].tolist() == expected
    with pytest.raises(ConfigError, match="at least one token more"):
        dial.generate(ids, past_key_values=more.past_key_values, lam=1.0)


def test_samples_and_beams_keep_their_prompts_lambda(dial, inputs, greedy):
    settings = {"max_new_tokens": 5, "eos_token_id": None}
    beams = dial.generate(**inputs, lam=MIXED, num_beams=2, do_sample=False, **settings)
    for row, lam in enumerate(MIXED):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = dial.generate(**one, lam=lam, num_beams=2, do_sample=False, **settings)
        assert beams[row].tolist() == alone[0].tolist()
    samples = dial.generate(
        **inputs, lam=MIXED, num_return_sequences=2, do_sample=True, top_k=1, **settings
    )
    width = inputs["input_ids"].shape[1]
    expected = greedy(dial, lam=MIXED, max_new_tokens=5)
    assert samples[:, width:].tolist() == [row for row in expected for _ in range(2)]


def test_a_gate_is_refused(dial, inputs):
    for ask in (dial, dial.generate):
        with pytest.raises(ConfigError, match="takes no gate"):
            ask(inputs["input_ids"], lam=2.0, gate=0.01)


@pytest.mark.parametrize("lam", [float("nan"), "x", [0.1, 0.2], torch.ones(2), torch.ones(3, 2, 2)])
def test_bad_lambdas(dial, inputs, lam):
    with pytest.raises((LambdaError, ConfigError)):
        dial.generate(**inputs, lam=lam)


def test_a_lambda_outside_the_range_is_noted_once(dial, inputs, recwarn):
    with pytest.warns(UserWarning, match=r"^λ = 6 leaves this adapter's range \[-2, 5\]"):
        dial.generate(**inputs, lam=6.0, max_new_tokens=1)
    recwarn.clear()
    dial.generate(**inputs, lam=7.0, max_new_tokens=1)
    assert not [w for w in recwarn if "leaves" in str(w.message)]


def test_merging_leaves_the_dial_as_it_is(dial, inputs):
    before = dial(**inputs, lam=MIXED).logits
    plain = dial.merged(2.0)
    assert torch.equal(dial(**inputs, lam=MIXED).logits, before)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(dial(**inputs, lam=MIXED).logits, before)
    with pytest.raises(LambdaError):
        dial.merged(float("inf"))


class _Shuffled(nn.Module):
    """A feed-forward part that gives its layer the tokens in another order, as routing does."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        order = torch.arange(hidden.shape[0] * hidden.shape[1]).flip(0)
        flat = self.inner(hidden.reshape(-1, hidden.shape[-1])[order])
        return flat[order].reshape(hidden.shape)


def test_a_layer_that_sees_tokens_in_another_order_is_refused():
    model = put_lora(family_model("llama"))
    layer = model.get_base_model().model.layers[0]
    layer.mlp = _Shuffled(layer.mlp)
    with pytest.raises(UnsupportedModelError, match="disturb each other"):
        LoRADial(model, LoRADialConfig("base", ""))


def test_a_policy_beside_a_thinking_schedule_reads_whole_prompts(dial, tiny_tokenizer):
    opening = tiny_tokenizer.convert_tokens_to_ids("<think>")
    prompts = torch.tensor([[7, 8, 9, opening], [7, 8, 9, 12]])
    thinking = {"kind": "thinking", "think": 0.0, "answer": 3.0}
    policy = Adaptive(1.0, fast_lambda=2.0, slow_lambda=0.5)
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    # The tag is the last token, which the shared prefill leaves out.
    together = dial.generate(prompts, policy=[thinking, policy], **settings)
    alone = dial.generate(prompts[:1], lam=thinking, **settings)
    assert together[0].tolist() == alone[0].tolist()
    assert alone[0].tolist() != dial.generate(prompts[:1], lam=3.0, **settings)[0].tolist()


def test_a_checkpointed_forward_runs_again_at_its_own_lambda(dial, inputs):
    weights = dict(dial.peft.named_parameters())

    def gradients() -> dict[str, torch.Tensor]:
        dial.zero_grad()
        loss = dial(**inputs, lam=MIXED, labels=inputs["input_ids"]).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in weights.items() if p.grad is not None}

    dial.train()
    expected = gradients()
    dial.base.enable_input_require_grads()
    dial.gradient_checkpointing_enable()
    found = gradients()
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6)
