"""Run this folder's README on the miniature: every command, in order, as it stands there.

    python examples/paper/rehearse.py                        # about five minutes on two cores
    python examples/paper/rehearse.py --section Dialogue     # one section, after "Before"

Each block of commands is given to bash, in a scratch folder where the names of the README's models and
data are parts of the miniature and some of its questions. In front of the search path stand programs
called ``flexalign``, ``python`` and so on, which add options that make everything small and hand
the command to this process: it has loaded the libraries, and forks. A server's block runs until its
section ends. Fetching and `trl sft` are passed over, and for vLLM the local engine stands in. Any
command that fails ends the rehearsal.
"""

import argparse
import array
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ALWAYS = "Before"
"""The section that all others stand on."""

STAND_INS = {
    "reference": (
        "DeepSeek-R1-Distill-Qwen-1.5B",
        "DeepSeek-R1-Distill-Qwen-7B",
        "Qwen2.5-7B-SFT",
    ),
    "aligned": ("DeepScaleR-1.5B-Preview",),
}
R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)
"""As the template of R1's models: the prompt opens the thinking, and messages are shown without theirs."""
PASSED_OVER = {"hf": "it fetches", "trl": "a base stands there already"}
PROGRAMS = ("flexalign", "python", "accelerate", *PASSED_OVER)

TRAINING = {
    "max_steps": 2,
    "max_length": 256,
    "save_steps": 50,
    "logging_steps": 1,
    "bf16": "false",
}
TRAINING_OPTIONS = [
    part for pair in TRAINING.items() for part in ("--set", "training.{}={}".format(*pair))
]
ONE_PASS = ["--set", "training.gradient_accumulation_steps=1"]
SMALL = {
    "sample": ["--limit", "12", "--max-new-tokens", "128", "--batch-size", "12"],
    "realign": [*TRAINING_OPTIONS, *ONE_PASS],
    "cache": TRAINING_OPTIONS,
    "adapt": [*TRAINING_OPTIONS, *ONE_PASS],
    "evaluate": ["--samples", "2", "--limit", "3", "--max-new-tokens", "48", "--dtype", "auto"],
    "inspect": [],
    "compare": [],
    "select_traces.py": ["--rows", "8"],
    "ask_in_turns.py": ["--limit", "2", "--max-new-tokens", "16"],
    "estimate.py": [],
    "between.py": [],
    "table1.py": [],
}
"""What is added to a command, by its name; options given twice count as they stand last."""
TOKENS = "1:128"
"""Of the traces that are kept, for the README's 4096:8192."""


def sections(readme: Path) -> dict[str, list[str]]:
    """Return the blocks of commands of the README, by the heading that they stand under."""
    found: dict[str, list[str]] = {}
    heading, block = "", None
    for line in readme.read_text(encoding="utf-8").splitlines():
        if line == "```" and block is not None:
            found[heading].append("\n".join(block))
            block = None
        elif block is not None:
            block.append(line)
        elif line == "```sh":
            block = []
        elif line.startswith("## "):
            heading = line.removeprefix("## ")
            found[heading] = []
    return {heading: blocks for heading, blocks in found.items() if blocks}


# The scratch folder.


def furnish(home: Path) -> None:
    """Put what the README names into a folder, small."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from flexalign.miniature import folder, make_questions, make_traces

    for part, names in STAND_INS.items():
        for name in names:
            model = home / "models" / name
            shutil.copytree(folder(part), model)
            if not name.startswith("Qwen"):
                (model / "chat_template.jinja").write_text(R1_TEMPLATE, encoding="utf-8")
    shutil.copytree(ROOT / "examples", home / "examples")

    asked = [{"problem": q.text, "answer": str(q.answer)} for q in make_questions(24, seed=5)]
    data = home / "data"
    data.mkdir()
    (data / "questions.json").write_text(json.dumps(asked[:12]), encoding="utf-8")
    for task in ("aime", "aime25", "math500"):
        _write_lines(data / f"{task}.jsonl", asked[12:])
    turns = [{"question_id": n, "turns": [row["problem"]] * 2} for n, row in enumerate(asked)]
    _write_lines(data / "mt_bench.jsonl", turns)
    instructions = [{"instruction": row["problem"]} for row in asked]
    (data / "alpaca_eval.json").write_text(json.dumps(instructions), encoding="utf-8")

    answers, pairs = [], []
    for row in make_traces(12, seed=1):
        prompt, completion = row["prompt"], row["completion"]
        answers.append({"messages": [*prompt, *completion]})
        other = [{"role": "assistant", "content": "0"}]
        pairs.append({"prompt": prompt, "chosen": completion, "rejected": other})
    pq.write_table(pa.Table.from_pylist(answers), data / "openr1.parquet")
    pq.write_table(pa.Table.from_pylist(pairs), data / "ultrafeedback.parquet")


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# The programs in front of the search path: each sends what it was asked to this process.

_PROGRAM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    socket.send_fds(asked, [json.dumps([os.getcwd(), words]).encode()], [0, 1, 2])
    sys.exit(int(asked.recv(16) or b"1"))
"""


def install_programs(folder: Path, address: Path) -> None:
    """Write the programs that stand in for the real ones."""
    folder.mkdir()
    text = _PROGRAM.format(python=sys.executable, address=str(address))
    for name in PROGRAMS:
        program = folder / name
        program.write_text(text, encoding="utf-8")
        program.chmod(0o755)


def answer_programs(listening: socket.socket) -> None:
    """Do what the programs ask, each in a fork of this process, until it is ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        asked, _ = listening.accept()
        if os.fork() == 0:
            code = 1
            try:
                code = _take(asked)
            finally:
                with contextlib.suppress(OSError):
                    asked.send(str(code).encode())
                os._exit(code)
        asked.close()


def _take(asked: socket.socket) -> int:
    """Read a command and where it reads and writes, do it, and return its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(asked, 1 << 16, array.array("i").itemsize * 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
    where, words = json.loads(message)
    os.chdir(where)

    print("$", shlex.join(words), file=sys.stderr, flush=True)
    start = time.monotonic()
    code = _do(words)
    print(f"  {code}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return code


def _do(words: list[str]) -> int:
    program, *rest = words
    if program in PASSED_OVER:
        print(f"  passed over: {PASSED_OVER[program]}", file=sys.stderr)
        return 0
    if program == "accelerate":
        return subprocess.run(two_processes(rest)).returncode
    try:
        if program == "flexalign":
            from flexalign.cli.app import main

            sys.argv = ["flexalign", *made_small(rest)]
            main()
        else:
            script, *_ = rest
            sys.argv = [script, *made_small([Path(script).name, *rest[1:]])[1:]]
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def made_small(words: list[str]) -> list[str]:
    """Return a command of ours with what makes it small: other sizes, and this machine's engine."""
    words = [TOKENS if word == "4096:8192" else word for word in words]
    if "--engine" in words:
        place = words.index("--engine")
        del words[place : place + 2]
    if "--batch-size" in words:
        words[words.index("--batch-size") + 1] = "12"
    return [*words, *SMALL[words[0]]]


def two_processes(words: list[str]) -> list[str]:
    """Return a launch on eight GPUs as one of two processes on this machine, to a folder of its own."""
    command = words[words.index("flexalign") + 1 :]
    output = f"out/on-two-processes/{Path(command[1]).stem}-{command[0]}"
    launcher = ["launch", "--config_file", "examples/distributed/cpu_2.yaml", "-m", "flexalign"]
    main = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return [*main, *launcher, *made_small(command), "--output", output]


# Servers.


def is_server(block: str) -> bool:
    """Whether a block's command serves until it is stopped."""
    return block.startswith(("vllm serve ", "flexalign serve "))


@contextlib.contextmanager
def serving(block: str, port: int, home: Path) -> Iterator[None]:
    """Start a block's server on the local engine, and end it as a supervisor does."""
    words = shlex.split(block.replace("\\\n", " "))
    model, options = words[2], words[3:]
    kept = [sys.executable, "-m", "flexalign", "serve", model, "--port", str(port)]
    for option, value in zip(options, [*options[1:], ""], strict=True):
        if option == "--adapter":
            kept += [option, value]
        if option == "--served-model-name":
            kept += ["--model-name", value]
        if option.startswith("--lambda-range="):
            kept.append(option)
    print("$", shlex.join(["flexalign", *kept[3:]]), file=sys.stderr, flush=True)
    with subprocess.Popen(kept, cwd=home, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            urllib.request.urlopen(f"{address}/models").close()
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def free_port() -> int:
    """Find a port of this machine that nobody uses."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def rehearse(home: Path, wanted: str | None) -> None:
    """Run all sections, or one and what it stands on, in a folder.

    Raises:
        subprocess.CalledProcessError: If a command fails.
    """
    found = sections(HERE / "README.md")
    if wanted is not None:
        found = {heading: found[heading] for heading in dict.fromkeys((ALWAYS, wanted))}
    environment = os.environ | {"PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    for heading, blocks in found.items():
        print(f"\n== {heading}", file=sys.stderr, flush=True)
        with contextlib.ExitStack() as stack:
            for block in blocks:
                if is_server(block):
                    stack.close()  # the one before
                    port = free_port()
                    stack.enter_context(serving(block, port, home))
                    continue
                text = (
                    re.sub(r"localhost:8000", f"localhost:{port}", block)
                    if is_asking(block)
                    else block
                )
                subprocess.run(["bash", "-euc", text], cwd=home, env=environment, check=True)


def is_asking(block: str) -> bool:
    """Whether a block asks a server."""
    return "localhost:8000" in block


def main() -> None:
    """Furnish a folder, answer the programs, and run the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", help="a heading of the README, such as 'Table 9'")
    parser.add_argument("--keep", type=Path, help="run in this folder, and leave it there")
    options = parser.parse_args()
    start = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"

    with contextlib.ExitStack() as stack:
        home = options.keep or Path(stack.enter_context(TemporaryDirectory()))
        home = home.resolve()
        home.mkdir(parents=True, exist_ok=True)
        furnish(home)
        address = home / "asked"
        install_programs(home / "bin", address)
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(address))
        listening.listen()

        answering = os.fork()
        if answering == 0:
            _load_libraries()
            answer_programs(listening)
        stack.callback(os.kill, answering, signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the callbacks are run then too
        try:
            rehearse(home, options.section)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: a command of this block failed:\n{error.cmd[-1]}")
    print(f"rehearsed in {time.monotonic() - start:.0f} s", file=sys.stderr)


def _load_libraries() -> None:
    """Load what commands need, once for all of them."""
    import flexalign.calibration.results
    import flexalign.cli.app
    import flexalign.evaluation.report
    import flexalign.evaluation.sweep
    import flexalign.training.adapter
    import flexalign.training.realignment  # noqa: F401


if __name__ == "__main__":
    main()
