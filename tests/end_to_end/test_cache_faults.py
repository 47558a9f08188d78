"""Writers of one cache, several at once and killed without warning."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexalign.training.hidden_cache import HiddenStateCache

pytestmark = pytest.mark.full

VICTIM = Path(__file__).with_name("cache_victim.py")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_pair: Any) -> Path:
    folder = tmp_path_factory.mktemp("cache_faults")
    traces = folder / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}" * (1 + n % 4)} for n in range(40)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(traces),
        "output": str(folder / "out"),
        "lambda": 2.0,
        "training": {"max_length": 32, "use_cpu": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def command(recipe: Path, folder: Path, point: str = "never:0", launcher: Any = ()) -> list[str]:
    arguments = [str(VICTIM), point, "cache", str(recipe), "-o", str(folder)]
    return [sys.executable, *launcher, *arguments]


def run(recipe: Path, folder: Path, *more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, folder, *more), capture_output=True, text=True, timeout=240, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    HiddenStateCache.open(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(recipe: Path) -> dict[str, bytes]:
    folder = recipe.with_name("whole")
    done = run(recipe, folder)
    assert done.returncode == 0, done.stderr
    found = contents(folder)
    assert len(found) > 5
    return found


def test_writers_killed_one_after_another_end_in_the_same_bytes(
    recipe: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = tmp_path / "cache"
    for point in ("half:2", "unnoted:2", "before:1"):
        killed = run(recipe, folder, point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run(recipe, folder)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == whole
    assert not list(folder.glob(".*.partial"))


def test_two_processes_on_one_folder_share_the_work(
    recipe: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = tmp_path / "cache"
    assert run(recipe, folder, "half:2").returncode == -signal.SIGKILL
    writers = [
        subprocess.Popen(command(recipe, folder), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for writer in writers:
        _, stderr = writer.communicate(timeout=240)
        assert writer.returncode == 0, stderr
    assert contents(folder) == whole


def test_one_of_two_is_killed_and_the_other_makes_everything(
    recipe: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = tmp_path / "cache"
    writers = [
        subprocess.Popen(command(recipe, folder, point), stderr=subprocess.PIPE, text=True)
        for point in ("unnoted:2", "never:0")
    ]
    ends = []
    for writer in writers:
        _, stderr = writer.communicate(timeout=240)
        ends.append(writer.returncode)
    assert ends[1] == 0, stderr
    assert ends[0] in (-signal.SIGKILL, 0)  # 0: the other was done before its second file
    assert contents(folder) == whole


def test_a_launcher_starts_both(recipe: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "cache"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(recipe, folder, "never:0", launcher)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("response tokens of 40 rows") == 1
    assert contents(folder) == whole


def test_a_full_and_a_read_only_disk_are_one_sentence_each(
    recipe: Path, whole: dict[str, bytes], disk: Callable[..., Path]
) -> None:
    place = disk(f"size={sum(map(len, whole.values())) // 2}")
    folder = place / "cache"

    def refused() -> str:
        done = subprocess.run(
            [*command(recipe, folder), "--anyway"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        return line

    assert "the disk is full" in refused()
    assert not list(folder.glob(".*.partial"))
    subprocess.run(["mount", "-o", "remount,ro,size=64m", str(place)], check=True)
    assert "ead-only" in refused()
    subprocess.run(["mount", "-o", "remount,rw,size=64m", str(place)], check=True)
    done = run(recipe, folder)
    assert done.returncode == 0, done.stderr
    # Not `contents`, which maps the files: the disk could not be unmounted.
    assert {name: (folder / name).read_bytes() for name in whole} == whole
