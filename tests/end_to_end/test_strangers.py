"""Three strangers with a goal each, from an empty folder: what they type, and how long they wait.

They type the console script's commands, copied from its help or from what the command before said
comes next. Copies of the miniature's parts stand for their checkpoints. Each prints its commands and
its seconds (``pytest -s``).
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from flexalign.miniature import folder, make_questions

pytestmark = pytest.mark.full

SCRIPT = Path(sysconfig.get_path("scripts")) / "flexalign"
TRAINING = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_length": 512,
    "activation_checkpointing": False,
}
AS_WRITTEN = ("--temperature", "1", "--top-p", "1", "--max-new-tokens", "400")
"""The miniature was taught bare sums, sampled as they are."""


class Stranger:
    """Types commands in a folder of their own.

    Attributes:
        home: The folder.
        said: What each command wrote, on both streams.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.said: list[str] = []
        self.seconds: list[float] = []
        self.server: subprocess.Popen[str] | None = None
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def type(self, *words: str) -> str:
        """Run ``flexalign WORDS…`` and return its stdout."""
        started = time.monotonic()
        done = subprocess.run(
            [SCRIPT, *words], cwd=self.home, env=self._environment, capture_output=True, text=True
        )
        self.seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
        self.said.append(done.stdout + done.stderr)
        return done.stdout

    def serve(self, *words: str) -> str:
        """Start ``flexalign serve WORDS…`` and return the address that it prints."""
        started = time.monotonic()
        self.server = subprocess.Popen(
            [SCRIPT, "serve", *words],
            cwd=self.home,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout is not None
        address = self.server.stdout.readline().strip()
        self.seconds.append(time.monotonic() - started)
        return address

    def write(self, name: str, tree: dict[str, Any]) -> None:
        """Write a recipe."""
        (self.home / name).write_text(yaml.safe_dump(tree), encoding="utf-8")

    def ask_of(self, seed: int, count: int) -> str:
        """Write questions with known answers; return the file's name."""
        rows = [
            {"problem": question.text, "answer": str(question.answer)}
            for question in make_questions(count, seed)
        ]
        name = f"questions-{seed}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.home / name).write_text(text, encoding="utf-8")
        return name

    def leave(self) -> None:
        """Say what it took."""
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(60) == 0
            assert self.server.stdout is not None
            self.server.stdout.close()
        waits = ", ".join(f"{seconds:.0f}" for seconds in self.seconds)
        total = f"{len(self.seconds)} commands, {sum(self.seconds):.0f} s ({waits})"
        print(f"{self.home.name}: {total}", file=sys.stderr)


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Stranger]:
    stranger = Stranger(tmp_path)
    yield stranger
    stranger.leave()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_papers_shape_is_reproduced_and_drawn(stranger: Stranger):
    stranger.type("demo", "--questions", "100", "--steps", "60")
    assert "out/demo/pareto.png" in stranger.said[-1]
    demo = {row["name"]: row for row in read(stranger.home / "out/demo/demo.json")["rows"]}
    tokens = [demo[name]["tokens"] for name in ("reference", "aligned", "λ=2", "λ=2, 2 rounds")]
    assert tokens == sorted(tokens, reverse=True)
    assert demo["λ=1"]["tokens"] == pytest.approx(demo["aligned"]["tokens"], rel=0.2)

    stranger.type(
        *("evaluate", "pair:miniature", "--task", "miniature", "--limit", "120", "-n", "1"),
        *("--lambda", "0,0.5,1,2", "--batch-size", "64", "-o", "out/sweep"),
    )
    rows = read(stranger.home / "out/sweep/summary.json")["rows"]
    cuts = [row["token_cut"] for row in rows]
    assert cuts == sorted(cuts)
    assert cuts[-1] > 1.2 * cuts[-2] > 0
    assert rows[-1]["accuracy_ci"][1] > rows[0]["accuracy"]
    for picture in ("out/demo/pareto.png", "out/sweep/pareto.png"):
        assert (stranger.home / picture).read_bytes().startswith(b"\x89PNG")


def test_two_checkpoints_give_a_model_with_forty_percent_fewer_tokens(stranger: Stranger):
    for part, name in (("reference", "base"), ("aligned", "concise")):
        shutil.copytree(folder(part), stranger.home / "models" / name)
    asked, held_out = stranger.ask_of(7, 400), stranger.ask_of(8, 100)

    stranger.type("inspect", "models/base", "models/concise")
    stranger.type(
        "sample", "models/base", "--prompts", asked, "--limit", "100", "-o", "traces.jsonl"
    )
    assert "data: traces.jsonl" in stranger.said[-1]

    pair = "pair:models/base,models/concise"
    stranger.type(
        *("tune", pair, "--task", asked, "--margin", "0.1", "--lambda", "2,3", "--samples", "1"),
        *(*AS_WRITTEN, "--batch-size", "64", "-o", "out/tuned"),
    )
    chosen = read(stranger.home / "out/tuned/tuned.json")["chosen"]
    lam = chosen.removeprefix("λ=")
    assert f"flexalign realign recipe.yaml --lambda {lam}" in stranger.said[-1]

    recipe = {"reference": "models/base", "aligned": "models/concise", "data": "traces.jsonl"}
    recipe |= {"output": "out/realigned", "training": TRAINING | {"max_steps": 30}}
    stranger.write("recipe.yaml", recipe)
    stranger.type("realign", "recipe.yaml", "--lambda", lam)
    systems = ("before=model:models/base", "after=model:out/realigned", "--baseline", "before")
    assert f"flexalign evaluate {' '.join(systems)}" in stranger.said[-1]

    stranger.type(
        *("evaluate", *systems, "--task", held_out, "-n", "1", *AS_WRITTEN),
        *("--batch-size", "64", "-o", "out/evaluated"),
    )
    before, after = read(stranger.home / "out/evaluated/summary.json")["rows"]
    assert after["token_cut"] > 0.35
    assert after["accuracy"] > before["accuracy"] - 0.1
    card = (stranger.home / "out/realigned/README.md").read_text(encoding="utf-8")
    assert f"flexalign realign recipe.yaml --lambda {lam}" in card
    assert "models/concise" in card


def test_one_model_gets_a_dial_that_clients_turn(stranger: Stranger):
    shutil.copytree(folder("reference"), stranger.home / "models" / "base")
    asked = stranger.ask_of(9, 150)

    stranger.type("sample", "models/base", "--prompts", asked, "-o", "traces.jsonl")
    recipe = {"base": "models/base", "data": "traces.jsonl", "output": "out/fast"}
    recipe |= {"method": "sft", "strip_thinking": True, "training": TRAINING | {"max_steps": 60}}
    stranger.write("adapt.yaml", recipe)
    stranger.type("adapt", "adapt.yaml")
    dial = ("models/base", "--adapter", "out/fast")
    assert f"flexalign calibrate {' '.join(dial)} --task questions.jsonl" in stranger.said[-1]

    stranger.type("calibrate", *dial, "--task", asked, *AS_WRITTEN, "--batch-size", "64")
    assert f"flexalign serve {' '.join(dial)}" in stranger.said[-1]
    address = stranger.serve(*dial, "--port", "0")

    tokens = {}
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        (model,) = client.models.list().data
        for effort in ("none", "xhigh"):
            answers = [
                client.chat.completions.create(
                    model=model.id,
                    messages=[{"role": "user", "content": question.text}],
                    reasoning_effort=effort,
                    temperature=1,
                    seed=0,
                )
                for question in make_questions(6, 10)
            ]
            tokens[effort] = sum(answer.usage.completion_tokens for answer in answers)
            assert {answer.model_extra["dial"]["route"] for answer in answers} == (
                {"fast"} if effort == "none" else {None}
            )
    assert tokens["none"] < tokens["xhigh"] / 3
