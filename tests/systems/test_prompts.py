import json
from pathlib import Path

import pytest

from flexalign.data.traces import derive_seed
from flexalign.errors import DataError
from flexalign.lambdas import Setting
from flexalign.systems import Answer, PromptRequest
from flexalign.systems.prompts import (
    TimedAnswer,
    UserPrompt,
    prompt_requests,
    read_prompts,
    timed_answers,
)

SETTINGS = [Setting.of(0.0), Setting.of(1.0)]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("\ufeff1 + 1?\n\n  2 + 2?  \n", encoding="utf-8")
    prompts = read_prompts(file)
    assert [prompt.given for prompt in prompts] == ["1 + 1?", "2 + 2?"]
    assert prompts[1].messages == [{"role": "user", "content": "2 + 2?"}]
    assert prompts[1].text == "2 + 2?"


def test_a_table_has_conversations_as_well(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"messages": asked}) + "\n", encoding="utf-8")
    (prompt,) = read_prompts(file)
    assert prompt.given == prompt.messages == asked
    assert prompt.text == "Be brief.\n1 + 1?"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n  \n", "holds no prompt"), (b"\xff\xfe1", "is not UTF-8"), (None, "no such file")],
)
def test_a_file_without_prompts_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "questions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(file)
    with pytest.raises(DataError, match="the prompt is empty"):
        UserPrompt.of_text(" \n")


def test_all_settings_of_a_sample_share_its_seed() -> None:
    prompts = [UserPrompt.of_text("a"), UserPrompt.of_text("b")]
    requests = prompt_requests(prompts, SETTINGS, samples=3, seed=7)
    assert len({request.key for request in requests}) == len(requests) == 2 * 2 * 3
    for request in requests:
        assert request.seed == derive_seed(7, "", request.prompt, request.sample)
        assert request.messages == prompts[request.prompt].messages


class TwoBatches:
    """A backend that answers the second half of the requests first, each half from its end."""

    def run(self, requests: list[PromptRequest]) -> object:
        half = len(requests) // 2
        for batch in (requests[half:], requests[:half]):
            yield [(one, Answer(f"{one.key}", 5, 2, 0, False)) for one in reversed(batch)]


def test_answers_come_by_batch_in_the_order_of_their_requests() -> None:
    requests = prompt_requests([UserPrompt.of_text("a")], SETTINGS, samples=2)
    first, second = timed_answers(TwoBatches(), requests)  # type: ignore[arg-type]
    assert [one.place for one in first] == [2, 3]
    assert [one.place for one in second] == [0, 1]
    for one in (*first, *second):
        assert one.request is requests[one.place]
        assert one.answer.text == f"{one.request.key}"
    assert len({one.tokens_per_second for one in first}) == 1
    assert first[0].tokens_per_second > 0


def test_the_json_of_an_answer_has_its_prompt_as_it_was_given() -> None:
    prompt = UserPrompt.of_text(" 1 + 1? ")
    (request,) = prompt_requests([prompt], SETTINGS[1:])
    row = TimedAnswer(0, request, Answer("2", 5, 2, 1, True), 3.14159).to_json(prompt)
    assert row["prompt"] == "1 + 1?"
    assert (row["setting"], row["lambda"], row["sample"]) == ("λ=1", 1.0, 0)
    assert (row["response"], row["tokens"], row["truncated"]) == ("2", 5, True)
    assert (row["thinking_tokens"], row["rejected_tokens"]) == (2, 1)
    assert row["tokens_per_second"] == 3.1
