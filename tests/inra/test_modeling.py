"""The model around the streams: λ by position, its range, precision, memory, and its base."""

import copy
import gc
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from contract.subjects import stir
from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.inra import ADAPTER, BASE, BOTH, InRaModel
from twin import fuse64


@torch.no_grad()
def ends(model, inputs):
    return tuple(model(**inputs, lam=lam).logits.double() for lam in (0.0, 1.0))


@pytest.mark.parametrize("gate", [None, 0.42])
@torch.no_grad()
def test_lambda_by_position(model, inputs, gate):
    lam = torch.linspace(-2, 4, inputs["input_ids"].numel()).reshape(inputs["input_ids"].shape)
    expected = fuse64(*ends(model, inputs), lam, gate)
    found = model(**inputs, lam=lam, gate=gate).logits.double()
    assert float((found - expected).abs().max()) <= 1e-5
    last = model(**inputs, lam=lam, gate=gate, logits_to_keep=2).logits.double()
    assert float((last - expected[:, -2:]).abs().max()) <= 1e-5
    chosen = model(**inputs, lam=lam, gate=gate, logits_to_keep=torch.tensor([0, 3])).logits
    assert float((chosen.double() - expected[:, [0, 3]]).abs().max()) <= 1e-5


@torch.no_grad()
def test_lambda_where_none_is_given(model, inputs):
    model.inra_config = replace(model.inra_config, default_lambda=0.7)
    expected = model(**inputs, lam=0.7).logits
    assert torch.equal(model(**inputs).logits, expected)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, **settings), model.generate(**inputs, lam=0.7, **settings)
    )


@pytest.mark.parametrize(
    ("lam", "message"),
    [(float("inf"), "finite"), ([0.1, 0.2], "does not fit 3 rows"), ("0.5", "real number")],
)
def test_bad_lambda(model, inputs, lam, message):
    with pytest.raises(LambdaError, match=message):
        model(**inputs, lam=lam)


def test_the_range_is_warned_of_once(base, inputs):
    model = InRaModel.create(base)
    model(**inputs, lam=1.0)
    model.generate(**inputs, lam=[0, 0.5, 1], max_new_tokens=1)
    with pytest.warns(UserWarning, match=r"λ from 0 to 2 leaves this adapter's range \[0, 1\]"):
        model.generate(**inputs, lam=[0, 2, 1], max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, lam=-3.0)
    with pytest.warns(UserWarning, match="^λ = -3 leaves"):
        InRaModel.create(base)(**inputs, lam=-3.0)


def test_a_cache_without_the_stream_is_refused(model, inputs):
    cache = model.prefill(**inputs, streams=BASE)
    token = torch.tensor([[5]] * 3)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1).long()], 1)
    model(token, mask, past_key_values=cache, lam=0.0)
    with pytest.raises(ConfigError, match="does not hold a stream"):
        model(token, mask, past_key_values=cache, lam=[0.0, 0.0, 0.5])
    with pytest.raises(ConfigError, match="does not hold a stream"):
        cache.take(torch.tensor([0]), torch.tensor([ADAPTER]))
    with pytest.raises(ConfigError, match="needs input_ids"):
        model(lam=0.0)


@torch.no_grad()
def test_a_cache_is_rearranged_by_rows(model, inputs, rows):
    """Rows are dropped, repeated and reduced to one stream, and each goes on as if alone."""
    cache = model.prefill(**inputs)
    sources, streams = torch.tensor([2, 0, 0]), torch.tensor([ADAPTER, BASE, BOTH])
    cache.take(sources, streams)
    mask = torch.cat([inputs["attention_mask"][sources], torch.ones(3, 1).long()], 1)
    positions = mask.sum(1, keepdim=True) - 1
    lam = torch.tensor([1.0, 0.0, 0.5])
    token = torch.tensor([[7], [8], [9]])
    found = model(token, mask, positions, past_key_values=cache, lam=lam).logits[:, 0]
    for row, source in enumerate(sources.tolist()):
        alone = torch.tensor([rows[source] + token[row].tolist()])
        expected = model(alone, lam=float(lam[row])).logits[0, -1]
        assert float((found[row] - expected).abs().max()) <= 1e-5


def test_half_precision(model, inputs):
    model.to(torch.bfloat16)
    assert torch.equal(
        model(**inputs, lam=0.0).logits, model.base(**inputs, use_cache=False).logits
    )
    written = model.generate(**inputs, lam=[0, 0.5, 2], max_new_tokens=4)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 4


@torch.no_grad()
def test_the_base_stays_itself(model, base, inputs):
    before = copy.deepcopy(base.state_dict())
    plain = base.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.generate(**inputs, lam=2.0, max_new_tokens=4)
    assert torch.equal(base.generate(**inputs, max_new_tokens=4, do_sample=False), plain)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert before.keys() == base.state_dict().keys()


@torch.no_grad()
def test_two_adapters_on_one_base(model, base, inputs):
    expected = model(**inputs, lam=0.5).logits
    other = InRaModel.create(base)
    stir(other.adapter, 0.2, seed=8)
    assert not torch.allclose(other(**inputs, lam=0.5).logits, expected)
    assert torch.equal(model(**inputs, lam=0.5).logits, expected)


def test_an_adapter_that_is_dropped_leaves_nothing_behind(base):
    model = InRaModel.create(base)
    assert len(base.model.layers[0]._forward_pre_hooks) == 1
    del model
    gc.collect()
    assert not base.model.layers[0]._forward_pre_hooks


@torch.no_grad()
def test_several_adapter_layers(base, inputs, tmp_path):
    model = InRaModel.create(base, adapter_layers=2)
    assert torch.equal(model(**inputs, lam=1.0).logits, model(**inputs, lam=0.0).logits)
    stir(model.adapter, 0.2, seed=3)
    settings = {"lam": [1.0, 0.5, 0.0], "max_new_tokens": 6, "do_sample": False}
    written = model.generate(**inputs, **settings)
    assert torch.equal(written, model.generate(**inputs, **settings, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = InRaModel.from_pretrained(base, tmp_path)
    assert len(loaded.adapter) == 2
    assert torch.equal(loaded.generate(**inputs, **settings), written)


def test_gradient_checkpointing_changes_no_gradient(model, inputs):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**inputs, lam=1.0).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.adapter.parameters()])
    assert model.base.model.layers[0].gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-7)


def test_a_copy_is_a_model_of_its_own(model, inputs):
    expected = model(**inputs, lam=0.5).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs, lam=0.5).logits, expected)
    stir(twin.adapter, 0.2, seed=5)
    assert not torch.allclose(twin(**inputs, lam=0.5).logits, expected)
    assert torch.equal(model(**inputs, lam=0.5).logits, expected)


def test_a_base_with_a_peft_adapter_is_refused(base):
    wrapped = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    with pytest.raises(UnsupportedModelError, match="merge"):
        InRaModel.create(wrapped)


def test_what_is_not_found_is_the_bases(model, base):
    assert model.config is base.config
    assert model.device == base.device
    with pytest.raises(AttributeError, match="no attribute 'wheels'"):
        model.wheels  # noqa: B018


def test_an_empty_cache_is_rearranged_into_an_empty_one_and_joins_nothing(model, inputs):
    empty = model.new_cache()
    empty.batch_select_indices(torch.tensor([1]))
    empty.batch_repeat_interleave(2)
    assert empty.plan is None
    with pytest.raises(ConfigError, match="the cache is empty; run the prompts first"):
        empty.join(model.prefill(**inputs))
    with pytest.raises(ConfigError, match="the cache is empty; run the prompts first"):
        model.prefill(**inputs).append(empty)


@torch.no_grad()
def test_rows_are_chosen_as_transformers_chooses_them(model, inputs, rows):
    cache = model.prefill(**inputs)
    cache.batch_select_indices(torch.tensor([2, 0]))
    mask = torch.cat([inputs["attention_mask"][[2, 0]], torch.ones(2, 1).long()], 1)
    positions = mask.sum(1, keepdim=True) - 1
    token = torch.tensor([[7], [8]])
    found = model(token, mask, positions, past_key_values=cache, lam=0.5).logits[:, 0]
    for row, source in enumerate((2, 0)):
        alone = torch.tensor([rows[source] + token[row].tolist()])
        expected = model(alone, lam=0.5).logits[0, -1]
        assert float((found[row] - expected).abs().max()) <= 1e-5


class _Leaky(torch.nn.Module):
    """A decoder layer whose rows see each other."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        output = self.layer(hidden_states, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden + 0.1 * hidden.mean(0, keepdim=True)


def test_a_base_whose_rows_see_each_other_is_refused_and_stays_as_it_was(base):
    base.model.layers[1] = _Leaky(base.model.layers[1])
    hooks = len(base.model.layers[0]._forward_pre_hooks)
    with pytest.raises(
        UnsupportedModelError, match=r"Qwen2.*disturb each other when they run as rows .*off by"
    ):
        InRaModel.create(base)
    gc.collect()
    assert len(base.model.layers[0]._forward_pre_hooks) == hooks
    assert all(parameter.requires_grad for parameter in base.parameters())
