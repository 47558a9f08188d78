"""Makes the miniature's models and adapters from a seed.

The reference is trained from random weights on traces with the habits `REFERENCE`. The aligned
model is the reference, fine-tuned on traces with the habits `ALIGNED`. ``fast`` is a layer adapter
on the reference, trained to answer without thinking. ``hybrid`` is one model with both ways of
thinking: the reference's habits by default, the aligned ones under the system message `SYSTEM`.
``dial`` is one LoRA on the reference, whose strength is λ: it learns the pair's fusion for all λ of
a range. ``concise`` is a PEFT adapter on the reference, trained on the habits `CONCISE`: it differs
from the reference in `again` alone. ``placebo`` is the control: the reference, fine-tuned on as many
traces with its *own* habits, so that it differs from the reference only by noise.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from flexalign._storage import following_umask
from flexalign.inra import InRaModel
from flexalign.lora_dial import LoRADial
from flexalign.miniature import make_traces
from flexalign.miniature.tokenizer import build_tokenizer
from flexalign.miniature.world import (
    ALIGNED,
    CONCISE,
    REFERENCE,
    SYSTEM,
    Habits,
    branches,
    sample_question,
    sample_trace,
)
from flexalign.models.loading import load_model
from flexalign.training import realign

CONTEXT_TOKENS = 1024
_USUAL_TOKENS = 85
_ALTERNATIVES = 3


@dataclass(frozen=True)
class Schooling:
    """Options of a model's training.

    Attributes:
        habits: The habits of the traces.
        steps: Optimizer steps of `batch_size` traces.
        learning_rate: Peak learning rate; warm-up over 5 % of the steps, then cosine decay to zero.
        batch_size: Traces in each step.
        by_length: Whether a batch has traces of similar length. It is twice as fast, but the order
            of batches, from long to short, makes the model's traces slightly too short.
        exact: Whether the targets are the world's probabilities of tokens instead of the sampled
            tokens, which removes the noise of sampling.
        traces: Number of different traces, which are used repeatedly; None for a new trace in each
            step and row.
        without_thinking: Whether to train on right traces without their thinking.
        told: The habits of every second trace, whose question comes with the system message
            `SYSTEM`; None for no such traces.
    """

    habits: Habits
    steps: int
    learning_rate: float
    batch_size: int = 32
    by_length: bool = False
    exact: bool = False
    traces: int | None = None
    without_thinking: bool = False
    told: Habits | None = None


REFERENCE_SCHOOLING = (
    Schooling(REFERENCE, steps=4500, learning_rate=3e-3, by_length=True),
    Schooling(REFERENCE, steps=1600, learning_rate=2e-3, by_length=True, exact=True),
)
ALIGNED_SCHOOLING = Schooling(ALIGNED, steps=800, learning_rate=3e-4)
PLACEBO_SCHOOLING = Schooling(REFERENCE, steps=800, learning_rate=3e-4)
HYBRID_SCHOOLING = Schooling(
    REFERENCE, steps=1200, learning_rate=1e-3, by_length=True, exact=True, told=ALIGNED
)
CONCISE_SCHOOLING = Schooling(CONCISE, steps=500, learning_rate=2e-3, by_length=True, exact=True)
CONCISE_LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
FAST_SCHOOLING = Schooling(
    REFERENCE, steps=300, learning_rate=1e-3, batch_size=48, traces=600, without_thinking=True
)
"""Few traces, so that thinking is an advantage: the model can compute a sum of five numbers in one
step, and with many traces the fast mode would be more accurate than the reference, which is trained
to make errors."""

DIAL_STEPS = 700
DIAL_RECIPE: dict[str, Any] = {
    # A little beyond DIAL_RANGE: the end of a range is learnt from one side only, and worst.
    "lambda": {"low": 0, "high": 5.25},
    "gate": 0.01,
    "lora": {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"},
    "training": {
        "learning_rate": 1.5e-3,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 24,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "max_length": 512,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "use_cpu": True,
    },
}
"""The realignment of ``dial``, without its models, steps and seed."""

DIAL_RANGE = (0.0, 5.0)
"""The λ that ``dial`` serves."""


def build_all(output: Path, *, seed: int = 0, placebo: bool = False) -> Iterator[str]:
    """Make all parts from a seed, and yield the name of each one after its folder is written.

    Args:
        output: Folder for the parts, one folder each.
        seed: Seed of initial weights and data.
        placebo: Whether to make the control too.
    """
    reference = build_model(seed)
    for index, schooling in enumerate(REFERENCE_SCHOOLING):
        teach(reference, schooling, seed + 10 * index)
    yield save_part(reference, output, "reference")

    schoolings = {"aligned": ALIGNED_SCHOOLING} | (
        {"placebo": PLACEBO_SCHOOLING} if placebo else {}
    )
    for index, (part, schooling) in enumerate(schoolings.items(), start=1):
        model = copy.deepcopy(reference)
        teach(model, schooling, seed + index)
        yield save_part(model, output, part)

    adapter = make_adapter(output / "reference")
    teach(adapter.stream, FAST_SCHOOLING, seed)
    adapter.save(output / "fast")
    yield "fast"

    hybrid = copy.deepcopy(reference)
    teach(hybrid, HYBRID_SCHOOLING, seed + 3)
    yield save_part(hybrid, output, "hybrid")

    make_dial(output, seed=seed)
    yield "dial"

    make_concise(output, seed=seed)
    yield "concise"


def make_dial(parts: Path, *, seed: int) -> None:
    """Train the LoRA dial of a reference and an aligned model, and write it beside them.

    Args:
        parts: The folder of the parts; it has ``reference`` and ``aligned``, and gets ``dial``.
        seed: Seed of the traces, of the LoRA's initial weights and of the draws of λ.
    """
    batch_size = DIAL_RECIPE["training"]["per_device_train_batch_size"]
    rows = make_traces(DIAL_STEPS * batch_size, seed + 4)
    training = DIAL_RECIPE["training"] | {
        "max_steps": DIAL_STEPS,
        "warmup_steps": DIAL_STEPS // 10,
        "seed": seed,
    }
    with TemporaryDirectory() as scratch:
        realign(
            DIAL_RECIPE
            | {
                "reference": str(parts / "reference"),
                "aligned": str(parts / "aligned"),
                "data": "miniature",
                "output": f"{scratch}/dial",
                "training": training,
            },
            data=Dataset.from_list(sorted_by_length(rows, batch_size, seed)),
        )
        dial = LoRADial.from_pretrained(parts / "reference", f"{scratch}/dial")

    # The folder names its base by its known name instead of a path.
    name = "miniature:reference"
    dial.dial_config = replace(dial.dial_config, base=name, lambda_range=DIAL_RANGE)
    dial.peft.peft_config["default"].base_model_name_or_path = name
    dial.save_pretrained(parts / "dial")
    (parts / "dial" / "README.md").unlink()


def make_concise(parts: Path, *, seed: int) -> None:
    """Train the LoRA that makes the reference concise, and write it beside the reference.

    Args:
        parts: The folder of the parts; it has ``reference``, and gets ``concise``.
        seed: Seed of the traces and of the LoRA's initial weights.
    """
    reference = load_model(str(parts / "reference"))
    set_seed(seed + 5)
    model = get_peft_model(reference, LoraConfig(task_type="CAUSAL_LM", **CONCISE_LORA))
    teach(model, CONCISE_SCHOOLING, seed + 5)

    model.peft_config["default"].base_model_name_or_path = "miniature:reference"
    with following_umask(parts / "concise"):
        # PEFT looks for a changed vocabulary at the base's name, which is no folder.
        model.save_pretrained(parts / "concise", save_embedding_layers=False)
    (parts / "concise" / "README.md").unlink()


def sorted_by_length(
    rows: list[dict[str, Any]], batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """Return traces in an order in which each batch has traces of similar length.

    A batch is padded to its longest trace, so this halves the work of a training that takes its
    rows in order. The batches themselves follow each other at random.

    Args:
        rows: The traces, as `make_traces` returns them.
        batch_size: Traces in each batch.
        seed: Seed of the order of the batches.
    """
    ordered = sorted(rows, key=lambda row: len(row["completion"][0]["content"].split()))
    batches = [ordered[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    random.Random(seed).shuffle(batches)
    return [row for batch in batches for row in batch]


def make_adapter(reference: Path, layers: int = 1) -> "LayerAdapter":
    """Load the reference from a folder with a new adapter, which is initially the identity."""
    return LayerAdapter(InRaModel.create(reference, adapter_layers=layers))


class LayerAdapter:
    """A layer adapter in training.

    Attributes:
        model: The reference with its adapter.
        stream: The module to train: takes ``input_ids`` and ``attention_mask``, and returns an
            output with the adapter stream's ``logits``.
    """

    def __init__(self, model: InRaModel) -> None:
        self.model = model
        self.stream: nn.Module = _AdapterStream(model)

    def save(self, folder: Path) -> None:
        """Write the adapter, with the known name of its base instead of a path."""
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
    """Make an untrained model of 0.6 million parameters: 3 layers, width 128, 4 heads of size 32."""
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
    """Train a model, or an adapter's stream, in place on sampled traces.

    Args:
        model: The module to train.
        schooling: Options of the training.
        seed: Seed of the traces and of their order.
        callbacks: Callbacks of the trainer; if given, there is no progress bar.
    """
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
        show_progress_alone(trainer)
        trainer.train()

    model.eval()


class _Bar(ProgressCallback):  # type: ignore[misc]
    """The progress bar, on standard error, without the logs, which go to standard output."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Write nothing."""


def show_progress_alone(trainer: Trainer) -> None:
    """Leave of what a trainer prints its progress bar, if it has one."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Bar)


def encode(
    tokenizer: PreTrainedTokenizerFast, question: str, trace: list[str], system: str = ""
) -> tuple[list[int], list[int]]:
    """Return the token ids of a question in the chat template, and of its trace with ``<eos>``."""
    asked = tokenizer.convert_tokens_to_ids(["<bos>", *system.split(), *question.split()])
    answered = tokenizer.convert_tokens_to_ids([*trace, "<eos>"])
    return asked, answered


class _Traces(torch.utils.data.Dataset[dict[str, list[Any]]]):
    """Traces, with the possible tokens and their probabilities at each position as targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, schooling: Schooling, seed: int) -> None:
        rng = random.Random(seed)
        self._rows: list[dict[str, list[Any]]] = []
        wanted = schooling.traces or schooling.steps * schooling.batch_size
        while len(self._rows) < wanted:
            question = sample_question(rng)
            told = schooling.told if len(self._rows) % 2 else None
            habits = told or schooling.habits
            trace = sample_trace(question, habits, rng)
            if schooling.without_thinking:
                if trace[-1] != str(question.answer):
                    continue
                trace = [trace[0], *trace[-2:]]

            asked, answered = encode(tokenizer, question.text, trace, SYSTEM if told else "")
            targets: list[list[tuple[int, float]]] = [[(token, 1.0)] for token in answered]
            if schooling.exact:
                for branch in branches(question, trace):
                    targets[branch.position] = [
                        (tokenizer.convert_tokens_to_ids(token), probability)
                        for token, probability in branch.distribution(habits).items()
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

        # Trainer only passes `labels` to the loss, so tokens and weights are joined there.
        return {
            "input_ids": ids,
            "attention_mask": (ids != tokenizer.pad_token_id).long(),
            "labels": torch.cat([tokens.float(), weights], dim=-1),
        }

    return collate


def _summed_loss(batch_size: int) -> Callable[..., Tensor]:
    """Return the cross-entropy loss to the targets; all tokens have the same weight.

    A mean over each batch's tokens would give the tokens of long traces less weight, because
    batches are grouped by length: the trained model then had `again` = 0.65 instead of 0.70.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        tokens, weights = torch.split(labels[:, 1:], _ALTERNATIVES, dim=-1)
        log_probabilities = torch.log_softmax(outputs.logits[:, :-1], dim=-1)
        total: Tensor = (weights * log_probabilities.gather(-1, tokens.long())).sum()
        return -total / (batch_size * _USUAL_TOKENS)

    return loss


def save_part(model: PreTrainedModel, output: Path, part: str) -> str:
    """Write a transformers model folder (weights, config, tokenizer), and return the part's name."""
    with following_umask(output / part):
        model.save_pretrained(output / part)
    build_tokenizer(CONTEXT_TOKENS).save_pretrained(output / part)
    return part
