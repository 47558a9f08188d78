"""λ is read and checked once, where it enters: no token and no batch does it again."""

import sys
from collections import Counter

import pytest
import torch

from flexalign import fusion, lambdas
from flexalign.generation import TwoModelDecoder, generate_responses
from flexalign.inra import InRaModel
from flexalign.lambdas import Adaptive, Schedule

PROMPTS = ["one and two", "1+2=", "the answer is six because one and two make three"]
CHECKS = ((fusion, "as_lambda"), (lambdas, "parse_dial"), (lambdas, "finite_lambda"))


@pytest.fixture
def counted(monkeypatch):
    """How often λ was read or checked, by function; every module's own name for it is replaced."""
    seen = Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        return count

    for home, name in CHECKS:
        function = getattr(home, name)
        wrapped = counting(name, function)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("flexalign.") and vars(module).get(name) is function:
                monkeypatch.setattr(module, name, wrapped)
    return seen


@pytest.fixture(params=["two models", "two streams"])
def model(request, pair, tiny_model, tiny_tokenizer):
    if request.param == "two models":
        return TwoModelDecoder(pair)
    model = InRaModel.create(tiny_model(initializer_range=0.1))
    model.tokenizer = tiny_tokenizer
    return model


LINEAR = Schedule.parse({"kind": "linear", "start": 0, "end": 1, "steps": 4})


@pytest.mark.parametrize(
    ("lam", "gate", "expected"),
    [
        (0.5, None, {"parse_dial": 1, "finite_lambda": 1}),
        ([0.5, 0.25, 1.0], None, {"parse_dial": 3, "finite_lambda": 3}),
        (LINEAR, 0.2, {}),
        (torch.tensor([0.5, 0.25, 1.0]), None, {"as_lambda": 1}),
    ],
    ids=["number", "list", "schedule", "tensor"],
)
@pytest.mark.parametrize("tokens", [1, 6])
def test_generate_checks_once_for_any_number_of_tokens(
    model, tiny_tokenizer, counted, lam, gate, expected, tokens
):
    batch = tiny_tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": tokens}
    written = model.generate(**inputs, lam=lam, gate=gate, **settings)
    assert written.shape[1] == inputs["input_ids"].shape[1] + tokens
    assert dict(counted) == expected


def test_responses_in_several_batches_read_the_dials_once(model, tiny_tokenizer, counted):
    generate_responses(
        model,
        tiny_tokenizer,
        PROMPTS,
        max_new_tokens=4,
        batch_size=1,
        policy=[0.5, {"policy": "adaptive", "threshold": 1}, "0.25"],
    )
    # A policy checks its two λ; what it gives its streams are values that it makes of them.
    assert counted["parse_dial"] == 3
    assert counted["as_lambda"] == 0


def test_a_policy_is_not_read_again_for_its_parts(model, tiny_tokenizer, counted):
    inputs = tiny_tokenizer(PROMPTS[:1], return_tensors="pt")
    model.generate(inputs["input_ids"], policy=Adaptive(1), max_new_tokens=4)
    assert counted["parse_dial"] == counted["as_lambda"] == 0


def test_a_forward_of_ones_own_is_checked(model, tiny_tokenizer, counted):
    inputs = tiny_tokenizer(PROMPTS[:1], return_tensors="pt")
    model(inputs["input_ids"], lam=0.5)
    assert dict(counted) == {"as_lambda": 1}
