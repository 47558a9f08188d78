"""A probe at the start of a packed run: do documents that share a row see each other?

Packing joins documents in one row and tells them apart by position ids alone. Whether a model's
attention heeds them depends on its family (Falcon, OPT and gpt_oss did not), so it is measured
on the model at hand and not looked up.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from flexalign.errors import UnsupportedModelError
from flexalign.heads import last_hidden
from flexalign.trra.teachers import as_teacher

__all__ = ["packing_leak", "require_packable"]

_DOCUMENT_TOKENS = 12
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_PRECISION_TOLERANCE = 0.05


def packing_leak(model: nn.Module) -> float:
    """Measure how far a document's hidden states move when it shares a row with another.

    Args:
        model: A transformers causal language model, or a PEFT wrapper of one.

    Returns:
        The largest relative difference (norm of the difference over the norm) between two
        documents packed in one row and each of them alone. 0 up to rounding if nothing leaks.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(1, 2 * _DOCUMENT_TOKENS + 1) % _vocab_size(model)
    documents = [document.tolist() for document in tokens.split(_DOCUMENT_TOKENS)]
    with torch.no_grad(), as_teacher(model, None):
        packed = _hidden(model, documents, device)
        alone = torch.cat([_hidden(model, [document], device) for document in documents])
    difference = (packed - alone).view(len(documents), -1).norm(dim=1)
    return float((difference / alone.view(len(documents), -1).norm(dim=1)).max())


def require_packable(models: Mapping[str, nn.Module]) -> None:
    """Refuse packing if any of the models lets packed documents see each other.

    Args:
        models: The models of a run by their role.

    Raises:
        UnsupportedModelError: Naming the role, the family and the size of the leak.
    """
    for role, model in models.items():
        dtype = next(model.parameters()).dtype
        leak = packing_leak(model)
        if not leak <= _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE):
            family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise UnsupportedModelError(
                f"packing: in the {role} model (family {family}) documents that share a row see "
                f"each other (hidden states move by {leak:.1%}); set packing: false (and "
                "padding_free: false)."
            )


def _hidden(model: nn.Module, documents: list[list[int]], device: torch.device) -> Tensor:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": document} for document in documents])
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    return last_hidden(model, **inputs)[0].float()


def _vocab_size(model: nn.Module) -> int:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    return weight.shape[0]
