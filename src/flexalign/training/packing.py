"""A check at the start of a packed run that documents which share a row do not see each other.

Packing joins documents in one row and separates them only by position ids. Whether a model's
attention respects these depends on its family (Falcon, OPT and gpt_oss did not). So it is measured
on the model of the run.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from flexalign.errors import UnsupportedModelError
from flexalign.heads import last_hidden
from flexalign.training.models import as_teacher

_DOCUMENT_TOKENS = 12
_TOLERANCE = 1e-3
_ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""The relative change of hidden states in half precision if only the batch's shape changes."""


def packing_leak(model: nn.Module) -> float:
    """Measure the change of a document's hidden states if it shares a row with another.

    There are two comparisons. In the first, the second of two packed documents is run after two
    different first ones. The shapes are the same, so only a leak changes it. In the second, both
    packed documents are compared with each run alone. This also finds positions that do not restart
    at 0. In half precision, a difference that rounding can explain is ignored.

    Args:
        model: A transformers causal language model, or a PEFT wrapper of one.

    Returns:
        The largest relative difference (norm of the difference over the norm); 0 up to rounding
        if nothing leaks.
    """
    vocab_size = _vocab_size(model)
    first, other, second = (
        [
            (_DOCUMENT_TOKENS * index + token) % vocab_size
            for token in range(1, _DOCUMENT_TOKENS + 1)
        ]
        for index in range(3)
    )

    with torch.no_grad(), as_teacher(model, None):
        packed = _hidden(model, first, second)
        neighbour = _hidden(model, other, second)
        alone = torch.cat([_hidden(model, first), _hidden(model, second)])

    rounding = _ROUNDING.get(next(model.parameters()).dtype, 0.0)
    beside = _relative(neighbour[_DOCUMENT_TOKENS:], packed[_DOCUMENT_TOKENS:])
    apart = max(
        _relative(packed[:_DOCUMENT_TOKENS], alone[:_DOCUMENT_TOKENS]),
        _relative(packed[_DOCUMENT_TOKENS:], alone[_DOCUMENT_TOKENS:]),
    )
    return max(beside, apart if apart > rounding else 0.0)


def require_packable(models: Mapping[str, nn.Module]) -> None:
    """Refuse packing if any of the models lets packed documents see each other.

    Args:
        models: The models of a run by their role.

    Raises:
        UnsupportedModelError: Naming the role, the family and the size of the leak.
    """
    for role, model in models.items():
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        remedy = "set packing: false (and padding_free: false)"

        try:
            leak = packing_leak(model)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"packing: the {role} model (family {family}) cannot run packed documents "
                f"({error}); {remedy}."
            ) from error

        # `not … <=` instead of `>`, so that NaN is refused too.
        if not leak <= _TOLERANCE:
            raise UnsupportedModelError(
                f"packing: in the {role} model (family {family}) documents that share a row see "
                f"each other (hidden states move by {leak:.1%}); {remedy}."
            )


def _hidden(model: nn.Module, *documents: list[int]) -> Tensor:
    device = next(model.parameters()).device
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": document} for document in documents])

    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    return last_hidden(model, **inputs)[0].float()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _vocab_size(model: nn.Module) -> int:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight.shape[0]
