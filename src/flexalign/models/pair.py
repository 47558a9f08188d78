"""Two models that must fit together: the reference (λ=0) and the aligned model (λ=1).

All that can be checked without weights is checked before they are loaded. If the aligned model is a
PEFT adapter on the reference, the base is loaded once: the reference is the same module with the
adapter off.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flexalign.errors import ConfigError
from flexalign.heads import Head, last_hidden
from flexalign.models.adapters import AdapterSwitch, inner_model
from flexalign.models.compatibility import (
    GIB,
    ModelFacts,
    PairFacts,
    available_bytes,
    examine_pair,
    shared_width,
    vocabulary_size,
)
from flexalign.models.loading import load_adapter, load_model
from flexalign.models.sources import Model, aligned_beside
from flexalign.models.weights import same_module

Side: TypeAlias = Literal["reference", "aligned"]

SIDES: tuple[Side, Side] = ("reference", "aligned")
"""The two sides, in the order of λ = 0 and λ = 1."""

_ADAPTER = "aligned"


class Heads(NamedTuple):
    """The two heads, cut to the shared vocabulary."""

    reference: Head
    aligned: Head


class ModelPair:
    """A reference and an aligned model with one vocabulary.

    Attributes:
        reference: The model of λ=0.
        aligned: The model of λ=1; the same module as `reference` if the base is shared.
        tokenizer: The tokenizer of both.
        vocab_size: V, the number of tokens in the logits of both; wider logits end in padding.
        shared_base: Whether the aligned model is a PEFT adapter on the reference.
        one_model: Whether both sides are one module, without adapters; they differ in what they are
            asked (`flexalign.models.prompted`).
    """

    def __init__(
        self,
        reference: nn.Module,
        aligned: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
    ) -> None:
        """Make a pair without checks; `load` and `of` check it."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.shared_base = isinstance(aligned, PeftModel) and (
            inner_model(aligned) is inner_model(reference)
        )
        self.reference: Any = aligned if self.shared_base else reference
        self.aligned: Any = cast("Any", aligned)
        self.one_model = not self.shared_base and aligned is reference

        self._adapters: dict[Side, tuple[str, ...]] = {"reference": ()}
        self._switch: AdapterSwitch | None = None
        if self.shared_base:
            self._adapters["aligned"] = tuple(self.aligned.active_adapters)
            self._switch = AdapterSwitch(self.aligned)

    @classmethod
    def load(
        cls,
        reference: Model,
        aligned: Model | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        allow_oversize: bool = False,
        prompted: bool = False,
        by_id: bool = False,
    ) -> "ModelPair":
        """Check a pair and load it, frozen and in evaluation mode.

        Prints on stderr how much memory it needs, and how small differences are handled.

        Args:
            reference: A folder or a known name; see `flexalign.models.sources.resolve`.
            aligned: A folder, a known name, or the folder of a PEFT adapter on the reference. May
                be left out if the reference is a known name of a pair.
            dtype: Data type of the weights; ``"auto"`` is the stored one of each.
            device_map: As in transformers.
            trust_remote_code: Permit code in a checkpoint to run.
            allow_pickle: Permit pickled weights, whose loading can run code.
            allow_oversize: Load it even if the free memory seems too small.
            prompted: The two are asked under different prompts, so they may be one model, which is
                loaded once.
            by_id: Special tokens may have other names in the aligned model, at equal ids: each id
                is taken for one token of both, and the reference's name is used.

        Raises:
            PairMismatchError: If the two do not fit; its message names all problems.
            ConfigError: If one does not exist, or both together do not fit in memory.
            CheckpointError: If weights are missing or damaged.
            UnsupportedModelError: If one cannot be realigned.
        """
        if aligned is None:
            aligned = aligned_beside(reference)
        if aligned is None:
            raise ConfigError(f"a pair has two models; name the aligned one beside {reference}.")

        facts = examine_pair(
            reference,
            aligned,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            prompted=prompted,
            by_id=by_id,
        )
        return cls.load_examined(
            facts,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            allow_oversize=allow_oversize,
        )

    @classmethod
    def load_examined(
        cls,
        facts: PairFacts,
        *,
        allow_oversize: bool = False,
        say: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> "ModelPair":
        """Load a pair that has been examined already.

        Args:
            facts: The result of `flexalign.models.compatibility.examine_pair`.
            allow_oversize: As in `load`.
            say: Called with a line before each model is loaded.
            **options: `dtype`, `device_map`, `trust_remote_code` and `allow_pickle`, as in `load`.

        Raises:
            PairMismatchError: If the two do not fit.
            ConfigError: If both together do not fit in memory.
            CheckpointError: If weights are missing or damaged.
        """
        vocab_size = _judge(facts, options.get("device_map"), allow_oversize)

        def load(side: ModelFacts) -> Any:
            form = ", de-quantised from GGUF" if side.kind == "gguf" else ""
            say(f"loading {side.name}, {side.gib:.3g} GiB{form}")
            return load_model(side.source, **options)

        first = load(facts.reference)
        if facts.shared_base:
            second = load_adapter(
                first,
                facts.aligned.source,
                name=_ADAPTER,
                allow_pickle=options.get("allow_pickle", False),
            ).eval()
        elif facts.one_model:
            second = first
        else:
            second = load(facts.aligned)

        for model in (first, second):
            model.requires_grad_(False)
        return cls(first, second, facts.tokenizer, vocab_size)

    @classmethod
    def of(
        cls,
        reference: nn.Module,
        aligned: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompted: bool = False,
    ) -> "ModelPair":
        """Make a pair of two modules with one tokenizer. Neither is changed.

        Args:
            reference: A transformers causal language model.
            aligned: Another, or a PEFT wrapper; if it wraps the reference, the base is shared.
            tokenizer: The tokenizer of both.
            prompted: As in `load`.
        """
        widths = [_width(model) for model in (reference, aligned)]
        vocab_size, _ = shared_width(widths[0], widths[1], vocabulary_size(tokenizer))
        pair = cls(reference, aligned, tokenizer, vocab_size)

        if not (prompted or pair.shared_base) and (
            pair.one_model or same_module(reference, aligned)
        ):
            warnings.warn(
                "the aligned model equals the reference: there is nothing to realign.",
                stacklevel=2,
            )
        return pair

    @cached_property
    def heads(self) -> Heads:
        """Both heads, read and verified.

        Raises:
            UnsupportedModelError: If a head is not a (scaled, capped) matrix product.
        """
        reference = Head.of(inner_model(self.reference)).cut(self.vocab_size)
        if self.shared_base or self.one_model:
            return Heads(reference, reference)
        return Heads(reference, Head.of(inner_model(self.aligned)).cut(self.vocab_size))

    @contextmanager
    def running(self, side: Side) -> Iterator[Any]:
        """Yield the module of one side; in the block, a shared base has that side's adapters on."""
        if side not in SIDES:
            raise ConfigError(f"a pair has the sides 'reference' and 'aligned', not {side!r}.")
        switch = self._switch
        with nullcontext() if switch is None else switch.use(self._adapters[side]):
            yield getattr(self, side)

    @torch.no_grad()
    def hidden(self, side: Side, **inputs: Any) -> Tensor:
        """Return one side's final hidden states, shape ``(B, T, H)``, without gradient.

        Args:
            side: ``"reference"`` or ``"aligned"``.
            **inputs: ``input_ids``, ``attention_mask`` and other inputs of the decoder.
        """
        with self.running(side) as model:
            return last_hidden(model, **inputs)

    @torch.no_grad()
    def logits(self, side: Side, **inputs: Any) -> Tensor:
        """Return one side's logits, shape ``(B, T, V)``, without gradient and without padding.

        Args:
            side: ``"reference"`` or ``"aligned"``.
            **inputs: As in the model's forward.
        """
        with self.running(side) as model:
            logits: Tensor = model(**inputs, use_cache=False).logits
        return logits[..., : self.vocab_size]


def _judge(facts: PairFacts, device_map: Any, allow_oversize: bool) -> int:
    """Refuse a pair that does not fit, warn and print notes before it is loaded; return its V."""
    vocab_size = facts.require_fit()
    for warning in facts.warnings:
        warnings.warn(warning, stacklevel=4)
    free = available_bytes(device_map) / GIB

    need = f"the pair's weights take {facts.gib:.3g} GiB, and {free:.3g} GiB are free"
    if facts.gib > free and not allow_oversize:
        raise ConfigError(
            f"{need}; load it in bfloat16, on a larger machine, or anyway with "
            "allow_oversize=True (--anyway)."
        )

    for note in (f"{need}.", *facts.notes):
        print(f"note: {note}", file=sys.stderr)
    return vocab_size


def _width(model: nn.Module) -> int:
    embeddings: Any = inner_model(model).get_output_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])
