"""An adapter's folder: complete, honest about its base, or refused in one sentence."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from contract.subjects import stir
from flexalign.errors import CheckpointError, ConfigError, LambdaError, PairMismatchError
from flexalign.generation import adapted
from flexalign.inra import InRaConfig, InRaModel
from flexalign.models.loading import fingerprint

CONFIG, WEIGHTS = "inra_config.json", "inra_adapter.safetensors"


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def base_folder(base, tiny_tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_what_the_folder_says(model, folder):
    assert json.loads((folder / CONFIG).read_text()) == {
        "base": model.inra_config.base,
        "base_fingerprint": fingerprint(model.base),
        "adapter_layers": 1,
        "default_lambda": 0.0,
        "lambda_range": [-2.0, 4.0],
        "thinking_tags": None,
        "calibration": None,
        "format_version": 1,
    }
    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == model.adapter.state_dict().keys()


def test_the_files_keys_keep_their_order():
    settings = InRaConfig("x", "y", 2, rendering={"template": "z"})
    assert list(json.loads(settings.to_text())) == [
        *("base", "base_fingerprint", "adapter_layers", "default_lambda", "lambda_range"),
        *("thinking_tags", "calibration", "format_version", "rendering"),
    ]


def test_defaults_at_creation(base):
    settings = InRaModel.create(base).inra_config
    assert (settings.default_lambda, settings.lambda_range) == (0.0, (0.0, 1.0))


def test_a_base_from_disk(model, folder, base_folder, rows):
    settings = replace(model.inra_config, default_lambda=0.3, thinking_tags=("<think>", "</think>"))
    model.inra_config = settings
    model.save_pretrained(folder)
    loaded = InRaModel.from_pretrained(base_folder, folder)
    assert loaded.inra_config == settings
    assert loaded.tokenizer is not None
    tokens = torch.tensor([rows[0]])
    assert torch.equal(loaded(tokens).logits, model(tokens, lam=0.3).logits)


def test_created_from_disk(base_folder):
    model = InRaModel.create(base_folder)
    assert model.inra_config.base == str(base_folder)
    assert model.tokenizer is not None


def test_a_cast_base_is_still_its_base(folder, base):
    assert InRaModel.from_pretrained(base.to(torch.bfloat16), folder).dtype == torch.bfloat16


def test_another_base_is_refused_before_its_weights_load(tiny_model, folder, tmp_path, monkeypatch):
    other = tiny_model(seed=9, initializer_range=0.1)
    with pytest.raises(
        PairMismatchError, match=rf"made for .* {fingerprint(other)}: other weights"
    ):
        InRaModel.from_pretrained(other, folder)
    other.save_pretrained(tmp_path / "other")
    assert InRaModel.from_pretrained(tmp_path / "other", folder, any_base=True).base is not other

    def loads(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(adapted, "load_model", loads)
    with pytest.raises(PairMismatchError, match="--any-base"):
        InRaModel.from_pretrained(tmp_path / "other", folder)


def test_a_base_of_another_shape_is_refused_even_so(tiny_model, folder):
    other = tiny_model(intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"3 tensors.*'0.mlp.down_proj.weight'.*\(64, 96\)"):
        InRaModel.from_pretrained(other, folder, any_base=True)


@pytest.mark.parametrize("kept", [0, 5, 100, -8])
def test_truncated_weights(base, folder, kept):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        InRaModel.from_pretrained(base, folder)


def test_missing_weights_and_tensors(base, folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["0.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 tensors.*'0.mlp.up_proj.weight' \(here None"):
        InRaModel.from_pretrained(base, folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no complete InRa adapter"):
        InRaModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "corrupt"),
        ("[]", "corrupt"),
        ('{"base": "x"}', "format_version None"),
        ('{"format_version": 2}', "format_version 2 .* reads 1"),
        ('{"format_version": 1, "base": "x"}', "not usable.*base_fingerprint"),
        ('{"format_version": 1, "bas": "x"}', "unknown keys: bas"),
        (
            '{"format_version": 1, "base": "x", "base_fingerprint": "y", "lambda_range": [1, 0]}',
            r"not usable.*\[least, largest\]",
        ),
    ],
)
def test_unusable_settings(base, folder, text, message):
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        InRaModel.from_pretrained(base, folder)


def test_no_adapter_there(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"inra_config.json is missing.*flexalign adapt"):
        InRaModel.from_pretrained(base, tmp_path)


def test_saving_again_leaves_no_partial_files(model, folder, base):
    stir(model.adapter, 0.1, seed=4)
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    loaded = InRaModel.from_pretrained(base, folder)
    for mine, theirs in zip(model.adapter.parameters(), loaded.adapter.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"default_lambda": float("nan")}, LambdaError, "default_lambda must be a finite number"),
        ({"default_lambda": True}, LambdaError, "finite number"),
        ({"lambda_range": (0,)}, ConfigError, r"\[least, largest\]"),
        ({"lambda_range": (0, float("inf"))}, LambdaError, "finite"),
        ({"adapter_layers": 0}, ConfigError, "whole number ≥ 1"),
        ({"thinking_tags": ("<a>", "<a>")}, ConfigError, "two different texts"),
        ({"base": None}, ConfigError, "base must be a text"),
    ],
    ids=str,
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        InRaConfig(**({"base": "x", "base_fingerprint": "y"} | changes))
