"""Output in an encoding that has no λ: text spells it, JSON escapes it, nothing ends in a traceback."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flexalign
from flexalign.cli.console import print_json, show_in_any_encoding

ENCODINGS = ("ascii", "latin-1")
OTHERS_NOTATION = ("answers.py", "gguf_file.py", "ollama.py", "rendering.py", "text.py")
"""Files whose characters are read from answers, or written for other programs."""
HELP_OF_EVERYTHING = """
import contextlib, sys
import typer.main
from flexalign.cli.app import app, main

def walk(command, path):
    print("\\x1e" + " ".join(path))
    sys.argv[1:] = [*path, "--help"]
    with contextlib.suppress(SystemExit):
        main()
    for name, child in getattr(command, "commands", {}).items():
        walk(child, [*path, name])

walk(typer.main.get_command(app), [])
"""
RUN_EACH = """
import json, sys
from flexalign.cli.app import main

for arguments in json.loads(sys.argv[1]):
    print("\\x1e", end="")
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as left:
        assert not left.code, arguments
"""


def in_encoding(encoding: str, script: str, *arguments: str) -> list[str]:
    """Run a script with its output in a pipe of an encoding; return the parts of that output."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(encoding).split("\x1e")[1:]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_of_every_command(encoding: str) -> None:
    shown = dict(part.split("\n", 1) for part in in_encoding(encoding, HELP_OF_EVERYTHING))
    assert len(shown) > 15
    assert "as a number lambda" in " ".join(shown[""].split())
    assert {name: len(text) > 100 for name, text in shown.items()} == dict.fromkeys(shown, True)
    assert "lambda" in shown["evaluate"]
    assert [name for name, text in shown.items() if "Usage: flexalign" not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_commands_and_their_json(encoding: str, tiny_pair: Any, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": "is λ ≥ 1?", "problem": "is λ ≥ 1?", "answer": "2"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = [str(tiny_pair.reference), str(tiny_pair.aligned)]
    asked = ["generate", pair[0], "--aligned", pair[1], "--prompts", str(questions)]
    asked += ["--lambda", "0,0.5", "--max-new-tokens", "4"]
    sweep = ["evaluate", f"pair:{pair[0]},{pair[1]}", "--task", str(questions), "--lambda", "0,1"]
    sweep += ["--max-new-tokens", "4", "--output", str(tmp_path / "out")]
    many = tmp_path / "many.jsonl"
    asked_of_tune = [{"problem": f"is λ ≥ {number}?", "answer": "2"} for number in range(24)]
    many.write_text("".join(json.dumps(row) + "\n" for row in asked_of_tune))
    tuned = ["tune", f"pair:{pair[0]},{pair[1]}", "--task", str(many), "--margin", "0.2"]
    tuned += ["--lambda", "0.5,1", "--max-new-tokens", "4", "--output", str(tmp_path / "tuned")]
    commands = [
        asked,
        [*asked, "--json"],
        sweep,
        [*sweep, "--json"],
        tuned,
        ["inspect", *pair],  # the first command of a process would leave torch out of it
        ["inspect", *pair, "--json"],
    ]
    answers, answered, table, summary, chosen, models, facts = in_encoding(
        encoding, RUN_EACH, json.dumps(commands)
    )
    assert "fits: 320 shared tokens" in models
    assert json.loads(facts)["fits"] is True
    assert "is lambda >= 1?" in answers
    assert [row["prompt"] for row in json.loads(answered)] == ["is λ ≥ 1?"] * 2
    assert "\\u03bb" in answered
    assert "lambda=1" in table
    assert chosen == "none\n"  # these models write noise; what was compared is on stderr
    assert {row["setting"] for row in json.loads(summary)["rows"]} == {"λ=0", "λ=1"}


def test_input_in_another_encoding_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flexalign", "generate", "miniature"],
        input="λ".encode(),
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2
    told = done.stderr.decode()
    assert told.startswith("error: standard input is read as ascii, and byte 0 of it is none; set")
    assert told.count("\n") == 1


def test_json_is_escaped_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("utf-8", '"λ é"'), ("latin-1", r'"\u03bb \u00e9"')):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        print_json("λ é")
        stream.seek(0)
        assert stream.read() == expected + "\n"

    # Half of a pair, as a damaged answer has it, is in no encoding.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    print_json("\ud800")
    sys.stdout.seek(0)
    assert sys.stdout.read() == '"\\ud800"\n'


def test_no_character_of_our_messages_becomes_a_question_mark() -> None:
    """Docstrings of commands are their help; those of the rest are not shown."""
    show_in_any_encoding()
    source = Path(flexalign.__file__).parent
    unspelled = set()
    for file in source.rglob("*.py"):
        if file.name in OTHERS_NOTATION:
            continue
        tree = ast.parse(file.read_text("utf-8"))
        unshown = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        shown = set(ast.walk(tree)) - (set() if file.parent.name == "cli" else unshown)
        texts = [node.value for node in shown if isinstance(node, ast.Constant)]
        characters = set("".join(text for text in texts if isinstance(text, str)))
        foreign = {character for character in characters if not character.isascii()}
        unspelled |= {(file.name, c) for c in foreign if c.encode("ascii", "flexalign") == b"?"}
    assert unspelled == set()


def test_text_keeps_what_can_be_shown_and_spells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (
        ("utf-8", "λ ≥ 1 × é 文"),
        ("latin-1", "lambda >= 1 × é ?"),
        ("ascii", "lambda >= 1 x ? ?"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        show_in_any_encoding()
        print("λ ≥ 1 × é 文")
        stream.seek(0)
        assert stream.read() == expected + "\n"
