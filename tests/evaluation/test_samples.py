import json

import numpy as np
import pytest

from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.samples import ResultsFolder, Samples
from flexalign.evaluation.systems import Key
from flexalign.evaluation.tasks import Task, TaskQuestion

TASK = Task("sums", (TaskQuestion("a", "1+1\u2028", "2"), TaskQuestion("b", "1+2", "3")))
CONFIGURATION = {"systems": [{"name": "m"}], "sampling": {"seed": 0, "gate": None}}


def _row(sample, **fields):
    row = {"system": "m", "setting": "λ=0", "task": "sums", "question": "a", "sample": sample}
    return row | {"status": "wrong", "tokens": 3, "response": "one\u2028two"} | fields


def _begin(path, configuration=CONFIGURATION, environment="one"):
    return ResultsFolder.begin(path, configuration, [TASK], {"machine": environment})


def test_the_configuration_and_the_questions_come_first(tmp_path) -> None:
    folder = _begin(tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run == {
        "format_version": 1,
        "configuration": CONFIGURATION,
        "environments": [{"machine": "one"}],
    }
    lines = (tmp_path / "out" / "questions.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert [json.loads(line) for line in lines] == [
        {"task": "sums", "question": "a", "problem": "1+1\u2028", "gold": "2"},
        {"task": "sums", "question": "b", "problem": "1+2", "gold": "3"},
    ]
    assert folder.golds() == {("sums", "a"): "2", ("sums", "b"): "3"}
    assert folder.rows == []


def test_samples_are_there_when_it_goes_on(tmp_path) -> None:
    folder = _begin(tmp_path)
    folder.append([_row(0), _row(1)])
    folder.append([_row(2, system="other")])
    again = _begin(tmp_path)
    assert again.rows == folder.rows
    assert again.done("m") == {Key("λ=0", "sums", "a", 0), Key("λ=0", "sums", "a", 1)}
    assert again.environments == [{"machine": "one"}]


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_half_written_last_line_is_dropped(tmp_path, cut) -> None:
    folder = _begin(tmp_path)
    folder.append([_row(0), _row(1)])
    content = folder.samples_file.read_bytes()
    folder.samples_file.write_bytes(content[:-cut])
    again = _begin(tmp_path)
    assert again.rows == [_row(0)]
    again.append([_row(1)])
    assert folder.samples_file.read_bytes() == content


def test_a_damaged_line_is_named(tmp_path) -> None:
    folder = _begin(tmp_path)
    folder.append([_row(0)])
    with folder.samples_file.open("a") as file:
        file.write('{"system": 1}\n')
    with pytest.raises(DataError, match="line 2 is no sample"):
        _begin(tmp_path)


def test_another_configuration_is_refused_by_what_differs(tmp_path) -> None:
    _begin(tmp_path).append([_row(0)])
    other = {"systems": [{"name": "m"}, {"name": "n"}], "sampling": {"seed": 1, "gate": None}}
    with pytest.raises(ConfigError) as refused:
        _begin(tmp_path, other)
    assert 'systems: ["m"] there, ["m", "n"] asked' in str(refused.value)
    assert "sampling.seed: 0 there, 1 asked" in str(refused.value)
    assert "name another --output" in str(refused.value)


def test_a_folder_without_a_sample_is_left_to_any_configuration(tmp_path) -> None:
    first = _begin(tmp_path)
    (tmp_path / "samples.jsonl").touch()
    other = {"systems": [{"name": "m", "model": "k2"}], "sampling": {"seed": 1}}
    folder = ResultsFolder.begin(tmp_path, other, [], {"machine": "two"})
    assert folder.configuration == other
    stored = ResultsFolder.read(tmp_path)
    assert (stored.configuration, stored.environments) == (other, [{"machine": "two"}])
    assert stored.golds() == {}

    with pytest.raises(ConfigError, match="was taken over by a run of another configuration"):
        first.append([_row(0)])
    folder.append([_row(0)])
    assert ResultsFolder.read(tmp_path).rows == [_row(0)]


def test_another_machine_is_noted(tmp_path) -> None:
    _begin(tmp_path)
    _begin(tmp_path, environment="two")
    folder = _begin(tmp_path, environment="two")
    assert folder.environments == [{"machine": "one"}, {"machine": "two"}]


def test_what_is_no_results_folder_is_said(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json is missing"):
        ResultsFolder.read(tmp_path)
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"no run\.json that says what they are"):
        _begin(tmp_path)
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(ConfigError, match="is damaged"):
        _begin(tmp_path)
    (tmp_path / "run.json").write_text('{"format_version": 9}')
    with pytest.raises(ConfigError, match="format_version 9"):
        _begin(tmp_path)


ROWS = [
    {"question": "b", "sample": 1, "status": "correct", "tokens": 9, "confidence": 0.5},
    {"question": "a", "sample": 0, "status": "truncated", "tokens": 30, "route": "fast"},
    {"question": "b", "sample": 0, "status": "wrong", "tokens": 3, "thinking_tokens": 2},
    {"question": "a", "sample": 1, "status": "correct", "tokens": None},
]


def test_columns_are_those_of_the_rows() -> None:
    samples = Samples.from_rows(ROWS)
    assert samples.questions == ["b", "a"]
    assert samples.correct.tolist() == [True, False, False, True]
    assert samples.tokens.tolist() == [9, 30, 3, 0]
    assert samples.rejected_tokens.tolist() == [0, 0, 0, 0]
    assert (samples.accuracy, samples.mean_tokens) == (0.5, 10.5)
    assert (samples.share("truncated"), samples.share("unparsed")) == (0.25, 0)
    given = samples.to_rows()
    assert [row["confidence"] for row in given] == [0.5, None, None, None]
    assert [row["thinking_tokens"] for row in given] == [None, None, 2, None]
    assert [row["route"] for row in given] == [None, "fast", None, None]
    assert Samples.from_rows(given).to_rows() == given


def test_samples_are_chosen_and_put_together_by_question() -> None:
    samples = Samples.from_rows(ROWS)
    assert samples.by_question(samples.tokens).tolist() == [6, 15]
    assert samples.table(samples.tokens).tolist() == [[9, 3], [30, 0]]
    assert samples.sorted().table(samples.sorted().tokens).tolist() == [[30, 0], [3, 9]]
    only = samples.on(["a"])
    assert (only.questions, only.shape, only.tokens.tolist()) == (["a"], (1, 2), [30, 0])
    both = samples.on(["a", "b"])
    assert both.questions == both.select(np.arange(4)).questions == ["a", "b"]
    assert both.tokens.tolist() == [30, 0, 9, 3]
    joined = only.joined(samples.on(["b"]))
    assert joined.to_rows() == both.to_rows()
    assert samples.select(samples.correct).tokens.tolist() == [9, 0]


def test_a_table_is_samples_question_by_question() -> None:
    samples = Samples.from_table([[1, 0], [1, 1]], [[5, 6], [7, 8]], ["x", "y"])
    assert samples.question.tolist() == ["x", "x", "y", "y"]
    assert samples.sample.tolist() == [0, 1, 0, 1]
    assert samples.status.tolist() == ["correct", "wrong", "correct", "correct"]
    assert samples.table(samples.tokens).tolist() == [[5, 6], [7, 8]]
    cut = samples.token_cut(Samples.from_table([[1], [0]], [[10], [16]], ["x", "y"]))
    assert cut.mean == pytest.approx(0.5)
    change = samples.accuracy_difference(Samples.from_table([[1], [0]], [[10], [16]], ["x", "y"]))
    assert change.mean == pytest.approx(0.25)


def test_columns_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match="one value of each kind"):
        Samples(["a", "b"], [True], [3, 4])
    with pytest.raises(DataError, match="no sample of question 'c'"):
        Samples.from_rows(ROWS).on(["a", "c"])
    with pytest.raises(DataError, match="no table holds them"):
        Samples(["a", "a", "b"], [1, 1, 1], [1, 1, 1]).table(np.zeros(3))
    one, other = Samples("ab", [1, 1], [2, 2]), Samples("ac", [1, 1], [2, 2])
    with pytest.raises(DataError, match="one of the two only"):
        one.accuracy_difference(other)


def test_a_setting_of_a_folder_is_a_table(tmp_path) -> None:
    folder = _begin(tmp_path)
    folder.append([_row(0), _row(1, status="correct", tokens=5), _row(0, setting="λ=1")])
    found = folder.samples("m", "λ=0", "sums")
    assert (found.tokens.tolist(), found.correct.tolist()) == ([3, 5], [False, True])
    assert len(folder.samples("m", "λ=9", "sums")) == 0
