"""The folder that vLLM loads."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flexalign.errors import (
    CheckpointError,
    ConfigError,
    LambdaError,
    PairMismatchError,
    UnsupportedModelError,
)
from flexalign.inra import InRaConfig, InRaModel
from flexalign.lambdas import Fixed, require_range
from flexalign.lora_dial import LoRADialConfig
from flexalign.models.loading import fingerprint, load_model
from flexalign.models.sources import Source, resolve
from flexalign.serving.vllm import folder as module
from flexalign.serving.vllm.folder import is_prepared, prepare_folder, prepared_dial
from flexalign.serving.vllm.lambdas import DialSettings


@pytest.fixture
def adapter(tmp_path, tiny_pair):
    path = tmp_path / "adapter"
    InRaModel.create(tiny_pair.reference).save_pretrained(path)
    return path


def _weights(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in index.items()}


def test_it_holds_the_base_by_links_and_the_adapter_by_the_models_names(
    tmp_path, tiny_pair, adapter
):
    folder = prepare_folder(tiny_pair.reference, adapter, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    base = json.loads((tiny_pair.reference / "config.json").read_text())
    dial = config.pop("flexalign")
    assert config == base | {"architectures": ["InRaQwen2ForCausalLM"]}
    assert dial == {"adapter_layers": 1, "default_lambda": 0.0, "thinking_tokens": [4, 5]}
    link = folder / "model.safetensors"
    assert link.is_symlink()
    assert link.resolve() == (tiny_pair.reference / "model.safetensors").resolve()
    expected = load_file(tiny_pair.reference / "model.safetensors")
    for name, tensor in load_file(adapter / "inra_adapter.safetensors").items():
        expected[f"model.adapter.{name}"] = tensor
    found = _weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (tiny_pair.reference / name).read_bytes()
    assert InRaConfig.load(folder) == InRaConfig.load(adapter)


def test_shards_are_linked_each(tmp_path, tiny_model, tiny_tokenizer):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(base)
    InRaModel.create(base).save_pretrained(tmp_path / "adapter")
    folder = prepare_folder(base, tmp_path / "adapter", tmp_path / "out")
    shards = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all((folder / name).is_symlink() for name in shards)
    names = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert names.keys() < _weights(folder).keys()


def test_known_names_and_settings(tmp_path):
    folder = prepare_folder("miniature", "miniature:fast", tmp_path / "out")

    class Config:
        flexalign = json.loads((folder / "config.json").read_text())["flexalign"]

    settings = DialSettings.of(Config)
    assert settings == DialSettings(1, 0.0, settings.thinking_tokens)
    assert settings.thinking_tokens is not None
    with pytest.raises(ConfigError, match="no 'flexalign' key"):
        DialSettings.of(object())


def test_a_gguf_file_is_written_out(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """What reading one gives is the loader's test; here it gives a tiny model."""
    model = tiny_model("llama")
    source = Source("tiny", tmp_path, "tiny.gguf")
    monkeypatch.setattr(module, "load_config", lambda _: model.config)
    monkeypatch.setattr(module, "load_model", lambda _: model)
    monkeypatch.setattr(module, "load_tokenizer", lambda _: tiny_tokenizer)
    adapter = tmp_path / "adapter"
    InRaModel.create(model).save_pretrained(adapter)
    folder = prepare_folder(source, adapter, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["InRaLlamaForCausalLM"]
    assert not (folder / "model.safetensors").is_symlink()
    assert (folder / "tokenizer.json").is_file()
    found = _weights(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor)
    monkeypatch.setattr(module, "load_model", lambda _: tiny_model("llama", seed=1))
    with pytest.raises(PairMismatchError, match="was made for"):
        prepare_folder(source, adapter, tmp_path / "out")


def test_it_is_written_anew_over_itself_alone(tmp_path, tiny_pair, adapter):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="files of something else"):
        prepare_folder(tiny_pair.reference, adapter, output)
    assert (output / "notes.txt").read_text() == "mine"
    shutil.rmtree(output)
    prepare_folder(tiny_pair.reference, adapter, output)
    assert is_prepared(output)
    (output / "left.txt").write_text("of an earlier base")
    prepare_folder(tiny_pair.reference, adapter, output)
    assert not (output / "left.txt").exists()
    assert load_file(tiny_pair.reference / "model.safetensors")


def test_another_base_is_refused_unless_told(tmp_path, tiny_pair, adapter):
    with pytest.raises(PairMismatchError, match="was made for"):
        prepare_folder(tiny_pair.aligned, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare_folder(tiny_pair.aligned, adapter, tmp_path / "out", any_base=True)


def test_an_adapter_of_other_shapes_is_refused(tmp_path, tiny_model, tiny_tokenizer, adapter):
    tiny_model("qwen2", intermediate_size=96).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="does not fit this base"):
        prepare_folder(tmp_path / "base", adapter, tmp_path / "out", any_base=True)


def test_a_family_without_a_class_is_refused_by_name(tmp_path, tiny_model, tiny_tokenizer):
    base = tmp_path / "base"
    tiny_model("gemma2").save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    InRaModel.create(base).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        UnsupportedModelError, match="family gemma2, and vLLM serves a dial on llama"
    ):
        prepare_folder(base, tmp_path / "adapter", tmp_path / "out")


def test_tags_of_several_tokens_are_no_tags(tmp_path, tiny_pair, adapter):
    path = adapter / "inra_config.json"
    settings = json.loads(path.read_text()) | {"thinking_tags": ["<reason>", "</reason>"]}
    path.write_text(json.dumps(settings))
    folder = prepare_folder(tiny_pair.reference, adapter, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["flexalign"]["thinking_tokens"] is None


def test_a_base_that_is_a_peft_adapter_is_refused(tmp_path, tiny_pair, adapter):
    peft = get_peft_model(load_model(tiny_pair.reference), LoraConfig(target_modules="all-linear"))
    peft.save_pretrained(tmp_path / "peft")
    with pytest.raises(UnsupportedModelError, match="merge it"):
        prepare_folder(tmp_path / "peft", adapter, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.fixture
def lora(tmp_path, tiny_pair):
    """A LoRA dial of several ranks and scalings, as PEFT has it too."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.v_proj": 2},
        alpha_pattern={"up_proj": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    peft = get_peft_model(load_model(tiny_pair.reference), config)
    peft.save_pretrained(tmp_path / "lora")
    found = fingerprint(resolve(tiny_pair.reference))
    LoRADialConfig("base", found, lambda_range=(0.0, 5.0)).save(tmp_path / "lora")
    return peft, tmp_path / "lora"


def test_a_lora_dial_is_written_by_vllms_layers(tmp_path, tiny_pair, lora):
    peft, path = lora
    folder = prepare_folder(tiny_pair.reference, path, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    dial = config.pop("flexalign")
    base = json.loads((tiny_pair.reference / "config.json").read_text())
    assert config == base | {"architectures": ["LoRADialQwen2ForCausalLM"]}
    ranks = {}
    for layer, width in (("model.layers.0.", 4), ("model.layers.1.", 2)):
        ranks[f"{layer}self_attn.qkv_proj"] = [4, 0, width]
        ranks[f"{layer}self_attn.o_proj"] = [4]
        ranks[f"{layer}mlp.gate_up_proj"] = [0, 4]
    assert dial == {"default_lambda": 1.0, "thinking_tokens": [4, 5], "ranks": ranks}

    found = _weights(folder)
    expected = load_file(tiny_pair.reference / "model.safetensors")
    assert expected.keys() < found.keys()
    for name, layer in peft.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = found.pop(f"{name}.lora_a.weight"), found.pop(f"{name}.lora_b")
            delta = layer.get_delta_weight("default")
            torch.testing.assert_close(up[:, : len(down)] @ down, delta, atol=1e-6, rtol=1e-5)
            assert not up[:, len(down) :].any()
    assert found.keys() == expected.keys()
    assert prepared_dial(folder) == LoRADialConfig.load(path)
    assert not (folder / "adapter_config.json").exists()


def test_a_plain_lora_keeps_its_two_ends(tmp_path, tiny_pair, lora):
    _, path = lora
    (path / "lora_dial.json").unlink()
    folder = prepare_folder(tiny_pair.reference, path, tmp_path / "out")
    assert not (folder / "lora_dial" / "lora_dial.json").exists()
    with pytest.raises(LambdaError, match="plain LoRA"):
        require_range(prepared_dial(folder).lambda_range, [("0.5", Fixed(0.5))], "it")


def test_a_lora_dial_of_another_base_or_shape_is_refused(
    tmp_path, tiny_pair, tiny_model, tiny_tokenizer, lora
):
    _, path = lora
    with pytest.raises(PairMismatchError, match="was made for"):
        prepare_folder(tiny_pair.aligned, path, tmp_path / "out")
    prepare_folder(tiny_pair.aligned, path, tmp_path / "out", any_base=True)
    tiny_model("qwen2", intermediate_size=96).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not fit this base"):
        prepare_folder(tmp_path / "other", path, tmp_path / "out", any_base=True)


def test_layers_of_a_lora_that_vllm_does_not_serve_are_named(tmp_path, tiny_pair, lora):
    _, path = lora
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(8, 4)
    save_file(tensors, weights)
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        prepare_folder(tiny_pair.reference, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
