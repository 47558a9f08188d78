"""Write docs/MAP.md, a clause for each module, from its docstring: ``python tools/document_map.py``."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "MAP.md"
HEAD = """\
# The map

Where a thing stands, a clause for each module: the first sentence of its docstring, put together by
`make docs-cli` and held by a test. Imports go down only: cli → serving, calibration → evaluation → inra
→ trra, decoding → losses, pairing, heads, data, miniature, policies → fusion, schedules, errors.
"""


def render() -> str:
    """Return the page: one list for each package, its own clause above it."""
    source = ROOT / "src" / "flexalign"
    packages = sorted({path.parent for path in source.rglob("*.py")})
    parts = [HEAD]
    for package in packages:
        inits = package / "__init__.py"
        name = ".".join(package.relative_to(ROOT / "src").parts)
        clause = _clause(inits) if inits.exists() else ""
        lines = [f"## `{name}`\n\n{clause}\n"]
        for path in sorted(package.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"- `{path.name}`: {_clause(path)}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts).rstrip() + "\n"


def _clause(path: Path) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(doc.partition("\n\n")[0].split()).replace("``", "`")
    return paragraph.rstrip(".") + "." if paragraph else ""


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
