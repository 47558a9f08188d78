"""Hooks of the documentation's site: pages that are made from the code, and links out of docs/.

The home page is README.md, the tutorial on a real model is that of examples/smollm2, the Python
reference follows the `__all__` lists, and the keys of recipes come from their data classes.
"""

import importlib
import inspect
import posixpath
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
BORROWED = {"index.md": "README.md", "tutorial-smollm2.md": "examples/smollm2/README.md"}
PACKAGES = (
    "flexalign",
    "flexalign.training",
    "flexalign.inra",
    "flexalign.evaluation",
    "flexalign.calibration",
)
RECIPES = {
    "realign": "flexalign.training.recipes.Recipe",
    "adapt": "flexalign.training.adapter_recipes.AdaptRecipe",
    "bake": "flexalign.training.adapter_recipes.BakeRecipe",
}
_DEFAULTS = re.compile(r"`(DEFAULT_\w+)`")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    for name, source in BORROWED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_moved(text, posixpath.dirname(source))))
    files.append(File.generated(config, "reference.md", content=_reference()))
    files.append(File.generated(config, "recipes.md", content=_recipes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name files outside docs/ instead of linking them; a file that is not there is an error."""
    borrowed = {f"../{source}": page for page, source in BORROWED.items()}

    def plain(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if target in borrowed:
            return f"{mark}[{text}]({borrowed[target]})"
        if not target.startswith("../"):
            return match.group(0)
        path = ROOT / target.removeprefix("../").partition("#")[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist")
        named = target.removeprefix("../")
        return f"`{named}`" if mark or text.strip("`") == named else f"{text} (`{named}`)"

    return _LINK.sub(plain, markdown)


def _moved(text: str, folder: str) -> str:
    """Return a page whose links count from docs/ instead of from its own folder."""

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group(0)
        path = posixpath.normpath(posixpath.join(folder, target))
        inside = path.removeprefix("docs/")
        return f"{mark}[{label}]({inside if inside != path else '../' + path})"

    return _LINK.sub(link, text)


def _reference() -> str:
    parts = [
        "# The Python interface\n\nWhat may be imported; everything else may change. "
        "`flexalign.X` loads on first use.\n"
    ]
    seen: set[Any] = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if not (inspect.isclass(value) or inspect.isfunction(value)) or value in seen:
                continue
            seen.add(value)
            parts.append(f"::: {home}.{value.__name__}\n")
    return "\n".join(parts)


def _recipes() -> str:
    parts = ["# Recipes: the keys of the YAML files\n"]
    for command, path in RECIPES.items():
        home, _, name = path.rpartition(".")
        module = importlib.import_module(home)
        recipe = getattr(module, name)
        said = _attributes(inspect.getdoc(recipe) or "")
        parts.append(f"## `flexalign {command}`\n\n| key | default | meaning |\n|---|---|---|")
        for field in fields(recipe):
            key = {"lam": "lambda"}.get(field.name, field.name)
            given = field.default is not MISSING
            default = f"`{field.default}`" if given else ""
            if not given and field.default_factory is MISSING:
                default = "required"
            meaning = _spelt_out(said.get(field.name, "").replace("`lam`", "`lambda`"), module)
            parts.append(f"| `{key}` | {default} | {meaning} |")
        parts.append("")
    return "\n".join(parts)


def _spelt_out(meaning: str, module: Any) -> str:
    """Write a dictionary of defaults out where a docstring names it."""

    def items(found: re.Match[str]) -> str:
        return ", ".join(f"`{key}: {value}`" for key, value in getattr(module, found[1]).items())

    return _DEFAULTS.sub(items, meaning)


def _attributes(doc: str) -> dict[str, str]:
    """Read the Attributes section of a docstring."""
    _, _, section = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        head = re.match(r" {4}(\w+): (.*)", line)
        if head:
            name = head[1]
            found[name] = head[2]
        elif line.startswith("        ") and name:
            found[name] += " " + line.strip()
        else:
            break
    return {key: value.replace("``", "`").replace("|", "\\|") for key, value in found.items()}
