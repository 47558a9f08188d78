import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chat_server import say
from flexalign.data import load_traces, split_tokens


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"problem": f"what is {i} plus two", "answer": i + 2} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def server() -> Iterator[str]:
    """Answers every chat with its seed."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization", "no key")
            choice = {"message": {"content": f"{body['seed']} {key}"}, "finish_reason": "stop"}
            content = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


@pytest.fixture
def sample(run_cli: Callable[..., Any], tiny_pair: Any, prompts: Path) -> Callable[..., Any]:
    def run(*options: object, model: object = tiny_pair.reference) -> Any:
        return run_cli(
            "sample",
            model,
            "--prompts",
            prompts,
            "--max-new-tokens",
            8,
            "--batch-size",
            4,
            *options,
        )

    return run


def test_a_model_answers_every_prompt(sample: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"
    result = sample("-o", output, "-n", 3, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert (summary["prompts"], summary["rows"], summary["made"]) == (3, 9, 9)
    assert summary["truncated"] == sum(row["truncated"] for row in rows)
    assert [row["answer"] for row in rows] == ["2"] * 3 + ["3"] * 3 + ["4"] * 3
    assert all(0 <= row["tokens"] <= 8 for row in rows)
    assert len({row["completion"][0]["content"] for row in rows}) > 3


def test_a_run_that_broke_off_ends_in_the_same_file(
    sample: Callable[..., Any], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for output in (whole, cut):
        assert sample("-o", output, "-n", 3).exit_code == 0
    content = whole.read_bytes()
    assert cut.read_bytes() == content
    end = content.rindex(b"\n", 0, len(content) // 2)
    cut.write_bytes(content[: end - 10])
    result = sample("-o", cut, "-n", 3)
    assert result.exit_code == 0
    assert "going on" in result.stderr
    assert cut.read_bytes() == content


def test_the_seed_changes_the_traces(sample: Callable[..., Any], tmp_path: Path) -> None:
    for seed in (0, 1):
        assert sample("-o", tmp_path / f"{seed}.jsonl", "--seed", seed).exit_code == 0
    assert (tmp_path / "0.jsonl").read_bytes() != (tmp_path / "1.jsonl").read_bytes()


def test_another_configuration_is_refused(
    sample: Callable[..., Any], tiny_pair: Any, tmp_path: Path
) -> None:
    output = tmp_path / "traces.jsonl"
    assert sample("-o", output, "--limit", 1).exit_code == 0
    before = output.read_bytes()
    for options in (
        {"model": tiny_pair.aligned},
        {"options": ["--seed", 1]},
        {"options": ["--temperature", 0.5]},
        {"options": ["--top-k", 20]},
        {"options": ["--repetition-penalty", 1.1]},
        {"options": ["--limit", 2]},
    ):
        model = options.get("model", tiny_pair.reference)
        result = sample("-o", output, "--limit", 1, *options.get("options", []), model=model)
        assert result.exit_code == 2
        assert "belongs to another run" in result.stderr
        assert output.read_bytes() == before


def test_plain_traces_hold_the_rendered_prompt(
    sample: Callable[..., Any], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    output = tmp_path / "traces.jsonl"
    assert sample("-o", output, "--plain", "--limit", 1).exit_code == 0
    messages = [{"role": "user", "content": "what is 0 plus two"}]
    rendered = tiny_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    (row,) = load_traces(output).to_list()
    assert row["prompt"] == rendered
    assert isinstance(row["completion"], str)


def test_a_dry_run_shows_prompts_and_writes_nothing(
    sample: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "traces.jsonl"
    result = sample("-o", output, "-n", 3, "--dry-run")
    assert result.exit_code == 0
    assert "<|im_start|>user\nwhat is 1 plus two<|im_end|>" in result.stderr
    assert "would make 9 traces of 3 prompts, at most 72 tokens" in result.stderr
    result = sample("-o", output, "--dry-run", "--json")
    assert json.loads(result.stdout)["rows"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


def test_a_server_answers_with_a_seed_of_its_own_for_each(
    run_cli: Callable[..., Any],
    server: str,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret")
    output = tmp_path / "traces.jsonl"
    result = run_cli(
        "sample", "--endpoint", server, "--model-name", "m", "--prompts", prompts, "-o", output,
        "-n", 2, "--api-key-env", "SERVER_KEY",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    said = [row["completion"][0]["content"] for row in load_traces(output)]
    assert len(set(said)) == 6
    assert all(text.endswith(" Bearer secret") for text in said)
    assert "mean tokens unknown" in result.stderr
    assert "secret" not in (tmp_path / "traces.jsonl.manifest.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a MODEL, or a server with --endpoint"),
        (["m", "--endpoint", "http://127.0.0.1:9"], "MODEL has no meaning with --endpoint"),
        (["--endpoint", "http://127.0.0.1:9", "--plain"], "--plain has no meaning with"),
        (["m", "--model-name", "m"], "--model-name has no meaning without --endpoint"),
        (
            ["--endpoint", "http://127.0.0.1:9", "--model-name", "m", "--api-key-env", "NO_SUCH"],
            "'NO_SUCH' is not set",
        ),
        (["m", "--concurrency", "4"], "--concurrency has no meaning without --endpoint"),
        (["m", "--lambda-range", "0,2"], "--lambda-range has no meaning without --adapter"),
        (["url:http://127.0.0.1:9", "--any-base"], "--any-base has no meaning with --endpoint"),
        (["--endpoint", "http://127.0.0.1:9", "--dtype", "float16"], "--dtype has no meaning with"),
        (["m", "--temperature", "-1"], "temperature must be a number ≥ 0"),
        (["no/such/model"], "no/such/model"),
    ],
)
def test_contradictions_are_refused_in_a_sentence(
    run_cli: Callable[..., Any], prompts: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run_cli("sample", *arguments, "--prompts", prompts, "-o", tmp_path / "o.jsonl")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "o.jsonl.manifest.json").exists()


@pytest.mark.parametrize("form", ["url", "endpoint"])
def test_the_only_model_of_a_server_needs_no_name(
    run_cli: Callable[..., Any], prompts: Path, tmp_path: Path, serve: Any, form: str
) -> None:
    models = [{"id": "only"}, {"id": "second"}]
    chat = serve(lambda path, body: say("4") if body else (200, {"data": models}))
    system = [f"url:{chat.url}"] if form == "url" else ["--endpoint", chat.url]
    command = ["sample", *system, "--prompts", prompts, "-o", tmp_path / "o.jsonl"]
    result = run_cli(*command)
    assert result.exit_code == 2
    assert "has 2 models (only, second); name one with --model-name" in result.stderr
    models.pop()
    result = run_cli(*command)
    assert result.exit_code == 0, result.stderr
    assert [body["model"] for _, body, _ in chat.asked if body] == ["only"] * 3


def test_a_server_that_is_tried_again_is_said_once(
    run_cli: Callable[..., Any],
    prompts: Path,
    tmp_path: Path,
    serve: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flexalign.data.client.time.sleep", lambda seconds: None)
    chat = serve(lambda path, body: (503, b"loading"))
    command = ["sample", "--endpoint", chat.url, "--model-name", "m", "--prompts", prompts]
    result = run_cli(*command, "-o", tmp_path / "o.jsonl", "--attempts", 3, "--timeout", 9)
    assert result.exit_code == 1
    assert result.stderr.count("note:") == 1
    assert "gave no response (503 loading); every request is tried up to 3 times" in result.stderr
    assert "gave no response in 3 attempts (503 loading)" in result.stderr
    assert len(chat.asked) % 3 == 0
    result = run_cli(*command, "-o", tmp_path / "o.jsonl", "--attempts", 1)
    assert "note:" not in result.stderr


def test_bad_prompts_are_named_by_line(
    sample: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    prompts.write_text(prompts.read_text() + '{"problem": ""}\n{"prob')
    result = sample("-o", tmp_path / "o.jsonl")
    assert result.exit_code == 2
    assert "2 of 5 rows cannot be used" in result.stderr
    assert "line 5: cut off" in result.stderr
    with pytest.warns(UserWarning, match="skipped: 2 of 5 rows"):
        assert sample("-o", tmp_path / "o.jsonl", "--skip-bad-rows").exit_code == 0


def test_an_interrupted_run_says_how_to_go_on(
    sample: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexalign.systems import sampling

    output, whole = tmp_path / "traces.jsonl", tmp_path / "whole.jsonl"
    answer = sampling.generate_responses

    def stop_at_the_second(*args: Any, **options: Any) -> Any:
        if output.read_bytes():
            raise KeyboardInterrupt
        return answer(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "generate_responses", stop_at_the_second)
        result = sample("-o", output, "-n", 3)
    assert result.exit_code == 130
    assert "same command again to go on" in result.stderr
    assert output.read_bytes().count(b"\n") == 4
    assert sample("-o", output, "-n", 3).exit_code == 0
    assert sample("-o", whole, "-n", 3).exit_code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_a_template_that_drops_the_thinking_loses_no_token_of_the_traces(
    sample: Callable[..., Any], tmp_path: Path, tiny_pair: Any, tiny_tokenizer: Any
) -> None:
    folder = shutil.copytree(tiny_pair.reference, tmp_path / "dropping")
    template = folder / "chat_template.jinja"
    answer = "{{ message['content'] }}<|im_end|>{% endgeneration %}"
    dropping = answer.replace("['content']", "['content'].split('</think>')[-1]")
    text = template.read_text(encoding="utf-8")
    assert answer in text
    template.write_text(text.replace(answer, dropping), encoding="utf-8")
    output = tmp_path / "traces.jsonl"
    result = sample("-o", output, model=folder)
    assert result.exit_code == 0, result.stderr
    assert "drops the thinking" not in result.stderr
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    trained = list(split_tokens(load_traces(output), AutoTokenizer.from_pretrained(folder)))
    assert len(trained) == len(rows) == 3
    for row, (_, response) in zip(rows, trained, strict=True):
        stop = [] if row["truncated"] else [tiny_tokenizer.eos_token_id]
        assert response == row["response_ids"] + stop


def test_a_server_is_shown_the_messages_it_would_be_sent(
    run_cli: Callable[..., Any], prompts: Path, tmp_path: Path, server: str
) -> None:
    asked = ("--endpoint", server, "--model-name", "m", "--prompts", prompts)
    result = run_cli("sample", *asked, "-o", tmp_path / "t.jsonl", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    (first, *_) = json.loads(result.stdout)["preview"]
    assert json.loads(first) == [{"role": "user", "content": "what is 0 plus two"}]


def test_empty_responses_are_counted_with_what_to_do(
    run_cli: Callable[..., Any], prompts: Path, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    choice = {"message": {"content": ""}, "finish_reason": "stop"}
    chat = serve(lambda path, body: (200, {"choices": [choice]}))
    asked = ("--endpoint", chat.url, "--model-name", "m", "--prompts", prompts)
    result = run_cli("sample", *asked, "-o", tmp_path / "traces.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "3 responses are empty; train with --skip-bad-rows" in result.stderr
