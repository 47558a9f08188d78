"""The preallocated cache layer: what a concatenating one holds, without copying it for every token."""

import copy

import pytest
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flexalign.generation.stream_cache import PreallocatedLayer, StreamCache


def states(tokens: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys as attention makes them, a transposed view, and values of another width."""
    keys, values = torch.randn(rows, tokens, 3, 4), torch.randn(rows, 3, tokens, 5)
    return keys.transpose(1, 2), values


def require_equal(preallocated: DynamicLayer, plain: DynamicLayer) -> None:
    assert torch.equal(preallocated.keys, plain.keys)
    assert torch.equal(preallocated.values, plain.values)
    assert preallocated.get_seq_length() == plain.get_seq_length()


@pytest.fixture
def layers() -> tuple[PreallocatedLayer, DynamicLayer]:
    torch.manual_seed(0)
    return PreallocatedLayer(), DynamicLayer()


@torch.no_grad()
def test_it_holds_what_concatenation_holds(layers: tuple[PreallocatedLayer, DynamicLayer]) -> None:
    for tokens in [7, *[1] * 150, 40, 200, 1]:
        new = states(tokens)
        returned = [layer.update(*new) for layer in layers]
        for mine, theirs in zip(*returned, strict=True):
            assert torch.equal(mine, theirs)
        require_equal(*layers)


@torch.no_grad()
def test_a_token_copies_nothing_while_there_is_room(
    layers: tuple[PreallocatedLayer, DynamicLayer],
) -> None:
    layer = layers[0]
    layer.update(*states(9))
    places = set()
    for _ in range(256):
        layer.update(*states(1))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) <= 3


@torch.no_grad()
def test_rows_chosen_cropped_and_copied_go_on_by_themselves(
    layers: tuple[PreallocatedLayer, DynamicLayer],
) -> None:
    new = states(6)
    for layer in layers:
        layer.update(*new)
    others = copy.deepcopy(layers)
    kept = layers[0].keys.clone()
    for first, second in ((layers, others), (others, layers)):
        for step in (states(1), states(2)):
            for layer in first:
                layer.update(*step)
            require_equal(*first)
            require_equal(*second)
    assert torch.equal(layers[0].keys[:, :, :6], kept)
    rows = torch.tensor([1, 1, 0])
    for layer in layers:
        layer.batch_select_indices(rows)
        layer.crop(-2)
    require_equal(*layers)
    for step in (states(1, rows=3), states(3, rows=3)):
        for layer in layers:
            layer.update(*step)
        require_equal(*layers)
    for layer in layers:
        layer.reset()
        layer.update(*new)
    require_equal(*layers)


def test_what_inference_mode_filled_can_be_continued_outside(
    layers: tuple[PreallocatedLayer, DynamicLayer],
) -> None:
    with torch.inference_mode():
        new = states(5)
        for layer in layers:
            layer.update(*new)
    with torch.no_grad():
        step = states(1)
        for layer in layers:
            layer.update(*step)
    require_equal(*layers)


def test_gradients_reach_every_token(layers: tuple[PreallocatedLayer, DynamicLayer]) -> None:
    gradients = []
    first, second = states(3), states(1)
    for layer in layers:
        leaves = [part.detach().clone().requires_grad_() for part in (*first, *second)]
        early, _ = layer.update(*leaves[:2])
        loss = (early**2).sum()
        keys, values = layer.update(*leaves[2:])
        loss = loss + (keys**3).sum() * (values**2).sum()
        loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


def test_full_layers_have_room_and_sliding_ones_keep_their_window() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "sliding_attention"]
    config.sliding_window = 8
    kinds = [type(layer) for layer in StreamCache(config, 1).layers]
    assert kinds == [PreallocatedLayer, DynamicSlidingWindowLayer, PreallocatedLayer]
