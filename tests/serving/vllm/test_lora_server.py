"""vLLM's server with a LoRA dial, and stock vLLM with what ``flexalign export`` wrote of one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model

from flexalign.generation.responses import generate_responses
from flexalign.lambdas import Schedule
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.lora_dial.export import export_lora
from flexalign.models.loading import fingerprint, load_model
from flexalign.models.sources import resolve
from server_process import QUESTIONS, Server, messages, whole

pytestmark = pytest.mark.full

LAMBDAS = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA dial on the miniature that changes what it says."""
    folder = tmp_path_factory.mktemp("dial") / "dial"
    torch.manual_seed(0)
    low = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_model(resolve("miniature")), low).save_pretrained(folder)
    base = fingerprint(resolve("miniature"))
    LoRADialConfig("miniature", base, lambda_range=(-1.0, 2.0)).save(folder)
    return folder


@pytest.fixture(scope="module")
def ours(dial: Path) -> LoRADial:
    return LoRADial.from_pretrained("miniature", dial)


@pytest.fixture(scope="module")
def lora_server(start_vllm: Any, dial: Path) -> Server:
    server: Server = start_vllm(adapter=str(dial))
    return server


@pytest.fixture
def client(lora_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=lora_server.url, api_key="none", max_retries=0) as client:
        yield client


def written(ours: LoRADial, question: str, dial: Any, tokens: int = 40) -> str:
    """What the library writes, alone."""
    [response] = generate_responses(
        ours, ours.tokenizer, [messages(question)], max_new_tokens=tokens, lam=[dial], temperature=0
    )
    return closed(response.text)


def closed(text: str) -> str:
    """A text whose last thinking is closed: a message does not say whether it was.

    vLLM's detokenizer puts a space before its first word: the miniature's tokenizer has no decoder.
    """
    text = text.strip()
    return text if "</think>" in text or "<think>" not in text else f"{text}</think>"


def ask(client: openai.OpenAI, question: str, dial: Any, tokens: int = 40) -> Any:
    return client.chat.completions.create(
        model="miniature",
        messages=messages(question),
        max_tokens=tokens,
        temperature=0,
        extra_body={"lambda": dial},
    )


def test_mixed_lambdas_at_once_are_the_librarys(client: openai.OpenAI, ours: LoRADial):
    schedule = {"kind": "linear", "start": 0, "end": 2, "steps": 20}
    asked = [(q, lam) for q in QUESTIONS for lam in (*LAMBDAS, schedule)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(client, *one), asked))
    found = [closed(whole(answer.choices[0].message)) for answer in answers]
    expected = [
        written(ours, q, Schedule.parse(lam) if isinstance(lam, dict) else lam) for q, lam in asked
    ]
    assert found == expected
    assert len(set(found)) > len(QUESTIONS), "λ changes what is said"
    for (_, lam), answer in zip(asked, answers, strict=True):
        assert isinstance(lam, dict) or answer.model_extra["dial"]["lambda"] == lam


def test_without_a_dial_it_is_the_adapter_at_1(client: openai.OpenAI, ours: LoRADial):
    answer = client.chat.completions.create(
        model="miniature", messages=messages(QUESTIONS[0]), max_tokens=40, temperature=0
    )
    assert answer.model_extra["dial"]["lambda"] == 1.0
    assert closed(whole(answer.choices[0].message)) == written(ours, QUESTIONS[0], 1.0)


def test_an_adaptive_answer_reads_its_prompt_again_at_the_other_lambda(
    client: openai.OpenAI, ours: LoRADial
):
    question = "+".join(["1"] * 60) + "?"
    policy = {"policy": "adaptive", "threshold": 1}
    answer = ask(client, question, policy, tokens=12)
    assert answer.model_extra["dial"]["route"] == "slow"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert closed(whole(answer.choices[0].message)) == written(ours, question, 0.0, 12)
    again = ask(client, question, 0.0, tokens=12)
    assert again.usage.prompt_tokens_details.cached_tokens >= 32
    assert whole(again.choices[0].message) == whole(answer.choices[0].message)


def test_lambdas_outside_the_range_are_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="range"):
        ask(client, QUESTIONS[0], 3.0)


STOCK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
base, adapters, prompts = json.loads(sys.argv[1])
llm = LLM(base, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
          max_lora_rank=8, max_loras=4)
params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
tokens = {}
for number, (name, path) in enumerate(adapters.items(), 1):
    request = LoRARequest(name, number, path)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(asked, params, lora_request=request, use_tqdm=False)
    tokens[name] = [list(output.outputs[0].token_ids) for output in outputs]
print("TOKENS", json.dumps(tokens))
"""


def test_stock_vllm_serves_exported_adapters_by_name(
    dial: Path, ours: LoRADial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm: Any
):
    """Without our plugin, as LoRA modules."""
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    export = export_lora(dial, [0.5, 1, 1.5], tmp_path / "adapters")
    adapters = {f"{lam:g}": str(path) for lam, path in export.adapters.items()}
    tokenizer = ours.tokenizer
    prompts = [
        tokenizer.apply_chat_template(messages(q), add_generation_prompt=True, return_dict=False)
        for q in QUESTIONS[:2]
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            STOCK,
            json.dumps([str(resolve("miniature").path), adapters, prompts]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    found = json.loads(line.removeprefix("TOKENS "))
    for name, rows in found.items():
        for prompt, row in zip(prompts, rows, strict=True):
            tokens = torch.tensor([prompt])
            expected = ours.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                lam=float(name),
                max_new_tokens=24,
                min_new_tokens=24,
                do_sample=False,
                eos_token_id=[],
            )
            assert row == expected[0, len(prompt) :].tolist(), name
    assert found["0.5"] != found["1.5"]
