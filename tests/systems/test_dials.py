"""Dials by their folders: what is opened, what is refused, and that a LoRA dial answers alike anywhere."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flexalign.analysis.preview import open_preview
from flexalign.errors import (
    CheckpointError,
    ConfigError,
    LambdaError,
    PairMismatchError,
    UnsupportedModelError,
)
from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaConfig, InRaModel
from flexalign.lambdas import Adaptive, Fixed, Setting
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.miniature import folder as part
from flexalign.systems import LocalBackend, PromptRequest, System, SystemOptions
from flexalign.systems.dials import dial_files, load_dial, read_dial
from lora_folders import BASE, write_dial

QUESTIONS = ["9+3+6?", "4+4+8+2?"]
ASKED: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dial(tmp_path_factory.mktemp("lora") / "dial")


@pytest.fixture
def plain(dial: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(dial, tmp_path / "plain")
    (folder / "lora_dial.json").unlink()
    return folder


def system(folder: Path, base: str = BASE) -> System:
    return System("d", "dial", (base, str(folder)))


def at(*dials: Any) -> list[Setting]:
    return [Setting.of(dial) for dial in dials]


def test_the_kind_is_told_by_the_files(dial: Path, plain: Path) -> None:
    assert isinstance(read_dial("miniature:fast"), InRaConfig)
    settings = read_dial(dial)
    assert isinstance(settings, LoRADialConfig)
    assert (settings.lambda_range, settings.only_ends) == ((0, 5), False)
    other = read_dial(plain)
    assert isinstance(other, LoRADialConfig)
    assert (other.lambda_range, other.only_ends) == ((0, 1), True)
    assert isinstance(load_dial(BASE, "miniature:fast"), InRaModel)
    assert isinstance(load_dial(BASE, dial), LoRADial)
    peft = ["adapter_model.safetensors", "adapter_config.json"]
    assert dial_files(settings, dial) == [*peft, "lora_dial.json"]
    assert dial_files(other, plain) == peft
    inra = read_dial("miniature:fast")
    assert dial_files(inra, part("fast")) == ["inra_adapter.safetensors", "inra_config.json"]


def test_a_folder_that_is_no_dial_or_two(dial: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no dial \(inra_config\.json is missing"):
        read_dial(part("reference"))
    with pytest.raises(CheckpointError, match="whole model; two whole models are pair:REF,ALIGNED"):
        read_dial(part("aligned"))
    both = shutil.copytree(dial, tmp_path / "both")
    shutil.copy(part("fast") / "inra_config.json", both)
    with pytest.raises(CheckpointError, match="keep one of them"):
        read_dial(both)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(dial / "lora_dial.json", alone)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        LocalBackend(system(alone))
    with pytest.raises(ConfigError, match="there is no adapter"):
        LocalBackend(system(tmp_path / "none"))


def test_another_base(dial: Path) -> None:
    with pytest.raises(PairMismatchError, match="--any-base"):
        LocalBackend(system(dial, "miniature:aligned")).load()
    options = SystemOptions(any_base=True)
    assert isinstance(
        LocalBackend(system(dial, "miniature:aligned"), options=options).load(), LoRADial
    )


def test_lambda_outside_the_range(dial: Path, plain: Path) -> None:
    with pytest.raises(LambdaError, match=r"λ=6: outside the range \[0, 5\].*--lambda-range"):
        LocalBackend(system(dial), at(1, 6))
    LocalBackend(system(dial), at(6), SystemOptions(lambda_range=(0, 7)))
    LocalBackend(system(plain), at(0, 1, Adaptive(0.5)))
    for asked in (0.5, 2, {"kind": "linear", "start": 0, "end": 1, "steps": 9}):
        with pytest.raises(LambdaError, match=r"plain LoRA.*--lambda 0:5.*--lambda-range"):
            LocalBackend(system(plain), at(asked))
    LocalBackend(system(plain), at(0.5), SystemOptions(lambda_range=(0, 1)))


def test_a_gate_and_a_preview_are_refused_by_name(dial: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--gate: a LoRA dial takes no gate"):
        LocalBackend(system(dial), options=SystemOptions(gate=0.01))
    LocalBackend(system(Path("miniature:fast")), options=SystemOptions(gate=0.01))
    with pytest.raises(ConfigError, match="no two distributions"):
        open_preview(system(dial), tmp_path / "traces.jsonl")


def test_an_adapter_of_a_changed_base_cannot_be_scaled(plain: Path) -> None:
    file = plain / "adapter_config.json"
    file.write_text(
        file.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"')
    )
    with pytest.raises(UnsupportedModelError, match="pissa"):
        LocalBackend(system(plain))


def test_every_setting_answers_as_the_dial_alone(dial: Path) -> None:
    backend = LocalBackend(system(dial), options=SystemOptions(**ASKED))
    thinking = {"kind": "thinking", "think": 0.5, "answer": 3.0}
    settings = at(0, 1, 3.5, thinking, Adaptive(0.5, fast_lambda=4, slow_lambda=0.5), "route 0.5")
    requests = [
        PromptRequest(number, question, setting, 0, 7 + number)
        for number, question in enumerate(QUESTIONS)
        for setting in settings
    ]
    answers = {
        (request.prompt, request.setting.id): answer
        for block in backend.run(requests)
        for request, answer in block
    }
    assert len(answers) == 12
    model = load_dial(BASE, dial)
    for number, question in enumerate(QUESTIONS):
        for setting in settings[:5]:
            [alone] = generate_responses(
                model,
                backend.text.tokenizer,
                [question],
                seeds=[7 + number],
                lam=[setting.dial],
                **ASKED,
            )
            found = answers[number, setting.id]
            assert (found.text, found.tokens) == (alone.text, alone.tokens)
            assert found.route == alone.route
    assert {answers[n, settings[5].id].route for n in range(2)} <= {"fast", "slow"}
    texts = {answers[0, setting.id].text for setting in settings[:3]}
    assert len(texts) > 1


def test_a_folder_describes_itself(dial: Path, plain: Path) -> None:
    described = LocalBackend(system(dial)).describe()
    assert [entry["name"] for entry in described["parts"]] == [BASE, str(dial)]
    same = LocalBackend(system(plain)).describe()
    assert same["parts"][1]["fingerprint"] == described["parts"][1]["fingerprint"]
    assert LocalBackend(system(dial)).default == Setting.of(Fixed(1.0))


@torch.no_grad()
def test_a_dials_one_is_the_model_that_peft_loads(dial: Path) -> None:
    backend = LocalBackend(System.of(str(dial)), options=SystemOptions(**ASKED))
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(backend.load()(tokens).logits, load_dial(BASE, dial)(tokens).logits)
