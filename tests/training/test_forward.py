from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from flexalign.errors import UnsupportedModelError
from flexalign.models.adapters import inner_model
from flexalign.training.forward import (
    HeadForm,
    require_plain_head,
    run_inside,
    run_with_head,
)

IDS = torch.tensor([[5, 6, 7, 8]])


def test_a_function_runs_in_the_place_of_forward_among_the_hooks(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model()
    events: list[str] = []
    model.register_forward_pre_hook(lambda *_: events.append("before"))
    model.register_forward_hook(lambda *_: events.append("after"))

    def function(input_ids: torch.Tensor) -> str:
        events.append(f"inside {tuple(input_ids.shape)}")
        return "result"

    assert run_inside(model, model, function, input_ids=IDS, attention_mask=None) == "result"
    assert events == ["before", "inside (1, 4)", "after"]
    assert "forward" not in vars(model)


def test_the_inside_may_call_the_model_itself(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    expected = model(input_ids=IDS).logits
    found = run_inside(model, model, lambda **inputs: model(**inputs).logits, input_ids=IDS)
    assert torch.equal(found, expected)


def test_a_forward_of_the_instance_comes_back_even_after_an_error() -> None:
    module = nn.Linear(2, 2)
    own = lambda x: x + 1  # noqa: E731
    module.forward = own  # type: ignore[method-assign]

    def fail(x: torch.Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_inside(module, module, fail, torch.zeros(1))
    assert vars(module)["forward"] is own


def test_it_reaches_through_peft(tiny_model: Callable[..., PreTrainedModel]) -> None:
    peft = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    seen: dict[str, Any] = {}
    run_inside(peft, inner_model(peft), lambda **inputs: seen.update(inputs), input_ids=IDS)
    assert list(seen) == ["input_ids"]
    assert torch.equal(seen["input_ids"], IDS)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_that_is_given_is_live_and_cut(
    tiny_model: Callable[..., PreTrainedModel], tied: bool
) -> None:
    model = tiny_model(vocab_size=331, tie_word_embeddings=tied)
    form = HeadForm.of(model, vocab_size=300)
    weight = model.get_output_embeddings().weight
    hidden = torch.randn(2, 3, 64, requires_grad=True)

    logits = run_with_head(model, form, hidden, lambda states, head: head(states))
    torch.testing.assert_close(logits, hidden @ weight[:300].T)
    logits.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:300].abs().min() > 0
    assert not weight.grad[300:].any()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "leave lm_head out"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "leave lm_head out"),
        (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "such as LoRA"),
    ],
)
def test_an_adapter_that_the_loss_would_pass_by_is_refused(
    tiny_model: Callable[..., PreTrainedModel], config: Any, reason: str
) -> None:
    model = get_peft_model(tiny_model(tie_word_embeddings=False), config)
    with pytest.raises(UnsupportedModelError, match=reason):
        require_plain_head(model)


def test_an_adapter_beside_the_head_is_taken(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    require_plain_head(model)
    assert "lm_head" not in {name for name, _ in model.named_parameters() if "lora" in name}
