import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from flexalign.inra import InRaModel
from flexalign.training.callbacks import StopOnSignal

Run = Callable[..., Any]

TRAINING = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "max_length": 64,
}


@pytest.fixture
def tree(tmp_path: Path, tiny_pair: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{n}+{n}=", "completion": f"again {n}</think> {2 * n}"} for n in range(8)]
    data = tmp_path / "traces.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "base": str(tiny_pair.reference),
        "data": str(data),
        "output": str(tmp_path / "out"),
        "training": TRAINING,
    }


@pytest.fixture
def command(tmp_path: Path, run_cli: Run) -> Run:
    def run(name: str, tree: dict[str, Any], *options: object) -> Any:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return run_cli(name, path, *options)

    return run


@pytest.fixture
def adapter(tmp_path: Path, tiny_pair: Any) -> Path:
    model = InRaModel.create(tiny_pair.reference)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.usefixtures("weightless")
def test_a_dry_run_shows_what_is_trained_on_and_writes_nothing(
    command: Run, tree: dict[str, Any]
) -> None:
    result = command("adapt", tree, "--strip-thinking", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["samples"][1] == {"masked": "1+1=", "trained": "2<|im_end|>"}
    assert (facts["steps"], facts["effective_batch"]) == (3, 2)
    assert facts["trained_parameters"] < 100_000
    assert not Path(tree["output"]).exists()


def test_adapt_writes_an_adapter_that_loads(command: Run, tree: dict[str, Any]) -> None:
    result = command("adapt", tree, "--strip-thinking", "--json")
    assert result.exit_code == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["steps"] == 3
    model = InRaModel.from_pretrained(tree["base"], outcome["output"])
    ids = torch.arange(1, 9)[None]
    assert not torch.allclose(model(ids, lam=1.0).logits, model(ids, lam=0.0).logits, atol=1e-3)


def test_bake_comes_nearer_to_the_dial(
    command: Run, tree: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    baked = {**tree, "adapter": str(adapter), "lambda": 1.0, "output": str(tmp_path / "baked")}
    baked |= {"held_out": 0.25, "training": TRAINING | {"max_steps": 30}}
    result = command("bake", baked, "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["held_out_divergence"] < 0.5 * measured["held_out_divergence_of_base"]
    plain = AutoModelForCausalLM.from_pretrained(measured["output"])
    assert not any("inra" in name for name, _ in plain.named_parameters())
    again = command("bake", baked, "--json")
    assert json.loads(again.stdout) == measured
    assert "finished" in again.stderr


def test_dpo_and_trra_by_option(
    command: Run, tree: dict[str, Any], tiny_pair: Any, tmp_path: Path
) -> None:
    trra = {**tree, "aligned": str(tiny_pair.aligned), "output": str(tmp_path / "trra")}
    asked = ("--method", "trra", "--lambda", "-0.5")
    refused = command("adapt", trra, *asked)
    assert refused.exit_code == 2
    assert "undoes its safety training" in refused.stderr
    result = command("adapt", trra, *asked, "--extrapolate", "--json")
    assert result.exit_code == 0, result.stderr
    rows = [{"prompt": f"{n}=", "chosen": f" {n}", "rejected": " no"} for n in range(6)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dpo = {**tree, "data": str(data), "output": str(tmp_path / "dpo")}
    options = ["--set", "training.beta=0.2"]
    result = command("adapt", dpo, "--method", "dpo", *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "dpo" / "inra_adapter.safetensors").is_file()


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dqo"}, "method must be"),
        ({"methods": "sft"}, "did you mean 'method'?"),
        ({"training": {"max_step": 3}}, "did you mean 'training.max_steps'?"),
        ({"training": {"beta": 0.1}}, "unknown key 'training.beta'"),
        ({"lambda": 1.0}, "lambda is for method trra"),
        ({"method": "trra"}, "needs `aligned` and `lambda`"),
        ({"method": "dpo"}, "expected chosen and rejected"),
        ({"method": "dpo", "strip_thinking": True}, "leave it out with method dpo"),
        ({"adapter_layers": 0}, "adapter_layers must be at least 1"),
        ({"base": "no/such"}, "there is no model"),
        ({"adapter": "./no/such"}, "holds no InRa adapter"),
        ({"adapter": "no/such"}, "there is no adapter"),
        ({"method": "trra", "lambda": 1.0, "aligned": "miniature:aligned"}, "do not fit: "),
    ],
)
def test_wrong_recipes_are_one_sentence(
    change: dict[str, Any], message: str, command: Run, tree: dict[str, Any]
) -> None:
    result = command("adapt", {**tree, **change})
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("weightless")
def test_strip_thinking_without_thinking_is_refused(
    command: Run, tree: dict[str, Any], tmp_path: Path
) -> None:
    data = tmp_path / "plain.jsonl"
    data.write_text('{"prompt": "1=", "completion": " 1"}\n', encoding="utf-8")
    result = command("adapt", {**tree, "data": str(data)}, "--strip-thinking")
    assert result.exit_code == 2
    assert "has the thinking tag '</think>'" in result.stderr


@pytest.mark.parametrize("name", ["adapt", "bake"])
def test_adapters_that_do_not_fit_are_refused_before_weights_load(
    name: str,
    command: Run,
    tree: dict[str, Any],
    adapter: Path,
    tiny_pair: Any,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue("weightless")
    given = {**tree, "adapter": str(adapter), **({"lambda": 0.5} if name == "bake" else {})}
    other = command(name, {**given, "base": str(tiny_pair.aligned)})
    assert other.exit_code == 2
    assert "was made for" in other.stderr
    weights = adapter / "inra_adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cut = command(name, given)
    assert cut.exit_code == 2
    assert "truncated or corrupt" in cut.stderr


def test_a_lambda_outside_the_adapters_range_is_not_baked_unless_told(
    command: Run, tree: dict[str, Any], adapter: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("weightless")
    given = {**tree, "adapter": str(adapter), "lambda": 1.5}
    refused = command("bake", given, "--dry-run")
    assert refused.exit_code == 2
    assert f"λ=1.5: outside the range [0, 1] of the adapter {adapter}" in refused.stderr
    assert command("bake", given, "--lambda-range", "0,2", "--dry-run").exit_code == 0
    assert command("bake", given, "--lambda-range", "0,1.4", "--dry-run").exit_code == 2


def test_bases_that_cannot_have_an_adapter_are_refused(
    command: Run, tree: dict[str, Any], tiny_pair: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    settings = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(vocab_size=len(tiny_tokenizer), **settings))
    for part in (mamba, tiny_tokenizer):
        part.save_pretrained(tmp_path / "mamba")
    result = command("adapt", {**tree, "base": str(tmp_path / "mamba")})
    assert result.exit_code == 2, result.stderr
    assert "InRa" in result.stderr
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.reference)
    for part in (model, tiny_tokenizer):
        part.save_pretrained(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = command("adapt", {**tree, "base": str(broken)})
    assert result.exit_code == 2, result.stderr
    assert "cut off or damaged" in result.stderr


@pytest.mark.slow
def test_the_examples_run_in_the_miniature(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    monkeypatch.chdir(tmp_path)
    few = ["--set", "training.max_steps=8"]
    result = run_cli("adapt", examples / "adapt.yaml", *few, "--json")
    assert result.exit_code == 0, result.stderr
    result = run_cli("bake", examples / "bake.yaml", *few, "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["held_out_divergence"] < measured["held_out_divergence_of_base"]


@pytest.mark.usefixtures("weightless")
def test_a_base_that_is_a_peft_adapter_is_refused(
    command: Run, tree: dict[str, Any], tmp_path: Path
) -> None:
    peft = {"peft_type": "LORA", "base_model_name_or_path": tree["base"], "r": 4}
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(peft))
    result = command("adapt", {**tree, "base": str(tmp_path / "peft")})
    assert result.exit_code == 2, result.stderr
    assert "merge" in result.stderr


def test_a_single_row_leaves_nothing_to_hold_out(
    command: Run, tree: dict[str, Any], adapter: Path
) -> None:
    data = Path(tree["data"])
    data.write_text(data.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    result = command("bake", {**tree, "adapter": str(adapter), "lambda": 0.5})
    assert result.exit_code == 2, result.stderr
    assert "has one row; held_out needs at least one more" in result.stderr


def test_a_signal_ends_with_how_to_go_on(
    command: Run, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_step_end = StopOnSignal.on_step_end

    def signalled(self: StopOnSignal, *given: Any, **more: Any) -> None:
        self.requested = True
        on_step_end(self, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(StopOnSignal, "on_step_end", signalled)
        result = command("adapt", tree)
    assert result.exit_code == 130, result.stderr
    assert "checkpoint-1; give the same command again to go on from there" in result.stderr
    result = command("adapt", tree)
    assert result.exit_code == 0, result.stderr
    assert InRaModel.from_pretrained(tree["base"], tree["output"])
