"""A LoRA dial's folder: complete, honest about its base, or refused in one sentence."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from contract.subjects import put_lora
from flexalign import LoRADial
from flexalign.errors import (
    CheckpointError,
    ConfigError,
    LambdaError,
    PairMismatchError,
    UnsupportedModelError,
)
from flexalign.generation import adapted
from flexalign.lambdas import Fixed, OnlyEnds, Schedule, outside_range
from flexalign.lora_dial import LoRADialConfig
from flexalign.lora_dial.configuration import check_folder, nearest_default
from flexalign.models.loading import fingerprint

CONFIG, PEFT, WEIGHTS = "lora_dial.json", "adapter_config.json", "adapter_model.safetensors"


def test_what_the_file_says(dial, folder):
    assert json.loads((folder / CONFIG).read_text()) == {
        "base": "base",
        "base_fingerprint": dial.dial_config.base_fingerprint,
        "default_lambda": 1.0,
        "lambda_range": [-2.0, 5.0],
        "thinking_tags": None,
        "calibration": None,
        "format_version": 1,
        "gate": None,
    }


def test_the_folder_is_a_plain_peft_folder(tiny_model, dial, folder, rows):
    plain = PeftModel.from_pretrained(tiny_model(initializer_range=0.1), folder).eval()
    tokens = torch.tensor([rows[0]])
    assert torch.equal(plain(tokens).logits, dial(tokens, lam=1.0).logits)


def test_a_base_from_disk(dial, base_folder, folder, rows):
    settings = replace(dial.dial_config, default_lambda=0.3, gate=0.01, rendering={"template": "x"})
    dial.dial_config = settings
    dial.save_pretrained(folder)
    with pytest.warns(UserWarning, match="another chat template"):
        loaded = LoRADial.from_pretrained(base_folder, folder)
    assert loaded.dial_config == settings
    assert loaded.tokenizer is not None
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    tokens = torch.tensor([rows[0]])
    assert torch.equal(loaded(tokens).logits, dial(tokens, lam=0.3).logits)


def test_another_base_is_refused_before_its_weights_load(tiny_model, folder, tmp_path, monkeypatch):
    other = tiny_model(seed=9, initializer_range=0.1)
    with pytest.raises(
        PairMismatchError, match=rf"made for .* {fingerprint(other)}: other weights"
    ):
        LoRADial.from_pretrained(other, folder)
    other.save_pretrained(tmp_path / "other")
    assert LoRADial.from_pretrained(tmp_path / "other", folder, any_base=True).dial_config

    def loads(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(adapted, "load_model", loads)
    with pytest.raises(PairMismatchError, match="--any-base"):
        LoRADial.from_pretrained(tmp_path / "other", folder)


def test_a_base_of_another_shape_is_refused_even_so(tiny_model, folder):
    with pytest.raises(CheckpointError, match=r"does not fit this base: .*down_proj"):
        LoRADial.from_pretrained(tiny_model(intermediate_size=96), folder, any_base=True)


def test_a_base_with_an_adapter_is_refused(tiny_model, folder):
    with pytest.raises(UnsupportedModelError, match="PEFT adapter already"):
        LoRADial.from_pretrained(put_lora(tiny_model()), folder, any_base=True)


@pytest.mark.parametrize("kept", [0, 5, 100, -8])
def test_truncated_weights(tiny_model, folder, kept):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        LoRADial.from_pretrained(tiny_model(initializer_range=0.1), folder)


def test_missing_weights_and_tensors(tiny_model, folder):
    tensors = load_file(folder / WEIGHTS)
    gone = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / WEIGHTS)
    base = tiny_model(initializer_range=0.1)
    with pytest.raises(CheckpointError, match=r"it lacks .*layers\.1\.mlp\.up_proj\.lora_B"):
        LoRADial.from_pretrained(base, folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no complete LoRA dial"):
        LoRADial.from_pretrained(base, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "corrupt"),
        ("[]", "corrupt"),
        ('{"base": "x"}', "format_version None"),
        ('{"format_version": 2}', "format_version 2 .* reads 1"),
        ('{"format_version": 1, "base": "x"}', "not usable.*base_fingerprint"),
        ('{"format_version": 1, "adapter_layers": 1}', "unknown keys: adapter_layers"),
        (
            '{"format_version": 1, "base": "x", "base_fingerprint": "y", "lambda_range": [5, 0]}',
            r"not usable.*\[least, largest\]",
        ),
        (
            '{"format_version": 1, "base": "x", "base_fingerprint": "y", "gate": 2}',
            "not usable.*gate",
        ),
    ],
)
def test_unusable_settings(folder, text, message):
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        check_folder(folder)


def test_damaged_peft_settings(folder):
    (folder / PEFT).write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        check_folder(folder)
    (folder / PEFT).write_text('{"peft_type": "NONE"}')
    with pytest.raises(CheckpointError, match="PEFT cannot read"):
        check_folder(folder)
    (folder / PEFT).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        check_folder(folder)


def test_what_cannot_be_scaled_is_refused_before_the_base_loads(folder):
    settings = json.loads((folder / PEFT).read_text())
    (folder / PEFT).write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        check_folder(folder)


def test_a_plain_lora_is_a_dial_of_two_settings(tiny_model, folder, rows, dial):
    (folder / CONFIG).unlink()
    loaded = LoRADial.from_pretrained(tiny_model(initializer_range=0.1), folder)
    settings = loaded.dial_config
    assert (settings.default_lambda, settings.lambda_range, settings.only_ends) == (1, (0, 1), True)
    tokens = torch.tensor([rows[0]])
    assert torch.equal(loaded(tokens).logits, dial(tokens, lam=1.0).logits)
    loaded.save_pretrained(folder)
    assert json.loads((folder / CONFIG).read_text())["only_ends"] is True
    assert check_folder(folder) == settings
    assert isinstance(check_folder(folder).lambda_range, OnlyEnds)


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_a_plain_lora_notes_what_was_not_tried(tiny_model, folder, rows, lam, recwarn):
    (folder / CONFIG).unlink()
    loaded = LoRADial.from_pretrained(tiny_model(initializer_range=0.1), folder)
    tokens = torch.tensor([rows[0]])
    loaded.generate(tokens, lam=1.0, max_new_tokens=1)
    assert not [w for w in recwarn if "leaves" in str(w.message)]
    with pytest.warns(UserWarning, match="range, which is λ = 0 and 1 alone: it is a plain LoRA"):
        loaded.generate(tokens, lam=lam, max_new_tokens=1)


def test_only_ends():
    ends = OnlyEnds((0.0, 1.0))
    assert [outside_range(Fixed(lam), ends) for lam in (0, 1, 0.5, 2)] == [None, None, 0.5, 2]
    linear = Schedule.parse({"kind": "linear", "start": 0, "end": 1, "steps": 6})
    thinking = Schedule.parse({"kind": "thinking", "think": 0, "answer": 1})
    assert outside_range(linear, ends) == 0.5
    assert outside_range(thinking, ends) is None


def test_widened_settings():
    plain = LoRADialConfig("x", "y", only_ends=True)
    assert plain.widened(OnlyEnds((0.0, 1.0))) == plain
    wider = plain.widened((0.0, 2.0))
    assert (wider.lambda_range, wider.only_ends) == ((0.0, 2.0), False)
    trained = LoRADialConfig("x", "y", lambda_range=(0, 5))
    assert trained.widened((-1, 2)).lambda_range == (-1, 5)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 5, 1), (2, 5, 2), (-1, 0.5, 0.5), (1, 1, 1)]
)
def test_the_default_is_one_or_the_nearest_end(low, high, expected):
    assert nearest_default(low, high) == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate": -0.1}, ConfigError, "gate"),
        ({"only_ends": 1}, ConfigError, "only_ends"),
        ({"lambda_range": (0, float("inf"))}, LambdaError, "finite"),
        ({"base": None}, ConfigError, "base must be a text"),
    ],
    ids=str,
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        LoRADialConfig(**({"base": "x", "base_fingerprint": "y"} | changes))
