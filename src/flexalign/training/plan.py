"""The plan of a run, made without loading weights: samples, sizes, steps and memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from flexalign.data import Lengths, split_tokens
from flexalign.errors import ConfigError
from flexalign.models.hub import Downloads
from flexalign.training.memory import Sizes, estimate_memory
from flexalign.training.pair_rows import PairRows

_SAMPLES = 2


@dataclass(frozen=True)
class TrainingPlan:
    """The result of a dry run.

    Attributes:
        facts: The recipe's main keys, the data's lengths, steps, parameters, memory in GiB and
            the state of the output folder, by name; ``downloads`` if there are any.
        samples: The first training rows: ``masked`` is the prompt, and ``trained`` the text whose
            tokens the loss counts; under two prompts ``aligned`` is the aligned side's prompt.
    """

    facts: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]]

    def with_downloads(self, waiting: Downloads) -> "TrainingPlan":
        """Return the plan with the weights that would be downloaded, bytes by repository."""
        if not waiting.sizes:
            return self
        return TrainingPlan({**self.facts, "downloads": waiting.sizes}, self.samples)

    def to_json(self) -> dict[str, Any]:
        """Return facts and samples as one mapping of JSON values."""
        return {**self.facts, "samples": list(self.samples)}


def plan_steps(arguments: Any, lengths: Lengths) -> tuple[dict[str, Any], int]:
    """Return a run's steps, effective batch and epochs, and its longest row in tokens.

    Args:
        arguments: The trainer's settings.
        lengths: The lengths of the data's rows.

    Raises:
        ConfigError: If packing is on and ``max_length`` is not set.
    """
    batch = (
        arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * max(arguments.world_size, 1)
    )

    longest = min(lengths.longest, arguments.max_length or lengths.longest)
    rows = lengths.rows
    if getattr(arguments, "packing", False):
        if arguments.max_length is None:
            raise ConfigError(
                "training.packing fills rows up to training.max_length; give that a number."
            )
        longest = arguments.max_length
        rows = math.ceil((lengths.prompt_tokens + lengths.response_tokens) / longest)

    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(rows / batch) * arguments.num_train_epochs)
    epochs = round(steps * batch / rows, 3)
    return {"steps": steps, "effective_batch": batch, "epochs": epochs}, longest


def plan_memory(
    arguments: Any,
    config: Any,
    sizes: Sizes,
    *,
    tokens: int,
    aligned_parameters: int,
    cached_heads: int | None = None,
    rows_each: int = 1,
) -> dict[str, Any]:
    """Estimate parameters and memory of a run on one device.

    Args:
        arguments: The trainer's settings.
        config: The reference's, or the base's, configuration.
        sizes: Parameters of the student.
        tokens: Length of the longest row.
        aligned_parameters: Parameters of the models in memory besides the student and its base.
        cached_heads: As in `estimate_memory`.
        rows_each: Rows of one forward pass that an example of the data makes; a pair makes two.
    """
    need = estimate_memory(
        config,
        sizes,
        aligned_parameters=aligned_parameters,
        cached_heads=cached_heads,
        rows=rows_each * arguments.per_device_train_batch_size,
        tokens=tokens,
        chunk_size=getattr(arguments, "chunk_size", 256),
        half_precision=bool(arguments.bf16),
        checkpointing=bool(arguments.activation_checkpointing),
    )
    return {"trained_parameters": sizes.trainable, "memory_gib": need.to_gib()}


def sample_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    pair_rows: PairRows | None = None,
) -> list[dict[str, str]]:
    """Return the first training rows as text: prompts, and the tokens that the loss counts."""
    first = rows.select(range(min(_SAMPLES, len(rows))))
    if pair_rows is not None:
        pairs = [pair_rows.row(row, number) for number, row in enumerate(first, start=1)]
        return [
            {
                "masked": tokenizer.decode(pair.reference.prompt.ids),
                "aligned": tokenizer.decode(pair.aligned.ids),
                "trained": tokenizer.decode(pair.kept(max_length)),
            }
            for pair in pairs
        ]

    samples = []
    for prompt, response in split_tokens(first, tokenizer):
        kept = len(response) if max_length is None else max(max_length - len(prompt), 0)
        masked, trained = tokenizer.decode(prompt[:max_length]), tokenizer.decode(response[:kept])
        samples.append({"masked": masked, "trained": trained})
    return samples
