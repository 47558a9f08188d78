"""Write docs/cli.md from the help of the commands: ``python tools/document_cli.py``."""

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """\
# The command line

Made from the commands' own help by `make docs-cli`; a test holds the two together.

Results go to stdout and everything else to stderr; `--json` prints one JSON document, alone.
Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted.
"""


def render() -> str:
    """Return the page: each command's help as the terminal shows it, 100 columns wide."""
    import typer.main
    import typer.rich_utils

    from flexalign.cli.app import app

    root = typer.main.get_command(app)
    sections = [HEAD]

    def visit(command: object, path: list[str]) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            root.main([*path, "--help"], prog_name="flexalign")
        lines = [line.rstrip() for line in said.getvalue().strip("\n").splitlines()]
        title = " ".join(["flexalign", *path])
        sections.append(f"## `{title}`\n\n```text\n" + "\n".join(lines) + "\n```\n")
        for name, child in sorted(getattr(command, "commands", {}).items()):
            visit(child, [*path, name])

    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    with mock.patch.dict(os.environ, plain), mock.patch.object(typer.rich_utils, "MAX_WIDTH", 100):
        visit(root, [])
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
