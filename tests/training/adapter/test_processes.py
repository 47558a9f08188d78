"""DPO of an adapter in two processes, through accelerate's launcher, equals that in one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from launching import DISTRIBUTED

TRAINING = {
    "max_steps": 3,
    "warmup_steps": 0,
    "learning_rate": 5e-3,
    "max_length": 64,
    "train_sampling_strategy": "sequential",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.mark.full
def test_two_processes_share_the_reference_and_take_the_steps_of_one(
    tmp_path: Path, tiny_pair: Any, preferences: Dataset, run_cli: Callable[..., Any]
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preferences), encoding="utf-8")
    tree = {"base": str(tiny_pair.reference), "data": str(data), "method": "dpo"}
    outputs = {count: tmp_path / f"on-{count}" for count in (1, 2)}
    commands: dict[int, list[Any]] = {}
    for count, output in outputs.items():
        batch = {"per_device_train_batch_size": 4 // count, "gradient_accumulation_steps": 1}
        own = tmp_path / f"recipe-{count}.yaml"
        own.write_text(yaml.safe_dump(tree | {"output": str(output), "training": TRAINING | batch}))
        commands[count] = ["adapt", own]

    alone = run_cli(*commands[1])
    assert alone.exit_code == 0, alone.stderr
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    configuration = ["--config_file", DISTRIBUTED / "cpu_2.yaml", "-m", "flexalign"]
    together = subprocess.run(
        [sys.executable, *launcher, *configuration, *commands[2]], capture_output=True, text=True
    )
    assert together.returncode == 0, together.stderr

    one, two = (load_file(output / "inra_adapter.safetensors") for output in outputs.values())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    assert not list(outputs[2].rglob("*.arrow"))
