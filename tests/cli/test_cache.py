"""``flexalign cache``, and ``flexalign realign`` of several λ from one cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexalign.training.hidden_cache import HiddenStateCache

WIDTH, VOCAB = 64, 320


@pytest.fixture
def tree(tmp_path: Path, tiny_pair: Any) -> dict[str, Any]:
    traces = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}" * (1 + n % 4)} for n in range(12)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(traces),
        "output": str(tmp_path / "out"),
        "lambda": 2.0,
        "training": {
            "max_steps": 3,
            "save_steps": 3,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_length": 32,
            "logging_steps": 1,
            "activation_checkpointing": False,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        },
    }


@pytest.fixture
def flexalign(tmp_path: Path, run_cli: Callable[..., Any]) -> Callable[..., Any]:
    def run(command: str, tree: dict[str, Any], *options: object) -> Any:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return run_cli(command, path, *options)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("bfloat16", 2)])
def test_a_dry_run_tells_the_size_and_loads_nothing(
    flexalign: Callable[..., Any],
    tree: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    size: int,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    result = flexalign("cache", tree, "--dry-run", "--json", "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["bytes_per_token"] == 2 * WIDTH * size
    total = facts["response_tokens"] * 2 * WIDTH * size + 2 * VOCAB * WIDTH * 4
    assert facts["gib"] == pytest.approx(total / 2**30, abs=1e-4)
    assert not Path(facts["cache"]).exists()
    assert "GiB are free" in flexalign("cache", tree, "--dry-run").stdout


def test_a_recipe_without_lambda_has_the_cache_of_every_lambda(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    lam = tree.pop("lambda")
    made = flexalign("cache", tree, "--json")
    assert made.exit_code == 0, made.stderr
    refused = flexalign("realign", tree, "--set", "teacher=cached")
    assert refused.exit_code == 2
    assert "lambda is missing" in refused.stderr

    files = {path: path.stat().st_mtime_ns for path in Path(tree["output"] + "-cache").iterdir()}
    again = flexalign("cache", tree | {"lambda": lam}, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["tokens"] == json.loads(made.stdout)["tokens"]
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert [path.stat().st_mtime_ns for path in shards] == [files[path] for path in shards]

    told = flexalign("cache", tree | {"lambda": "much"}, "--dry-run")
    assert told.exit_code == 2
    assert "lambda must be" in told.stderr


def test_a_cache_is_made_checked_and_mended(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = flexalign("cache", tree, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["cache"] == tree["output"] + "-cache"
    assert facts["tokens"] > facts["documents"] == 12
    assert "response tokens ×" in result.stderr
    shard = Path(facts["cache"]) / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    again = flexalign("cache", tree)
    assert again.exit_code == 0, again.stderr
    assert "is corrupt (its checksum differs); it is made again" in again.stderr
    HiddenStateCache.open(facts["cache"])


@pytest.mark.parametrize("change", [{"rounds": 2}, {"rollouts": 0.5}])
def test_a_cache_that_no_run_of_the_recipe_could_read_is_not_made(
    flexalign: Callable[..., Any], tree: dict[str, Any], change: dict[str, Any]
) -> None:
    for options in ((), ("--dry-run",)):
        result = flexalign("cache", tree | change, *options)
        assert result.exit_code == 2
        assert "no run of this recipe can read a cache: " in result.stderr
        assert f"{next(iter(change))} with teacher='cached'" in result.stderr
    assert not Path(tree["output"] + "-cache").exists()


def test_a_cache_that_a_run_does_not_read_is_said(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    told = "-cache holds hidden states of teachers, which are not read"
    assert told not in flexalign("realign", tree, "--dry-run").stderr
    assert flexalign("cache", tree).exit_code == 0
    assert told in flexalign("realign", tree, "--dry-run").stderr
    cached = flexalign("realign", tree, "--dry-run", "--set", "teacher=cached")
    assert (cached.exit_code, told in cached.stderr) == (0, False)


def test_students_of_several_lambda_come_from_one_cache_with_one_report(
    flexalign: Callable[..., Any], tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = []
    original = HiddenStateCache.__init__

    def opened(self: Any, *args: Any) -> None:
        filled.append(1)
        original(self, *args)

    monkeypatch.setattr(HiddenStateCache, "__init__", opened)
    options = ("--lambda", "0.5,2", "--set", "teacher=cached", "--json")
    result = flexalign("realign", tree, *options)
    assert result.exit_code == 0, result.stderr
    assert len(filled) == 1
    report = json.loads(result.stdout)
    output = Path(tree["output"])
    assert [student["output"] for student in report["students"]] == [
        str(output / "lambda=0.5"),
        str(output / "lambda=2"),
    ]
    assert report == json.loads((output / "report.json").read_text())
    first, second = report["students"]
    assert first["kl_aligned"] != second["kl_aligned"]
    cost = report["cost"]
    steps = sum(3 * student["seconds_per_step"] for student in report["students"])
    assert cost["training_seconds"] == pytest.approx(steps)
    assert cost["total_seconds"] == pytest.approx(cost["cache_seconds"] + steps)
    assert cost["online_total_seconds"] > steps
    assert "single runs with the teachers online" in result.stderr
    page = (output / "report.md").read_text(encoding="utf-8")
    assert "| 0.5 | 3 |" in page
    assert cost["how"] in page

    tree |= {"output": str(output.with_name("online"))}
    assert flexalign("realign", tree).exit_code == 0
    online = weights(Path(tree["output"]))
    for name, value in weights(output / "lambda=2").items():
        torch.testing.assert_close(value, online[name], rtol=0, atol=2e-4)


def test_several_lambda_go_on_where_they_stopped(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    tree |= {"teacher": "cached", "lambda": [1, 2]}
    first = flexalign("realign", tree)
    assert first.exit_code == 0, first.stderr
    (Path(tree["output"]) / "lambda=2" / "manifest.json").unlink()
    again = flexalign("realign", tree, "--json")
    assert again.exit_code == 0, again.stderr
    assert "lambda=1 holds this run already" in again.stderr
    report = json.loads(again.stdout)
    assert report["students"][0]["seconds_per_step"] is None
    assert report["cost"] is None


def test_a_dry_run_of_several_names_them(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = flexalign("realign", tree, "--lambda", "0.5,2", "--dry-run", "--json")
    facts = json.loads(result.stdout)
    assert facts["lambda"] == [0.5, 2.0]
    assert facts["output_state"] == ["new", "new"]


def test_a_cache_of_other_data_is_refused_by_realign(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    assert flexalign("cache", tree).exit_code == 0
    tree["training"]["max_length"] = 16
    result = flexalign("realign", tree, "--set", "teacher=cached")
    assert result.exit_code == 2
    assert "the cut-off max_length (max_length was 32, now 16)" in result.stderr


def test_an_unknown_dtype_is_one_sentence(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = flexalign("cache", tree, "--dtype", "int8")
    assert result.exit_code == 2
    assert "--dtype must be one of auto, float32" in result.stderr


def test_pickled_weights_have_no_fingerprint_to_go_by(
    flexalign: Callable[..., Any], tree: dict[str, Any], tmp_path: Path
) -> None:
    aligned = shutil.copytree(tree["aligned"], tmp_path / "pickled")
    torch.save(load_file(aligned / "model.safetensors"), aligned / "pytorch_model.bin")
    (aligned / "model.safetensors").unlink()
    result = flexalign("cache", {**tree, "aligned": str(aligned)}, "--allow-pickle")
    assert result.exit_code == 2, result.stderr
    assert "which pickled weights have none of" in result.stderr


def test_a_run_of_few_rows_is_told_that_the_cache_holds_all(
    flexalign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = flexalign("cache", tree, "--set", "training.max_steps=1")
    assert result.exit_code == 0, result.stderr
    assert "the 1 steps of a run see 33% of the rows" in result.stderr


def test_ctrl_c_says_how_to_go_on(
    flexalign: Callable[..., Any], tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flexalign.training.cache.write_cache", interrupt)
        result = flexalign("cache", tree)
    assert result.exit_code == 130
    assert "give the same command again to go on from there" in result.stderr
    assert flexalign("cache", tree).exit_code == 0
