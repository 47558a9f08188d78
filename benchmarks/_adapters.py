"""What the adapter benchmarks share: training towards a teacher, and measuring in the miniature."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexalign.losses import fused_divergence
from flexalign.miniature import REFERENCE, Question, folder
from flexalign.miniature.build import CONTEXT_TOKENS, encode, make_adapter
from flexalign.miniature.demo import load_pair
from flexalign.miniature.tokenizer import build_tokenizer
from flexalign.miniature.world import Habits, sample_question, sample_trace

Logits = Callable[[Tensor, Tensor], Tensor]

_RANDOM_SEED = 20_000
"""Of adapters that start with random weights."""


@dataclass(frozen=True)
class Variant:
    """One way to make an adapter; `place` counts the layers of the reference before it."""

    name: str
    layers: int = 1
    place: int = 0
    is_random: bool = False


def make(variant: Variant) -> tuple[nn.Module, list[nn.Parameter]]:
    """A stream with fresh adapter layers, and their parameters: all that is trained."""
    if variant.place == 0:
        adapter = make_adapter(folder("reference"), variant.layers)
        stream, layers = adapter.stream, adapter.model.adapter
    else:
        stream, layers = _placed(variant.place)
    parameters = list(layers.parameters())
    if variant.is_random:
        torch.manual_seed(_RANDOM_SEED)
        for parameter in parameters:
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
    return stream, parameters


def _placed(place: int) -> tuple[nn.Module, nn.ModuleList]:
    """The reference with a copy of the layer below `place` above it, made the identity."""
    model = load_pair()[0].requires_grad_(False)
    layers = list(model.model.layers)
    fresh = copy.deepcopy(layers[place - 1])
    nn.init.zeros_(fresh.self_attn.o_proj.weight)
    nn.init.zeros_(fresh.mlp.down_proj.weight)
    layers.insert(place, fresh.requires_grad_(True))
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model, nn.ModuleList([fresh])


def towards(
    student: Logits,
    parameters: Sequence[nn.Parameter],
    reference: Logits,
    aligned: Logits,
    *,
    lam: float = 1.0,
    steps: int,
    learning_rate: float,
    batch_size: int = 24,
    seed: int = 0,
) -> None:
    """Train parameters towards equation 5 over two teachers, on the reference's traces.

    The loss is :func:`flexalign.losses.fused_divergence`, reverse. Its hidden states are the
    logits here and its heads the identity, so any stream can be a student.
    """
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    for ids, mask, counts in _batches(batch_size, steps, seed):
        with torch.no_grad():
            teachers = [model(ids, mask) for model in (reference, aligned)]
        logits = student(ids, mask)
        head = torch.eye(logits.shape[-1])
        loss = fused_divergence(logits, head, teachers[0], head, teachers[1], head, counts, lam)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def plain_logits(model: Any) -> Logits:
    """A model's logits."""
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def stream_logits(stream: nn.Module) -> Logits:
    """A stream's logits."""
    return lambda ids, mask: stream(input_ids=ids, attention_mask=mask).logits


def dial_logits(model: Any, lam: float) -> Logits:
    """A dial's logits at one λ."""
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask, lam=lam).logits


def walked(questions: Sequence[Question], habits: Habits = REFERENCE, seed: int = 1) -> list[Any]:
    """Traces to walk along, one for each question."""
    rng = random.Random(seed)
    return [sample_trace(question, habits, rng) for question in questions]


def _batches(batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids, attention mask, and the mask of positions whose prediction counts."""
    tokenizer = build_tokenizer(CONTEXT_TOKENS)
    rng = random.Random(1_000 + seed)
    for _ in range(steps):
        rows = []
        for _ in range(batch_size):
            question = sample_question(rng)
            rows.append(encode(tokenizer, question.text, sample_trace(question, REFERENCE, rng)))
        width = max(len(asked) + len(answered) for asked, answered in rows)
        ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        counts = torch.zeros(batch_size, width, dtype=torch.bool)
        for row, (asked, answered) in enumerate(rows):
            end = len(asked) + len(answered)
            ids[row, :end] = torch.tensor(asked + answered)
            counts[row, len(asked) - 1 : end - 1] = True
        yield ids, (ids != tokenizer.pad_token_id).long(), counts
