import json

import pytest

from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.systems import Key
from flexalign.evaluation.tasks import Question, Task

TASK = Task("sums", (Question("a", "1+1\u2028", "2"), Question("b", "1+2", "3")))
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
    _begin(tmp_path)
    other = {"systems": [{"name": "m"}, {"name": "n"}], "sampling": {"seed": 1, "gate": None}}
    with pytest.raises(ConfigError) as refused:
        _begin(tmp_path, other)
    assert 'systems: ["m"] there, ["m", "n"] asked' in str(refused.value)
    assert "sampling.seed: 0 there, 1 asked" in str(refused.value)
    assert "name another --output" in str(refused.value)


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
