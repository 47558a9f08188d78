"""Decoding with equation 5 over one model under two prompts.

The two prompts are two streams of one model: each row of a batch runs under the reference's prompt,
under the aligned prompt, or under both, and all of them take one pass, which reads each weight once.
The prompts may differ in length. Both are left padded to one width, and each stream has its own
mask, positions and cache rows; the generated tokens are common to both.
"""

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from flexalign.data.rendering import Prompt, end_ids
from flexalign.errors import ConfigError
from flexalign.generation.fused import positions_of
from flexalign.generation.row_lambdas import RowDials, TagTokens
from flexalign.generation.two_prompt_config import TwoPromptConfig
from flexalign.generation.two_streams import TwoStreamModel
from flexalign.lambdas import Adaptive
from flexalign.models.adapters import inner_model
from flexalign.models.loading import load_config, load_model, load_tokenizer
from flexalign.models.prompted import (
    PairRendering,
    PromptPair,
    TwoPrompts,
    context_of,
    require_context,
)
from flexalign.models.sources import Model


class TwoPromptDecoder(TwoStreamModel):
    """One model whose logits are fused from two prompts, for transformers' ``generate``.

    Example::

        prompts = PromptPair(aligned=PromptSettings(system="Answer in one short sentence."))
        decoder = TwoPromptDecoder.from_pretrained("smollm2", prompts)
        inputs = decoder.encode([[{"role": "user", "content": "Why is the sky blue?"}]])
        decoder.generate(**inputs, lam=2.0, gate=0.01, max_new_tokens=200)

    Sampling, beams, several samples of a prompt, stop strings and streaming are transformers'. The
    default λ is 1. A row whose λ is 0 at every token runs under the reference's prompt alone, one
    whose λ is 1 under the aligned prompt alone: it is the plain model under that prompt.

    Attributes:
        base: The model. It is not copied or changed.
        rendering: Renders conversations under both prompts.
        tokenizer: The tokenizer with the reference's template arguments.
        dial_config: The settings with the dial's calibration; None if it has none.
    """

    dial_config: TwoPromptConfig | None = None
    row_inputs = ("aligned_ids", "aligned_mask")

    def __init__(self, base: Any, rendering: PairRendering) -> None:
        """Decode with a model, or with a PEFT wrapper of one.

        Args:
            base: A causal language model of transformers.
            rendering: The two prompts, bound to its tokenizer.

        Raises:
            UnsupportedModelError: If it has no plain head, or a layer caches anything other than
                keys and values.
        """
        super().__init__(inner_model(base), rendering.tokenizers["reference"])
        self.rendering = rendering
        self.new_cache()  # raises if a layer caches anything other than keys and values

        # The model's settings, and the tokens that end a response under either prompt.
        settings: Any = copy.deepcopy(self.base.generation_config)
        ends = end_ids(rendering.tokenizers["reference"], settings.eos_token_id, rendering.stop_ids)
        settings.eos_token_id = ends or None
        if settings.pad_token_id is None:
            settings.pad_token_id = self.tokenizer.pad_token_id if self.tokenizer else None
        self.generation_config = settings

    @classmethod
    def from_pretrained(
        cls, model: Model, prompts: PromptPair, **loading: Any
    ) -> "TwoPromptDecoder":
        """Load a model, and put it under two prompts. The prompts are checked first.

        Args:
            model: A known name or a folder.
            prompts: The prompts of λ = 0 and of λ = 1.
            **loading: Options of :func:`flexalign.models.loading.load_model`.

        Raises:
            ConfigError: If the chat template does not take one of the prompts, or it alone is longer
                than the model's context.
            CheckpointError: If weights are missing or damaged.
            UnsupportedModelError: As in the constructor.
        """
        trusted = bool(loading.get("trust_remote_code", False))
        config = load_config(model, trust_remote_code=trusted)
        tokenizer = load_tokenizer(model, trust_remote_code=trusted)
        rendering = PairRendering(tokenizer, prompts, context=context_of(config))
        return cls(load_model(model, **loading), rendering)

    def encode(self, prompts: Sequence[Prompt | TwoPrompts]) -> dict[str, Tensor]:
        """Return conversations as a batch of both prompts, for ``generate``.

        Args:
            prompts: Messages, or what :meth:`PairRendering.both` returned for them.

        Returns:
            ``input_ids`` and ``attention_mask`` of the reference's prompts, ``aligned_ids`` and
            ``aligned_mask`` of the aligned ones: each ``(B, T)``, left padded to the longest of all.

        Raises:
            DataError: If a prompt cannot be rendered, or is longer than the model's context.
        """
        both = [p if isinstance(p, TwoPrompts) else self.rendering.both(p) for p in prompts]
        pad = self.generation_config.pad_token_id or 0
        return padded_prompts(both, pad, self.base.device)

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Not available: the model is saved by its own ``save_pretrained``, the prompts in no file.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "TwoPromptDecoder.save_pretrained is not available: a folder has no place for two "
            "prompts; save the model with decoder.base.save_pretrained."
        )

    # The second stream: the aligned prompt.

    def _second_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids, mask, positions = (
            inputs.pop(name, None) for name in ("aligned_ids", "aligned_mask", "aligned_positions")
        )
        first = inputs.get("position_ids")
        if positions is None and mask is not None and first is not None:
            positions = positions_of(mask)[:, -first.shape[1] :]
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def _default_dial(self) -> float:
        return 1.0

    def threshold(self, policy: Adaptive) -> float:
        """Return a policy's threshold. If it sets none, the calibrated one, if there is one."""
        settings = self.dial_config
        return super().threshold(policy) if settings is None else settings.threshold(policy)

    # Methods that `generate` calls.

    def generate(
        self, inputs: Tensor | None = None, *, aligned_ids: Tensor | None = None, **options: Any
    ) -> Any:
        """Generate as transformers does, each prompt with its own λ.

        Args:
            inputs: The reference's prompts, shape ``(B, T)``, left padded; or ``input_ids``.
            aligned_ids: The aligned prompts, of the same shape, left padded, as :meth:`encode`
                returns them, with their mask as ``aligned_mask``.
            **options: As in :meth:`flexalign.generation.fused.FusedDecoding.generate`. A thinking
                schedule looks for the opening tag in the reference's prompt.

        Raises:
            LambdaError: If a λ is not finite, or their number is not that of the prompts.
            ConfigError: If the aligned prompts are missing or of another shape, or an option is not
                available.
            DataError: If a prompt is longer than the model's context.
        """
        if inputs is not None:
            options["input_ids"] = inputs
        ids = options.get("input_ids")
        if ids is None or aligned_ids is None or ids.shape != aligned_ids.shape:
            raise ConfigError(
                "generate needs input_ids and aligned_ids, the two prompts of each row left padded "
                "to one width; encode makes them of conversations."
            )
        masks = []
        for name in ("attention_mask", "aligned_mask"):
            given = options.get(name)
            options[name] = torch.ones_like(ids) if given is None else given
            masks.append(options[name])
        context = context_of(self.base.config)
        for reference, aligned in zip(*(mask.sum(1).tolist() for mask in masks), strict=True):
            require_context(reference, aligned, context)
        return super().generate(aligned_ids=aligned_ids, **options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        dials: RowDials,
        dial_rows: Tensor,
        prompt_tokens: int,
        tags: TagTokens | None = None,
        aligned_ids: Tensor | None = None,
        aligned_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of both streams, and each row's λ for the next token."""
        prepared = super().prepare_inputs_for_generation(
            input_ids,
            dials=dials,
            dial_rows=dial_rows,
            prompt_tokens=prompt_tokens,
            tags=tags,
            **kwargs,
        )
        ids = prepared["input_ids"]
        if aligned_ids is None or aligned_mask is None:
            raise ConfigError("generate needs aligned_ids and aligned_mask; encode makes both.")

        # Transformers leaves a mask without padding out, but the other prompt may have padding.
        cache = prepared.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        mask = prepared.get("attention_mask")
        if mask is None:
            mask = torch.ones((len(ids), past + ids.shape[1]), device=ids.device, dtype=torch.long)

        # The columns that run now, of all so far: those of the prompt differ, and those of the
        # response are the same.
        width, columns = aligned_ids.shape[1], mask.shape[1]
        if past < width:
            prompt = aligned_ids[:, past:columns].to(ids.device)
            prepared["aligned_ids"] = torch.cat([prompt, ids[:, prompt.shape[1] :]], 1)
        own = aligned_mask[:, :columns].to(ids.device)
        own = torch.cat([own, own.new_ones((len(own), columns - own.shape[1]))], 1)

        new = slice(columns - ids.shape[1], None)
        return prepared | {
            "attention_mask": mask,
            "aligned_mask": own,
            "position_ids": positions_of(mask)[:, new],
            "aligned_positions": positions_of(own)[:, new],
        }

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("inputs_embeds") is not None:
            raise ConfigError(
                "inputs_embeds is not available for one model under two prompts, which are given "
                "as tokens."
            )
        return super()._decoding_inputs(dials, options)


def padded_prompts(
    prompts: Sequence[TwoPrompts], pad: int, device: torch.device
) -> dict[str, Tensor]:
    """Return rendered prompts as one batch, as :meth:`TwoPromptDecoder.encode` does."""
    width = max(prompt.longest for prompt in prompts)

    def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    input_ids, attention_mask = padded([prompt.reference.ids for prompt in prompts])
    aligned_ids, aligned_mask = padded([prompt.aligned.ids for prompt in prompts])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "aligned_ids": aligned_ids,
        "aligned_mask": aligned_mask,
    }
