import json
from pathlib import Path
from typing import Any

import pytest

from flexalign.data import load_preferences
from flexalign.errors import DataError

USER = {"role": "user", "content": "1+1?"}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_and_conversations_become_prompt_chosen_rejected(tmp_path: Path) -> None:
    text = {"prompt": "1+1=", "chosen": " 2", "rejected": " 3"}
    assert list(load_preferences(write(tmp_path, text))) == [text]
    explicit = {"prompt": [USER], "chosen": [say("2")], "rejected": [say("3")]}
    implicit = {"chosen": [USER, say("2")], "rejected": [USER, say("3")]}
    assert list(load_preferences(write(tmp_path, explicit, implicit))) == [explicit, explicit]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "1+1=", "completion": " 2"}, "expected chosen and rejected"),
        ({"chosen": " 2", "rejected": " 3"}, "needs a prompt"),
        ({"chosen": [say("2")], "rejected": [say("3")]}, "no message before the responses"),
        ({"prompt": "1", "chosen": [say("2")], "rejected": " 3"}, "some are text"),
        (
            {"chosen": [USER, say("2")], "rejected": [say("?"), USER, say("3")]},
            "differ before their last message",
        ),
    ],
)
def test_other_rows_are_named_by_line(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"(?s)1.*{reason}"):
        load_preferences(write(tmp_path, row))
