import json
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from flexalign.errors import ConfigError, LambdaError
from flexalign.lambdas import Schedule
from flexalign.training import TrRaConfig

LINEAR = {"kind": "linear", "start": 0, "end": 2, "steps": 200}


def make(tmp_path: Path, **options: Any) -> TrRaConfig:
    return TrRaConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize("lam", [2, 2.0, "2.0", LINEAR, json.dumps(LINEAR), Schedule.parse(LINEAR)])
def test_every_form_of_lambda_becomes_one_that_json_can_hold(tmp_path: Path, lam: Any) -> None:
    config = make(tmp_path, lam=lam)
    assert config.schedule == Schedule.parse(lam)
    again = json.loads(config.to_json_string())
    assert Schedule.parse(again["lam"]) == config.schedule
    assert config.schedule.at(100) == (1.0 if "kind" in str(lam) else 2.0)


def test_a_copy_from_its_own_dictionary_is_equal(tmp_path: Path) -> None:
    config = make(tmp_path, lam=LINEAR, divergence="jsd", beta=0.3, gate=0.01)
    values = config.to_dict()
    secret = {name for name in values if name.endswith("_token")}  # to_dict writes a placeholder
    again = TrRaConfig(**{name: value for name, value in values.items() if name not in secret})
    assert again.to_dict() == values


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"divergence": "kl"}, "one of reverse, forward, jsd"),
        ({"beta": 1.5}, "from 0 to 1"),
        ({"beta": 0.3}, "'reverse': it says where 'jsd' lies"),
        ({"beta": 1, "divergence": "forward"}, "'forward': it says where 'jsd' lies"),
        ({"beta": float("nan")}, "from 0 to 1"),
        ({"gate": -0.1}, "from 0 to 1"),
        ({"gate": True}, "from 0 to 1"),
        ({"chunk_size": 0}, "at least 1"),
        ({"rounds": 1.5}, "at least 1"),
        ({"teacher": "offline"}, "one of online, cached"),
        ({"teacher": "cached"}, "needs cache_dir"),
        ({"cache_dir": "c"}, "set teacher='cached', or leave cache_dir out"),
        ({"packing_strategy": "bfd_split"}, "set packing=True, or leave packing_strategy out"),
        ({"rollouts": 2.0}, "from 0 to 1"),
        ({"lam": [0.5, 1.0]}, "make one for each"),
        ({"lam": {"kind": "liner", "start": 0}}, "linear"),
        ({"lam": {"kind": "thinking", "think": 0, "answer": 1}}, "schedule over the step"),
        ({"loss_type": "dft"}, "leave it out"),
        ({"label_smoothing_factor": 0.1}, "leave it out"),
        ({"router_aux_loss_coef": 0.01}, "leave it out"),
        ({"model_init_kwargs": {"use_cache": True}}, "attn_implementation and dtype are"),
        ({"use_liger_kernel": True}, "pip install liger-kernel"),
        ({"packing": True, "packing_strategy": "wrapped"}, "use 'bfd'"),
        ({"eval_packing": True}, "leave it out"),
        ({"average_tokens_across_devices": False}, "leave it out"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_remedy(
    tmp_path: Path, options: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy):
        make(tmp_path, **options)


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), True, 1j])
def test_a_lambda_that_is_no_number_is_refused(tmp_path: Path, lam: Any) -> None:
    with pytest.raises(LambdaError):
        make(tmp_path, lam=lam)


def test_half_precision_is_off_without_an_accelerator(tmp_path: Path) -> None:
    assert make(tmp_path).bf16 is False
    assert make(tmp_path, bf16=True).bf16 is True


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_goes_by_either_name(tmp_path: Path, name: str) -> None:
    assert make(tmp_path).activation_checkpointing is True
    config = make(tmp_path, **{name: False})
    assert config.activation_checkpointing is config.gradient_checkpointing is False


def test_every_own_field_explains_itself() -> None:
    own = set(TrRaConfig.__annotations__)
    for name in own:
        assert TrRaConfig.__dataclass_fields__[name].metadata["help"]
    assert {"lam", "divergence", "beta", "gate", "chunk_size", "teacher", "cache_dir"} <= own
    assert {"rounds", "rollouts", "rollout_objective", "rollout_max_new_tokens"} <= own


def test_it_parses_from_the_command_line(tmp_path: Path) -> None:
    (config,) = HfArgumentParser(TrRaConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--lam", json.dumps(LINEAR), "--gate", "0.01"]
    )
    assert (config.schedule.end_value, config.gate) == (2.0, 0.01)
