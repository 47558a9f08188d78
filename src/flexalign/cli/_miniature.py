"""The adapter that ``flexalign miniature build`` trains: a layer adapter on the reference."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexalign.inra import InRaModel


def make_adapter(reference: Path, layers: int = 1) -> "LayerAdapter":
    """Put a fresh adapter, the identity, on the reference in a folder."""
    return LayerAdapter(InRaModel.create(reference, adapter_layers=layers))


class LayerAdapter:
    """A layer adapter in training, as :class:`flexalign.miniature.build.Adapter` asks."""

    def __init__(self, model: InRaModel) -> None:
        self.model = model
        self.stream: nn.Module = _AdapterStream(model)

    def save(self, folder: Path) -> None:
        """Write the adapter, its base by its known name and not by where it lies."""
        self.model.inra_config = dataclasses.replace(
            self.model.inra_config,
            base="miniature:reference",
            thinking_tags=("<think>", "</think>"),
        )
        self.model.save_pretrained(folder)


class _AdapterStream(nn.Module):
    """The adapter stream alone, λ = 1."""

    def __init__(self, model: InRaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, lam=1.0)
