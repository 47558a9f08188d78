"""lm-evaluation-harness asks a running server by its own API models, over a real socket."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; make test-full does so")
pytest.importorskip("tenacity", reason="lm-eval's API models need lm-eval[api]")

from lm_eval.tasks import TaskManager

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaModel
from flexalign.miniature import folder
from server_process import KEY, Server

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]

TASK = """\
task: server_sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["again"], max_gen_toks: 40, temperature: 0, lambda: LAMBDA}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = ["3+14+15?", "7+7+7?", "12+5+7+1?"]


@pytest.fixture
def ask(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the harness put the questions at a λ; return the responses."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    data = tmp_path / "sums.jsonl"
    rows = [{"question": question, "answer": "1"} for question in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(model: str, path: str, lam: float, **options: Any) -> list[str]:
        (tmp_path / "sums.yaml").write_text(
            TASK.replace("DATA", str(data)).replace("LAMBDA", str(lam))
        )
        found = lm_eval.simple_evaluate(
            model=model,
            model_args={"model": "miniature", "base_url": server.url + path, **options},
            tasks=["server_sums"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            apply_chat_template=True,
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"]["server_sums"], key=lambda sample: sample["doc_id"])
        return [sample["resps"][0][0] for sample in samples]

    return run


@pytest.fixture(scope="module")
def alone() -> Any:
    model = InRaModel.from_pretrained("miniature", "miniature:fast")
    model.inra_config = replace(model.inra_config, lambda_range=(-1.0, 2.0))

    def write(lam: float) -> list[str]:
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        responses = [
            generate_responses(
                model, model.tokenizer, [one], max_new_tokens=40, temperature=0, lam=[lam]
            )[0]
            for one in asked
        ]
        return [response.text.partition("again")[0] for response in responses]

    return write


@pytest.mark.parametrize("lam", [0.0, 1.0, 1.5])
def test_chats(ask: Any, alone: Any, lam: float):
    told = ask("local-chat-completions", "/chat/completions", lam)
    assert told == [ThinkingTags().split(text).answer for text in alone(lam)]


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_completions_by_token_ids(ask: Any, alone: Any, lam: float):
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": str(folder("reference"))}
    options = {**tokenizer, "num_concurrent": 3}
    assert ask("local-completions", "/completions", lam, **options) == alone(lam)
