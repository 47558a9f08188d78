import gzip
import json
from pathlib import Path

import pytest

from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.grading import Grader
from flexalign.evaluation.tasks import (
    DATA_VARIABLE,
    MATHEMATICS,
    TaskQuestion,
    load_task,
    sample_warning,
    unreadable_golds,
)
from flexalign.miniature import make_questions

MATH = [
    {"problem": "Polar?", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "unique_id": "a/1.json"},
    {"problem": " Half? ", "answer": "\\frac{1}{2}", "unique_id": "a/2.json"},
]
AIME = [{"problem": f"Question {n}?", "answer": f"{n:03}", "year": 2024} for n in range(30)]
AMC = [{"problem": "m+n?", "answer": 142.0}, {"problem": "x?", "answer": -4.0}]
GSM8K = [{"question": "Eggs?", "answer": "She sells <<9*2=18>>18.\n#### 18"}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, rows in (("math", MATH), ("aime", AIME), ("amc", AMC)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    return tmp_path


def test_public_files_are_read_in_their_own_forms(data: Path) -> None:
    math = load_task("MATH-500", data=data)
    assert math.name == "math500"
    assert math.questions[1] == TaskQuestion("a/2.json", "Half?", "\\frac{1}{2}")
    assert [q.gold for q in load_task("amc", data=data).questions] == ["142", "-4"]
    assert load_task("gsm8k", data=data).questions == (TaskQuestion("1", "Eggs?", "18"),)
    assert load_task("aime24", data=data).questions[8].gold == "008"


def test_the_folder_may_come_from_the_environment(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(data))
    assert len(load_task("aime").questions) == 30
    monkeypatch.delenv(DATA_VARIABLE)
    with pytest.raises(ConfigError, match=f"--data .* or {DATA_VARIABLE}"):
        load_task("aime")
    with pytest.raises(ConfigError, match=r"no file of aime25.*aime25\.jsonl"):
        load_task("aime25", data=data)
    assert load_task("amc", data=data / "amc.json").name == "amc"


def test_a_public_question_asks_for_a_box_and_others_for_nothing(data: Path) -> None:
    task = load_task("amc", data=data)
    [message] = task.messages(task.questions[0])
    assert message == {"role": "user", "content": f"m+n?\n\n{MATHEMATICS}"}
    assert "\\boxed{}" in MATHEMATICS
    own = load_task(str(data / "amc.json"))
    assert own.messages(own.questions[0])[0]["content"] == "m+n?"
    asked = load_task(str(data / "amc.json"), instruction="Go.")
    assert asked.messages(asked.questions[0])[0]["content"] == "m+n?\n\nGo."
    little = load_task("miniature", limit=1)
    assert little.messages(little.questions[0])[0]["content"] == little.questions[0].problem


def test_the_miniatures_questions_are_its_worlds() -> None:
    task = load_task("miniature:7", limit=20)
    made = make_questions(20, 7)
    assert [(q.problem, q.gold) for q in task.questions] == [(m.text, str(m.answer)) for m in made]
    assert load_task("miniature").questions != load_task("miniature:7").questions
    assert len(load_task("miniature").questions) == 500
    with pytest.raises(ConfigError, match="model:miniature:aligned"):
        load_task("miniature:aligned")


def test_the_papers_sampling_is_the_default(data: Path) -> None:
    sampling = load_task("amc", data=data).sampling
    assert (sampling.samples, sampling.temperature) == (8, 0.7)
    assert (sampling.top_p, sampling.max_new_tokens) == (0.95, 16384)


def test_a_limit_draws_by_seed_and_keeps_the_order(data: Path) -> None:
    ids = [int(q.id) for q in load_task("aime", data=data, limit=10, seed=3).questions]
    assert ids == sorted(set(ids))
    assert len(ids) == 10
    again = load_task("aime", data=data, limit=10, seed=3).questions
    assert [int(q.id) for q in again] == ids
    assert [int(q.id) for q in load_task("aime", data=data, limit=10, seed=4).questions] != ids
    assert load_task("aime", data=data, limit=99) == load_task("aime", data=data)
    with pytest.raises(ConfigError, match="at least 1"):
        load_task("aime", data=data, limit=0)


def test_the_hash_is_that_of_the_contents(data: Path, tmp_path: Path) -> None:
    before = load_task("amc", data=data).content_hash
    (data / "copy.json").write_text(json.dumps(AMC))
    assert load_task(str(data / "copy.json"), instruction=MATHEMATICS).content_hash == before
    (data / "amc.json").write_text(json.dumps([AMC[0], {**AMC[1], "answer": 4}]))
    assert load_task("amc", data=data).content_hash != before
    assert len(before) == 16


def test_missing_fields_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"problem": "p", "answer": "1"}, {"problem": "p"}, {"answer": "1"}, {"problem": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        load_task(str(path))
    assert str(error.value).splitlines() == [
        f"{path}: 3 rows cannot be asked; mend or remove them:",
        "  line 2: no field `answer`",
        "  line 3: no field `problem` (or `question`)",
        "  line 4: `problem` is not a text, or is empty",
    ]


@pytest.mark.parametrize("answer", [[1], True, " ", {"a": 1}, float("nan")])
def test_an_answer_that_is_none_is_refused(tmp_path: Path, answer: object) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": "p", "answer": answer}) + "\n")
    with pytest.raises(DataError, match="line 1: `answer` is neither"):
        load_task(str(path))


def test_ids_are_unique_and_a_task_has_questions(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(2 * '{"problem": "p", "answer": 1, "id": "x"}\n')
    with pytest.raises(DataError, match="line 2: the id 'x' was given before, at line 1"):
        load_task(str(path))
    path.write_text("")
    with pytest.raises(DataError, match="no questions"):
        load_task(str(path))


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no task and no file 'mth'.*math500, aime"):
        load_task("mth")


def test_few_samples_of_aime_are_warned_of(data: Path) -> None:
    aime = load_task("aime", data=data)
    assert "at least 32" in str(sample_warning(aime, 8))
    assert sample_warning(aime, 32) is None
    assert sample_warning(load_task("amc", data=data), 1) is None


def test_golds_that_cannot_be_parsed_are_found_before_sampling(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    golds = ["\\frac{1}{2}", "\\frac{1}{", "7", "???"]
    path.write_text("".join(json.dumps({"problem": "p", "answer": g}) + "\n" for g in golds))
    with Grader(seconds=20) as grader:
        found = unreadable_golds(load_task(str(path)), grader)
    assert [question.id for question in found] == ["2", "4"]


def test_an_instruction_of_ones_own_takes_the_tasks_place(data: Path):
    usual, bare = load_task("amc", data=data), load_task("amc", data=data, instruction="")
    assert bare.messages(bare.questions[0])[0]["content"] == "m+n?"
    assert bare.content_hash != usual.content_hash
    brief = load_task("miniature", limit=1, instruction="Be brief.")
    assert brief.messages(brief.questions[0])[0]["content"].endswith("?\n\nBe brief.")


def test_a_task_may_be_a_table_with_gzip_or_a_split_of_a_folder(tmp_path: Path) -> None:
    rows = [{"problem": f"{number}+1?", "answer": str(number + 1)} for number in range(3)]
    plain = tmp_path / "sums.jsonl"
    plain.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    table = "problem,answer\n" + "".join(f"{row['problem']},{row['answer']}\n" for row in rows)
    (tmp_path / "sums.csv.gz").write_bytes(gzip.compress(table.encode()))
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "test.jsonl").write_bytes(plain.read_bytes())
    (folder / "train.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")

    expected = load_task(str(plain))
    zipped, split = load_task(str(tmp_path / "sums.csv.gz")), load_task(str(folder / "test"))
    assert zipped.questions == split.questions == expected.questions
    assert (zipped.name, split.name) == ("sums", "test")
    own = tmp_path / "own.csv"
    own.write_text(table.replace("problem,answer", "query,key"), encoding="utf-8")
    columns = {"problem": "query", "answer": "key"}
    assert load_task(str(own), columns=columns).questions == expected.questions
    for wrong, error, message in (
        ({"problem": "quary", "answer": "key"}, DataError, "no row has the column 'quary'"),
        ({"problm": "query"}, ConfigError, "unknown key 'columns.problm'; did you mean"),
    ):
        with pytest.raises(error, match=message):
            load_task(str(own), columns=wrong)
    for known in ("miniature", "math500"):
        with pytest.raises(ConfigError, match=f"columns is for files, and {known} has rows"):
            load_task(known, columns=columns)
    with pytest.raises(DataError, match="there is no split 'dev'; the splits of"):
        load_task(str(folder / "dev"))
    with pytest.raises(ConfigError, match="there is no task and no file"):
        load_task(str(tmp_path / "none"))
