"""``--by-id`` in every command that takes two models, and what is recorded of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import RENAMED_TOKENS
from flexalign.errors import ConfigError
from flexalign.serving.server import ServeOptions

pytestmark = pytest.mark.filterwarnings("ignore:the chat templates differ")

RunCli = Callable[..., Any]
REFUSED = "go on with --by-id (by_id: true in a recipe, by_id=True in Python)"
NAMES = {"<think>": "<|box_start|>", "<|im_end|>": "<|end_of_sentence|>"}


def named(renamed: list[dict[str, Any]]) -> dict[str, str]:
    return {token["reference"]: token["aligned"] for token in renamed}


@pytest.fixture
def told_both_ways(run_cli: RunCli) -> Callable[..., Any]:
    """Call a command without the option, which is refused, and with it."""

    def call(*words: object) -> Any:
        refused = run_cli(*words)
        assert refused.exit_code == 2, refused.stderr
        said = " ".join((refused.stderr + refused.stdout).split())
        assert REFUSED in said
        assert "'<think>' and '<|box_start|>'" in said
        result = run_cli(*words, "--by-id")
        assert result.exit_code == 0, result.stderr
        return result

    return call


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"problem": f"{n}+2?", "answer": str(n + 2)} for n in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path, renamed_pair: Any) -> Callable[..., Path]:
    def write(**keys: Any) -> Path:
        traces = tmp_path / "traces.jsonl"
        rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(4)]
        traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        training = {"max_steps": 1, "gradient_accumulation_steps": 2, "max_length": 64}
        tree = {"data": str(traces), "output": str(tmp_path / "out"), "training": training}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree | keys), encoding="utf-8")
        return path

    return write


@pytest.fixture
def sides(renamed_pair: Any) -> dict[str, str]:
    return {"reference": str(renamed_pair.reference), "aligned": str(renamed_pair.aligned)}


def test_inspect(told_both_ways: Callable[..., Any], renamed_pair: Any, run_cli: RunCli) -> None:
    result = told_both_ways("inspect", *renamed_pair)
    assert "fits:" in result.stdout
    assert "'<think>' and '<|box_start|>'" in result.stdout
    report = json.loads(run_cli("inspect", *renamed_pair, "--by-id", "--json").stdout)
    assert named(report["renamed"]) == RENAMED_TOKENS
    adapter = run_cli("inspect", "miniature", "miniature:fast", "--diff", "x", "--by-id")
    assert adapter.exit_code == 2
    assert "miniature:fast is an adapter" in " ".join(adapter.stderr.split())
    alone = run_cli("inspect", renamed_pair.reference, "--by-id")
    assert alone.exit_code == 2
    assert "name the aligned one" in alone.stderr


def test_generate(told_both_ways: Callable[..., Any], renamed_pair: Any, run_cli: RunCli) -> None:
    one, other = renamed_pair
    asked = ("1+2?", "--max-new-tokens", 3, "--lambda", "0,0.5", "--json")
    result = told_both_ways("generate", one, *asked, "--aligned", other)
    assert len(json.loads(result.stdout)) == 2
    for words in ((), ("--adapter", one)):
        refused = run_cli("generate", one, "1+2?", *words, "--by-id")
        assert refused.exit_code == 2
        assert "--by-id is about two models" in " ".join(refused.stderr.split())


def test_evaluate(
    told_both_ways: Callable[..., Any],
    renamed_pair: Any,
    questions: Path,
    tmp_path: Path,
    run_cli: RunCli,
) -> None:
    one, other = renamed_pair
    settings = ("--task", questions, "--max-new-tokens", 3, "-n", 1, "-o", tmp_path / "results")
    asked = ("--lambda", "0,0.5", *settings)
    systems = (f"pair:{one},{other}", f"interpolate:{one},{other}", f"model:{one}")
    told_both_ways("evaluate", *systems, *asked)
    recorded = json.loads((tmp_path / "results" / "run.json").read_text(encoding="utf-8"))
    found = recorded["configuration"]["systems"]
    assert [named(system.get("renamed", [])) for system in found] == [
        RENAMED_TOKENS,
        RENAMED_TOKENS,
        {},
    ]
    refused = run_cli("evaluate", f"model:{one}", *settings, "--by-id")
    assert refused.exit_code == 2
    assert "--by-id is about two models" in " ".join(refused.stderr.split())


def test_sample(
    told_both_ways: Callable[..., Any], renamed_pair: Any, questions: Path, tmp_path: Path
) -> None:
    one, other = renamed_pair
    output = tmp_path / "sampled.jsonl"
    asked = ("--prompts", questions, "-o", output, "--max-new-tokens", 3, "--lambda", 0.5)
    told_both_ways("sample", one, "--aligned", other, *asked)
    manifest = json.loads(Path(f"{output}.manifest.json").read_text(encoding="utf-8"))
    assert '"<|box_start|>"' in json.dumps(manifest)


def test_realign(
    told_both_ways: Callable[..., Any],
    recipe: Callable[..., Path],
    sides: dict[str, str],
    tmp_path: Path,
    run_cli: RunCli,
) -> None:
    path = recipe(**sides, **{"lambda": 2.0})
    planned = told_both_ways("realign", path, "--dry-run")
    assert "<|box_start|>" in planned.stdout
    done = run_cli("realign", path, "--set", "by_id=true")
    assert done.exit_code == 0, done.stderr
    assert "'<think>' and '<|box_start|>'" in done.stderr
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "by_id: true" in card
    (row,) = [line for line in card.splitlines() if "read by id" in line]
    for name, other in NAMES.items():
        cells = f"`{name}`, `{other}`".replace("|", "\\|")
        assert cells in row
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert named(manifest["renamed"]) == RENAMED_TOKENS


def test_cache(
    told_both_ways: Callable[..., Any],
    recipe: Callable[..., Path],
    sides: dict[str, str],
    run_cli: RunCli,
) -> None:
    path = recipe(**sides)
    told_both_ways("cache", path)
    trained = run_cli("realign", path, "--by-id", "--lambda", 1, "--set", "teacher=cached")
    assert trained.exit_code == 0, trained.stderr


def test_adapt(
    told_both_ways: Callable[..., Any],
    recipe: Callable[..., Path],
    sides: dict[str, str],
    tmp_path: Path,
    run_cli: RunCli,
) -> None:
    base = sides["reference"]
    path = recipe(base=base, aligned=sides["aligned"], method="trra", **{"lambda": 1.0})
    result = told_both_ways("adapt", path)
    assert "'<think>' and '<|box_start|>'" in result.stderr
    assert "read by id" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    other = run_cli("adapt", recipe(base=base), "--by-id")
    assert other.exit_code == 2
    assert "by_id is for method trra" in " ".join(other.stderr.split())


def test_preview(
    told_both_ways: Callable[..., Any],
    renamed_pair: Any,
    recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    recipe()
    one, other = renamed_pair
    traces = tmp_path / "traces.jsonl"
    told_both_ways("tune", f"pair:{one},{other}", "--preview", traces, "--lambda", "0,1")


def test_serving_takes_it_for_a_pair_alone(renamed_pair: Any, run_cli: RunCli) -> None:
    one, other = map(str, renamed_pair)
    assert ServeOptions(one, aligned=other, by_id=True).by_id
    with pytest.raises(ConfigError, match="--by-id is about two models"):
        ServeOptions(one, by_id=True)
    refused = run_cli("serve", one, "--adapter", "x", "--by-id", "--engine", "vllm")
    assert refused.exit_code == 2
    assert "which vLLM does not serve" in " ".join(refused.stderr.split())
