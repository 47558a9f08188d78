"""Hooks of the documentation's site: pages that are made from the code, and links out of docs/.

The home page is README.md, the tutorial on a real model is that of examples/smollm2, the Python
reference follows the `__all__` lists, and the keys of recipes come from their schema.
"""

import importlib
import inspect
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from flexalign.training import recipes

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
    "realign": recipes.RealignRecipe,
    "adapt": recipes.AdaptRecipe,
    "bake": recipes.BakeRecipe,
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
        for name in _names(module):
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if not (inspect.isclass(value) or inspect.isfunction(value)) or value in seen:
                continue
            seen.add(value)
            parts.append(f"::: {home}.{value.__name__}\n")
    return "\n".join(parts)


def _names(module: Any) -> list[str]:
    """Return what a package lists in `__all__`, or what a module without one defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = vars(module).items()
    return sorted(
        name
        for name, value in own
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def _recipes() -> str:
    parts = ["# Recipes: the keys of the YAML files\n"]
    for command, recipe in RECIPES.items():
        parts.append(f"## `flexalign {command}`\n\n| key | default | meaning |\n|---|---|---|")
        parts += _rows(recipes.describe_keys(recipe))
        parts.append("")
    return "\n".join(parts)


def _rows(keys: Iterable[recipes.RecipeKey], prefix: str = "") -> Iterator[str]:
    for key in keys:
        default = "required" if key.default is None else f"`{key.default}`"
        meaning = _DEFAULTS.sub(_spelt_out, key.description).replace("|", "\\|")
        yield f"| `{prefix}{key.name}` | {default} | {meaning} |"
        yield from _rows(key.section, f"{key.name}.")


def _spelt_out(found: re.Match[str]) -> str:
    """Write a dictionary of defaults out where a description names it."""
    return ", ".join(f"`{key}: {value}`" for key, value in getattr(recipes, found[1]).items())
