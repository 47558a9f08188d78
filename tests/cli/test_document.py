"""docs/cli.md is what the commands say of themselves."""

import runpy
from pathlib import Path

import typer.main

from flexalign.cli.app import app

ROOT = Path(__file__).parents[2]


def test_page_is_current():
    tool = runpy.run_path(str(ROOT / "tools" / "document_cli.py"))
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == tool["render"](), "the help has changed; run: make docs-cli"


def test_every_command_teaches_by_example():
    silent = []

    def visit(command, path):
        children = getattr(command, "commands", {})
        if not children and f"flexalign {path}" not in (command.help or ""):
            silent.append(path)
        for name, child in children.items():
            visit(child, f"{path} {name}".strip())

    visit(typer.main.get_command(app), "")
    assert silent == []
