"""A plain model that vLLM runs with a budget of its thinking, beside the local engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexalign.data.logits import LogitsSettings
from flexalign.lambdas import AS_IT_IS
from flexalign.miniature import make_questions
from flexalign.systems import PromptRequest, SystemOptions, open_backend, parse_system

pytestmark = pytest.mark.full

BUDGETS = (0, 13, 40)

BY_VLLM = """
import json
from functools import partial
import vllm
vllm.LLM = partial(vllm.LLM, enforce_eager=True, max_model_len=256)
from test_thinking_budget import answers
print("ANSWERS", json.dumps(answers("vllm")))
"""


def answers(engine: str) -> list[list[Any]]:
    """Return text, tokens and tokens of thinking of each answer, greedily, at each budget."""
    found = []
    for budget in BUDGETS:
        options = SystemOptions(
            max_new_tokens=120,
            temperature=0,
            top_p=1.0,
            dtype="float32",
            engine=engine,
            logits=LogitsSettings(thinking_budget=budget),
        )
        backend = open_backend(parse_system("model:miniature"), (), options)
        requests = [
            PromptRequest(place, [{"role": "user", "content": one.text}], AS_IT_IS, 0, 5)
            for place, one in enumerate(make_questions(6, 77))
        ]
        made = {
            request.prompt: [answer.text.split(), answer.tokens, answer.thinking_tokens]
            for block in backend.run(requests, set())
            for request, answer in block
        }
        found += [made[request.prompt] for request in requests]
        backend.release()
    return found


def test_vllm_closes_the_thinking_where_the_local_engine_does(
    vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parent), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", BY_VLLM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    expected = answers("local")
    assert json.loads(line.removeprefix("ANSWERS ")) == expected
    spent = [thinking for _, _, thinking in expected]
    assert [max(spent[at : at + 6]) for at in (0, 6, 12)] == list(BUDGETS)
