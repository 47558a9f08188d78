"""What the user may name as student, reference and aligned model, and what comes of it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from flexalign.errors import ConfigError, PairMismatchError
from flexalign.models.pair import ModelPair
from flexalign.training.models import TrainingModels, assemble

from .conftest import Modules, lora

IDS = torch.arange(10, 30)[None]


@pytest.fixture
def parts(settings: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., TrainingModels]:
    def make(
        model: Any = None,
        reference: Any = None,
        aligned: Any = None,
        pair: Any = None,
        **options: Any,
    ) -> TrainingModels:
        peft_config = options.pop("peft_config", None)
        tokenizer = options.pop("tokenizer", tiny_tokenizer)
        args = settings(**options)
        return assemble(model, reference, aligned, pair, args, peft_config, tokenizer)

    return make


def hidden(teacher: Any) -> torch.Tensor:
    return teacher.hidden({"input_ids": IDS})


def test_paths_start_the_student_at_the_reference(
    parts: Callable[..., TrainingModels], tiny_pair: Any
) -> None:
    made = parts(reference=tiny_pair.reference, aligned=str(tiny_pair.aligned))
    reference, aligned = (AutoModelForCausalLM.from_pretrained(path) for path in tiny_pair)
    assert torch.equal(made.student(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    assert torch.equal(hidden(made.reference), reference.model(input_ids=IDS)[0])
    assert torch.equal(hidden(made.aligned), aligned.model(input_ids=IDS)[0])
    assert all(parameter.requires_grad for parameter in made.student.parameters())
    assert len(made.models()) == 3


def test_a_path_given_twice_is_the_reference(
    parts: Callable[..., TrainingModels], tiny_pair: Any
) -> None:
    path = tiny_pair.reference
    made = parts(str(path), Path(path), tiny_pair.aligned, peft_config=lora())
    assert made.reference.shares_student
    assert list(made.models()) == ["student", "aligned"]


def test_a_pair_may_take_the_place_of_both(
    parts: Callable[..., TrainingModels], tiny_pair: Any
) -> None:
    pair = ModelPair.load(tiny_pair.reference, tiny_pair.aligned, dtype=torch.bfloat16)
    made = parts(pair=pair)
    assert made.reference.model is pair.reference
    assert {parameter.dtype for parameter in made.student.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="one or the other"):
        parts(reference=tiny_pair.reference, pair=pair)


def test_a_full_student_of_a_pair_on_one_base_has_its_own_weights(
    parts: Callable[..., TrainingModels], adapter_folder: tuple[Path, Path]
) -> None:
    pair = ModelPair.load(*adapter_folder)
    made = parts(pair=pair)
    assert not isinstance(made.student, PeftModel)
    assert all(parameter.requires_grad for parameter in made.student.parameters())
    assert torch.equal(made.student.model(input_ids=IDS)[0], hidden(made.reference))
    assert not torch.allclose(hidden(made.reference), hidden(made.aligned))


def test_an_aligned_adapter_makes_room_for_the_students_name(
    parts: Callable[..., TrainingModels], adapter_folder: tuple[Path, Path], tiny_tokenizer: Any
) -> None:
    base, adapter = adapter_folder
    aligned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    pair = ModelPair.of(aligned.get_base_model(), aligned, tiny_tokenizer)
    expected = pair.hidden("aligned", input_ids=IDS)
    made = parts(pair=pair, peft_config=lora())
    assert made.student is aligned
    assert aligned.active_adapters == ["default"]
    assert made.aligned.adapters == ("aligned",)
    assert torch.equal(hidden(made.aligned), expected)


def test_a_module_and_a_folder_may_be_mixed(
    parts: Callable[..., TrainingModels], adapter_folder: tuple[Path, Path], modules: Modules
) -> None:
    base, adapter = adapter_folder
    made = parts(reference=str(base), aligned=modules.aligned)
    assert made.aligned.model is modules.aligned
    shared = parts(copy.deepcopy(modules.reference), aligned=adapter, peft_config=lora())
    assert list(shared.models()) == ["student"]


def test_modules_need_a_tokenizer(parts: Callable[..., TrainingModels], modules: Modules) -> None:
    with pytest.raises(ConfigError, match="processing_class"):
        parts(**modules._asdict(), tokenizer=None)


def test_a_student_with_other_tokens_is_refused_before_its_weights_are_read(
    parts: Callable[..., TrainingModels], tiny_pair: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        source = tiny_pair.reference / name
        (other / name).write_bytes(source.read_bytes())
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.from_file(str(other / "tokenizer.json")).get_vocab_size() >= 300
    with pytest.raises(PairMismatchError, match="does not fit the reference"):
        parts(str(other), tiny_pair.reference, tiny_pair.aligned)


def test_a_students_adapter_lies_beside_the_aligned_one_on_their_base(
    parts: Callable[..., TrainingModels], adapter_folder: tuple[Path, Path], tmp_path: Path
) -> None:
    base, aligned = adapter_folder
    own = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(r=2))
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    own.save_pretrained(tmp_path / "own")
    made = parts(model=tmp_path / "own", reference=base, aligned=aligned)
    assert set(made.student.peft_config) == {"default", "aligned"}
    one, other = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        for folder in (tmp_path / "own", aligned)
    )
    found = made.student.eval()(input_ids=IDS).logits
    assert torch.allclose(found, one(input_ids=IDS).logits, atol=1e-6)
    expected = other.get_base_model().model(input_ids=IDS)[0]
    assert torch.allclose(hidden(made.aligned), expected, atol=1e-6)
    trained = [name for name, part in made.student.named_parameters() if part.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)


def test_a_peft_student_on_the_reference_itself_lends_it_its_base(
    parts: Callable[..., TrainingModels], modules: Modules
) -> None:
    expected = modules.reference.model(input_ids=IDS)[0]
    student = get_peft_model(modules.reference, lora(init_lora_weights=False))
    made = parts(model=student, reference=modules.reference, aligned=modules.aligned)
    assert made.student is student
    assert made.reference.model is student
    assert torch.equal(hidden(made.reference), expected)
