"""Known names: what ships with one registers it, and everything else asks the register."""

import subprocess
import sys
from pathlib import Path

import pytest

from flexalign.errors import ConfigError
from flexalign.evaluation.tasks import Task, TaskQuestion, load_task, task_names
from flexalign.models import names
from flexalign.models.names import KnownName, known_name, known_names, register
from flexalign.models.sources import aligned_beside, resolve, resolve_adapter
from flexalign.systems import parse_system


@pytest.fixture
def village(monkeypatch: pytest.MonkeyPatch, tiny_pair, tmp_path: Path) -> Path:
    """A name that nothing in the package knows: two models, an adapter and a task."""
    known_names()
    monkeypatch.setattr(names, "_REGISTERED", dict(names._REGISTERED))
    places = {"": tiny_pair.reference, "fast": tmp_path}
    register(
        KnownName(
            "village",
            places.__getitem__,
            models=("village",),
            has_parts=True,
            pair=("village", str(tiny_pair.aligned)),
            dial=("village", "village:fast"),
            task=lambda part, limit: Task(
                "village", (TaskQuestion("1", "1+1?", "2"),) * (limit or 2)
            ),
        )
    )
    return tmp_path


def test_what_ships_is_known():
    assert [entry.name for entry in known_names()] == ["miniature", "smollm2"]
    assert known_name("smollm2:part") is None
    assert known_name("models/base") is None


def test_a_registered_name_is_known_everywhere(village: Path, tiny_pair):
    assert resolve("village").path == tiny_pair.reference
    assert resolve_adapter("village:fast") == village
    assert aligned_beside("village") == str(tiny_pair.aligned)
    assert aligned_beside("village:fast") is None
    assert parse_system("dial:village").parts == ("village", "village:fast")
    assert parse_system("pair:village").parts == ("village", str(tiny_pair.aligned))
    assert "village" in task_names()
    assert len(load_task("village", limit=3).questions) == 3
    with pytest.raises(ConfigError, match=r"no known name \(.*smollm2, village\)"):
        resolve("nowhere")


def test_looking_a_name_up_loads_nothing_heavy():
    program = (
        "import sys; from flexalign.models.names import known_name; "
        "assert known_name('miniature'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
