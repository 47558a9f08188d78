"""What ``accelerate launch`` sets for the processes of one of examples/distributed/."""

import os
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

DISTRIBUTED = Path(__file__).parents[1] / "examples" / "distributed"


def launch_environment(config: Path, *options: str) -> dict[str, str]:
    """Return the environment of one process, RANK and its like excepted.

    Args:
        config: A configuration of accelerate.
        *options: Of ``accelerate launch``; they win over the file.
    """
    asked = ["--config_file", str(config), *options, "--main_process_port", "0", "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(asked))
    if not arguments.use_deepspeed:
        return dict(prepare_multi_gpu_env(arguments))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    with mock.patch.dict(os.environ):
        _, environment = prepare_deepspeed_cmd_env(arguments)
    return dict(environment)
