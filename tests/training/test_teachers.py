from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from flexalign.heads import last_hidden
from flexalign.training.forward import HeadForm
from flexalign.training.models import Teacher, as_teacher

from .conftest import lora, lora_state

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def two_adapters(tiny_model: Callable[..., PreTrainedModel]):
    """A base in train mode with a student ("default") and an aligned adapter, both with effect."""
    model = get_peft_model(tiny_model(attention_dropout=0.5), lora(lora_dropout=0.5))
    model.add_adapter("aligned", lora(r=4, lora_dropout=0.5))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.set_adapter("default")
    return model.train()


def test_each_side_is_the_model_that_it_would_be_alone(
    two_adapters, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    reference = Teacher(two_adapters, (), HeadForm(1.0, None, 300), shares_student=True)
    aligned = Teacher(two_adapters, ("aligned",), HeadForm(1.0, None, 300), shares_student=True)
    assert torch.equal(
        reference.hidden({"input_ids": IDS}), last_hidden(tiny_model(), input_ids=IDS)
    )

    alone = get_peft_model(tiny_model(), lora(r=4)).eval()
    mine, its = lora_state(two_adapters, "aligned"), alone.state_dict()
    alone.load_state_dict(its | {n.replace(".aligned.", ".default."): v for n, v in mine.items()})
    expected = last_hidden(alone, input_ids=IDS)
    torch.testing.assert_close(aligned.hidden({"input_ids": IDS}), expected)
    assert not torch.allclose(expected, reference.hidden({"input_ids": IDS}))


def test_a_teacher_leaves_no_trace(two_adapters) -> None:
    wants_gradient = {name: p.requires_grad for name, p in two_adapters.named_parameters()}
    modes = {name: m.training for name, m in two_adapters.named_modules()}
    torch.manual_seed(7)
    before = last_hidden(two_adapters, input_ids=IDS)  # the student's, with dropout
    torch.manual_seed(7)
    for adapters in ((), ("aligned",), None):
        with as_teacher(two_adapters, adapters):
            assert not any(module.training for module in two_adapters.modules())
        teacher = Teacher(two_adapters, adapters, HeadForm(1.0, None, 300), shares_student=True)
        assert not teacher.hidden({"input_ids": IDS}).requires_grad
    assert torch.equal(
        last_hidden(two_adapters, input_ids=IDS), before
    )  # and the same random state
    assert {name: p.requires_grad for name, p in two_adapters.named_parameters()} == wants_gradient
    assert {name: m.training for name, m in two_adapters.named_modules()} == modes


def test_an_error_inside_puts_everything_back(two_adapters) -> None:
    expected = two_adapters.eval()(input_ids=IDS).logits
    with pytest.raises(RuntimeError, match="stop"), as_teacher(two_adapters.train(), ()):
        raise RuntimeError("stop")
    assert all(module.training for module in two_adapters.modules())
    assert torch.equal(two_adapters.eval()(input_ids=IDS).logits, expected)
