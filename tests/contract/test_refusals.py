"""Families that two streams cannot serve are refused before any work, and left as they were."""

import pytest
import torch

from contract.subjects import REFUSED, make_base
from flexalign.errors import UnsupportedModelError
from flexalign.inra import InRaModel


@pytest.mark.parametrize("family", REFUSED)
@torch.no_grad()
def test_refused_by_the_probe(family: str) -> None:
    base = make_base(family)
    tokens = torch.arange(3, 12)[None]
    before = base(tokens).logits
    with pytest.raises(UnsupportedModelError, match=f"{family}.*InRa"):
        InRaModel.create(base)
    assert torch.equal(base(tokens).logits, before)
    assert all(parameter.requires_grad for parameter in base.parameters())
