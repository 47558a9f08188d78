import json

import pytest

from flexalign.miniature import ALIGNED, make_questions, make_traces


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_carry_their_answers(run_cli, tmp_path):
    output = tmp_path / "questions.jsonl"
    assert run_cli("miniature", "questions", "-o", output, "-n", 4, "--seed", 3).exit_code == 0
    expected = make_questions(4, seed=3)
    assert read_rows(output) == [
        {"problem": question.text, "answer": str(sum(question.terms))} for question in expected
    ]


def test_traces_are_rows_of_the_chosen_way_of_thinking(run_cli, tmp_path):
    output = tmp_path / "deep" / "traces.jsonl"
    result = run_cli("miniature", "traces", "-o", output, "-n", 3, "--style", "aligned")
    assert result.exit_code == 0
    assert read_rows(output) == make_traces(3, seed=0, habits=ALIGNED)


def test_an_unknown_style_is_refused(run_cli, tmp_path):
    output = tmp_path / "traces.jsonl"
    result = run_cli("miniature", "traces", "-o", output, "--style", "slow")
    assert result.exit_code == 2
    assert "take reference or aligned" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize("command", ["questions", "traces"])
def test_a_file_that_is_there_stays_as_it_is(command, run_cli, tmp_path):
    output = tmp_path / "rows.jsonl"
    output.write_text("mine", encoding="utf-8")
    result = run_cli("miniature", command, "-o", output)
    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert output.read_text(encoding="utf-8") == "mine"


def test_forms_draws_a_picture(run_cli, tmp_path):
    output = tmp_path / "forms.png"
    assert run_cli("miniature", "forms", "-o", output).exit_code == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_building_names_each_part_as_it_is_written(run_cli, tmp_path, monkeypatch):
    def build_all(output, *, seed, placebo):
        assert (seed, placebo) == (3, True)
        yield from ("reference", "placebo")

    monkeypatch.setattr("flexalign.miniature.build.build_all", build_all)
    result = run_cli("miniature", "build", "-o", tmp_path, "--seed", 3, "--placebo")
    assert result.exit_code == 0, result.stderr
    wrote = [f"wrote {tmp_path / part}" for part in ("reference", "placebo")]
    assert "".join(result.stderr.split("\n")) == "".join(wrote)


def test_aligning_prints_what_its_card_says(run_cli, tmp_path):
    output = tmp_path / "sft"
    given = ("--method", "sft", "--steps", 1, "--questions", 4)
    result = run_cli("miniature", "align", "-o", output, *given)
    assert result.exit_code == 0, result.stderr
    record = json.loads((output / "alignment.json").read_text(encoding="utf-8"))
    low, mean, high = record["aligned"]["tokens"]
    for text in (result.stdout, (output / "README.md").read_text(encoding="utf-8")):
        assert f"{mean:.1f} [{low:.1f}, {high:.1f}]" in text
    assert f"wrote {output}" in result.stderr
    assert "train_runtime" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("--method", "dpo"), "take grpo or sft"),
        (("--method", "sft", "--cost", 0.1), "--cost is of --method grpo"),
        (("--reward", "constant", "--cost", 0.1), "has no cost"),
    ],
    ids=str,
)
def test_an_alignment_that_is_not_known_is_refused(given, reason, run_cli, tmp_path):
    result = run_cli("miniature", "align", "-o", tmp_path / "model", *given)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not (tmp_path / "model").exists()
