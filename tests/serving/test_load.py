"""Seconds of the load that benchmarks/load.py puts on a server for minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"


def test_nothing_is_wrong_lost_or_uncounted_under_mixed_load(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--minutes", "0.33", "--spot-checks", "60"]
    command += ["--output", str(tmp_path / "load.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| failures | 0 |" in (tmp_path / "load.md").read_text()
