"""Reference, aligned model and student on one base, held once."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor, nn

from flexalign.errors import UnsupportedModelError
from flexalign.models.adapters import inner_model

from .conftest import Modules, lora, lora_state, make_rows
from .test_trainer import assert_same, dense_loss

IDS = torch.arange(10, 30)[None]


def storage_bytes(*models: nn.Module) -> int:
    """Bytes of all parameters, each storage once."""
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for model in models
        for parameter in model.parameters()
    }
    return sum(storages.values())


@pytest.fixture
def shared(
    make_trainer: Callable[..., Any], adapter_folder: tuple[Path, Path]
) -> Callable[..., Any]:
    base, adapter = adapter_folder

    def make(**options: Any) -> Any:
        models = {"reference": str(base), "aligned": str(adapter)}
        return make_trainer(models=models, peft_config=lora(), **options)

    return make


def test_the_base_is_held_once(shared: Callable[..., Any], adapter_folder: Any) -> None:
    trainer = shared()
    objective = trainer.objective
    models = [trainer.model, objective.reference.model, objective.aligned.model]
    base = AutoPeftModelForCausalLM.from_pretrained(adapter_folder[1]).unload()
    adapters = sum(p.nbytes for name, p in trainer.model.named_parameters() if "lora_" in name)
    assert storage_bytes(*models) == storage_bytes(base) + adapters
    assert len({inner_model(model) for model in models}) == 1
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in trainer.model.named_parameters() if ".default." in n}


def test_the_gradient_is_that_of_three_models_apart(
    shared: Callable[..., Any], adapter_folder: tuple[Path, Path]
) -> None:
    trainer = shared(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    student = copy.deepcopy(trainer.model).double()
    aligned = AutoPeftModelForCausalLM.from_pretrained(adapter_folder[1]).double().eval()
    reference = copy.deepcopy(aligned).unload()
    dense_loss(student, reference, aligned, make_rows(), 2.0).backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert expected
    assert all(".default." in name for name in expected)

    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    taken = {n: before[n] - p.detach() for n, p in trainer.model.named_parameters()}
    assert_same({n: taken[n] for n in expected}, expected)


def test_the_teachers_stay_bit_equal_while_the_student_learns(shared: Callable[..., Any]) -> None:
    trainer = shared(
        max_steps=30, learning_rate=2e-2, optim="adamw_torch", lam=1.0, max_grad_norm=1.0
    )
    old = {n: v.clone() for n, v in trainer.model.state_dict().items() if ".default." not in n}
    trainer.train()
    new = trainer.model.state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items())
    log = trainer.state.log_history
    assert log[-2]["divergence"] < 0.5 * log[0]["divergence"]


def test_dropout_of_base_and_adapters_reaches_the_student_alone(
    shared: Callable[..., Any],
) -> None:
    quiet, noisy = shared(lam=0.0), shared(lam=0.0)
    for layer in inner_model(noisy.model).model.layers:
        layer.self_attn.attention_dropout = 0.3
    for trainer in (quiet, noisy):
        trainer.train()
    assert quiet.state.log_history[0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert noisy.state.log_history[0]["divergence"] > 1e-3
    assert noisy.evaluate(quiet.train_dataset)["eval_kl_aligned"] > 1e-3


def test_checkpointed_activations_are_recomputed_with_the_students_adapter(
    shared: Callable[..., Any],
) -> None:
    plain, thrifty = shared(), shared(activation_checkpointing=True)
    for trainer in (plain, thrifty):
        trainer.train()
    expected, found = (lora_state(t.model, "default") for t in (plain, thrifty))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_only_the_student_is_saved(shared: Callable[..., Any], tmp_path: Path) -> None:
    trainer = shared(learning_rate=0.5)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*/"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = trainer.model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected)


def test_a_full_student_beside_a_pair_on_one_base(
    make_trainer: Callable[..., Any], adapter_folder: tuple[Path, Path]
) -> None:
    base, adapter = adapter_folder
    trainer = make_trainer(models={"reference": str(base), "aligned": str(adapter)})
    objective = trainer.objective
    assert objective.reference.model is objective.aligned.model is not trainer.model
    assert not objective.reference.shares_student
    trainer.train()
    aligned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    expected = dense_loss(aligned.unload(), *_pair(adapter), make_rows(), 2.0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def _pair(adapter: Path) -> tuple[nn.Module, nn.Module]:
    aligned = AutoPeftModelForCausalLM.from_pretrained(adapter).double()
    return copy.deepcopy(aligned).unload(), aligned


def test_a_lora_student_lends_its_base_to_the_reference(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    models = {"model": modules.reference, "aligned": modules.aligned}
    trainer = make_trainer(models=models, peft_config=lora())
    objective = trainer.objective
    assert objective.reference.model is trainer.model
    assert inner_model(trainer.model) is modules.reference
    assert not objective.aligned.shares_student
    trainer.train()
    assert trainer.state.log_history[0]["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[0]["kl_aligned"] > 1e-2


def test_an_adapter_folder_is_trained_on(
    make_trainer: Callable[..., Any], adapter_folder: tuple[Path, Path], modules: Modules
) -> None:
    base, adapter = adapter_folder
    models = {"model": str(adapter), "reference": str(base), "aligned": modules.aligned}
    trainer = make_trainer(models=models)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.objective.reference.model is trainer.model
    before = lora_state(trainer.model, "default")
    assert any(value.any() for name, value in before.items() if "lora_B" in name)
    trainer.train()
    after = lora_state(trainer.model, "default")
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["target", "saved"],
)
def test_an_adapter_on_the_head_is_refused(
    make_trainer: Callable[..., Any],
    modules: Modules,
    tiny_model: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    models = {"model": tiny_model(tie_word_embeddings=False), "aligned": modules.aligned}
    with pytest.raises(UnsupportedModelError, match="leave lm_head out"):
        make_trainer(models=models, peft_config=lora(**options))


def test_a_peft_student_of_ones_own(make_trainer: Callable[..., Any], modules: Modules) -> None:
    student = get_peft_model(copy.deepcopy(modules.reference), lora())
    trainer = make_trainer(models={"model": student, **modules._asdict()})
    assert not trainer.objective.reference.shares_student
    first: Tensor = student.state_dict()[next(n for n in student.state_dict() if "lora_B" in n)]
    assert not first.any()
    trainer.train()
    assert first.any()
