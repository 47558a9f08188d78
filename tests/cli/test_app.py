"""Exit codes and sentences of the command line, and what its help must not load."""

import errno
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import typer

from flexalign import __version__, errors
from flexalign.cli import app as app_module

LEAVES = sorted(set(errors.__all__) - {"FlexAlignError"})


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Put one command on the line that raises what it is given."""

    def install(error: BaseException) -> None:
        line = typer.Typer(pretty_exceptions_enable=False)

        @line.callback()
        def root() -> None: ...

        @line.command()
        def burn() -> None:
            raise error

        monkeypatch.setattr(app_module, "app", line)

    return install


@pytest.mark.parametrize("name", LEAVES)
def test_foreseen_errors_are_one_sentence_and_a_code(name, failing, run_cli):
    kind = getattr(errors, name)
    failing(kind("the [dev] part of [0, 2] is wrong; write [1, 2]."))
    result = run_cli("burn")
    assert result.exit_code == (2 if issubclass(kind, ValueError) else 1)
    assert result.stderr == "error: the [dev] part of [0, 2] is wrong; write [1, 2].\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full, writing /out/model; free space"),
        (errno.EDQUOT, "the disk is full, writing /out/model; free space"),
        (errno.EROFS, "/out/model is on a read-only disk; name another --output"),
        (errno.EACCES, "no permission for /out/model; change its rights"),
        (errno.EIO, "boom: '/out/model'"),
    ],
)
def test_disk_errors_say_what_to_do(number, says, failing, run_cli):
    failing(OSError(number, "boom", "/out/model"))
    result = run_cli("burn")
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_interrupt_is_130(failing, run_cli):
    failing(KeyboardInterrupt())
    assert run_cli("burn").exit_code == 130


def test_a_bug_keeps_its_traceback(failing, run_cli):
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        run_cli("burn")


def test_wrong_usage_is_2(run_cli):
    assert run_cli("no-such-command").exit_code == 2
    assert run_cli("--no-such-option").exit_code == 2


def test_version_alone_on_stdout(run_cli):
    assert run_cli("--version") == (0, f"flexalign {__version__}\n", "")


def test_the_package_itself_is_the_command():
    command = [sys.executable, "-m", "flexalign", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"flexalign {__version__}\n"


HELP_OF_EVERYTHING = """
import contextlib, io, json, sys
import typer.main
from flexalign.cli.app import app

def walk(command, path):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        root.main([*path, "--help"], prog_name="flexalign")
    shown[" ".join(path)] = len(said.getvalue())
    for name, child in getattr(command, "commands", {}).items():
        walk(child, [*path, name])

shown = {}
root = typer.main.get_command(app)
walk(root, [])
heavy = ["torch", "transformers", "trl", "datasets", "matplotlib", "numpy", "scipy", "openai", "fastapi"]
print(json.dumps({"shown": shown, "loaded": [name for name in heavy if name in sys.modules]}))
"""


def test_no_help_loads_a_heavy_library():
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_EVERYTHING], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["loaded"] == []
    assert len(report["shown"]) > len(app_module.app.registered_commands)
    assert min(report["shown"].values()) > 100


REFUSE_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from flexalign.cli.app import main

for command in sys.argv[1:]:
    sys.argv[1:] = command.split()
    try:
        main()
    except SystemExit as left:
        assert left.code == 2, command
"""


def test_a_bad_dial_or_recipe_is_refused_before_torch_loads(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: traces.jsonl\n")
    dial = "miniature --adapter miniature:fast"
    pair = "--set reference=a --set aligned=b --set output=c"
    base = "--set base=a --set output=c"
    commands = {
        f"generate {dial} --lambda nan": "'nan' is not a finite number",
        f"chat {dial} --lambda fast": "'fast' is not a finite number",
        "evaluate dial:miniature --task miniature -o out --lambda 0,inf": "'inf' is not a finite",
        "tune dial:miniature --task miniature -o out --lambda half": "'half' is not a finite",
        f"calibrate {dial} --task miniature --lambda-range 2,1": "LEAST,LARGEST",
        f"serve {dial} --lambda-range 1": "LEAST,LARGEST",
        f"realign {recipe} --lambda 1,x": "'x' is not a finite number",
        f"adapt {recipe} --lambda y": "'y' is not a finite number",
        f"bake {recipe} --lambda z": "'z' is not a finite number",
        f'generate {dial} --lambda {{"kind":"liner"}}': "did you mean 'linear'",
        f"generate {dial} --policy adaptive=2": "'adaptive=2' is no λ and no policy",
        f"chat {dial} --policy route": "needs a share",
        "evaluate dial:miniature --task miniature -o out --policy auto --policy auto": "twice",
        "evaluate dail:miniature --task miniature -o out": "is no system",
        f'realign {recipe} --lambda {{"kind":"liner"}}': "did you mean 'linear'",
        f'adapt {recipe} --lambda {{"kind":"linear"': "must be a number or a JSON object",
        f"realign {recipe} {pair} --set lamda=1": "did you mean 'lambda'",
        f"realign {recipe} {pair} --set lambda=.nan": "lambda must be a finite number",
        f"adapt {recipe} {base} --set method=stf": "method must be",
        f"adapt {recipe} {base} --lambda 1": "lambda is for method trra",
        f"bake {recipe} {base} --set adapter=b --set lambda=.inf": "lambda must be a finite number",
    }
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_WITHOUT_TORCH, *commands], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    pairs = zip(commands.values(), lines, strict=True)
    assert [(said, line) for said, line in pairs if said not in line] == []


WARNING_COMMAND = """
import os, warnings
import typer
from flexalign.cli import app

line = typer.Typer()
line.callback()(lambda: None)

@line.command()
def warn():
    warnings.warn("a name is renamed", FutureWarning)
    warnings.warn("a driver is old", UserWarning)
    print(os.environ["TRANSFORMERS_VERBOSITY"])

app.app = line
app.main()
"""


@pytest.mark.parametrize(("options", "is_shown"), [([], False), (["-W", "default"], True)])
def test_what_libraries_tell_their_developers_is_hidden(options: list[str], is_shown: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if "VERBOSITY" not in key}
    done = subprocess.run(
        [sys.executable, *options, "-c", WARNING_COMMAND, "warn"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "a driver is old" in done.stderr
    assert ("a name is renamed" in done.stderr) == is_shown
    assert done.stdout == "error\n"


def test_an_option_of_several_commands_is_written_the_same_in_all() -> None:
    forms: dict[str, dict[tuple[str, ...], list[str]]] = {}

    def gather(command: Any, name: str) -> None:
        for option in command.params:
            long = max(option.opts, key=len)
            if long.startswith("--"):
                forms.setdefault(long, {}).setdefault(tuple(option.opts), []).append(name)
        for inner, sub in getattr(command, "commands", {}).items():
            gather(sub, f"{name} {inner}")

    gather(typer.main.get_command(app_module.app), "flexalign")
    assert len(forms["--output"][("--output", "-o")]) > 8
    assert {long: form for long, form in forms.items() if len(form) > 1} == {}


def test_a_process_ends_without_searching_all_objects_for_garbage():
    asked = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))"
    program = f"{asked}; from flexalign.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"flexalign {__version__}", "True"]
