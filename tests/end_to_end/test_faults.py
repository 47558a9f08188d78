"""Real faults: processes killed without warning, full and read-only disks."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexalign.training.checkpoints import newest_complete
from launching import DISTRIBUTED

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
    stands = newest_complete(folder / "out").path
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    result = run(tree)
    assert result.returncode == 1, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "ead-only" in line
    assert sorted(os.listdir(folder / "out")) == before
    assert stands is not None  # for the type checker and the next line, which None would pass
    assert newest_complete(folder / "out").path == stands


@pytest.fixture
def responding(tmp_path: Path, tiny_pair: Any) -> Callable[[str, Path], list[str]]:
    """The arguments of the two commands that write responses, to a given folder."""
    prompts = tmp_path / "sums.jsonl"
    rows = [{"problem": f"what is {n} plus two " + "?" * 200, "answer": n + 2} for n in range(24)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def arguments(name: str, folder: Path) -> list[str]:
        short = ["--max-new-tokens", "24", "--samples", "2", "--batch-size", "8"]
        if name == "sample":
            prompted = ["--prompts", str(prompts), "-o", str(folder / "traces.jsonl")]
            return ["sample", str(tiny_pair.reference), *prompted, *short]
        pair = f"pair=pair:{tiny_pair.reference},{tiny_pair.aligned}"
        asked = ["--task", str(prompts), "--lambda", "0,1", "-o", str(folder)]
        return ["evaluate", pair, *asked, *short]

    return arguments


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_responses_survive_a_full_and_a_read_only_disk(
    name: str,
    responding: Callable[[str, Path], list[str]],
    start: Callable[..., Any],
    disk: Callable[..., Path],
    tmp_path: Path,
) -> None:
    file = {"sample": "traces.jsonl", "evaluate": "samples.jsonl"}[name]
    folder = disk("size=16k")
    result = start(responding(name, folder))
    assert result.code == 1, result.log
    [line] = [line for line in result.log.splitlines() if line.startswith("error:")]
    assert "the disk is full" in line
    assert "Traceback" not in result.log

    subprocess.run(["mount", "-o", "remount,ro,size=16m", str(folder)], check=True)
    before = (folder / file).read_bytes()
    refused = start(responding(name, folder))
    assert refused.code == 1, refused.log
    assert "ead-only" in refused.log
    assert "Traceback" not in refused.log
    assert (folder / file).read_bytes() == before

    subprocess.run(["mount", "-o", "remount,rw,size=16m", str(folder)], check=True)
    assert start(responding(name, folder)).code == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    assert start(responding(name, whole)).code == 0
    assert sorted((folder / file).read_text().splitlines()) == sorted(
        (whole / file).read_text().splitlines()
    )


def _launch(
    tree: dict[str, Any], folder: Path, point: str, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Start the run with accelerate, as examples/distributed says."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", str(DISTRIBUTED / "cpu_2.yaml"), "--num_processes", str(processes)]
    command = _command(tree, folder, point)[1:]
    return subprocess.run(
        [*launcher, *options, "--main_process_port", "0", *command],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_processes_make_one_run_that_resumes(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["training"] |= {"max_steps": 4, "gradient_accumulation_steps": 1}
    whole = tree | {"output": str(tmp_path / "whole")}

    done = _launch(whole, tmp_path, "never:0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the realigned model:") == 1
    assert _launch(tree, tmp_path, "step:4").returncode != 0
    stands = newest_complete(Path(tree["output"])).path
    assert stands is not None
    assert stands.name == "checkpoint-2"
    resumed = _launch(tree, tmp_path, "never:0")
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from {stands}" in resumed.stderr
    assert _checksum(tree["output"]) == _checksum(whole["output"])


def test_a_run_goes_on_with_another_number_of_processes(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["training"] |= {"gradient_accumulation_steps": 2, "max_steps": 8}

    def start(tree: dict[str, Any], processes: int, point: str) -> Any:
        rows = 4 // (2 * processes)
        share = tree | {"training": tree["training"] | {"per_device_train_batch_size": rows}}
        return _launch(share, tmp_path, point, processes)

    whole = tree | {"output": str(tmp_path / "whole")}
    assert start(whole, 1, "never:0").returncode == 0
    assert start(tree, 2, "step:7").returncode != 0  # in the fourth step
    to_one = start(tree, 1, "step:7")  # in the sixth
    assert f"going on from {tree['output']}/checkpoint-2" in to_one.stderr
    to_two = start(tree, 2, "never:0")
    assert to_two.returncode == 0, to_two.stderr
    assert f"going on from {tree['output']}/checkpoint-4" in to_two.stderr

    found, expected = (_losses(each["output"]) for each in (tree, whole))
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 4) for loss in expected}) == 8  # so another order would show


def _losses(output: str) -> list[float]:
    states = sorted(Path(output).glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    log = json.loads(states[-1].read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_when_one_of_two_processes_dies_the_other_ends_soon_and_says_so(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Without a launcher that looks after both, as on two machines."""
    tree["training"] |= {"gradient_accumulation_steps": 1}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = _command(tree, tmp_path, "step:4@1")
    survivor, dead = (
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    try:
        dead.communicate(timeout=120)
        _, stderr = survivor.communicate(timeout=30)
    finally:
        survivor.kill()
        dead.kill()
    assert dead.returncode == -signal.SIGKILL
    assert survivor.returncode == 1, stderr
    stands = newest_complete(Path(tree["output"])).path
    assert stands is not None
    assert stands.name == "checkpoint-2"
    [line] = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "another process of this run ended" in line
    assert f"{stands} stands" in line
    assert "Traceback" not in stderr
