"""Every configuration under examples/distributed/, as accelerate's own launcher reads it."""

import os

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from launching import DISTRIBUTED, launch_environment

FILES = {path.stem: path for path in sorted(DISTRIBUTED.glob("*.yaml"))}
KINDS = {"cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}


def test_each_way_is_there_for_one_machine_and_for_two():
    ways = ("ddp", "fsdp2", "zero2", "zero3")
    assert set(FILES) == {"cpu_2"} | {f"{way}_{size}" for way in ways for size in ("1x8", "2x8")}


@pytest.mark.parametrize("name", FILES)
def test_accelerate_loads_it(name: str):
    way, _, size = name.partition("_")
    config = load_config_from_file(str(FILES[name]))
    assert config.distributed_type.value == KINDS.get(way, "DEEPSPEED")
    assert config.num_machines == (2 if size == "2x8" else 1)
    assert config.num_processes == {"2": 2, "1x8": 8, "2x8": 16}[size]
    assert config.mixed_precision == ("no" if way == "cpu" else "bf16")
    assert f"--config_file examples/distributed/{name}.yaml" in FILES[name].read_text("utf-8")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("fsdp2")])
def test_fsdp_reads_the_weights_once_and_saves_a_model_folder(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", launch_environment(FILES[name]))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.state_dict_type == torch.distributed.fsdp.StateDictType.FULL_STATE_DICT
    model = torch.nn.Sequential()
    model._no_split_modules = ["Linear"]
    model.append(torch.nn.Linear(1, 1))
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {torch.nn.Linear}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("zero")])
def test_deepspeed_shards_what_the_name_says(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", launch_environment(FILES[name]))
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == int(name[4])
    assert plugin.zero3_init_flag is (plugin.zero_stage == 3)
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == plugin.zero_stage
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (plugin.zero_stage == 3)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
