"""Students of one pair that were trained differently: refused by name, or named in the report."""

import json
from pathlib import Path

import pytest
import transformers

from flexalign.errors import ConfigError
from flexalign.evaluation import evaluate
from flexalign.evaluation.students import training_differences
from flexalign.evaluation.summary import compare
from flexalign.evaluation.tasks import Task, TaskQuestion

TASK = Task("sums", (TaskQuestion("q", "what is one plus two", "3"),), instruction="")
TRAINING = {"max_steps": 100, "learning_rate": 1e-3, "seed": 0, "rows_per_step": 8}
SHORT = {"samples": 1, "max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture
def student(tmp_path, tiny_model, tiny_tokenizer):
    """Make the folder of a student, with the record of a training."""

    def make(name: str, lam: object = 1.0, pair: str = "pair", **training: object) -> Path:
        folder = tmp_path / name
        if not folder.exists():
            tiny_model(vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        run = {"lambda": lam, "pair": [pair, "b"], "round": 1, "training": TRAINING | training}
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        return folder

    return make


def _differences(*folders: Path) -> str | None:
    return training_differences({folder.name: folder for folder in folders})


def test_students_that_differ_in_lambda_alone_may_be_compared(student):
    same = [student("one", 1.0), student("two", 2.0, seed=3, data_seed=5, use_cpu=True)]
    integer = student("three", 3, max_steps=100.0, activation_checkpointing=True)
    assert _differences(*same, integer) is None


def test_every_field_is_named_with_its_values_and_who_has_them(student):
    folders = [
        student("half", 0.5),
        student("one", 1.0, learning_rate=2e-3),
        student("two", 2.0, max_steps=200, learning_rate=2e-3),
    ]
    assert _differences(*folders) == (
        "learning_rate 0.001 (half) and 0.002 (one, two); max_steps 100 (half, one) and 200 (two)"
    )


def test_a_field_that_was_not_recorded_counts_with_its_default(student):
    default = transformers.TrainingArguments.weight_decay
    assert _differences(student("one"), student("two", weight_decay=default)) is None
    found = _differences(student("one"), student("two", weight_decay=0.5, own=1))
    assert found == "own the default (one) and 1 (two); weight_decay 0 (one) and 0.5 (two)"


def test_only_students_of_one_pair_and_one_lambda_are_compared(student, tmp_path):
    one = student("one")
    other_pair = student("other", pair="other", max_steps=7)
    dial = student("dial", {"low": 0.0, "high": 2.0}, max_steps=7)
    for name, text in (("broken", "{"), ("list", "[]"), ("foreign", '{"training": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text, encoding="utf-8")
    others = [tmp_path / name for name in ("broken", "list", "foreign", "missing")]
    assert _differences(one, other_pair, dial, *others) is None
    scheduled = student("scheduled", {"schedule": "linear", "start": 0, "end": 2}, max_steps=7)
    assert _differences(one, scheduled) == "max_steps 100 (one) and 7 (scheduled)"


def test_a_sweep_is_refused_before_sampling_or_its_report_names_the_difference(student, tmp_path):
    systems = [f"one=model:{student('one')}", f"two=model:{student('two', 2.0, max_steps=200)}"]
    words = "Students of one pair were trained differently: max_steps 100 (one) and 200 (two)"
    with pytest.raises(ConfigError) as caught:
        evaluate(systems, [TASK], tmp_path / "sweep", **SHORT)
    assert str(caught.value).startswith(f"{words}; so λ is not all that sets them apart")
    assert "--any-training" in str(caught.value)
    assert not (tmp_path / "sweep").exists()

    result = evaluate(systems, [TASK], tmp_path / "sweep", any_training=True, **SHORT)
    assert result.summary.environment["notes"] == [f"{words}."]
    assert f'"notes":["{words}."]' in (tmp_path / "sweep" / "report.html").read_text("utf-8")


def test_a_sweep_that_was_begun_without_the_note_goes_on_with_it(student, tmp_path):
    systems = [f"one=model:{student('one')}", f"two=model:{student('two', 2.0)}"]
    evaluate(systems, [TASK], tmp_path / "sweep", **SHORT)
    assert "notes" not in json.loads((tmp_path / "sweep" / "run.json").read_text("utf-8"))
    student("two", 2.0, max_steps=200)
    result = evaluate(systems, [TASK], tmp_path / "sweep", any_training=True, **SHORT)
    assert result.made == 0
    assert "max_steps" in result.summary.environment["notes"][0]
    student("two", 2.0)
    result = evaluate(systems, [TASK], tmp_path / "sweep", **SHORT)
    assert "notes" not in result.summary.environment


def test_sweeps_side_by_side_have_a_note(student, tmp_path, run_cli):
    for name, steps in (("one", 100), ("two", 200)):
        system = f"model:{student(name, max_steps=steps)}"
        evaluate([system], [TASK], tmp_path / "sweeps" / name, **SHORT)
    folders = [tmp_path / "sweeps" / name for name in ("one", "two")]
    words = (
        "Students of one pair were trained differently: max_steps 100 (one/model:one) and 200 "
        "(two/model:two)."
    )
    assert compare(folders).environment == {"notes": [words]}
    result = run_cli("compare", *folders, "--output", tmp_path / "both")
    assert result.exit_code == 0, result.stderr
    assert words in " ".join(result.stderr.split())
    assert words in (tmp_path / "both" / "report.html").read_text("utf-8")


def test_the_command_refuses_with_its_exit_code_and_goes_on_when_asked(student, tmp_path, run_cli):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"problem": "one plus two", "answer": "3"}\n', encoding="utf-8")
    folders = [student("one"), student("two", 2.0, learning_rate=0.5)]
    asked = ["evaluate", *(f"model:{folder}" for folder in folders), "--task", questions]
    refused = run_cli(*asked, "--dry-run")
    assert refused.exit_code == 2
    assert "learning_rate 0.001 (model:one) and 0.5 (model:two)" in refused.stderr
    allowed = run_cli(*asked, "--dry-run", "--any-training")
    assert allowed.exit_code == 0, allowed.stderr
    assert "learning_rate 0.001 (model:one) and 0.5 (model:two)" in allowed.stderr
