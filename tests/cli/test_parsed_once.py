"""A λ is read where it enters: one parse, one check of its number and range, one set of settings."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexalign import fusion, lambdas
from flexalign.cli import options
from flexalign.training import realignment
from flexalign.training.config import TrRaConfig

LINEAR = {"kind": "linear", "start": 0, "end": 2, "steps": 2}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a λ is parsed, checked to be finite, checked against its range, and configured."""
    counted: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        return call

    # `--lambda 2` is read as a number, a schedule as one; both count as a parse.
    parse = lambdas.Schedule.parse.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(options, "parse_lambdas", counting("parse", options.parse_lambdas))
    settle = TrRaConfig.__post_init__
    monkeypatch.setattr(lambdas.Schedule, "parse", classmethod(counting("parse", parse)))
    monkeypatch.setattr(TrRaConfig, "__post_init__", counting("TrRaConfig", settle))
    for module, name in ((lambdas, "finite_lambda"), (realignment, "require_forward")):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counted


@pytest.fixture
def recipe(tmp_path: Path, tiny_pair: Any) -> Path:
    traces = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(4)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(traces),
        "output": str(tmp_path / "out"),
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_length": 64,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize(("given", "numbers"), [("2", 1), (json.dumps(LINEAR), 2)])
def test_realign_reads_its_lambda_once(
    given: str, numbers: int, counts: Counter[str], recipe: Path, run_cli: Callable[..., Any]
) -> None:
    result = run_cli("realign", recipe, "--lambda", given, "--json")
    assert result.exit_code == 0, result.stderr
    assert counts == {
        "parse": 1,
        "finite_lambda": numbers,
        "require_forward": 1,
        "TrRaConfig": 1,
    }
    assert json.loads(result.stdout)["effective_lambda"] == 2.0


@pytest.mark.parametrize("tokens", [1, 8])
def test_generate_reads_its_lambda_once(
    tokens: int, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", "miniature", "3+14+15?", "--adapter", "miniature:fast", "--json")
    asked += ("--temperature", "0", "--max-new-tokens", str(tokens))
    assert run_cli(*asked, "--lambda", "0").exit_code == 0  # loads every module that is patched

    counted: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # An adapter's configuration brings numbers of its own along, which are checked too.
            if name != "finite_lambda" or args[0] == 0.375:
                counted[name] += 1
            return original(*args, **kwargs)

        return call

    for home, name in (
        (lambdas, "parse_lambdas"),
        (lambdas, "finite_lambda"),
        (lambdas, "outside_range"),
        (fusion, "as_lambda"),
    ):
        original = getattr(home, name)
        replaced = counting(name, original)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("flexalign") and vars(module).get(name) is original:
                monkeypatch.setattr(module, name, replaced)

    [row] = json.loads(run_cli(*asked, "--lambda", "0.375").stdout)
    assert (row["lambda"], row["tokens"]) == (0.375, tokens)
    assert counted == {"parse_lambdas": 1, "finite_lambda": 1, "outside_range": 1}
