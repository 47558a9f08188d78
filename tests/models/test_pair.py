"""A pair is refused before any weights are loaded, shares its base, and says what it does."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flexalign.errors import ConfigError, PairMismatchError, UnsupportedModelError
from flexalign.models import compatibility, pair
from flexalign.models.loading import load_model
from flexalign.models.pair import ModelPair

IDS = {"input_ids": torch.arange(5, 15)[None]}


@pytest.fixture
def make(tmp_path, tiny_model, tiny_tokenizer):
    """Save a model with a tokenizer; `edit` changes the tokenizer's JSON."""

    def save(name, seed=0, edit=None, family="llama", template=None, eos="<|im_end|>", **config):
        state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
        if edit is not None:
            edit(state)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)),
            pad_token="<|pad|>",
            bos_token="<|bos|>",
            eos_token=eos,
            chat_template=tiny_tokenizer.chat_template if template is None else template,
        )
        tokenizer.save_pretrained(tmp_path / name)
        tiny_model(family, seed=seed, **config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def reference(make):
    return make("reference")


@pytest.fixture
def adapter(reference, tmp_path):
    """A LoRA on the reference, with its wrapper."""
    return save_adapter(reference, tmp_path / "adapter")


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save_adapter(base, folder, **settings):
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, **settings}
    adapted = get_peft_model(load_model(base), LoraConfig(**settings)).eval()
    adapted.save_pretrained(folder)
    return folder, adapted


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(pair, "load_model", fail)


def refused(reference, aligned, *words, error=PairMismatchError):
    with pytest.raises(error) as caught:
        ModelPair.load(reference, aligned)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_both_sides_are_the_models(reference, make, capsys):
    aligned = make("aligned", seed=1)
    pair = ModelPair.load(reference, aligned)
    assert not pair.shared_base
    assert "GiB" in capsys.readouterr().err
    for side, folder in (("reference", reference), ("aligned", aligned)):
        with torch.no_grad():
            expected = load_model(folder)(**IDS).logits
        assert torch.equal(pair.logits(side, **IDS), expected)
        head = getattr(pair.heads, side)
        torch.testing.assert_close(head(pair.hidden(side, **IDS)), expected, atol=1e-5, rtol=0)
        model = getattr(pair, side)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_padded_widths_are_cut_and_said(make, capsys):
    pair = ModelPair.load(make("a", vocab_size=384), make("b", seed=1, vocab_size=512))
    assert pair.vocab_size == 320
    said = capsys.readouterr().err
    assert "384 wide" in said
    assert "cut to 320" in said
    assert pair.logits("aligned", **IDS).shape[-1] == 320
    assert {head.vocab_size for head in pair.heads} == {320}


def swap(state):
    """Exchange the ids of two tokens that are not special."""
    vocab = state["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def rename(state):
    """Another token at an id: equal size, other vocabulary."""
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    last = max(vocab, key=vocab.get)
    vocab["zz"] = vocab.pop(last)
    merges[:] = [merge for merge in merges if "".join(merge) != last] + [["z", "z"]]


def extend(state):
    special = {
        "id": 320, "content": "<|tool|>", "special": True, "normalized": False, "lstrip": False,
        "rstrip": False, "single_word": False,
    }  # fmt: skip
    state["added_tokens"].append(special)


@pytest.mark.usefixtures("no_weights")
def test_other_token_ids_are_named(reference, make):
    refused(reference, make("b", edit=swap), "in the reference and", "300", "301", "GOLD")


@pytest.mark.usefixtures("no_weights")
def test_another_vocabulary_of_equal_size_is_named(reference, make):
    refused(reference, make("b", edit=rename), "'zz' (319) is in the aligned model alone")


@pytest.mark.usefixtures("no_weights")
def test_extra_special_tokens_are_named(reference, make):
    other = make("b", edit=extend, vocab_size=384)
    refused(reference, other, "'<|tool|>' (320) is in the aligned model alone")
    refused(other, reference, "'<|tool|>' (320) is in the reference alone")


@pytest.mark.usefixtures("no_weights")
def test_two_ends_of_a_response_do_not_fit(reference, make):
    refused(reference, make("b", eos="<|im_start|>"), "'<|im_end|>'", "'<|im_start|>'", "eos_token")


def test_two_beginnings_of_a_text_are_a_warning(reference, make):
    other = make("b", seed=1)
    change_json(other / "tokenizer_config.json", bos_token="<|pad|>")
    with pytest.warns(
        UserWarning, match=r"begins a text with '<\|bos\|>', the aligned model with '<\|pad"
    ):
        pair = ModelPair.load(reference, other)
    assert pair.tokenizer.bos_token == "<|bos|>"


def test_a_template_that_refuses_is_shown_as_its_refusal(reference, make):
    other = make("b", seed=1, template="{{ raise_exception('no system message') }}")
    with pytest.warns(UserWarning, match=r"(?s)templates differ.*as\n\(no system message\)"):
        ModelPair.load(reference, other)


@pytest.mark.usefixtures("no_weights")
def test_all_problems_are_said_at_once(reference, make):
    refused(reference, make("b", edit=swap, eos="<|pad|>"), "300", "Also", "'<|pad|>'")


def test_two_chat_templates_are_a_warning_with_both_renderings(reference, make):
    other = make("b", seed=1, template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    with pytest.warns(UserWarning, match="templates differ") as caught:
        pair = ModelPair.load(reference, other)
    (said,) = [str(warning.message) for warning in caught]
    assert "<|im_start|>user\nWhat is 1 + 1?" in said
    assert "[What is 1 + 1?][2][And 2 + 2?]" in said
    assert "im_start" in pair.tokenizer.chat_template


def test_two_templates_that_render_alike_are_none(reference, make, tiny_tokenizer):
    alike = tiny_tokenizer.chat_template + "{# the same #}"
    ModelPair.load(reference, make("b", seed=1, template=alike))


def test_a_template_that_one_lacks_is_taken_from_the_other(make, tiny_tokenizer):
    with pytest.warns(UserWarning, match="reference has no chat template"):
        pair = ModelPair.load(make("a", template=""), make("b", seed=1))
    assert pair.tokenizer.chat_template == tiny_tokenizer.chat_template


def test_what_is_missing_is_named(reference, tmp_path):
    refused(reference, tmp_path / "nothing", "nothing", error=ConfigError)
    refused(tmp_path / "nothing", reference, "nothing", error=ConfigError)
    with pytest.raises(ConfigError, match="name the aligned one"):
        ModelPair.load(reference)


def test_equal_models_are_a_warning(reference, tmp_path):
    copy = shutil.copytree(reference, tmp_path / "copy")
    with pytest.warns(UserWarning, match="nothing to realign"):
        ModelPair.load(reference, copy)


@pytest.mark.filterwarnings("error")
def test_one_changed_value_is_a_difference(tiny_model, tiny_tokenizer, tmp_path):
    one, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.model.norm.weight[1] += 0.5
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    ModelPair.of(one, other, tiny_tokenizer)
    ModelPair.load(tmp_path / "one", tmp_path / "other")


@pytest.mark.usefixtures("no_weights")
def test_what_cannot_fit_is_refused(reference, make, monkeypatch):
    monkeypatch.setattr(pair, "available_bytes", lambda device_map: 1000)
    refused(reference, make("b", seed=1), "GiB", "--anyway", error=ConfigError)


def test_what_cannot_fit_is_loaded_if_told(reference, make, monkeypatch):
    monkeypatch.setattr(pair, "available_bytes", lambda device_map: 1000)
    ModelPair.load(reference, make("b", seed=1), allow_oversize=True)


def test_the_need_is_that_of_the_parameters(reference, make):
    aligned = make("b", seed=1)
    count = sum(parameter.numel() for parameter in load_model(reference).parameters())
    for dtype, size in (("auto", 4), (torch.bfloat16, 2), ("float32", 4)):
        facts = pair.examine_pair(reference, aligned, dtype=dtype)
        assert facts.gib * 2**30 == 2 * size * count


def test_pickled_weights_need_as_much(reference, make):
    aligned = make("b", seed=1)
    torch.save(load_model(aligned).state_dict(), aligned / "pytorch_model.bin")
    (aligned / "model.safetensors").unlink()
    facts = pair.examine_pair(reference, aligned)
    assert facts.gib == pair.examine_pair(reference, reference).gib
    assert facts.aligned.fingerprint is None


def test_the_room_is_that_of_the_devices_that_are_named(monkeypatch):
    monkeypatch.setattr(compatibility, "_available_on_cpu", lambda: 1)
    assert compatibility.available_bytes("auto") == compatibility.available_bytes("cpu") == 1
    free = {0: 10, 1: 100}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(free))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free[device], 1000))
    rooms = {None: 1, "cpu": 1, "cuda": 10, "cuda:1": 100, "auto": 111, "balanced": 111}
    assert {name: compatibility.available_bytes(name) for name in rooms} == rooms
    assert compatibility.available_bytes(torch.device("cuda", 1)) == 100
    assert compatibility.available_bytes({"model": 0, "lm_head": 1}) == 110


def test_the_room_of_a_container_is_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(compatibility, "_CGROUP", tmp_path)
    monkeypatch.setattr("psutil.PROCFS_PATH", str(tmp_path))
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert compatibility.available_bytes("cpu") == whole
    sizes = {"MemTotal": 90, "MemFree": 50, "MemAvailable": 70}
    others = dict.fromkeys(("Buffers", "Cached", "Shmem", "Active", "Inactive", "Slab"), 0)
    lines = [f"{name}: {size} kB\n" for name, size in (sizes | others).items()]
    (tmp_path / "meminfo").write_text("".join(lines))
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert compatibility.available_bytes("cpu") == 70 * 1024
    (tmp_path / "memory.max").write_text("31000\n")
    assert compatibility.available_bytes("cpu") == 30000
    (tmp_path / "memory.current").write_text("32000\n")
    assert compatibility.available_bytes("cpu") == 0


def test_an_adapter_shares_the_base(reference, adapter):
    folder, adapted = adapter
    pair = ModelPair.load(reference, folder)
    assert pair.shared_base
    assert pair.reference is pair.aligned
    plain = load_model(reference)
    with torch.no_grad():
        assert torch.equal(pair.logits("reference", **IDS), plain(**IDS).logits)
        assert torch.equal(pair.logits("aligned", **IDS), adapted(**IDS).logits)
    assert not torch.equal(pair.logits("aligned", **IDS), pair.logits("reference", **IDS))
    names = [name for name, _ in pair.aligned.named_parameters() if "lora_" not in name]
    assert len(names) == len(list(plain.parameters()))
    assert not any(parameter.requires_grad for parameter in pair.aligned.parameters())
    assert pair.heads.reference is pair.heads.aligned


def test_switching_sides_leaves_the_adapter_as_it_was(reference, adapter):
    pair = ModelPair.load(reference, adapter[0])
    before = {name: tensor.clone() for name, tensor in pair.aligned.state_dict().items()}
    with pair.running("reference"), pair.running("aligned"):
        inside = pair.aligned(**IDS, use_cache=False).logits
    with pytest.raises(ConfigError, match="not 'both'"):
        pair.hidden("both", **IDS)
    assert torch.equal(inside, pair.logits("aligned", **IDS))
    assert torch.equal(pair.aligned(**IDS, use_cache=False).logits, inside)
    after = pair.aligned.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in pair.aligned.parameters())


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_of_another_shape_is_refused(make, adapter):
    wide = make("wide", hidden_size=96)
    refused(wide, adapter[0], "not of the base", "lora_B", "(64, 4)", "(96, 4)")
    refused(make("flat", num_hidden_layers=1), adapter[0], "not of the base", "layers.1")


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_of_other_weights_is_refused(reference, make, adapter):
    refused(make("other", seed=3), adapter[0], str(reference), "as the reference")


def test_an_adapter_whose_base_is_gone_is_a_warning(make, adapter, reference):
    folder, _ = adapter
    moved = reference.rename(reference.parent / "elsewhere")
    with pytest.warns(UserWarning, match=r"its base is .*reference, which is not here"):
        ModelPair.load(moved, folder)
    (reference.parent / "deeper").mkdir()
    ModelPair.load(moved.rename(reference.parent / "deeper" / "reference"), folder)


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_that_peft_cannot_read_is_refused(reference, adapter):
    change_json(adapter[0] / "adapter_config.json", peft_type="NO_SUCH_TYPE")
    refused(reference, adapter[0], "PEFT cannot read", "save the adapter again", error=ConfigError)


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_of_modules_that_the_base_lacks_is_refused(reference, adapter):
    change_json(adapter[0] / "adapter_config.json", target_modules=["c_attn"])
    refused(reference, adapter[0], "not of the base", "c_attn")


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_that_changes_the_head_is_refused(reference, tmp_path):
    folder, _ = save_adapter(
        reference, tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    refused(reference, folder, "lm_head", error=UnsupportedModelError)


@pytest.mark.usefixtures("no_weights")
def test_virtual_tokens_are_refused(reference, tmp_path):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    get_peft_model(load_model(reference), config).save_pretrained(tmp_path / "prompt")
    refused(reference, tmp_path / "prompt", "virtual tokens", error=UnsupportedModelError)


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_is_no_reference(reference, adapter):
    refused(adapter[0], reference, "merge it", error=ConfigError)


def test_an_adapter_that_adds_nothing_is_a_warning(reference, tmp_path):
    folder, _ = save_adapter(reference, tmp_path / "fresh", init_lora_weights=True)
    with pytest.warns(UserWarning, match="nothing to realign"):
        ModelPair.load(reference, folder)


def test_modules_in_memory(tiny_model, tiny_tokenizer):
    one, other = tiny_model(), tiny_model(seed=1, vocab_size=384)
    other.train()
    pair = ModelPair.of(one, other, tiny_tokenizer)
    assert (pair.reference, pair.aligned, pair.vocab_size) == (one, other, 320)
    assert other.training
    assert all(parameter.requires_grad for parameter in one.parameters())
    with pytest.warns(UserWarning, match="nothing to realign"):
        ModelPair.of(one, tiny_model(), tiny_tokenizer)


def test_a_wrapper_of_the_reference_shares_it(tiny_model, tiny_tokenizer):
    base = tiny_model()
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear"), adapter_name="tone")
    assert ModelPair.of(base, adapted, tiny_tokenizer).shared_base
    assert ModelPair.of(adapted, adapted, tiny_tokenizer).shared_base
    other = get_peft_model(tiny_model(seed=1), LoraConfig(target_modules="all-linear"))
    assert not ModelPair.of(base, other, tiny_tokenizer).shared_base
