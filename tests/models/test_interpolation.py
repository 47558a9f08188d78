"""Weights between two models: exact at both ends, by definition between, never half written."""

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import RENAMED_TOKENS
from families import family_model
from flexalign.errors import ConfigError, LambdaError, PairMismatchError
from flexalign.models.interpolation import RECORD, interpolate


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


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def between(one, other, lam):
    return (1 - lam) * one.double() + lam * other.double()


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0, 1.5])
@pytest.mark.parametrize("tied", [(True, False), (False, True)])
def test_of_a_tied_and_an_untied_model_the_result_is_untied(
    tmp_path, tiny_model, tiny_tokenizer, capsys, tied, lam
):
    folders = [
        save(
            tiny_model(seed=seed, tie_word_embeddings=is_tied),
            tiny_tokenizer,
            tmp_path / str(seed),
            max_shard_size="100KB",
        )
        for seed, is_tied in enumerate(tied)
    ]
    one, other = map(tensors, folders)
    assert [HEAD in stored for stored in (one, other)] == [not is_tied for is_tied in tied]
    output = interpolate(*folders, lam, tmp_path / "output")
    assert "untied" in capsys.readouterr().err
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((output / RECORD).read_text())["untied"] is True

    found = tensors(output)
    heads = [stored.get(HEAD, stored[EMBEDDING]) for stored in (one, other)]
    shared = one.keys() & other.keys()
    expected = {name: between(one[name], other[name], lam) for name in shared}
    expected[HEAD] = between(*heads, lam)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-8)

    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, found[HEAD])
    if lam in (0.0, 1.0):
        ids = torch.arange(5, 15)[None]
        end = AutoModelForCausalLM.from_pretrained(folders[int(lam)])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, end(ids).logits)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma2", "phi"])
def test_the_head_is_found_by_the_name_that_its_file_has(tmp_path, family):
    folders = [tmp_path / "tied", tmp_path / "untied"]
    for seed, folder in enumerate(folders):
        family_model(family, seed=seed, tie_word_embeddings=seed == 0).save_pretrained(folder)
    ids = torch.arange(5, 15)[None]
    for lam, folder in enumerate(folders):
        output = interpolate(*folders, float(lam), tmp_path / f"at-{lam}")
        models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (output, folder)]
        assert not models[0].config.tie_word_embeddings
        with torch.no_grad():
            found, expected = (model(ids).logits for model in models)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_a_tied_model_stores_and_differs_is_its_own(folders, tmp_path):
    file = folders[1] / "model.safetensors"
    stored = load_file(file)
    stored[HEAD] = stored[EMBEDDING].clone() + 1
    save_file(stored, file, metadata={"format": "pt"})
    found = tensors(interpolate(*folders, 1.0, tmp_path / "output"))
    assert torch.equal(found[HEAD], stored[HEAD])
    assert torch.equal(found[EMBEDDING], stored[EMBEDDING])


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, -1.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("widths", [(384, 512), (512, 320)])
def test_rows_that_both_have_are_interpolated(
    tmp_path, tiny_model, tiny_tokenizer, capsys, widths, tied, lam
):
    folders = [
        save(
            tiny_model(seed=seed, tie_word_embeddings=tied, vocab_size=width),
            tiny_tokenizer,
            tmp_path / str(seed),
        )
        for seed, width in enumerate(widths)
    ]
    one, other = map(tensors, folders)
    output = interpolate(*folders, lam, tmp_path / "output")
    said = capsys.readouterr().err
    assert f"{widths[0]} rows in the reference and {widths[1]} in the aligned model" in said
    record = json.loads((output / RECORD).read_text())
    assert record["rows"] == {"reference": widths[0], "aligned": widths[1]}

    found, rows = tensors(output), min(widths)
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        assert tensor.shape == one[name].shape
        if name in (EMBEDDING, HEAD):
            assert torch.equal(tensor[rows:], one[name][rows:])
            tensor, first, second = tensor[:rows], one[name][:rows], other[name][:rows]
        else:
            first, second = one[name], other[name]
        expected = between(first, second, lam)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.vocab_size == widths[0]
    text = AutoTokenizer.from_pretrained(output)("what is 1+2?", return_tensors="pt")
    with torch.no_grad():
        assert model(**text).logits.shape[-1] == widths[0]


def test_without_a_tokenizer_wider_rows_are_of_nothing_known(tmp_path, tiny_model, tiny_tokenizer):
    wide = save(tiny_model(vocab_size=384), tiny_tokenizer, tmp_path / "wide")
    bare, other = tmp_path / "bare", tmp_path / "other"
    tiny_model(vocab_size=320).save_pretrained(bare)
    tiny_model(vocab_size=320, seed=1).save_pretrained(other)
    interpolate(bare, other, 0.5, tmp_path / "equal")
    with pytest.raises(ConfigError, match="bare has no tokenizer"):
        interpolate(wide, bare, 0.5, tmp_path / "output")


def test_special_tokens_of_other_names_are_read_by_id(renamed_pair, tmp_path, capsys):
    with pytest.raises(PairMismatchError, match=r"'<think>' and '<\|box_start\|>'.*--by-id"):
        interpolate(*renamed_pair, 0.5, tmp_path / "output")
    output = interpolate(*renamed_pair, 0.5, tmp_path / "output", by_id=True)
    assert "'<think>' and '<|box_start|>'" in capsys.readouterr().err
    named = {token["reference"]: token["aligned"] for token in read_record(output)["renamed"]}
    assert named == RENAMED_TOKENS
    one, other = map(tensors, renamed_pair)
    for name, tensor in tensors(output).items():
        expected = between(one[name], other[name], 0.5)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    vocabularies = [
        AutoTokenizer.from_pretrained(folder).get_vocab()
        for folder in (output, renamed_pair.reference)
    ]
    assert vocabularies[0] == vocabularies[1]


def read_record(folder):
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def test_tokens_of_one_tokenizer_alone_are_said(tmp_path, tiny_model, tiny_tokenizer):
    longer = copy.deepcopy(tiny_tokenizer)
    longer.add_tokens(["<|tool|>"], special_tokens=True)
    one = save(tiny_model("llama", vocab_size=384), tiny_tokenizer, tmp_path / "one")
    other = save(tiny_model("llama", vocab_size=384, seed=1), longer, tmp_path / "other")
    for first, second in ((one, other), (other, one)):
        output = interpolate(first, second, 0.5, tmp_path / f"{first.name}-{second.name}")
        assert read_record(output)["extra_tokens"] == ["<|tool|>"]


def test_one_id_of_two_tokens_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    pair = []
    for name in ("<|tool|>", "<|call|>"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_tokens([name], special_tokens=True)
        model = tiny_model("llama", vocab_size=384)
        pair.append(save(model, tokenizer, tmp_path / name.strip("<|>")))
    with pytest.raises(PairMismatchError, match=r"320 is '<\|tool\|>' .*--by-id"):
        interpolate(*pair, 0.5, tmp_path / "output")


def test_a_longer_context_is_the_references(tmp_path, tiny_model, tiny_tokenizer, capsys):
    one = save(tiny_model(max_position_embeddings=4096), tiny_tokenizer, tmp_path / "one")
    other = save(tiny_model(seed=1), tiny_tokenizer, tmp_path / "other")
    output = interpolate(one, other, 1.0, tmp_path / "output")
    assert "max_position_embeddings is 4096, the reference's; it is 512" in capsys.readouterr().err
    ids = torch.arange(5, 15)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (output, other)]
    assert models[0].config.max_position_embeddings == 4096
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_a_context_that_changes_the_angles_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    one, other = (
        save(
            tiny_model(rope_parameters=dynamic, max_position_embeddings=length),
            tiny_tokenizer,
            tmp_path / str(length),
        )
        for length in (77, 512)
    )
    with pytest.raises(PairMismatchError, match="max_position_embeddings: 77 and 512"):
        interpolate(one, other, 0.5, tmp_path / "output")


def test_no_record_where_nothing_differs(tiny_pair, tmp_path, capsys):
    assert not (interpolate(*tiny_pair, 0.5, tmp_path / "output") / RECORD).exists()
    assert "note" not in capsys.readouterr().err


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
    flat = save(
        tiny_model(tie_word_embeddings=True, num_hidden_layers=1), tiny_tokenizer, tmp_path / "flat"
    )
    theta = save(
        tiny_model(
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 77.0}
        ),
        tiny_tokenizer,
        tmp_path / "theta",
    )
    for folder, named in ((flat, "num_hidden_layers: 2 and 1"), (theta, "77")):
        with pytest.raises(PairMismatchError, match=f"{named}.*with pair:REF,ALIGNED"):
            interpolate(folders[0], folder, 0.5, tmp_path / "output")
    file = folders[1] / "model.safetensors"
    stored = load_file(file)
    norm = stored.pop("model.norm.weight")
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(PairMismatchError, match=r"model\.norm\.weight is in the reference alone"):
        interpolate(*folders, 0.5, tmp_path / "output")
    save_file(stored | {"model.norm.weight": norm[1:].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(
        PairMismatchError, match=r"model\.norm\.weight is \(64,\) .* \(63,\).*pair:REF"
    ):
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
