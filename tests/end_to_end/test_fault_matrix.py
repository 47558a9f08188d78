"""SIGKILL at twenty random moments: every command, given again, comes to the same end.

The moments are seeded shares of how long the undisturbed run took, from outside, so that they fall
wherever they fall: while loading, in a step, half way through a file.
"""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from flexalign.training.hidden_cache import HiddenStateCache

pytestmark = pytest.mark.full

KILLS = 5


class Activity(NamedTuple):
    """A command that writes to a folder, and what of the folder must not depend on faults."""

    arguments: Callable[[Path], list[str]]
    result: Callable[[Path], Any]


@pytest.fixture
def recipe(tmp_path: Path, tiny_pair: Any) -> Callable[..., str]:
    traces = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}" * (1 + n % 4)} for n in range(60)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(output: Path, **settings: Any) -> str:
        training = {
            "save_steps": 3,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_length": 32,
            "logging_steps": 1,
            "use_cpu": True,
        }
        tree = {
            "reference": str(tiny_pair.reference),
            "aligned": str(tiny_pair.aligned),
            "data": str(traces),
            "output": str(output),
            "lambda": 1.5,
            **settings,
            "training": training | settings.get("training", {}),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"what is {n} plus two", "answer": n + 2} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(output: Path) -> dict[str, str]:
    """Checksums of the weights of the result and of every round before it."""
    found = {}
    for manifest in [output / "manifest.json", *output.glob("round-*/manifest.json")]:
        files = json.loads(manifest.read_text())["files"]
        for name, entry in files.items():
            if name.endswith(".safetensors"):
                found[f"{manifest.parent.relative_to(output)}/{name}"] = entry["sha256"]
    return found


def cached(output: Path) -> dict[str, bytes]:
    HiddenStateCache.open(output)
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.safetensors"))}


def evaluated(output: Path) -> tuple[Any, Any]:
    rows = (output / "samples.jsonl").read_text().splitlines()
    return sorted(rows), json.loads((output / "summary.json").read_text())["rows"]


@pytest.fixture
def activity(
    request: pytest.FixtureRequest, recipe: Callable[..., str], questions: Path, tiny_pair: Any
) -> Activity:
    def train(output: Path) -> list[str]:
        return ["realign", recipe(output, training={"max_steps": 30})]

    def rounds(output: Path) -> list[str]:
        return ["realign", recipe(output, rounds=3, training={"max_steps": 6, "save_steps": 2})]

    def cache(output: Path) -> list[str]:
        return ["cache", recipe(output), "-o", str(output)]

    def evaluate(output: Path) -> list[str]:
        pair = f"pair=pair:{tiny_pair.reference},{tiny_pair.aligned}"
        options = ["--lambda", "0,0.5,1", "--samples", "2", "--max-new-tokens", "24"]
        target = ["--task", str(questions), "--batch-size", "4", "--output", str(output)]
        return ["evaluate", pair, *options, *target]

    return {
        "training": Activity(train, trained),
        "rounds": Activity(rounds, trained),
        "cache": Activity(cache, cached),
        "evaluation": Activity(evaluate, evaluated),
    }[request.param]


@pytest.mark.parametrize(
    "activity", ["training", "rounds", "cache", "evaluation"], indirect=True, ids=str
)
def test_killed_at_random_moments_it_comes_to_the_same_end(
    request: pytest.FixtureRequest,
    activity: Activity,
    start: Callable[..., Any],
    tmp_path: Path,
) -> None:
    whole = start(activity.arguments(tmp_path / "whole"))
    assert whole.code == 0, whole.log
    expected = activity.result(tmp_path / "whole")
    assert expected

    shares = random.Random(request.node.callspec.id)
    killed, quicker, seconds = 0, 0, whole.seconds
    output = tmp_path / "out-0"
    while killed < KILLS:
        moment = shares.uniform(0.1, 0.9) * seconds
        ended = start(activity.arguments(output), moment)
        if ended.code == -signal.SIGKILL:
            killed += 1
            continue
        assert ended.code == 0, ended.log  # it was quicker: the next one starts anew
        assert activity.result(output) == expected
        quicker += 1
        assert quicker < 4 * KILLS
        seconds = min(seconds, ended.seconds)  # the machine was busy before
        output = tmp_path / f"out-{quicker}"
    last = start(activity.arguments(output))
    assert last.code == 0, last.log
    assert activity.result(output) == expected
