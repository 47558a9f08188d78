"""Completion in bash, zsh and fish: what is installed, and what a shell is told to offer."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Ask = Callable[..., str]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own, and a path on which ``flexalign`` is this one."""
    script = tmp_path / "bin" / "flexalign"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m flexalign "$@"\n')
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(tmp_path)}


@pytest.fixture
def ask(environment: dict[str, str]) -> Ask:
    """Call ``flexalign`` as a shell's completion does; return what it prints."""

    def call(instruction: str, variables: Mapping[str, str]) -> str:
        asked = environment | {"_FLEXALIGN_COMPLETE": instruction, **variables}
        return subprocess.run(
            ["flexalign"], env=asked, capture_output=True, text=True, check=True
        ).stdout

    return call


def test_zsh_and_fish_are_offered_commands_and_options_with_their_help(ask: Ask) -> None:
    zsh = ask("complete_zsh", {"_TYPER_COMPLETE_ARGS": "flexalign ev"})
    assert '"evaluate":"Measure systems at several settings' in zsh
    assert "generate" not in zsh
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    told = ask("complete_fish", fish | {"_TYPER_COMPLETE_ARGS": "flexalign generate --lambda-"})
    assert told.startswith("--lambda-range\t")
    assert len(told.splitlines()) == 1
    groups = ask("complete_fish", fish | {"_TYPER_COMPLETE_ARGS": "flexalign export "})
    assert groups.startswith("lora\t")


def test_the_scripts_of_zsh_and_fish_name_the_command(ask: Ask) -> None:
    assert ask("source_zsh", {}).lstrip().startswith("#compdef flexalign\n")
    assert ask("source_fish", {}).startswith("complete --command flexalign ")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_by_the_script_that_it_installs(environment: dict[str, str]) -> None:
    """Each line is completed as bash does it: by the function that is registered for its command."""
    asked = """
    flexalign --install-completion >/dev/null || exit
    . ~/.bashrc
    registered=$(complete -p flexalign)
    function=${registered#*-F } function=${function%% *}
    offer() {
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        "$function" flexalign
        echo "${COMPREPLY[*]}"
    }
    offer flexalign ca
    offer flexalign generate --lam
    offer flexalign miniature ''
    """
    done = subprocess.run(
        ["bash", "-c", asked], env=environment, capture_output=True, text=True, check=True
    )
    commands, options, parts = (line.split() for line in done.stdout.splitlines())
    assert commands == ["cache", "calibrate"]
    assert options == ["--lambda", "--lambda-range"]
    assert "traces" in parts
    assert done.stderr == ""
