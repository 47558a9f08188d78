import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

RunCli = Callable[..., Any]


def _alpaca(path: Path, rows: int) -> Path:
    answers = [
        {
            "instruction": f"what is {n} plus {n}",
            "input": "",
            "output": f"It is the number {2 * n}.",
        }
        for n in range(rows)
    ]
    path.write_text(json.dumps(answers), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        ("Paris.", "Paris."),
        ("The first one. The second one. The third one.", "The first one. The second one."),
        ("Only the first line.\n\nNever the second.", "Only the first line."),
        (
            "Dr. Smith wrote it, e.g. this. Then he left.",
            "Dr. Smith wrote it, e.g. this. Then he left.",
        ),
        ("Short enough. " + "far " * 38 + "too long.", "Short enough."),
        ("word " * 41 + "end.", None),
        ("1. First of all\n2. And then", None),
        ("- an item", None),
        ("```python\nprint(1)\n```", None),
        ("Here are three ways:\n\n1. Walk", None),
        ("Title: A Story\n\nOnce upon a time.", None),
        ("  \n ", None),
    ],
)
@pytest.mark.usefixtures("smollm2")
def test_an_answer_is_shortened_to_whole_first_sentences(answer: str, short: str | None) -> None:
    from concise import shorten

    assert shorten(answer) == short


@pytest.mark.usefixtures("smollm2")
def test_held_out_prompts_are_in_no_other_part_even_when_the_data_repeat_them(
    tmp_path: Path,
) -> None:
    from concise import split

    rows = json.loads(_alpaca(tmp_path / "data.json", 30).read_text())
    data = tmp_path / "twice.json"
    data.write_text(json.dumps(rows + rows))
    parts = split(data, held_out=8, seed=0)
    held_out, prompts, concise = (
        {row["prompt"][-1]["content"] for row in part}
        for part in (parts.held_out, parts.prompts, parts.concise)
    )
    assert len(parts.held_out) == len(held_out) == 8
    assert held_out.isdisjoint(prompts | concise)
    assert len(held_out | prompts) == 30
    assert split(data, held_out=8, seed=0) == parts
    assert split(data, held_out=8, seed=1).held_out != parts.held_out


@pytest.mark.usefixtures("smollm2")
def test_distinct_2_counts_pairs_of_words_within_answers() -> None:
    from measure import distinct_2

    # a b | b a | a b: three pairs, two of them distinct; none across the two answers.
    assert distinct_2(["A b, a", "a b."]) == pytest.approx(2 / 3)
    assert distinct_2(["A b, a", "a b."], words=2) == pytest.approx(1 / 2)
    assert math.isnan(distinct_2(["one"]))


@pytest.mark.usefixtures("smollm2")
def test_perplexity_is_that_of_the_answers_tokens_without_the_end(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from measure import perplexity, surprise

    model = tiny_model()
    answers, nats = [], []
    for text, question in (("six because", "one plus two"), ("", "what"), ("the answer", "is")):
        prompt = [{"role": "user", "content": question}]
        opening = tiny_tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False
        )
        response = tiny_tokenizer(text)["input_ids"]
        answers.append(
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": text}],
                "tokens": len(response),
            }
        )
        ids = opening + response
        with torch.no_grad():
            shares = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats.append([-float(shares[i - 1, ids[i]]) for i in range(len(opening), len(ids))])
    measured = surprise(answers, model, tiny_tokenizer)
    assert [len(part) for part in measured] == [len(part) for part in nats]
    for tokens in (None, 2):
        counted = [value for part in nats for value in part[:tokens]]
        expected = math.exp(sum(counted) / len(counted))
        assert perplexity(measured, tokens) == pytest.approx(expected, rel=1e-5)


def test_the_recipe_dry_runs(
    smollm2: Path, tmp_path: Path, run_cli: RunCli, tiny_pair: Any
) -> None:
    data = _alpaca(tmp_path / "data.json", 20)
    result = run_cli(
        *("realign", smollm2 / "realign.yaml", "--dry-run", "--json", "--output", tmp_path / "out"),
        *("--set", f"reference={tiny_pair.reference}", "--set", f"aligned={tiny_pair.aligned}"),
        *("--set", f"data={data}"),
    )
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    recipe = yaml.safe_load((smollm2 / "realign.yaml").read_text())
    assert facts["lambda"] == recipe["lambda"]
    assert facts["steps"] == recipe["training"]["max_steps"]
    assert facts["effective_batch"] == 8


@pytest.mark.full
def test_the_example_runs_from_data_to_report_and_passes_over_what_is_done(
    smollm2: Path, tmp_path: Path, tiny_pair: Any
) -> None:
    command = [
        *(sys.executable, smollm2 / "run.py", "--quick", "--reference", tiny_pair.reference),
        *("--data", _alpaca(tmp_path / "data.json", 60), "--output", tmp_path / "out"),
    ]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["system"], row["lambda"]) for row in rows] == [
        ("reference", 0.0),
        ("aligned", 1.0),
        ("trra", 2.0),
        ("dial", 2.0),
    ]
    assert all(row["answers"] == 24 for row in rows)
    report = (tmp_path / "out" / "report.md").read_text()
    weights = tmp_path / "out" / "lambda=2" / "merged" / "model.safetensors"
    trained = weights.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert weights.stat().st_mtime_ns == trained
    assert (tmp_path / "out" / "report.md").read_text() == report
    other = subprocess.run(command[:2] + command[3:], capture_output=True, text=True)
    assert other.returncode == 1
    assert "other settings" in other.stderr
