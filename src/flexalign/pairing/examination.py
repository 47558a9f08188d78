"""What can be known of a model, and of a pair, before any weights are loaded."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flexalign.errors import ConfigError, PairMismatchError, UnsupportedModelError
from flexalign.loading import (
    Model,
    Source,
    fingerprint,
    load_config,
    load_tokenizer,
    resolve,
)
from flexalign.loading.weights import same_folder, tensor_infos
from flexalign.pairing.compatibility import (
    compare_ends,
    compare_templates,
    compare_tokens,
    shared_width,
    vocabulary_size,
)
from flexalign.pairing.memory import GIB, weight_bytes

__all__ = ["ModelFacts", "PairFacts", "examine", "examine_pair"]


@dataclass(frozen=True)
class ModelFacts:
    """A model on disk.

    Attributes:
        name: What the user called it.
        family: As in its config.json, such as ``"qwen2"``.
        kind: ``"model"``, ``"gguf"`` or ``"adapter"`` (PEFT).
        gib: What its weights take once loaded; of an adapter, the adapter's.
        width: Width of its logits, padding included.
        vocabulary: Tokens that its tokenizer knows.
        eos_token: What ends a response.
        has_chat_template: Whether its tokenizer has one.
        thinking_tags: The tags around its thinking, if it shows any.
        fingerprint: Of its weights; None if they are pickled.
    """

    name: str
    family: str
    kind: str
    gib: float
    width: int
    vocabulary: int
    eos_token: str | None
    has_chat_template: bool
    thinking_tags: tuple[str, str] | None
    fingerprint: str | None
    source: Source = field(repr=False)
    config: Any = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The facts by name, without the objects behind them."""
        hidden = ("source", "config", "tokenizer")
        return {name: value for name, value in vars(self).items() if name not in hidden}


@dataclass(frozen=True)
class PairFacts:
    """Two models on disk, and whether they fit.

    Attributes:
        reference: The model of λ=0.
        aligned: The model of λ=1.
        vocab_size: Tokens that both score; None if they do not fit.
        shared_base: Whether the aligned model is an adapter, so that one base is held.
        gib: What both take together.
        identical: Whether the two are the same, so that there is nothing to realign.
        problems: Why they do not fit; empty if they do.
        warnings: What the user should look at.
        notes: What is done about small differences.
    """

    reference: ModelFacts
    aligned: ModelFacts
    vocab_size: int | None
    shared_base: bool
    gib: float
    identical: bool
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the two can be mixed."""
        return not self.problems

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of both: the reference's, unless the aligned model alone has a chat template."""
        own, other = self.reference.tokenizer, self.aligned.tokenizer
        return other if other.chat_template and not own.chat_template else own

    def require_fit(self) -> int:
        """Return the tokens that both score.

        Raises:
            PairMismatchError: If the two do not fit; says all that differs.
        """
        if self.vocab_size is None:
            names = f"{self.reference.name} and {self.aligned.name}"
            raise PairMismatchError(f"{names} do not fit: {' Also: '.join(self.problems)}")
        return self.vocab_size

    def to_json(self) -> dict[str, Any]:
        """The facts by name, with those of both models."""
        models = {"reference": self.reference.to_json(), "aligned": self.aligned.to_json()}
        return {"fits": self.fits, **vars(self), **models}


def examine(
    model: Model, *, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> ModelFacts:
    """Read what can be known of a model without its weights.

    Raises:
        ConfigError: If it is not there.
        CheckpointError: If it is damaged.
        UnsupportedModelError: If it is no model that can be realigned.
    """
    from flexalign.data.thinking import ThinkingTags

    source = resolve(model)
    config = load_config(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    tags = ThinkingTags.detect(tokenizer)
    try:
        print_ = fingerprint(source)
    except ConfigError:
        print_ = None
    kind = "adapter" if source.is_adapter else "gguf" if source.gguf_file else "model"
    return ModelFacts(
        name=source.name,
        family=config.model_type,
        kind=kind,
        gib=weight_bytes(source, config, dtype) / GIB,
        width=config.get_text_config().vocab_size,
        vocabulary=vocabulary_size(tokenizer),
        eos_token=tokenizer.eos_token,
        has_chat_template=bool(tokenizer.chat_template),
        thinking_tags=(tags.open, tags.close) if tags else None,
        fingerprint=print_,
        source=source,
        config=config,
        tokenizer=tokenizer,
    )


def examine_pair(
    reference: Model,
    aligned: Model,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
) -> PairFacts:
    """Compare two models by their configurations, tokenizers and tensor headers.

    Args:
        reference: The model of λ=0; bare ``miniature`` is its reference.
        aligned: The model of λ=1, or a PEFT adapter on the reference.
        dtype: What they will be loaded in.
        trust_remote_code: As in `flexalign.loading.load_model`.

    Raises:
        ConfigError: If one of them is not there, or the reference is an adapter.
        CheckpointError: If one is damaged.
        UnsupportedModelError: If one is no model that can be realigned.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    one = examine(reference, **options)
    if one.kind == "adapter":
        raise ConfigError(
            f"the reference, {one.name}, is a PEFT adapter; merge it into its base first "
            "(merge_and_unload), or give its base as the reference."
        )
    source = resolve(aligned)
    other = _examine_adapter(source, one) if source.is_adapter else examine(source, **options)
    shared = other.kind == "adapter"
    problems, warnings = _compare(one, other)
    if shared:
        from flexalign.pairing.adapters import adds_nothing

        problem, doubt = _compare_base(one, other)
        problems += [problem] if problem else []
        warnings += [doubt] if doubt else []
    identical = adds_nothing(source.path) if shared else _is_same(one, other)
    if identical:
        warnings.append(
            f"{other.name} equals the reference, {one.name}: there is nothing to realign."
        )
    width, note = shared_width(one.width, other.width, min(one.vocabulary, other.vocabulary))
    return PairFacts(
        reference=one,
        aligned=other,
        vocab_size=None if problems else width,
        shared_base=shared,
        gib=one.gib + other.gib,
        identical=identical,
        problems=tuple(problems),
        warnings=tuple(warnings),
        notes=() if problems or note is None else (note,),
    )


def _examine_adapter(source: Source, base: ModelFacts) -> ModelFacts:
    """Examine an adapter as one on the reference, whatever base it names."""
    infos = tensor_infos(source.path)
    changed = [name for name in infos if ".lm_head." in name]
    if changed or not infos:
        raise UnsupportedModelError(
            f"the adapter {source} changes lm_head, so that the head is not one matrix; train it "
            "without lm_head among target_modules and modules_to_save, or merge it into a model."
        )
    try:
        tokenizer = load_tokenizer(source)
    except ConfigError:
        tokenizer = base.tokenizer
    return replace(
        base,
        name=source.name,
        kind="adapter",
        gib=weight_bytes(source, base.config, "auto") / GIB,
        fingerprint=fingerprint(source),
        eos_token=tokenizer.eos_token,
        vocabulary=vocabulary_size(tokenizer),
        has_chat_template=bool(tokenizer.chat_template),
        source=source,
        tokenizer=tokenizer,
    )


def _compare(one: ModelFacts, other: ModelFacts) -> tuple[list[str], list[str]]:
    problems = [compare_tokens(one.tokenizer, other.tokenizer)]
    problem, warning = compare_ends(one.tokenizer, other.tokenizer)
    problems.append(problem)
    warnings = [warning, compare_templates(one.tokenizer, other.tokenizer)]
    return [text for text in problems if text], [text for text in warnings if text]


def _compare_base(base: ModelFacts, adapter: ModelFacts) -> tuple[str | None, str | None]:
    """Look whether an adapter belongs to this base: by its shapes, then by the base it names.

    Returns:
        A problem and a doubt, each None if there is none.
    """
    from flexalign.pairing.adapters import read_adapter_config, unfit_tensor

    config = read_adapter_config(adapter.source)
    unfit = unfit_tensor(base.config, config, tensor_infos(adapter.source.path))
    if unfit is not None:
        return f"the adapter {adapter.name} is not of the base {base.name}: {unfit}.", None
    named = str(config.base_model_name_or_path)
    try:
        meant = resolve(named)
    except ConfigError:
        if Path(named).name in (Path(base.name).name, base.source.path.name):
            return None, None
        return None, (
            f"the adapter {adapter.name} says that its base is {named}, which is not here to "
            f"compare; its shapes fit {base.name}."
        )
    if (meant.gguf_file is None) != (base.source.gguf_file is None):
        return None, None
    if fingerprint(meant) == base.fingerprint:
        return None, None
    return (
        f"the adapter {adapter.name} was made for {named}, whose weights are not those of "
        f"{base.name}; give {named} as the reference."
    ), None


def _is_same(one: ModelFacts, other: ModelFacts) -> bool:
    if one.fingerprint is None or one.fingerprint != other.fingerprint:
        return False
    return one.kind == other.kind == "gguf" or same_folder(one.source.path, other.source.path)
