"""Baking a LoRA dial: its terms at one λ in the base's weights, and nothing trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from flexalign import bake
from flexalign.errors import ConfigError, LambdaError, PairMismatchError
from flexalign.lora_dial import LoRADialConfig
from flexalign.models.loading import fingerprint
from flexalign.training import Events

from .conftest import lora

IDS = torch.arange(10, 30)[None]
LAM = 1.7


@pytest.fixture
def dial(tmp_path: Path, tiny_pair: Any) -> Path:
    """A LoRA dial with effect, on the pair's reference."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.reference)
    peft = get_peft_model(model, lora(r=4, init_lora_weights=False))
    peft.save_pretrained(tmp_path / "dial")
    LoRADialConfig(
        str(tiny_pair.reference), fingerprint(tiny_pair.reference), lambda_range=(0, 2)
    ).save(tmp_path / "dial")
    return tmp_path / "dial"


@pytest.fixture
def tree(tmp_path: Path, tiny_pair: Any, dial: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_pair.reference),
        "adapter": str(dial),
        "lambda": LAM,
        "output": str(tmp_path / "out"),
    }


def scaled(base: str, adapter: Path, lam: float) -> torch.Tensor:
    """The logits of PEFT's own unmerged forward with another `scaling`."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= lam
    return model(input_ids=IDS).logits.detach()


def logits(folder: Any) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits.detach()


def test_the_merged_model_is_the_dial_at_its_lambda(tree: dict[str, Any], dial: Path) -> None:
    outcome = bake(tree)
    found = logits(outcome.output)
    torch.testing.assert_close(found, scaled(tree["base"], dial, LAM), rtol=0, atol=1e-5)
    assert (found - logits(tree["base"])).abs().max() > 1e-2
    assert not (outcome.output / "adapter_config.json").exists()
    assert outcome.to_json() == {"output": tree["output"], "steps": 0}
    card = (outcome.output / "README.md").read_text(encoding="utf-8")
    assert "merged into its base" in card
    assert "| λ | 1.7 |" in card


def test_the_reference_and_the_stock_strength_are_exact(tree: dict[str, Any], dial: Path) -> None:
    assert torch.equal(logits(bake(tree | {"lambda": 0}).output), logits(tree["base"]))
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tree["base"]), dial)
    expected = merged.merge_and_unload().eval()(input_ids=IDS).logits
    output = Path(tree["output"]).with_name("stock")
    assert torch.equal(logits(bake(tree | {"lambda": 1, "output": str(output)}).output), expected)


def test_a_folder_holds_one_merge_and_is_not_written_again(tree: dict[str, Any]) -> None:
    output = bake(tree).output
    written = (output / "manifest.json").stat().st_mtime_ns
    assert bake(tree, dry_run=True).facts["output_state"] == "done"
    bake(tree)
    assert (output / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match=r"holds another run \(lambda"):
        bake(tree | {"lambda": 0.5})

    # Killed before the manifest, it is made again.
    (output / "manifest.json").unlink()
    (output / "model.safetensors").write_bytes(b"half")
    assert bake(tree, dry_run=True).facts["output_state"] == "unfinished"
    bake(tree)
    assert bake(tree, dry_run=True).facts["output_state"] == "done"


def test_a_dry_run_writes_nothing(tree: dict[str, Any]) -> None:
    plan = bake(tree, dry_run=True)
    assert plan.to_json() == {**tree, "steps": 0, "output_state": "new", "samples": []}
    assert not Path(tree["output"]).exists()


def _corrupt(tree: dict[str, Any]) -> None:
    (Path(tree["adapter"]) / "adapter_model.safetensors").write_bytes(b"x")


def _plain(tree: dict[str, Any]) -> None:
    (Path(tree["adapter"]) / "lora_dial.json").unlink()


def _other_base(tree: dict[str, Any]) -> None:
    path = Path(tree["adapter"]) / "lora_dial.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"base_fingerprint": "0" * 16}
    path.write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "traces.jsonl"}, ConfigError, "data is for a layer adapter.*leave it out"),
        ({"training": {"max_steps": 3}}, ConfigError, "training is for a layer adapter"),
        ({"held_out": 0.1}, ConfigError, "held_out is for a layer adapter"),
        ({"divergence": "forward"}, ConfigError, "divergence is for a layer adapter"),
        ({"gate": 0.1}, ConfigError, "gate is for a layer adapter"),
        ({"lambda": 3}, LambdaError, r"λ=3: outside the range \[0, 2\]"),
        ({"lambda": {"low": 0, "high": 2}}, ConfigError, "lambda must be a number"),
        (_corrupt, ConfigError, "truncated or corrupt"),
        (_plain, LambdaError, "a plain LoRA"),
        (_other_base, PairMismatchError, "other weights"),
    ],
)
def test_what_does_not_apply_is_refused(
    tree: dict[str, Any], change: Any, error: type[Exception], message: str
) -> None:
    if callable(change):
        change(tree)
    else:
        tree |= change
    with pytest.raises(error, match=message):
        bake(tree, dry_run=True)
    assert not Path(tree["output"]).exists()


def test_a_lambda_outside_the_range_may_be_meant(tree: dict[str, Any]) -> None:
    plan = bake(tree | {"lambda": 3}, lambda_range=(0, 4), dry_run=True)
    assert plan.facts["lambda"] == 3


def test_the_command_merges_and_says_so(
    tree: dict[str, Any], dial: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    path = tmp_path / "bake.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "lambda"}))
    result = run_cli("bake", path, "--lambda", LAM, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"output": tree["output"], "steps": 0}
    again = run_cli("bake", path, "--lambda", LAM)
    assert "finished" in again.stderr
    assert run_cli("bake", path, "--lambda", "0:2").exit_code == 2


def test_a_layer_adapter_still_needs_data(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data is missing; add a line `data: …`"):
        bake(tree | {"adapter": str(tmp_path / "none")})


def test_what_happens_is_told(tree: dict[str, Any]) -> None:
    begun: list[Any] = []

    class Hearing(Events):
        def begin(self, run: Any) -> None:
            begun.append(copy.copy(run))

    bake(tree, events=Hearing())
    bake(tree, events=Hearing())
    assert [run.state for run in begun] == ["new", "done"]
