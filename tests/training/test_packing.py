from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from families import family_model
from flexalign.errors import UnsupportedModelError
from flexalign.training.packing import packing_leak, require_packable


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "smollm3"])
def test_documents_in_a_row_do_not_see_each_other(family: str) -> None:
    assert packing_leak(family_model(family)) < 1e-5


@pytest.mark.parametrize("family", ["falcon", "opt", "gpt_oss"])
def test_a_family_that_leaks_is_refused_by_role_and_name(family: str) -> None:
    models = {"student": family_model("llama"), "aligned": family_model(family)}
    with pytest.raises(UnsupportedModelError, match=rf"aligned model \(family {family}\).*packing"):
        require_packable(models)


@pytest.mark.parametrize("family", ["bloom", "jamba", "falcon"])
def test_half_precision_hides_no_small_leak(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="packing: false"):
        require_packable({"reference": family_model(family).to(torch.bfloat16)})


def test_a_family_that_cannot_run_packed_rows_is_refused_alike() -> None:
    with pytest.raises(UnsupportedModelError, match=r"qwen3_next\) cannot run packed"):
        require_packable({"reference": family_model("qwen3_next")})


def test_half_precision_has_its_own_rounding(tiny_model: Callable[..., PreTrainedModel]) -> None:
    require_packable({"student": tiny_model().to(torch.bfloat16)})


def test_a_model_with_dropout_is_measured_without(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model(attention_dropout=0.5).train()
    assert packing_leak(model) < 1e-5
    assert model.training
