"""A PEFT LoRA scaled by λ, held against weights that are added by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flexalign.errors import ConfigError, LambdaError
from flexalign.generation.responses import generate_responses
from flexalign.lambdas import Setting
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.systems import PromptRequest, SystemOptions, open_backend, parse_system
from lora_folders import BASE, miniature_lora, write_dial

ASKED = ["3+14+15?", "7+7+7?", "12+5+7+1?"]
STEPS = 40


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as PEFT writes it, of a LoRA at one strength."""
    folder = tmp_path_factory.mktemp("plain") / "lora"
    miniature_lora().save_pretrained(folder)
    return folder


def opened(kind: str, folder: Path, lams: Sequence[float], **options: Any) -> Any:
    settings = [Setting.of(lam) for lam in lams]
    given = SystemOptions(max_new_tokens=STEPS, temperature=1.0, top_p=1.0, **options)
    return open_backend(parse_system(f"{kind}:{BASE},{folder}"), settings, given)


def test_its_answers_are_those_of_the_weights_with_the_scaled_difference(plain: Path) -> None:
    from safetensors.torch import load_file

    lams = [0.0, 0.5, 1.0, 3.0]
    backend = opened("lora", plain, lams)
    assert backend.describe()["kind"] == "lora"
    requests = [
        PromptRequest(place, [{"role": "user", "content": text}], Setting.of(lam), 0, place)
        for place, text in enumerate(ASKED)
        for lam in lams
    ]
    with pytest.warns(UserWarning, match="results at other λ are unmeasured"):
        found = {one.key: answer.text for block in backend.run(requests) for one, answer in block}

    tensors = load_file(plain / "adapter_model.safetensors")
    tokenizer = load_tokenizer(BASE)
    answers = []
    for lam in lams:
        model: Any = load_model(BASE)
        with torch.no_grad():
            for name, down in tensors.items():
                if "lora_A" in name:
                    up = tensors[name.replace("lora_A", "lora_B")]
                    layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    # The rank and alpha are equal, so PEFT's own factor is 1.
                    model.get_submodule(layer).weight += lam * (up @ down)
        for place, text in enumerate(ASKED):
            [expected] = generate_responses(
                model, tokenizer, [[{"role": "user", "content": text}]], max_new_tokens=STEPS,
                temperature=1.0, seeds=[place],
            )  # fmt: skip
            assert found[place, Setting.of(lam).id, 0] == expected.text
            answers.append(expected.text)
    assert len(set(answers)) > 4


def test_a_plain_lora_as_a_dial_is_refused_and_told_of_it(plain: Path) -> None:
    with pytest.raises(LambdaError, match="measure it scaled as lora:BASE,ADAPTER") as refused:
        opened("dial", plain, [0.5])
    assert "trained at one strength" in str(refused.value)
    opened("dial", plain, [0.0, 1.0])


def test_a_strength_below_zero_is_permitted_by_a_range_alone(plain: Path) -> None:
    with pytest.raises(LambdaError, match="--lambda-range"):
        opened("lora", plain, [-0.5])
    opened("lora", plain, [-0.5], lambda_range=(-1.0, 1.0))
    with pytest.raises(LambdaError, match="outside the range"):
        opened("lora", plain, [2.0], lambda_range=(-1.0, 1.0))


def test_what_was_trained_as_a_dial_is_refused(tmp_path: Path) -> None:
    folder = write_dial(tmp_path / "dial")
    for trained in (folder, "miniature:fast", "miniature:dial"):
        with pytest.raises(ConfigError, match="was trained as a dial"):
            opened("lora", trained, [0.5])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes no gate"):
        opened("lora", _plain_of(folder), [0.5], gate=0.1)


def _plain_of(folder: Path) -> Path:
    """Remove what makes a LoRA's folder a dial's."""
    (folder / "lora_dial.json").unlink()
    return folder


def test_the_command_line_measures_it(plain: Path, run_cli: Any, tmp_path: Path) -> None:
    result = run_cli(
        "evaluate", f"scaled=lora:{BASE},{plain}", "--task", "miniature", "--limit", 2,
        "--samples", 1, "--lambda", "0,2", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "scaled" in result.stdout
    refused = run_cli(
        "evaluate", f"dial:{BASE},{plain}", "--task", "miniature", "--limit", 2, "--samples", 1,
        "--lambda", "0,2", "-o", tmp_path / "other",
    )  # fmt: skip
    assert refused.exit_code == 2
    assert "lora:BASE,ADAPTER" in " ".join(refused.stderr.split())
