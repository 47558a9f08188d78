"""Every recipe under examples/ is read, checked and dry-run as its reader would run it.

Those of examples/paper have models of other shapes, and tests of their own in test_paper.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from trl import SFTConfig

from flexalign.training import AdaptRecipe, BakeRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"
ELSEWHERE = {*EXAMPLES.glob("distributed/*"), *EXAMPLES.glob("paper/*")}
FILES = sorted(set(EXAMPLES.rglob("*.y*ml")) - ELSEWHERE)
RECIPES = [path for path in FILES if "reference" in yaml.safe_load(path.read_text("utf-8"))]
ADAPTERS = [path for path in FILES if "base" in yaml.safe_load(path.read_text("utf-8"))]
TUNINGS = [path for path in FILES if path not in [*RECIPES, *ADAPTERS]]


def _name(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


@pytest.fixture
def stand_ins(tmp_path: Path, tiny_pair: Any) -> dict[str, Path]:
    """What a recipe reads besides the miniature: a pair and traces."""
    traces = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(8)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"reference": tiny_pair.reference, "aligned": tiny_pair.aligned, "data": traces}


def _is_shipped(side: Any) -> bool:
    name = side["model"] if isinstance(side, dict) else side
    return name.split(":")[0] == "miniature"


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_recipe_dry_runs(
    path: Path,
    stand_ins: dict[str, Path],
    tmp_path: Path,
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
):
    recipe = yaml.safe_load(path.read_text("utf-8"))
    replaced = [
        f"--set={key}={stand_in}"
        for key, stand_in in stand_ins.items()
        if not _is_shipped(recipe[key])
    ]
    monkeypatch.chdir(tmp_path)
    result = run_cli("realign", path, *replaced, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)
    assert not (tmp_path / recipe["output"]).exists()


@pytest.mark.parametrize("path", ADAPTERS, ids=_name)
def test_adapter_recipe_is_read(path: Path):
    baked = "adapter" in yaml.safe_load(path.read_text("utf-8"))
    recipe = (BakeRecipe if baked else AdaptRecipe).load(path)
    assert recipe.training_arguments().max_steps > 0


@pytest.mark.parametrize("path", TUNINGS, ids=_name)
def test_other_settings_name_fields_that_exist(path: Path):
    settings = yaml.safe_load(path.read_text("utf-8"))
    assert settings.keys() == {"lora", "training"}
    assert settings["training"].keys() <= SFTConfig.__dataclass_fields__.keys()
    assert settings["lora"].keys() <= LoraConfig.__dataclass_fields__.keys()
