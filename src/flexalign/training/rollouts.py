"""On-policy TrRa: batches whose responses the student samples during training.

The choice of sampled batches and all sampling depend only on the seed, the step and the batch's
index in the step. So a resumed run samples the same as one that was not stopped. All processes
sample the same batches, each its own rows, because sharded models can only run on all processes.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from flexalign._modes import evaluating
from flexalign.errors import DataError
from flexalign.generation.responses import generation_settings, left_padded
from flexalign.training.draws import LAMBDAS, RowLambdas
from flexalign.training.pair_rows import ALIGNED_PROMPT, prompt_lengths
from flexalign.training.rows import RenderedRows

_SAMPLED = "sampled"
"""The key that marks a batch with responses of the student."""
_IGNORED = -100


class Rollouts(RowLambdas, RenderedRows, SFTTrainer):  # type: ignore[misc]
    """A trainer in which the student samples the responses of a share of the batches.

    Where each row has a λ of its own, the student samples at it.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return a step's batches, some with sampled responses, and their number of tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.args.rollouts:
            return batches, num_items
        for index, batch in enumerate(batches):
            draw = random.Random(f"{self.args.seed} {self.state.global_step} {index}")
            if draw.random() < self.args.rollouts:
                batches[index] = self._with_samples(batch, draw.getrandbits(62))
        return batches, self._get_num_items_in_batch(batches, device)

    def take_sampled(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Remove the mark of a sampled batch; return the objective's arguments for it.

        Returns:
            ``sampled``, the token that follows each position, shape (B, T − 1), if the batch was
            sampled and the objective is not ``token``; else an empty mapping.
        """
        if not inputs.pop(_SAMPLED, False) or self.args.rollout_objective == "token":
            return {}
        return {"sampled": inputs["input_ids"][:, 1:]}

    def _with_samples(self, batch: dict[str, Any], seed: int) -> dict[str, Any]:
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        # Not TRL's unwrap_model_for_generation: it switches checkpointing off and on with a
        # deprecated method. In evaluation mode checkpointing has no effect.
        student = self.accelerator.unwrap_model(self.model_wrapped)
        with (
            evaluating(student),
            self.at_lambda(batch.get(LAMBDAS)),
            torch.random.fork_rng(devices),
            self.accelerator.autocast(),
        ):
            torch.manual_seed(seed + self.accelerator.process_index)
            sampled = sample_responses(
                student,
                self.processing_class,
                batch,
                max_length=self.args.max_length,
                max_new_tokens=self.args.rollout_max_new_tokens,
                synced_gpus=True if self.is_fsdp_enabled else None,
            )
        # The student is asked under the reference's prompt, which is the batch's own. The teachers
        # score the sample, each after its own prompt.
        kept = {name: batch[name] for name in (LAMBDAS, ALIGNED_PROMPT) if name in batch}
        return sampled | kept | {_SAMPLED: True}


@torch.no_grad()
def sample_responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Any],
    *,
    max_length: int | None,
    max_new_tokens: int | None,
    **options: Any,
) -> dict[str, Tensor]:
    """Replace the last response of every row of a batch by a sample from the model.

    Sampling is from the model's own distribution: temperature 1, without top-p or top-k. A row
    without a response token (its prompt reaches the cut-off) still has none afterwards. If the batch
    has the aligned side's prompts, the longer of a row's two prompts decides the room.

    Args:
        model: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, all (B, T), padded; perhaps
            `ALIGNED_PROMPT`.
        max_length: Tokens of a row at most; None: no limit.
        max_new_tokens: Tokens of a response at most; None: as many as `max_length` leaves.
        **options: More for ``generate``.

    Returns:
        A batch of the same kind, padded on the right: prompts, samples with their end token, and
        labels only at the tokens of the samples.

    Raises:
        DataError: If a row has no prompt.
    """
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
    others = prompt_lengths(batch[ALIGNED_PROMPT]).tolist() if ALIGNED_PROMPT in batch else None
    prompts, rooms = [], []
    for number, (ids, attended, labels) in enumerate(rows):
        prompt, is_answered = _split_off_prompt(ids[attended], labels[attended] != _IGNORED)
        prompts.append(prompt)
        longer = len(prompt) if others is None else max(len(prompt), others[number])
        rooms.append(_room(longer, max_length, max_new_tokens) if is_answered else 0)

    settings = generation_settings(model, tokenizer, max(1, *rooms), 1.0, 1.0, {})
    inputs = left_padded(prompts, settings.pad_token_id, batch["input_ids"].device)
    written = model.generate(**inputs, generation_config=settings, **options)
    written = written[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(settings.eos_token_id, device=written.device)
    responses = [
        _until_end(response[:room], ends) for response, room in zip(written, rooms, strict=True)
    ]

    asked = [written.new_tensor(prompt) for prompt in prompts]
    whole = [torch.cat(parts) for parts in zip(asked, responses, strict=True)]
    labels = [
        torch.cat([torch.full_like(prompt, _IGNORED), response])
        for prompt, response in zip(asked, responses, strict=True)
    ]
    return {
        "input_ids": pad_sequence(whole, True, settings.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in whole], True, 0),
        "labels": pad_sequence(labels, True, _IGNORED),
    }


def _split_off_prompt(ids: Tensor, trained: Tensor) -> tuple[list[int], bool]:
    """Return the tokens before a row's last response, and whether the row has a response.

    For a row without a response the prompt is its first token. A response is generated for it too,
    so that all processes run the model equally often, and is discarded.
    """
    places = trained.nonzero()
    if not len(places):
        return ids[:1].tolist(), False
    before = (~trained[: int(places[-1])]).nonzero()
    if not len(before):
        raise DataError(
            "rollouts answer prompts, and a row of the data has none: every token of it is trained "
            "on; give rows with a prompt and a completion, or set assistant_only_loss."
        )
    return ids[: int(before[-1]) + 1].tolist(), True


def _room(prompt_tokens: int, max_length: int | None, max_new_tokens: int | None) -> int:
    limits = [max_new_tokens, None if max_length is None else max_length - prompt_tokens]
    return min(limit for limit in limits if limit is not None)


def _until_end(response: Tensor, ends: Tensor) -> Tensor:
    """Return a response up to its first end token, inclusive."""
    found = torch.isin(response, ends).nonzero()
    return response[: int(found[0]) + 1] if len(found) else response
