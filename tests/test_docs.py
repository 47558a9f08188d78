"""The documentation's site builds without a warning; the map is what the modules say."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_map_is_what_the_modules_say() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "document_map.py"))
    page = (ROOT / "docs" / "MAP.md").read_text(encoding="utf-8")
    assert page == tool["render"](), "a module has come, gone or changed its clause: make docs-cli"
    assert ": .\n" not in page
    assert ": \n" not in page, "a module says nothing of itself"


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    assert all(
        f'id="{name}"' in page
        for name in ("flexalign.fusion.fuse", "flexalign.inra.model.InRaModel")
    )
    assert "https://fonts." not in (tmp_path / "index.html").read_text(encoding="utf-8")
