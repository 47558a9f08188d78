"""The LoRA dial: a base model with one LoRA, whose strength is each row's λ."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from flexalign._modes import evaluating
from flexalign._storage import following_umask
from flexalign.errors import (
    CheckpointError,
    ConfigError,
    LambdaError,
    UnsupportedModelError,
)
from flexalign.fusion import Lambda
from flexalign.generation.adapted import AdaptedModel, Base, load_own_base, model_name
from flexalign.generation.fused import forward_inputs, positions_of, taken_inputs
from flexalign.generation.inherited import refuse_inner_outputs
from flexalign.generation.interface import Phase
from flexalign.generation.probing import distance_beyond_rounding, perturbed
from flexalign.generation.row_lambdas import RowDials
from flexalign.lambdas import finite_lambda
from flexalign.lora_dial.configuration import LoRADialConfig, check_folder
from flexalign.lora_dial.projections import LoRAProjections
from flexalign.models.adapters import make_bases_absolute, read_adapter_config, unfit_tensor
from flexalign.models.loading import load_adapter
from flexalign.models.sources import Source, resolve_adapter
from flexalign.models.weights import tensor_infos

ADAPTER = "default"
"""The name of the LoRA in the PEFT model."""

GATE_REFUSED = (
    "a LoRA dial takes no gate: what it was trained with is in its weights, and no second "
    "distribution is there to compare with; leave the gate out."
)


class LoRADial(AdaptedModel):
    """A base model with one LoRA, whose strength is λ: one stream and one cache for every λ.

    λ = 0 is the base exactly, and λ = 1 in all rows PEFT's own forward. Between and beyond,
    :mod:`~flexalign.lora_dial.projections` takes PEFT's products together. Rows of one batch may
    have different λ. A cache holds each key and value as the λ of its token made it:
    a prompt is read at the λ of the first token after it, so a prefilled prompt is shared only
    between equal λ. Where λ changes inside a sequence (a schedule, ``(B, T)``, or a cache that is
    continued at another λ), the tokens before the change are not run again; the result is then
    close to equation 5 and not the student of either λ (docs/lora-dial.md says how close).

    Attributes that this class does not have (``config``, ``device``, …) are the base's.

    Example:
        >>> dial = LoRADial.from_pretrained("models/base", "out/dial")        # doctest: +SKIP
        >>> dial.generate(**tokenizer(prompts), lam=[0.0, 0.5, 3.0])          # doctest: +SKIP

    Attributes:
        base: The base model with the LoRA in its layers.
        peft: PEFT's wrapper of it.
        projections: The LoRA's layers at inference, where λ reaches them.
        scale: The strength of the LoRA on PEFT's own layers, with gradients for instance.
        dial_config: The dial's settings.
        tokenizer: The base's tokenizer; None if it is not known.
    """

    dial_config: LoRADialConfig

    def __init__(
        self,
        model: PeftModel,
        dial_config: LoRADialConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Make a dial of a PEFT model with one LoRA. See also :meth:`from_pretrained`.

        Raises:
            ConfigError: If the LoRA is merged.
            UnsupportedModelError: If the LoRA's effect is not linear in its strength, a layer is
                not a plain linear one, or rows of one batch disturb each other.
        """
        super().__init__(model.get_base_model(), dial_config, tokenizer)
        self.peft = model
        self.projections = LoRAProjections(model, ADAPTER)
        self.scale = self.projections.scale
        self._takes = forward_inputs(self.base)
        probe_rows(self, model_name(self.base))

    @classmethod
    def from_pretrained(
        cls, base: Base, folder: str | Path, *, any_base: bool = False, **loading: Any
    ) -> "LoRADial":
        """Load a dial's folder onto its base, frozen and in evaluation mode.

        Args:
            base: A known name, a folder, or a loaded model, which gets the LoRA's layers.
            folder: The dial's folder or known name; or that of a plain PEFT LoRA, which is a dial
                between λ = 0 and λ = 1.
            any_base: Accept another base than the dial was made for, if the shapes fit.
            **loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

        Raises:
            CheckpointError: If the dial's files are missing, truncated or corrupt, or do not fit
                the base.
            PairMismatchError: If the dial was made for another base.
            UnsupportedModelError: As for :class:`LoRADial`.
        """
        path = resolve_adapter(folder)
        settings = check_folder(path)
        model, tokenizer = load_own_base(base, settings, path, any_base=any_base, loading=loading)

        source = Source(str(folder), path)
        unfit = unfit_tensor(model.config, read_adapter_config(source), tensor_infos(path))
        if unfit is not None:
            raise CheckpointError(f"{folder} does not fit this base: {unfit}.")
        wrapper = load_adapter(model, source, name=ADAPTER)
        dial = cls(wrapper, settings, tokenizer)
        dial.requires_grad_(False).eval()
        return dial

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save the LoRA as PEFT does, and its settings beside it; the base is not saved."""
        path = Path(folder)
        # With "auto", PEFT asks a hub for the base's configuration.
        make_bases_absolute(self.peft)
        with following_umask(path):
            self.peft.save_pretrained(path, save_embedding_layers=False)
        self.dial_config.save(path)

    @torch.no_grad()
    def merged(self, lam: float) -> PreTrainedModel:
        """Return a copy of the base with the LoRA at strength λ in its weights.

        It is a plain model, without PEFT, and equals the dial at this λ up to the rounding of
        ``W + λ·s·B·A`` to the weights' data type. The dial stays as it is, so that both are in
        memory; :meth:`merge` keeps a second time only the weights that the LoRA adapts.

        Raises:
            LambdaError: If λ is not finite.
        """
        lam = finite_lambda(lam, "λ")
        self.scale.set(None)
        twin: Any = copy.deepcopy(self.peft)
        layers = [twin.get_submodule(name) for name in self.scale.layers]
        for layer in layers:
            layer.scaling[ADAPTER] *= lam
        plain: PreTrainedModel = twin.unload() if lam == 0 else twin.merge_and_unload()
        return plain.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        lam: Any = None,
        gate: float | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        lam_checked: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the logits of a batch, each row (or token) at its λ.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, T_cached + T)`` with a cache.
            position_ids: As the base takes them.
            past_key_values: The cache of an earlier call, of whatever λ.
            inputs_embeds: Embeddings instead of ``input_ids``, shape ``(B, T, H)``.
            use_cache: Keep keys and values; by default only if a cache is given.
            logits_to_keep: As in transformers: a number of last positions (0 for all), or their
                indices.
            lam: A number, a list, ``(B,)`` or ``(B, T)``; the dial's default if not given.
            gate: Must be None.
            labels: Shape ``(B, T)``, −100 where nothing is counted, for the loss.
            return_dict: False for a tuple.
            lam_checked: λ has been checked already, as ``generate`` does before the first token.
            **kwargs: Other arguments of the base.

        Returns:
            ``logits`` of shape ``(B, T, V)``, or ``(B, kept, V)``, ``past_key_values``, and the loss
            if there are labels.

        Raises:
            LambdaError: If λ is not finite or does not fit the batch.
            ConfigError: If a gate is given, or an output that this model does not return.
        """
        if gate is not None:
            raise ConfigError(GATE_REFUSED)
        refuse_inner_outputs(kwargs, self.base.config)
        prompts = input_ids if input_ids is not None else inputs_embeds
        if prompts is None:
            raise ConfigError("forward needs input_ids or inputs_embeds.")
        if not lam_checked:
            lam = self._checked_lambda(lam)
            _require_shape(lam, *prompts.shape[:2])

        keeps = past_key_values is not None if use_cache is None else use_cache
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        kwargs |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        kwargs |= {"use_cache": keeps, "return_dict": True}
        given = {name: value for name, value in kwargs.items() if value is not None}

        with self.projections.at(lam, *prompts.shape[:2]):
            output = self.base(**taken_inputs(given, self._takes))

        logits = output.logits
        if "logits_to_keep" not in self._takes:
            kept: Any = logits_to_keep
            logits = logits[:, slice(-kept, None) if isinstance(kept, int) else kept]
        # Backward runs a checkpointed forward again, so λ must still be there.
        if torch.is_grad_enabled() and self.training and self.base.is_activation_checkpointing:
            self.scale.set(lam)
        cache = getattr(output, "past_key_values", None)
        return self.fused_output(logits, cache, labels, return_dict)

    def merge(self, lam: float | None) -> None:
        """Keep the LoRA's layers a second time, with the LoRA at one λ in their weights.

        Where all rows of a batch have this λ, a step then takes as long as the base's. All other λ
        work as before, λ = 0 exactly too, because the base's weights do not change. It takes as
        much memory as the weights that the LoRA adapts, and is never done by itself, since requests
        mix λ. :meth:`merged` returns a plain model instead.

        Args:
            lam: λ, or None to free the copy.

        Raises:
            LambdaError: If λ is not finite.
        """
        self.projections.merge(lam)

    # Generation: caches, and sweeps of λ.

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        lam: Any = None,
        policy: Any = None,
        gate: float | None = None,
        **options: Any,
    ) -> Any:
        """Generate as transformers does, each prompt at its own λ.

        Args:
            inputs: Prompts, shape ``(B, T)``, left padded; or ``input_ids`` among the options.
            lam: As in :meth:`flexalign.generation.fused.FusedDecoding.generate`. The prompt is read
                at the λ of the first generated token.
            policy: The same as ``lam``.
            gate: Must be None.
            **options: The options of transformers' ``generate``, with the same exceptions.

        Raises:
            LambdaError: If a λ is not finite, or their number is not that of the prompts.
            ConfigError: If an option is not available here, or a gate is given.
        """
        if gate is not None:
            raise ConfigError(GATE_REFUSED)
        return super().generate(inputs, lam=lam, policy=policy, **options)

    @torch.no_grad()
    def prefill_phases(
        self, input_ids: Tensor, attention_mask: Tensor, phases: Sequence[Phase], **_: Tensor
    ) -> "PrefilledRows | None":
        """Run prompts, ``(B, T)``, once for each λ that they continue at.

        Returns:
            Their cache; None if the base keeps more than keys and values, which cannot be copied.
        """
        keys = [
            key
            for rows, dials in phases
            for key in zip(rows.tolist(), dials.first.tolist(), strict=True)
        ]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}

        rows = torch.tensor([row for row, _ in places], device=input_ids.device)
        lam = torch.tensor([lam for _, lam in places], dtype=torch.float64)
        mask = attention_mask[rows]
        cache = self.forward(
            input_ids[rows],
            mask,
            positions_of(mask),
            use_cache=True,
            logits_to_keep=1,
            lam=lam,
            lam_checked=True,
        ).past_key_values
        layers = getattr(cache, "layers", None)
        if not layers or any(isinstance(one, LinearAttentionCacheLayerMixin) for one in layers):
            return None
        return PrefilledRows(cache, places)

    def fork_cache(self, cache: "PrefilledRows", rows: Tensor, dials: RowDials) -> Any:
        """Return a new cache of some rows, each as its λ made it.

        Raises:
            ConfigError: If a row was not prefilled at its λ.
        """
        return cache.fork(zip(rows.tolist(), dials.first.tolist(), strict=True))

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        """Adapt the cache of an earlier call, if there is one, to the rows of this one."""
        self._note_range(dials.least, dials.largest)
        cache, ids = options.get("past_key_values"), options.get("input_ids")
        if cache is None:
            return {}

        past = cache.get_seq_length()
        if ids is None or ids.shape[1] <= past:
            raise ConfigError(
                f"the cache holds {past} tokens; give generate input_ids that begin with them, and "
                "at least one token more."
            )
        repeats = self._repeats(options)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return {}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Create the cache that the base's own ``generate`` would: its family decides."""
        return self.base._prepare_cache_for_generation(*args, **kwargs)


def _require_shape(lam: Lambda, rows: int, tokens: int) -> None:
    """Refuse λ of a forward that is neither one number, nor one per row, nor one per row and token.

    Raises:
        LambdaError: If it is of another shape.
    """
    if not isinstance(lam, Tensor) or lam.numel() == 1 or lam.shape in ((rows,), (rows, tokens)):
        return
    if lam.ndim == 1:
        raise LambdaError(
            f"{len(lam)} λ for {rows} rows; give one number, or one for each row, or one for each "
            "row and token."
        )
    raise LambdaError(
        f"λ of shape {tuple(lam.shape)} does not fit {rows} rows of {tokens} tokens; give one "
        f"number, ({rows},), or ({rows}, {tokens})."
    )


@dataclass(frozen=True)
class PrefilledRows:
    """The cache of prompts that were run at one or several λ each.

    Attributes:
        cache: The cache of transformers.
        places: The row of the cache, by the prompt's row and its λ.
    """

    cache: Any
    places: dict[tuple[int, float], int]

    def fork(self, keys: Any) -> Any:
        """Return a copy of the rows of these prompts at these λ.

        Raises:
            ConfigError: If a prompt was not run at its λ.
        """
        wanted = list(keys)
        missing = [key for key in wanted if key not in self.places]
        if missing:
            row, lam = missing[0]
            raise ConfigError(f"prompt {row} was not prefilled at λ = {lam:g}; prefill it first.")

        # Shallow copies suffice: selecting rows makes new tensors and leaves the others unchanged.
        own = copy.copy(self.cache)
        own.layers = [copy.copy(layer) for layer in self.cache.layers]
        index = torch.tensor([self.places[key] for key in wanted])
        own.batch_select_indices(index.to(own.layers[0].keys.device))
        return own


# The test of a model when it is loaded. λ belongs to a row, and a layer that gets its tokens in an
# order of its own (routed to experts, for instance) would apply it to others. A few tokens are run
# in one batch and row by row, and compared.

_ROWS, _TOKENS = 2, 4
_LAMBDAS = (0.5, 2.0)


@torch.no_grad()
def probe_rows(dial: LoRADial, name: str) -> None:
    """Check that rows of different λ in one batch equal each row alone.

    Raises:
        UnsupportedModelError: If they differ by more than rounding, or cannot be run together.
    """
    generator = torch.Generator().manual_seed(1)
    width = dial.base.get_input_embeddings().num_embeddings
    tokens = torch.randint(1, width, (_ROWS, _TOKENS), generator=generator).to(dial.device)
    lam = torch.tensor(_LAMBDAS)

    b_matrices = [layer.lora_B[ADAPTER].weight for layer in dial.scale.layers.values()]
    with evaluating(dial), perturbed(b_matrices):
        try:
            mixed = dial(tokens, lam=lam, lam_checked=True).logits
        except ValueError as error:
            raise UnsupportedModelError(
                f"{name}: rows of different λ cannot run as one batch ({error})"
            ) from error
        alone = [
            dial(tokens[row : row + 1], lam=one, lam_checked=True).logits
            for row, one in enumerate(_LAMBDAS)
        ]

    off = distance_beyond_rounding(mixed, torch.cat(alone), dial.base.dtype)
    if off is not None:
        raise UnsupportedModelError(
            f"{name}: rows of different λ disturb each other in one batch (off by {off:.1%}); a "
            "LoRA dial cannot serve this model. Leave out target_modules that see tokens in an "
            "order of their own, such as experts."
        )
