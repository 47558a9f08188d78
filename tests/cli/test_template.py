"""Template arguments on the command line: what is asked, kept beside traces, and compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from flexalign import InRaModel
from flexalign.data.rendering import Rendering
from flexalign.data.template import template_arguments

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% else %}<think>{% endif %}{% endif %}"
)


@pytest.fixture
def pair(tiny_pair: Any, tmp_path: Path) -> tuple[Path, Path]:
    folders = []
    for folder in tiny_pair:
        copied = shutil.copytree(folder, tmp_path / folder.name)
        (copied / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        folders.append(copied)
    return folders[0], folders[1]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"problem": "one plus two"}\n', encoding="utf-8")
    return path


@pytest.fixture
def realign(run_cli: Callable[..., Any], pair: Any, tmp_path: Path) -> Callable[[Path], Any]:
    def run(data: Path) -> Any:
        recipe = {"reference": str(pair[0]), "aligned": str(pair[1]), "data": str(data)}
        recipe |= {"output": str(tmp_path / "out"), "lambda": 2}
        recipe["training"] = {"max_steps": 1, "use_cpu": True, "max_length": 64}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return run_cli("realign", path, "--dry-run", "--json")

    return run


def test_traces_keep_what_they_were_sampled_after(
    run_cli: Callable[..., Any], pair: Any, prompts: Path, tmp_path: Path, realign: Any
) -> None:
    asked = ("sample", pair[0], "--prompts", prompts, "--max-new-tokens", 4)
    thought, quick = tmp_path / "thought.jsonl", tmp_path / "quick.jsonl"
    assert run_cli(*asked, "-o", thought).exit_code == 0
    with_system = ("--template", "enable_thinking=false", "--system", "be brief")
    assert run_cli(*asked, "-o", quick, *with_system).exit_code == 0
    (row,) = [json.loads(line) for line in quick.read_text("utf-8").splitlines()]
    assert row["rendering"]["arguments"] == {"enable_thinking": False}
    assert row["prompt"][0] == {"role": "system", "content": "be brief"}
    manifest = json.loads((tmp_path / "quick.jsonl.manifest.json").read_text("utf-8"))
    assert manifest["rendering"] == row["rendering"]

    shown = realign(thought)
    assert shown.exit_code == 0, shown.stderr
    (sample, *_) = json.loads(shown.stdout)["samples"]
    assert sample["masked"].endswith("<|im_start|>assistant\n<think>")
    refused = realign(quick)
    assert refused.exit_code == 2
    assert (
        f"{quick}, line 1: its response was sampled with the template arguments" in refused.stderr
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE + " ", "sampled with another chat template"),
        ("{{ messages[0].role }}", "cannot render a generation prompt"),
    ],
)
def test_a_template_that_has_changed_is_refused_before_weights_load(
    run_cli: Callable[..., Any],
    pair: Any,
    prompts: Path,
    tmp_path: Path,
    realign: Any,
    template: str,
    message: str,
) -> None:
    traces = tmp_path / "traces.jsonl"
    asked = ("sample", pair[0], "--prompts", prompts, "--max-new-tokens", 4)
    assert run_cli(*asked, "-o", traces).exit_code == 0
    for folder in pair:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    refused = realign(traces)
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_stop_token_in_the_middle_is_refused(tmp_path: Path, realign: Any) -> None:
    data = tmp_path / "data.jsonl"
    row = {"instruction": "one plus two", "output": "three<|im_end|>four"}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    refused = realign(data)
    assert refused.exit_code == 2
    assert f"{data}, line 1: the response contains the stop token" in refused.stderr


def test_generation_asks_with_the_arguments(
    run_cli: Callable[..., Any], pair: Any, prompts: Path, tmp_path: Path
) -> None:
    asked = ("sample", pair[0], "--prompts", prompts, "-o", tmp_path / "t.jsonl", "--dry-run")
    shown = run_cli(*asked, "--json", "--template", "enable_thinking=false")
    (text,) = json.loads(shown.stdout)["preview"]
    assert text.endswith("<think></think>")
    generate = ("generate", pair[0], "one plus two", "--max-new-tokens", 2)
    assert run_cli(*generate, "--template", "enable_thinking=false").exit_code == 0
    refused = run_cli(*generate, "--template", "messages=1")
    assert refused.exit_code == 2
    assert "template.messages cannot be an argument" in refused.stderr


def test_a_recipe_names_what_its_traces_were_sampled_with(
    run_cli: Callable[..., Any], pair: Any, prompts: Path, tmp_path: Path
) -> None:
    traces, output = tmp_path / "traces.jsonl", tmp_path / "out"
    asked = ("sample", pair[0], "--prompts", prompts, "-o", traces, "--max-new-tokens", 4)
    prompting = ("--template", "enable_thinking=false", "--system", "be brief")
    assert run_cli(*asked, *prompting).exit_code == 0
    recipe = {"reference": str(pair[0]), "aligned": str(pair[1]), "data": str(traces)}
    recipe |= {"output": str(output), "lambda": 2, "system": "be brief"}
    recipe |= {"template": {"enable_thinking": False}}
    recipe |= {"thinking": {"open": "<think>", "close": "</think>"}}
    recipe["training"] = {"max_steps": 1, "use_cpu": True, "max_length": 64, "bf16": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    trained = run_cli("realign", path)
    assert trained.exit_code == 0, trained.stderr
    student = AutoTokenizer.from_pretrained(output)
    assert template_arguments(student) == {"enable_thinking": False}
    asked_of_it = Rendering(student).prompt([{"role": "user", "content": "1+2"}]).text
    assert asked_of_it.endswith("<think></think>")

    recipe["thinking"] = {"open": "<nope>", "close": "</think>"}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    refused = run_cli("realign", path, "--dry-run")
    assert refused.exit_code == 2
    assert "the thinking marker '<nope>' is not in the vocabulary" in refused.stderr


def test_an_adapter_keeps_its_template_arguments(
    run_cli: Callable[..., Any], pair: Any, tmp_path: Path
) -> None:
    data, adapter = tmp_path / "data.jsonl", tmp_path / "adapter"
    row = {"instruction": "one plus two", "output": "three"}
    data.write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    recipe = {"base": str(pair[0]), "data": str(data), "output": str(adapter)}
    recipe |= {"template": {"enable_thinking": False}, "system": "be brief"}
    recipe["training"] = {"max_steps": 1, "use_cpu": True, "max_length": 64, "bf16": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    trained = run_cli("adapt", path)
    assert trained.exit_code == 0, trained.stderr
    kept = json.loads((adapter / "inra_config.json").read_text("utf-8"))["rendering"]
    assert (kept["arguments"], kept["system"]) == ({"enable_thinking": False}, "be brief")
    card = (adapter / "README.md").read_text("utf-8")
    assert "enable_thinking: false" in card
    assert "system: be brief" in card

    model = InRaModel.from_pretrained(pair[0], adapter)
    assert template_arguments(model.tokenizer) == {"enable_thinking": False}
    asked = ("generate", pair[0], "one plus two", "--adapter", adapter, "--max-new-tokens", 2)
    same = run_cli(*asked, "--template", "enable_thinking=false")
    assert (same.exit_code, "was trained with" in same.stderr) == (0, False)
    other = run_cli(*asked, "--template", "enable_thinking=true")
    told = " ".join(other.stderr.split())
    assert f"{adapter} was trained with the template arguments" in told
    assert 'and {"enable_thinking": true} are asked for' in told
    (pair[0] / "chat_template.jinja").write_text(TEMPLATE + "!", encoding="utf-8")
    with pytest.warns(UserWarning, match="trained with another chat template"):
        InRaModel.from_pretrained(pair[0], adapter)
