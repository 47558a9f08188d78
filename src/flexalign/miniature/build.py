"""Make the miniature's models from a seed: a reference, one aligned from it, a fast adapter.

The reference learns the world's first way of thinking from random weights; the aligned model is
the reference trained on with traces of the second way, as fine-tuning would. ``fast`` is a layer
adapter on the reference, which learns to answer without thinking. ``placebo`` is the control: the
reference trained on with as many traces of *its own* way, so that all its difference from the
reference is noise.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import TrainerCallback

from flexalign.inra import InRaModel
from flexalign.miniature.tokenizer import build_tokenizer
from flexalign.miniature.world import (
    ALIGNED,
    REFERENCE,
    Habits,
    branches,
    sample_question,
    sample_trace,
)

CONTEXT_TOKENS = 1024
_USUAL_TOKENS = 85
_ALTERNATIVES = 3


@dataclass(frozen=True)
class Schooling:
    """How long and how fast a model is taught.

    Attributes:
        habits: The way of thinking to learn.
        steps: Optimizer steps of `batch_size` traces.
        learning_rate: Peak; warm-up over 5 % of the steps, then a cosine to zero.
        batch_size: Traces a step.
        by_length: Whether a batch holds traces of one length. Twice as fast, but batches then
            come in an order, long to short, that leaves the model a little too brief.
        exact: Whether to learn the world's probability of every token, and not only the token
            that the trace drew: no noise of sampling, as if from endless traces.
        traces: How many traces there are, gone through again and again; None for as many as the
            steps ask for, each seen once.
        without_thinking: Whether to learn from right traces with their thinking taken out.
    """

    habits: Habits
    steps: int
    learning_rate: float
    batch_size: int = 32
    by_length: bool = False
    exact: bool = False
    traces: int | None = None
    without_thinking: bool = False


REFERENCE_SCHOOLING = (
    Schooling(REFERENCE, steps=4500, learning_rate=3e-3, by_length=True),
    Schooling(REFERENCE, steps=1600, learning_rate=2e-3, by_length=True, exact=True),
)
ALIGNED_SCHOOLING = Schooling(ALIGNED, steps=800, learning_rate=3e-4)
PLACEBO_SCHOOLING = Schooling(REFERENCE, steps=800, learning_rate=3e-4)
FAST_SCHOOLING = Schooling(
    REFERENCE, steps=300, learning_rate=1e-3, batch_size=48, traces=600, without_thinking=True
)
"""From few traces on purpose. Sums of five numbers fit into one step of this model, so a fast mode
that sees many beats the reference, which errs by nature, and thinking would not pay at all."""


def build_all(output: Path, *, seed: int = 0, placebo: bool = False) -> Iterator[str]:
    """Make every part from a seed, and yield the name of each when its folder is written.

    Args:
        output: Folder for the parts, one folder each.
        seed: Of initial weights and data.
        placebo: Whether to make the control too.
    """
    reference = build_model(seed)
    for index, schooling in enumerate(REFERENCE_SCHOOLING):
        teach(reference, schooling, seed + 10 * index)
    yield _save(reference, output, "reference")

    schoolings = {"aligned": ALIGNED_SCHOOLING} | (
        {"placebo": PLACEBO_SCHOOLING} if placebo else {}
    )
    for index, (part, schooling) in enumerate(schoolings.items(), start=1):
        model = copy.deepcopy(reference)
        teach(model, schooling, seed + index)
        yield _save(model, output, part)

    adapter = make_adapter(output / "reference")
    teach(adapter.stream, FAST_SCHOOLING, seed)
    adapter.save(output / "fast")
    yield "fast"


def make_adapter(reference: Path, layers: int = 1) -> "LayerAdapter":
    """Put a fresh adapter, the identity, on the reference in a folder."""
    return LayerAdapter(InRaModel.create(reference, adapter_layers=layers))


class LayerAdapter:
    """A layer adapter in training.

    Attributes:
        model: The reference with its adapter.
        stream: What is taught: takes ``input_ids`` and ``attention_mask``, and returns an output
            with the adapter stream's ``logits``.
    """

    def __init__(self, model: InRaModel) -> None:
        self.model = model
        self.stream: nn.Module = _AdapterStream(model)

    def save(self, folder: Path) -> None:
        """Write the adapter, its base by its known name and not by where it lies."""
        self.model.inra_config = replace(
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


def build_model(seed: int) -> LlamaForCausalLM:
    """Make an untrained model: 3 layers, width 128, 4 heads of 32; 0.6 million parameters."""
    tokenizer = build_tokenizer(CONTEXT_TOKENS)
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def teach(
    model: nn.Module,
    schooling: Schooling,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
) -> None:
    """Train a model, or an adapter's stream, in place on traces of a way of thinking."""
    tokenizer = build_tokenizer(CONTEXT_TOKENS)
    rows = _Traces(tokenizer, schooling, seed)

    with TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=schooling.steps,
                per_device_train_batch_size=schooling.batch_size,
                learning_rate=schooling.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=schooling.steps // 20,
                adam_beta2=0.95,
                weight_decay=0.01,
                train_sampling_strategy="group_by_length" if schooling.by_length else "random",
                logging_steps=max(1, schooling.steps // 20),
                save_strategy="no",
                report_to="none",
                seed=seed,
                use_cpu=True,
                remove_unused_columns=False,
                disable_tqdm=callbacks is not None,
            ),
            train_dataset=rows,
            data_collator=_collator(tokenizer),
            compute_loss_func=_summed_loss(schooling.batch_size),
            callbacks=callbacks,
        )
        trainer.train()

    model.eval()


def encode(
    tokenizer: PreTrainedTokenizerFast, question: str, trace: list[str]
) -> tuple[list[int], list[int]]:
    """Token ids of a question, as the chat template frames it, and of its trace with its end."""
    asked = tokenizer.convert_tokens_to_ids(["<bos>", *question.split()])
    answered = tokenizer.convert_tokens_to_ids([*trace, "<eos>"])
    return asked, answered


class _Traces(torch.utils.data.Dataset[dict[str, list[Any]]]):
    """Traces; each token with the tokens that might stand there instead."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, schooling: Schooling, seed: int) -> None:
        rng = random.Random(seed)
        self._rows: list[dict[str, list[Any]]] = []
        wanted = schooling.traces or schooling.steps * schooling.batch_size
        while len(self._rows) < wanted:
            question = sample_question(rng)
            trace = sample_trace(question, schooling.habits, rng)
            if schooling.without_thinking:
                if trace[-1] != str(question.answer):
                    continue
                trace = [trace[0], *trace[-2:]]

            asked, answered = encode(tokenizer, question.text, trace)
            targets: list[list[tuple[int, float]]] = [[(token, 1.0)] for token in answered]
            if schooling.exact:
                for branch in branches(question, trace):
                    targets[branch.position] = [
                        (tokenizer.convert_tokens_to_ids(token), probability)
                        for token, probability in branch.distribution(schooling.habits).items()
                    ]

            self._rows.append(
                {
                    "input_ids": (asked + answered)[:CONTEXT_TOKENS],
                    "targets": ([[]] * len(asked) + targets)[:CONTEXT_TOKENS],
                }
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[Any]]:
        return self._rows[index]


def _collator(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[[list[dict[str, list[Any]]]], dict[str, Tensor]]:
    def collate(rows: list[dict[str, list[Any]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        tokens = torch.zeros(len(rows), width, _ALTERNATIVES, dtype=torch.long)
        weights = torch.zeros(len(rows), width, _ALTERNATIVES)

        for index, row in enumerate(rows):
            ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            padded = [
                [*targets, *[(0, 0.0)] * (_ALTERNATIVES - len(targets))]
                for targets in row["targets"]
            ]
            pairs = torch.tensor(padded)
            tokens[index, : len(padded)] = pairs[..., 0].long()
            weights[index, : len(padded)] = pairs[..., 1]

        # The loss reads both; Trainer hands it whatever is called labels.
        return {
            "input_ids": ids,
            "attention_mask": (ids != tokenizer.pad_token_id).long(),
            "labels": torch.cat([tokens.float(), weights], dim=-1),
        }

    return collate


def _summed_loss(batch_size: int) -> Callable[..., Tensor]:
    """Cross-entropy to the targets; every token weighs the same, in whatever batch it stands.

    A mean over each batch's tokens would weigh the tokens of long traces less, because batches
    are grouped by length: `again` then came out at 0.65 instead of 0.70.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        tokens, weights = torch.split(labels[:, 1:], _ALTERNATIVES, dim=-1)
        log_probabilities = torch.log_softmax(outputs.logits[:, :-1], dim=-1)
        total: Tensor = (weights * log_probabilities.gather(-1, tokens.long())).sum()
        return -total / (batch_size * _USUAL_TOKENS)

    return loss


def _save(model: LlamaForCausalLM, output: Path, part: str) -> str:
    """Write a model folder that any program can load: weights, config, tokenizer."""
    model.save_pretrained(output / part)
    build_tokenizer(CONTEXT_TOKENS).save_pretrained(output / part)
    return part
