"""A model whose template opens the thinking in the prompt and drops it from messages, as R1's does.

The miniature under such a template, from sampling to measuring, beside the miniature as it is: the
chain must reach the same figures. Trained where nobody asks, it would not.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexalign.miniature import folder, make_questions

pytestmark = pytest.mark.full

OPENING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)
TRAINING = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_length": 512,
    "max_steps": 60,
    "activation_checkpointing": False,
    "use_cpu": True,
}
AS_WRITTEN = ("--temperature", "1", "--top-p", "1", "--max-new-tokens", "400", "--batch-size", "64")


class Home:
    """A folder with the pair, where the chain is run."""

    def __init__(self, path: Path, run_cli: Callable[..., Any], template: str | None) -> None:
        self.path, self._run = path, run_cli
        for part in ("reference", "aligned"):
            shutil.copytree(folder(part), path / part)
            if template is not None:
                (path / part / "chat_template.jinja").write_text(template, encoding="utf-8")

    def type(self, *words: object) -> str:
        result = self._run(*words)
        assert result.exit_code == 0, result.stderr
        return str(result.stdout)

    def questions(self, count: int, seed: int) -> Path:
        path = self.path / f"questions-{seed}.jsonl"
        rows = [
            {"problem": question.text, "answer": str(question.answer)}
            for question in make_questions(count, seed)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def train(self, command: str, **recipe: Any) -> None:
        path = self.path / f"{command}.yaml"
        path.write_text(yaml.safe_dump({**recipe, "training": TRAINING}), encoding="utf-8")
        self.type(command, path)

    def measure(self, system: str, *options: object) -> dict[str, Any]:
        output = self.path / f"evaluated-{system.partition(':')[0]}"
        asked = ("--task", self.questions(200, 10), "-n", 1)
        self.type("evaluate", system, *asked, *options, *AS_WRITTEN, "-o", output)
        (row,) = json.loads((output / "summary.json").read_text("utf-8"))["rows"]
        return dict(row)


@pytest.fixture
def figures(tmp_path: Path, run_cli: Callable[..., Any]) -> Callable[[str | None], Any]:
    def run(template: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        home = Home(tmp_path / ("opening" if template else "ordinary"), run_cli, template)
        reference, aligned = home.path / "reference", home.path / "aligned"
        traces = home.path / "traces.jsonl"
        prompts = home.questions(300, 9)
        home.type("sample", reference, "--prompts", prompts, "-o", traces, "--batch-size", 64)

        student, adapter = home.path / "student", home.path / "adapter"
        pair = {"reference": str(reference), "aligned": str(aligned), "data": str(traces)}
        home.train("realign", **pair, output=str(student), **{"lambda": 5, "gate": 0.01})
        realigned = home.measure(f"model:{student}")

        home.train(
            "adapt",
            base=str(reference),
            data=str(traces),
            output=str(adapter),
            method="sft",
            strip_thinking=True,
        )
        fast = home.measure(f"dial:{reference},{adapter}", "--lambda", 1)
        return realigned, fast

    return run


def test_a_template_that_opens_the_thinking_reaches_the_same_figures(
    figures: Callable[[str | None], Any],
) -> None:
    realigned, fast = figures(None)
    opened, opened_fast = figures(OPENING)

    # λ = 5 behind a gate: far shorter than the reference's 83 tokens, and more often right.
    for row in (realigned, opened):
        assert row["tokens"] < 65
        assert row["accuracy"] > 0.78
    assert abs(realigned["tokens"] - opened["tokens"]) < 6
    assert abs(realigned["accuracy"] - opened["accuracy"]) < 0.08

    # The fast stream mostly answers at once; where the thinking is open it closes it first.
    for row in (fast, opened_fast):
        assert row["tokens"] < 20
        assert row["thinking_tokens"] < 18
    assert abs(fast["tokens"] - opened_fast["tokens"]) < 8
    assert abs(fast["accuracy"] - opened_fast["accuracy"]) < 0.15
