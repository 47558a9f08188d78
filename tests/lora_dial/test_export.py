"""A LoRA dial at chosen strengths as plain PEFT adapters: what PEFT makes of them, and refusals."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexalign.errors import CheckpointError, ConfigError, LambdaError, UnsupportedModelError
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.lora_dial.export import export_lora
from flexalign.models.loading import fingerprint
from flexalign.models.sources import resolve

LORA = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": "all-linear",
    "rank_pattern": {"k_proj": 2},
    "alpha_pattern": {"up_proj": 3},
    "use_rslora": True,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A base's folder and a dial's on it."""
    where = tmp_path_factory.mktemp("dial")
    base = tiny_model("llama", initializer_range=0.2)
    base.save_pretrained(where / "base")
    tiny_tokenizer.save_pretrained(where / "base")
    torch.manual_seed(1)
    peft = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))
    peft.save_pretrained(where / "dial")
    tiny_tokenizer.save_pretrained(where / "dial")
    settings = LoRADialConfig("base", fingerprint(resolve(where / "base")), lambda_range=(0.0, 3.0))
    settings.save(where / "dial")
    return where / "base", where / "dial"


def test_peft_loads_each_as_the_dial_at_its_lambda(made, tmp_path):
    base, dial = made
    export = export_lora(dial, [0.5, 2, 0.0], tmp_path / "out")
    assert list(export.adapters) == [0.5, 2.0, 0.0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lambda=0",
        "lambda=0.5",
        "lambda=2",
    ]
    ours = LoRADial.from_pretrained(base, dial)
    tokens = torch.randint(6, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    found = {}
    for lam, folder in export.adapters.items():
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        with torch.no_grad():
            found[lam] = plain(tokens).logits
            torch.testing.assert_close(ours(tokens, lam=lam).logits, found[lam], atol=2e-5, rtol=0)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
    torch.testing.assert_close(found[0.0], reference, atol=0, rtol=0)
    assert (found[2.0] - found[0.5]).abs().max() > 0.1


def test_at_1_it_is_the_adapter_itself_and_no_dial(made, tmp_path):
    _, dial = made
    [folder] = export_lora(dial, [1], tmp_path / "out").adapters.values()
    names = {"adapter_config.json", "adapter_model.safetensors"}
    copied = {path.name for path in folder.iterdir()}
    assert names < copied
    assert "lora_dial.json" not in copied
    assert "tokenizer.json" in copied
    name = "adapter_config.json"
    assert (folder / name).read_bytes() == (dial / name).read_bytes()
    given, found = (load_file(f / "adapter_model.safetensors") for f in (dial, folder))
    assert given.keys() == found.keys()
    assert all(torch.equal(given[key], found[key]) for key in given)


def test_a_low_precision_is_kept(made, tmp_path):
    _, dial = made
    shutil.copytree(dial, tmp_path / "dial")
    path = tmp_path / "dial" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    halved = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halved, path)
    [folder] = export_lora(tmp_path / "dial", [1.5], tmp_path / "out").adapters.values()
    for name, tensor in load_file(folder / path.name).items():
        factor = 1.5 if "lora_B" in name else 1.0
        expected = (halved[name].double() * factor).to(torch.bfloat16)
        assert torch.equal(tensor, expected)


def test_nothing_is_written_of_what_is_refused(made, tmp_path):
    _, dial = made
    output = tmp_path / "out"
    refused = [
        ([4.0], LambdaError, r"λ=4: outside the range \[0, 3\]"),
        ([float("nan")], LambdaError, "finite"),
        ([1.0, 1.0], ConfigError, "twice"),
        ([1.0, 1.0000001], ConfigError, "twice"),
        ([], ConfigError, "no λ"),
    ]
    for lams, error, message in refused:
        with pytest.raises(error, match=message):
            export_lora(dial, lams, output)
    assert list(export_lora(dial, [4.0], output, lambda_range=(0, 5), dry_run=True).adapters) == [4]
    assert not output.exists()
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export_lora(dial, [1.0], output)
    assert (output / "notes.txt").read_text() == "mine"


def test_a_plain_lora_has_its_ends_alone(made, tmp_path):
    _, dial = made
    plain = shutil.copytree(dial, tmp_path / "plain")
    (plain / "lora_dial.json").unlink()
    with pytest.raises(LambdaError, match="plain LoRA"):
        export_lora(plain, [0.5], tmp_path / "out")
    export_lora(plain, [0.5], tmp_path / "out", lambda_range=(0, 1))


def test_folders_that_are_no_dial_are_refused(made, tmp_path):
    base, dial = made
    output = tmp_path / "out"
    with pytest.raises(CheckpointError, match="holds no"):
        export_lora(base, [1.0], output)
    with pytest.raises(UnsupportedModelError, match="InRa adapter"):
        export_lora("miniature:fast", [1.0], output)
    other = shutil.copytree(dial, tmp_path / "dora")
    path = other / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        export_lora(other, [1.0], output)
    cut = shutil.copytree(dial, tmp_path / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        export_lora(cut.parent, [1.0], output)
    assert not output.exists()


def test_a_disk_that_is_full_leaves_nothing(made, tmp_path, monkeypatch):
    from flexalign.lora_dial import export

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", fail)
    with pytest.raises(OSError, match="No space"):
        export_lora(made[1], [1.0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
