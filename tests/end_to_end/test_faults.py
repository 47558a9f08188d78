"""Real faults: processes killed without warning, full and read-only disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexalign.trra.checkpoints import newest_complete

pytestmark = pytest.mark.full

VICTIM = Path(__file__).with_name("victim.py")
STEPS = 6


@pytest.fixture
def tree(tmp_path: Path, tiny_pair: Any) -> dict[str, Any]:
    traces = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}" * (1 + n % 4)} for n in range(20)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(traces),
        "output": str(tmp_path / "out"),
        "lambda": 2.0,
        "training": {
            "max_steps": STEPS,
            "save_steps": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_length": 32,
            "logging_steps": 1,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        },
    }


def _command(tree: dict[str, Any], folder: Path, point: str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return [sys.executable, str(VICTIM), point, "realign", str(path)]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(tree: dict[str, Any], point: str = "never:0") -> subprocess.CompletedProcess[str]:
        command = _command(tree, tmp_path, point)
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    return run


def _checksum(output: str) -> str:
    files = json.loads((Path(output) / "manifest.json").read_text())["files"]
    [checksum] = [entry["sha256"] for name, entry in files.items() if "model.safetens" in name]
    return str(checksum)


def _attention_dropout(tree: dict[str, Any]) -> None:
    copy = Path(tree["output"]).with_name("dropping")
    shutil.copytree(tree["reference"], copy)
    config = json.loads((copy / "config.json").read_text())
    config["attention_dropout"] = 0.1
    (copy / "config.json").write_text(json.dumps(config))
    tree["reference"] = str(copy)


def _packed(tree: dict[str, Any]) -> None:
    tree["training"]["packing"] = True
    tree["lambda"] = {"kind": "cosine", "start": 0, "end": 2, "steps": STEPS}


def _lora(tree: dict[str, Any]) -> None:
    tree["lora"] = {"r": 4, "lora_dropout": 0.1}


@pytest.mark.parametrize(
    ("variant", "crash"),
    [
        (lambda tree: None, "weights:2"),
        (_packed, "optimizer:2"),
        (_lora, "manifest:1"),
        (_attention_dropout, "manifest:2"),
    ],
    ids=["plain", "packed, scheduled λ", "lora dropout", "attention dropout"],
)
def test_a_killed_run_ends_in_the_same_weights(
    tree: dict[str, Any],
    tmp_path: Path,
    run: Callable[..., subprocess.CompletedProcess[str]],
    variant: Callable[[dict[str, Any]], None],
    crash: str,
) -> None:
    variant(tree)
    whole = tree | {"output": str(tmp_path / "whole")}
    assert run(whole).returncode == 0

    in_checkpoint = run(tree, crash)
    assert in_checkpoint.returncode == -signal.SIGKILL, in_checkpoint.stderr
    step = random.Random(crash).randrange(1, 4)
    in_step = run(tree, f"step:{step}")
    assert in_step.returncode == -signal.SIGKILL, in_step.stderr
    assert "half written" in in_step.stderr
    assert ("going on from" in in_step.stderr) == (not crash.endswith(":1"))

    resumed = run(tree)
    assert resumed.returncode == 0, resumed.stderr
    assert _checksum(tree["output"]) == _checksum(whole["output"])
    first, second = (
        json.loads((Path(each["output"]) / "manifest.json").read_text()) for each in (tree, whole)
    )
    assert first["tokens_seen"] == second["tokens_seen"]


def test_ctrl_c_from_outside_saves_and_says_how_to_go_on(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["training"] |= {"max_steps": 2000, "save_steps": 2}
    command = _command(tree, tmp_path, "never:0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while newest_complete(Path(tree["output"])).path is None:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    stopped = newest_complete(Path(tree["output"])).path
    assert stopped is not None
    assert str(stopped) in stderr
    assert "same command" in stderr
    assert "Traceback" not in stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system; its size is in KiB."""
    mounted = []

    def mount(*options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_complete_checkpoint(
    tree: dict[str, Any],
    disk: Callable[..., Path],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    tree["training"] |= {"save_steps": 1, "save_total_limit": 5}
    folder = disk("size=8m")
    tree["output"] = str(folder / "out")
    result = run(tree)
    assert result.returncode == 1, result.stderr
    stands = newest_complete(folder / "out").path
    assert stands is not None
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert "the disk is full" in errors[0]
    assert f"{stands} stands" in errors[0]
    assert "Traceback" not in result.stderr

    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    resumed = run(tree)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from {stands}" in resumed.stderr


def test_a_read_only_disk_is_one_sentence_and_changes_nothing(
    tree: dict[str, Any],
    disk: Callable[..., Path],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    folder = disk("size=64m")
    tree["output"] = str(folder / "out")
    assert run(tree, "step:7").returncode == -signal.SIGKILL
    before = sorted(os.listdir(folder / "out"))
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    result = run(tree)
    assert result.returncode == 1, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "ead-only" in line
    assert sorted(os.listdir(folder / "out")) == before
    assert newest_complete(folder / "out").path is not None


def test_two_processes_make_one_run_that_resumes(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["training"] |= {"max_steps": 4, "gradient_accumulation_steps": 1}
    whole = tree | {"output": str(tmp_path / "whole")}

    def launch(tree: dict[str, Any], point: str) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command = _command(tree, tmp_path, point)[1:]
        return subprocess.run(
            [*launcher, "--standalone", *command],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    done = launch(whole, "never:0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the realigned model:") == 1
    assert launch(tree, "step:4").returncode != 0
    stands = newest_complete(Path(tree["output"])).path
    assert stands is not None
    assert stands.name == "checkpoint-2"
    resumed = launch(tree, "never:0")
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from {stands}" in resumed.stderr
    assert _checksum(tree["output"]) == _checksum(whole["output"])
