"""The commands in README and docs run as they are written, one page after another.

Each page has a folder of its own in which the names that documents use for the reader's files
(`models/base`, `recipe.yaml`, `DIR`, …) stand for the miniature's parts and a few of its questions.
What would only take long is cut short by more options at the end; nothing else is changed. What asks
for vLLM is run where vLLM is installed; two processes of it are only planned (`--dry-run`).
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexalign.miniature import folder as weights_folder
from flexalign.miniature import make_questions

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "cli.md"),
]

EXCUSED = {
    "make demo": "what it runs has tests/end_to_end/test_demo.py",
    "make test": "this is it",
    "make test-full": "this is it",
    "pip install": "installing has tests/test_packaging.py",
    "flexalign miniature build": "20 minutes; its steps have tests/miniature/test_build.py",
}
SHORT = {
    "evaluate": {"--samples": "1", "--max-new-tokens": "16", "--limit": "4"},
    "tune": {"--samples": "1", "--max-new-tokens": "16"},
    "calibrate": {"--max-new-tokens": "99", "--limit": "30"},
    "generate": {"--max-new-tokens": "16"},
    "chat": {"--max-new-tokens": "16"},
    "sample": {"--max-new-tokens": "16"},
    "realign": {"--set": "training.max_steps=2"},
    "adapt": {"--set": "training.max_steps=2"},
    "bake": {"--set": "training.max_steps=2"},
}
STAND_INS = {
    "reference": ("models/base", "models/R1", "BASE", "REF"),
    "aligned": ("models/concise", "ALIGNED"),
    "fast": ("ADAPTER", "out/adapter"),
    "hybrid": ("models/hybrid",),
}
AT_HAND = {
    "lora-dial": {"dial": "out/dial"},
    "vllm": {"dial": "out/dial"},
    "serve": {"dial": "out/lora-dial"},
}
"""What a page takes for granted, and others make."""

BEFORE = {
    "tune": "evaluate dial:BASE,ADAPTER --task math500 --lambda 0,1 --samples 2 --limit 40 --max-new-tokens 99 -o out/sweep",
}
ADDRESS = "http://localhost:8000/v1"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def commands(page: Path) -> list[str]:
    """Return the shell commands of a page: fenced as sh, or as nothing and beginning like one."""
    found, language, lines = [], None, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            if language is None:
                language, lines = line.strip().strip("`"), []
                continue
            if language in ("sh", "bash", ""):
                found += "\n".join(lines).replace("\\\n", " ").splitlines()
            language = None
        elif language is not None:
            lines.append(line.strip())
    known = ("flexalign ", "make ", "pip ", "echo ", "KEY=")
    return [line for line in found if line.startswith(known)]


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder."""
    home = tmp_path / "reader"
    for part, names in STAND_INS.items():
        for name in names:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(weights_folder(part), home / name)
    shutil.copytree(ROOT / "examples", home / "examples")
    for name in ("realign", "adapt", "bake"):
        shutil.copy(home / "examples" / f"{name}.yaml", home / f"{name}.yaml")
    (home / "realign.yaml").rename(home / "recipe.yaml")
    asked = [(one.text, str(one.answer)) for one in make_questions(40, seed=5)]
    plain = [{"problem": problem, "answer": answer} for problem, answer in asked]
    _write(home / "questions.jsonl", plain)
    _write(home / "DIR" / "math500.jsonl", plain)
    worked = [{"question": problem, "answer": f"#### {answer}"} for problem, answer in asked]
    for place in ("data", "DIR"):
        _write(home / place / "gsm8k.jsonl", worked)
    (home / "question.txt").write_text(asked[0][0], encoding="utf-8")
    monkeypatch.chdir(home)
    monkeypatch.setenv("KEY", "sesame")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FLEXALIGN_DATA", str(home / "DIR"))
    return home


@pytest.fixture
def bpe_model(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A model for GGUF, which has no form for the miniature's whole words."""
    tiny_model("llama", vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "bpe")
    tiny_tokenizer.save_pretrained(tmp_path / "bpe")
    return tmp_path / "bpe"


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _shortened(words: list[str]) -> list[str]:
    """Return a command with what only takes long cut short."""
    more = SHORT.get(words[0], {})
    taken = [word for word in words if word.startswith("-")]
    if words[0] == "tune" and ({"--plan", "--preview", "--from"} & set(taken)):
        return words
    given = {"--limit"} if "--effort" in taken else set()
    added = [
        part
        for option, value in more.items()
        if option not in {*taken, *given} or option == "--set"
        for part in (option, value)
    ]
    return [*words, *added]


def _server_command(words: list[str]) -> list[str]:
    """Return how a server is started, on a port that is free."""
    main = "from flexalign.cli.app import main; main()"
    python = VLLM_PYTHON if "vllm" in words else Path(sys.executable)
    if not python.exists():
        # vLLM pins packages of its own, so that it has an environment apart.
        pytest.skip("vLLM is not installed here: make .venv-vllm/installed")
    place = words.index("--") if "--" in words else len(words)
    flags = words[place:] or (["--", "--enforce-eager"] if "vllm" in words else [])
    return [str(python), "-c", main, *words[:place], "--port", "0", *flags]


@contextlib.contextmanager
def _served(words: list[str]) -> Iterator[str]:
    """Start a server, give its address, and end it as a supervisor does."""
    with subprocess.Popen(_server_command(words), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http"), words
        urllib.request.urlopen(f"{address}/models").close()
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page(
    page: Path,
    sandbox: Path,
    bpe_model: Path,
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = commands(page)
    for part, name in AT_HAND.get(page.stem, {}).items():
        shutil.copytree(weights_folder(part), sandbox / name)
    if page.stem == "lora-dial":
        # A LoRA as PEFT writes it, which is no dial.
        dial, own = weights_folder("dial"), shutil.ignore_patterns("lora_dial.json")
        shutil.copytree(dial, sandbox / "out" / "lora", ignore=own)
    if page.stem in BEFORE:
        lines = [f"flexalign {BEFORE[page.stem]}", *lines]
    if "-o questions.jsonl" in " ".join(lines):
        (sandbox / "questions.jsonl").unlink()  # there it is made
    for line in lines:
        if line.startswith(tuple(EXCUSED)):
            continue
        entered, words = _read(line)
        if words[:2] == ["export", "gguf"]:
            words[2] = str(bpe_model)
        with contextlib.ExitStack() as stack:
            if words[0] == "serve":
                if "--tensor-parallel-size" in words:
                    words.insert(words.index("--"), "--dry-run")
                    subprocess.run(_server_command(words), check=True)
                    continue
                stack.enter_context(_served(words))
                continue
            if ADDRESS in " ".join(words):
                own = stack.enter_context(_served(["serve", "miniature", "--adapter", "ADAPTER"]))
                words = [word.replace(ADDRESS, own) for word in words]
            monkeypatch.setattr(sys, "stdin", io.StringIO(entered))
            result = run_cli(*_shortened(words))
        assert result.exit_code == 0, f"{line}\n{result.stderr}"


def test_every_page_with_commands_is_among_them() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40


def _read(line: str) -> tuple[str, list[str]]:
    """Return what is entered, and the words after ``flexalign``."""
    line = line.removeprefix("KEY=… ")
    piped = re.match(r"echo '(.*)' \| (.*)", line)
    entered, command = piped.groups() if piped else ("/quit\n", line)
    words = shlex.split(command, comments=True)
    if "<" in words:
        place = words.index("<")
        entered = Path(words[place + 1]).read_text(encoding="utf-8")
        words = words[:place]
    assert words[0] == "flexalign", line
    return entered, words[1:]
