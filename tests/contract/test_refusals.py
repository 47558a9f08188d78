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
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=f"{family}.*InRa"):
        InRaModel.create(base)
    after = base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    # The last bit of a recurrent model's scan depends on where its tensors lie in memory.
    torch.testing.assert_close(base(tokens).logits, before)
    assert all(parameter.requires_grad for parameter in base.parameters())
