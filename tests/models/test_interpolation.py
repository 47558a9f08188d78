"""Weights between two models: exact at both ends, by definition between, never half written."""

import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexalign.errors import ConfigError, LambdaError, PairMismatchError
from flexalign.models.interpolation import interpolate


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def save(model, tokenizer, folder, **settings):
    model.save_pretrained(folder, **settings)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def folders(request, tmp_path, tiny_model, tiny_tokenizer):
    """A model in one file and another in several, with another split."""
    return [
        save(
            tiny_model(seed=seed, tie_word_embeddings=True).to(request.param),
            tiny_tokenizer,
            tmp_path / name,
            max_shard_size=size,
        )
        for seed, (name, size) in enumerate({"reference": "100KB", "aligned": "5GB"}.items())
    ]


def test_both_ends_are_the_models_bit_for_bit(folders, tmp_path):
    for lam, folder in enumerate(folders):
        expected = tensors(folder)
        found = tensors(interpolate(*folders, float(lam), tmp_path / f"at-{lam}"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("lam", [0.25, 1.5, -0.5])
def test_between_and_beyond(folders, tmp_path, lam):
    one, other = map(tensors, folders)
    output = interpolate(*folders, lam, tmp_path / "deep" / "output")
    found = tensors(output)
    for name, tensor in found.items():
        expected = (1 - lam) * one[name].double() + lam * other[name].double()
        assert tensor.dtype == one[name].dtype
        tolerance = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), expected, rtol=tolerance, atol=tolerance / 10)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in found.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folders[0]).chat_template
    assert sorted(path.name for path in output.parent.iterdir()) == ["output"]


def test_the_split_is_the_references(folders, tmp_path):
    output = interpolate(*folders, 0.5, tmp_path / "output")
    files = [sorted(path.name for path in folder.glob("model*")) for folder in (folders[0], output)]
    assert len(files[0]) > 2
    assert files[0] == files[1]


def test_two_dtypes_are_stored_in_float32(tmp_path, tiny_model, tiny_tokenizer):
    one = save(tiny_model().to(torch.bfloat16), tiny_tokenizer, tmp_path / "one")
    other = save(tiny_model(seed=1).to(torch.float16), tiny_tokenizer, tmp_path / "other")
    found = tensors(interpolate(one, other, 0.5, tmp_path / "output"))
    first, second = tensors(one), tensors(other)
    for name, tensor in found.items():
        expected = (first[name].double() + second[name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-9)


def test_a_tied_head_that_one_stores_too_is_left_out(folders, tmp_path):
    file = folders[1] / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    found = tensors(interpolate(*folders, 0.5, tmp_path / "output"))
    assert found.keys() == tensors(folders[0]).keys()


def test_a_peft_adapter_is_merged_first(tmp_path, tiny_pair):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_pair.reference)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    found = tensors(
        interpolate(tiny_pair.reference, tmp_path / "adapter", 1.0, tmp_path / "output")
    )
    assert all(torch.equal(merged[name], tensor) for name, tensor in found.items())


def test_what_does_not_fit(tmp_path, folders, tiny_model, tiny_tokenizer):
    wide = save(
        tiny_model(tie_word_embeddings=True, vocab_size=384), tiny_tokenizer, tmp_path / "wide"
    )
    theta = save(
        tiny_model(tie_word_embeddings=True, max_position_embeddings=77),
        tiny_tokenizer,
        tmp_path / "theta",
    )
    untied = save(tiny_model(tie_word_embeddings=False), tiny_tokenizer, tmp_path / "untied")
    for folder, named in ((wide, "vocab_size: 320 and 384"), (theta, "77"), (untied, "tie_word")):
        with pytest.raises(PairMismatchError, match=named):
            interpolate(folders[0], folder, 0.5, tmp_path / "output")
    file = folders[1] / "model.safetensors"
    stored = load_file(file)
    norm = stored.pop("model.norm.weight")
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(PairMismatchError, match=r"model\.norm\.weight is in the reference alone"):
        interpolate(*folders, 0.5, tmp_path / "output")
    save_file(stored | {"model.norm.weight": norm[1:].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(PairMismatchError, match=r"model\.norm\.weight is \(64,\) .* \(63,\)"):
        interpolate(*folders, 0.5, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("lam", [float("nan"), "1", True, torch.tensor([0.5])])
def test_bad_lambda(tiny_pair, tmp_path, lam):
    with pytest.raises(LambdaError, match="λ"):
        interpolate(*tiny_pair, lam, tmp_path / "output")


def test_an_output_that_is_taken(tiny_pair, tmp_path):
    (tmp_path / "output").mkdir()
    assert interpolate(*tiny_pair, 0.5, tmp_path / "output").is_dir()
    before = {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()}
    with pytest.raises(ConfigError, match="another output"):
        interpolate(*tiny_pair, 0.5, tmp_path / "output")
    assert {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()} == before


def test_nothing_half_written_is_left(tiny_pair, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[interpolate.__module__], "write_tensors", fail)
    with pytest.raises(OSError, match="No space"):
        interpolate(*tiny_pair, 0.5, tmp_path / "output")
    assert list(tmp_path.iterdir()) == []


def test_only_the_weights_are_not_copied(tiny_pair, tmp_path):
    reference = shutil.copytree(tiny_pair.reference, tmp_path / "reference")
    (reference / "notes.txt").write_text("kept")
    (reference / "pytorch_model.bin").write_bytes(b"left")
    (reference / "checkpoint-5").mkdir()
    output = interpolate(reference, tiny_pair.aligned, 0.5, tmp_path / "output")
    expected = {path.name for path in tiny_pair.reference.iterdir()} | {"notes.txt"}
    assert {path.name for path in output.iterdir()} == expected
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_whole_numbers_are_kept_where_they_agree(tiny_pair, tmp_path):
    def with_counter(folder, value):
        copy = shutil.copytree(folder, tmp_path / f"{folder.name}-{value}")
        file = copy / "model.safetensors"
        counter = {"model.counter": torch.tensor([value])}
        save_file(load_file(file) | counter, file, metadata={"format": "pt"})
        return copy

    reference, aligned = (with_counter(folder, 3) for folder in tiny_pair)
    found = tensors(interpolate(reference, aligned, 0.5, tmp_path / "output"))
    assert found["model.counter"].tolist() == [3]
    other = with_counter(tiny_pair.aligned, 4)
    with pytest.raises(PairMismatchError, match=r"model\.counter holds whole numbers and differs"):
        interpolate(reference, other, 0.5, tmp_path / "none")
    assert tensors(interpolate(reference, other, 1, tmp_path / "end"))[
        "model.counter"
    ].tolist() == [4]
    assert not (tmp_path / "none").exists()
