"""What users may import is fixed here; everything else is not promised."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import flexalign
from flexalign import errors

SOURCE = Path(flexalign.__file__).parent
PUBLIC = [
    "Adaptive",
    "Exit",
    "Fixed",
    "FlexAlignError",
    "InRaConfig",
    "InRaModel",
    "Ladder",
    "LoRADial",
    "ModelPair",
    "Route",
    "Schedule",
    "TrRaConfig",
    "TrRaTrainer",
    "TwoModelDecoder",
    "__version__",
    "adapt",
    "bake",
    "fuse",
    "interpolate",
    "realign",
]


def _modules() -> list[str]:
    optional = {
        "flexalign.evaluation.harness": "lm_eval",
        "flexalign.serving.vllm.models": "vllm",
        "flexalign.serving.vllm.runner_v2": "vllm",
    }
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("flexalign", *path.relative_to(SOURCE).with_suffix("").parts)
        names.append(".".join(parts).removesuffix(".__init__"))
    return [name for name in names if name not in optional or find_spec(optional[name])]


def test_public_names_are_the_documented_ones():
    assert flexalign.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(flexalign) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_imports(name: str):
    namespace: dict[str, object] = {}
    exec(f"from flexalign import {name}", namespace)
    home = getattr(namespace[name], "__module__", "flexalign")
    assert home.startswith("flexalign")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Fuse'"):
        flexalign.Fuse  # noqa: B018


@pytest.mark.parametrize("module", _modules())
def test_every_list_of_names_is_true(module: str):
    loaded = import_module(module)
    names = list(getattr(loaded, "__all__", []))
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(loaded, name)] == []


def test_import_costs_nothing():
    heavy = "torch,transformers,trl,datasets,typer"
    code = f"import sys, flexalign; print([m for m in '{heavy}'.split(',') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_errors_docstring_draws_the_classes():
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        text = line.strip()
        if text.startswith(("├── ", "└── ")):
            head = text[4:].split("  ")[0]
            name, base = head.rstrip(")").split("(")
            drawn[name] = base
    leaves = {
        name: getattr(errors, name).__bases__[1].__name__
        for name in errors.__all__
        if name != "FlexAlignError"
    }
    assert drawn == leaves
    for name in leaves:
        assert getattr(errors, name).__bases__[0] is errors.FlexAlignError


def test_every_error_of_ours_is_in_the_tree():
    for module in _modules():
        import_module(module)
    found, queue = set(), [errors.FlexAlignError]
    while queue:
        found.update(kind.__module__ for kind in queue)
        queue = [leaf for kind in queue for leaf in kind.__subclasses__()]
    assert found == {"flexalign.errors"}
