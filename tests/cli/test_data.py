"""Data of one's own in the commands: other names, other files, and rows that call tools."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROWS = [{"query": f"one plus {number}", "reply": "three " * number} for number in range(1, 7)]
TRAINING = {"max_steps": 2, "use_cpu": True, "max_length": 64, "save_steps": 1}
TRAINING |= {"gradient_accumulation_steps": 1}
COLUMNS = {"question": "query", "answer": "reply"}


@pytest.fixture
def write_recipe(tiny_pair: Any, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "realign", **keys: Any) -> Path:
        recipe = {"reference": str(tiny_pair.reference), "aligned": str(tiny_pair.aligned)}
        recipe |= {"lambda": 2, "output": str(tmp_path / "out"), "training": TRAINING}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe | keys), encoding="utf-8")
        return path

    return write


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same rows three times: under the known names, as a CSV, and as shards with gzip."""
    plain, table, shards = tmp_path / "plain.jsonl", tmp_path / "own.csv", tmp_path / "shards"
    known = [{"question": row["query"], "answer": row["reply"]} for row in ROWS]
    plain.write_text("\n".join(map(json.dumps, known)), encoding="utf-8")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["reply", "note", "query"])
        writer.writeheader()
        writer.writerows(row | {"note": "none"} for row in ROWS)
    shards.mkdir()
    for number in range(2):
        part = "\n\n".join(map(json.dumps, known[3 * number : 3 * number + 3]))
        (shards / f"train-0000{number}-of-00002.jsonl.gz").write_bytes(gzip.compress(part.encode()))
    return {"plain": plain, "table": table, "shards": shards}


def test_the_same_rows_from_other_files_are_the_same_run_and_cache(
    run_cli: Any, write_recipe: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    shared = {"teacher": "cached", "cache_dir": str(tmp_path / "cache")}
    plain = write_recipe("plain", data=str(files["plain"]), **shared)
    table = write_recipe("table", data=str(files["table"]), columns=COLUMNS, **shared)
    named = write_recipe("named", data=str(files["table"]), **shared)
    shards = write_recipe("shards", data=str(files["shards"] / "train"), **shared)

    shown = [
        json.loads(run_cli("realign", path, "--dry-run", "--json").stdout)
        for path in (plain, table, shards)
    ]
    assert shown[0]["samples"] == shown[1]["samples"] == shown[2]["samples"]
    assert shown[0]["data"]["rows"] == 6

    # The cache of one, and the run that begins with one, are those of the others.
    assert run_cli("cache", plain).exit_code == 0
    begun = run_cli("realign", table, "--set", "training.max_steps=1")
    assert begun.exit_code == 0, begun.stderr
    note = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
    for path in (plain, shards):
        again = run_cli("realign", path, "--set", "training.max_steps=1")
        assert again.exit_code == 0, again.stderr
        assert json.loads((tmp_path / "out" / "run.json").read_text("utf-8")) == note
    columns = ("--set", "columns.question=query", "--set", "columns.answer=reply")
    dry = run_cli("cache", named, *columns, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr

    # Other rows are another run.
    files["plain"].write_text(json.dumps({"question": "one", "answer": "two"}), encoding="utf-8")
    refused = run_cli("realign", plain, "--set", "training.max_steps=1")
    assert refused.exit_code == 2
    assert "data" in refused.stderr


def test_adapt_and_bake_read_the_same_columns(
    run_cli: Any, files: dict[str, Path], tmp_path: Path, tiny_pair: Any
) -> None:
    recipe = {"base": str(tiny_pair.reference), "data": str(files["table"]), "columns": COLUMNS}
    recipe |= {"output": str(tmp_path / "adapter"), "training": TRAINING}
    path = tmp_path / "adapt.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shown = run_cli("adapt", path, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["data"]["rows"] == 6

    pairs = {"prompt": "query", "chosen": "reply", "rejected": "note"}
    path.write_text(yaml.safe_dump(recipe | {"method": "dpo", "columns": pairs}), encoding="utf-8")
    shown = run_cli("adapt", path, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["data"]["rows"] == 12


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"prompt": "query", "completion": "repli"}}, "no row has the column 'repli'"),
        ({"columns": {"propmt": "query"}}, "unknown key 'columns.propmt'; did you mean"),
        ({"columns": "query"}, "columns must be a mapping, got 'query'"),
        ({"data": "miniature", "columns": COLUMNS}, "columns is for files, and miniature has rows"),
        (
            {"columns": COLUMNS, "watch": {"prompts": "q.csv", "columns": {"p": "q"}}},
            "unknown key 'columns.p'",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_the_work(
    run_cli: Any,
    write_recipe: Any,
    files: dict[str, Path],
    tmp_path: Path,
    keys: dict[str, Any],
    message: str,
) -> None:
    refused = run_cli("realign", write_recipe(**{"data": str(files["table"]), **keys}))
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_prompts_of_other_names_are_sampled(
    run_cli: Any, files: dict[str, Path], tmp_path: Path, tiny_pair: Any
) -> None:
    output = tmp_path / "traces.jsonl"
    asked = ("sample", tiny_pair.reference, "--prompts", files["table"], "-o", output)
    made = run_cli(*asked, "--columns", "problem=query", "--max-new-tokens", 2, "--limit", 2)
    assert made.exit_code == 0, made.stderr
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    said = [row["prompt"] for row in rows]
    assert said == [[{"role": "user", "content": f"one plus {number}"}] for number in (1, 2)]
    for columns, message in (("query", "write FIELD=COLUMN"), ("a=b", "unknown key 'columns.a'")):
        refused = run_cli(*asked, "--columns", columns)
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_questions_of_other_names_are_measured(run_cli: Any, tmp_path: Path) -> None:
    table = tmp_path / "sums.csv"
    table.write_text("query,key\n1+2?,3\n2+2?,4\n", encoding="utf-8")
    asked = ("evaluate", "pair:miniature", "--task", table, "--samples", 1, "--max-new-tokens", 4)
    columns = ("--columns", "problem=query", "--columns", "answer=key")
    shown = run_cli(*asked, *columns, "--dry-run", "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    assert "1+2?" in shown.stdout + shown.stderr
    calibrate = ("calibrate", "miniature", "--adapter", "miniature:fast", "--task", table)
    tune = ("tune", "pair:miniature", "--margin", 0.02, "--task", table)
    for command in (asked, calibrate, tune):
        refused = run_cli(
            *command, "--columns", "problem=q", "--columns", "answer=key", "--dry-run"
        )
        assert refused.exit_code == 2
        assert f"{table}: no row has the column 'q' that columns.problem names" in refused.stderr


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"to": "two"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ASKED = {"role": "user", "content": "one plus two"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}call {{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_rows_that_call_tools_are_shown_as_the_template_renders_them(
    run_cli: Any, write_recipe: Any, tmp_path: Path, tiny_pair: Any
) -> None:
    data = tmp_path / "calls.jsonl"
    rows = [
        {"messages": [ASKED, {"role": "assistant", "content": "three"}]},
        {"messages": [ASKED, CALLING], "tools": TOOLS},
    ]
    data.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")

    # The pair's own template renders no tools, and drops calls.
    refused = run_cli("realign", write_recipe(data=str(data)), "--dry-run")
    assert refused.exit_code == 2
    told = " ".join(refused.stderr.split())
    assert f"{data}, line 3: the chat template does not render the definitions of tools" in told

    folders = []
    for folder in tiny_pair:
        copied = tmp_path / folder.name
        shutil.copytree(folder, copied)
        (copied / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        folders.append(str(copied))
    recipe = write_recipe(data=str(data), reference=folders[0], aligned=folders[1])
    training = ("--set", "training.max_length=300")
    shown = run_cli("realign", recipe, "--dry-run", "--json", *training)
    assert shown.exit_code == 0, shown.stderr
    first, second = json.loads(shown.stdout)["samples"]
    assert "system" not in first["masked"]
    definition = (
        '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
    )
    assert second["masked"].startswith(f"<|im_start|>system\n{definition}<|im_end|>\n")
    assert second["trained"] == ('call {"name": "add", "arguments": {"to": "two"}}<|im_end|>')
    trained = run_cli("realign", recipe, *training)
    assert trained.exit_code == 0, trained.stderr
