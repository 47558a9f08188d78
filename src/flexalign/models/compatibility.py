"""Facts of a model and of a pair, before any weights are loaded, and whether two models fit.

Configurations, tokenizers and the headers of weight files are read. The facts of one model are a
:class:`ModelFacts`, those of two a :class:`PairFacts`.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from flexalign.errors import ConfigError, PairMismatchError, UnsupportedModelError
from flexalign.models.loading import fingerprint, load_config, load_tokenizer, skeleton
from flexalign.models.sources import Model, Source, resolve
from flexalign.models.weights import same_folder, tensor_infos

if TYPE_CHECKING:
    import torch

GIB = 2**30


@dataclass(frozen=True)
class ModelFacts:
    """A model on disk.

    Attributes:
        name: The name or path that the user gave.
        family: The ``model_type`` of its config.json, such as ``"qwen2"``.
        kind: ``"model"``, ``"gguf"`` or ``"adapter"`` (PEFT).
        gib: Memory of its weights once loaded, in GiB; of an adapter, the adapter's weights only.
        width: Width of its logits, padding included.
        vocabulary: Number of tokens of its tokenizer.
        eos_token: The token that ends a response.
        has_chat_template: Whether its tokenizer has a chat template.
        thinking_tags: The tags around its thinking; None if it has none.
        fingerprint: Of its weights; None if they are pickled.
        source: Where it is.
        config: Its transformers configuration.
        tokenizer: Its tokenizer.
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
        """Return the facts by name, without the source, the configuration and the tokenizer."""
        hidden = ("source", "config", "tokenizer")
        return {name: value for name, value in vars(self).items() if name not in hidden}


@dataclass(frozen=True)
class PairFacts:
    """Two models on disk, and whether they fit.

    Attributes:
        reference: The model of λ=0.
        aligned: The model of λ=1.
        vocab_size: Number of tokens in the logits of both; None if they do not fit.
        shared_base: Whether the aligned model is an adapter, so that the base is loaded once.
        gib: Memory of both together, in GiB.
        identical: Whether the two are equal, so that there is nothing to realign.
        problems: Why they do not fit; empty if they do.
        warnings: Differences that the user should check.
        notes: How small differences are handled.
        one_model: Whether the two are one model under two prompts, which is loaded once.
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
    one_model: bool = False

    @property
    def fits(self) -> bool:
        """Whether the two can be mixed."""
        return not self.problems

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both: the reference's, unless only the aligned one has a chat template."""
        own, other = self.reference.tokenizer, self.aligned.tokenizer
        return other if other.chat_template and not own.chat_template else own

    def require_fit(self) -> int:
        """Return the number of tokens in the logits of both.

        Raises:
            PairMismatchError: If the two do not fit; its message names all problems.
        """
        if self.vocab_size is None:
            names = f"{self.reference.name} and {self.aligned.name}"
            raise PairMismatchError(f"{names} do not fit: {' Also: '.join(self.problems)}")
        return self.vocab_size

    def to_json(self) -> dict[str, Any]:
        """Return the facts by name, with those of both models."""
        models = {"reference": self.reference.to_json(), "aligned": self.aligned.to_json()}
        return {"fits": self.fits, **vars(self), **models}


def examine(
    model: Model, *, dtype: "torch.dtype | str" = "auto", trust_remote_code: bool = False
) -> ModelFacts:
    """Return the facts of a model without loading its weights.

    Args:
        model: A known name, a folder, a GGUF file, or a `Source`.
        dtype: The data type that it will be loaded in.
        trust_remote_code: As in `flexalign.models.loading.load_model`.

    Raises:
        ConfigError: If it does not exist.
        CheckpointError: If it is damaged.
        UnsupportedModelError: If it cannot be realigned.
    """
    from flexalign.data.thinking import ThinkingTags

    source = resolve(model)
    config = load_config(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    tags = ThinkingTags.detect(tokenizer)
    try:
        mark = fingerprint(source)
    except ConfigError:  # pickled weights, which are not opened
        mark = None
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
        fingerprint=mark,
        source=source,
        config=config,
        tokenizer=tokenizer,
    )


def examine_pair(
    reference: Model,
    aligned: Model,
    *,
    dtype: "torch.dtype | str" = "auto",
    trust_remote_code: bool = False,
    prompted: bool = False,
) -> PairFacts:
    """Compare two models by their configurations, tokenizers and tensor headers.

    Args:
        reference: The model of λ=0.
        aligned: The model of λ=1, or a PEFT adapter on the reference.
        dtype: The data type that they will be loaded in.
        trust_remote_code: As in `flexalign.models.loading.load_model`.
        prompted: The two are asked under different prompts, so they may be equal.

    Raises:
        ConfigError: If one of them does not exist, or the reference is an adapter.
        CheckpointError: If one is damaged.
        UnsupportedModelError: If one cannot be realigned.
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
        from flexalign.models.adapters import adds_nothing

        problem, doubt = _compare_base(one, other)
        problems += [problem] if problem else []
        warnings += [doubt] if doubt else []

    identical = adds_nothing(source.path) if shared else _is_same(one, other)
    if identical and not prompted:
        warnings.append(
            f"{other.name} equals the reference, {one.name}: there is nothing to realign."
        )

    one_model = prompted and _one_source(one, other)
    width, note = shared_width(one.width, other.width, min(one.vocabulary, other.vocabulary))
    return PairFacts(
        reference=one,
        aligned=other,
        vocab_size=None if problems else width,
        shared_base=shared,
        gib=one.gib if one_model else one.gib + other.gib,
        identical=identical,
        problems=tuple(problems),
        warnings=tuple(warnings),
        notes=() if problems or note is None else (note,),
        one_model=one_model,
    )


def _one_source(one: ModelFacts, other: ModelFacts) -> bool:
    files = [
        (facts.kind, facts.source.path.resolve(), facts.source.gguf_file) for facts in (one, other)
    ]
    return files[0] == files[1]


def _examine_adapter(source: Source, base: ModelFacts) -> ModelFacts:
    """Examine an adapter as one on the reference; the base that it names is not read."""
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
    """Return the problems and the warnings of two models' tokenizers."""
    problems = [compare_tokens(one.tokenizer, other.tokenizer)]
    problem, warning = compare_ends(one.tokenizer, other.tokenizer)
    problems.append(problem)
    warnings = [warning, compare_templates(one.tokenizer, other.tokenizer)]
    return [text for text in problems if text], [text for text in warnings if text]


def _compare_base(base: ModelFacts, adapter: ModelFacts) -> tuple[str | None, str | None]:
    """Check whether an adapter belongs to this base: by its shapes, then by the base it names.

    Returns:
        A problem and a doubt, each None if there is none.
    """
    from flexalign.models.adapters import read_adapter_config, unfit_tensor

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

    # The fingerprints of two file formats cannot be compared.
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


# Comparisons of two tokenizers and of two widths of logits.

_SHOWN = 3
"""Differences that a message names."""

_CONVERSATION = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of a tokenizer: its largest id plus 1."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return max(ids.values()) + 1


def compare_tokens(
    reference: PreTrainedTokenizerBase, aligned: PreTrainedTokenizerBase
) -> str | None:
    """Return how two token→id maps differ, with the first tokens; None if they are equal."""
    one, other = reference.get_vocab(), aligned.get_vocab()
    if one == other:
        return None

    moved = sorted((one[token], token) for token in one.keys() & other.keys())
    differences = [
        f"{token!r} is {id_} in the reference and {other[token]} in the aligned model"
        for id_, token in moved
        if other[token] != id_
    ]
    for here, there, name in ((one, other, "reference"), (other, one, "aligned model")):
        alone = sorted((here[token], token) for token in here.keys() - there.keys())
        differences += [f"{token!r} ({id_}) is in the {name} alone" for id_, token in alone]

    more = len(differences) - _SHOWN
    return (
        f"the tokenizers differ: {'; '.join(differences[:_SHOWN])}"
        + (f"; and {more} tokens more" if more > 0 else "")
        + ". Their logits are of different things and cannot be mixed; take two models with one "
        "tokenizer (for others, see TRL's GOLD trainer)."
    )


def compare_ends(
    reference: PreTrainedTokenizerBase, aligned: PreTrainedTokenizerBase
) -> tuple[str | None, str | None]:
    """Compare the tokens that begin and end a text.

    Returns:
        A problem (the two end a response differently) and a warning (they begin it differently),
        each None if there is none.
    """
    problem = warning = None
    if reference.eos_token != aligned.eos_token:
        problem = (
            f"the reference ends a response with {reference.eos_token!r}, the aligned model with "
            f"{aligned.eos_token!r}; between the two it may not end at all. If this pair is "
            "meant, set one eos_token in both tokenizer_config.json."
        )
    if reference.bos_token != aligned.bos_token:
        warning = (
            f"the reference begins a text with {reference.bos_token!r}, the aligned model with "
            f"{aligned.bos_token!r}; the reference's is used for both."
        )
    return problem, warning


def compare_templates(
    reference: PreTrainedTokenizerBase, aligned: PreTrainedTokenizerBase
) -> str | None:
    """Return how two chat templates differ, with both renderings; None if they do not."""
    if reference.chat_template == aligned.chat_template:
        return None
    if not reference.chat_template or not aligned.chat_template:
        without, having = ("reference", "aligned model")
        if reference.chat_template:
            without, having = having, without
        return f"the {without} has no chat template; that of the {having} is used for both."

    one, other = _render(reference), _render(aligned)
    if one == other:
        return None
    return (
        "the chat templates differ; the reference's is used for both. It renders a conversation "
        f"as\n{one}\nand the aligned model's as\n{other}"
    )


def shared_width(reference: int, aligned: int, vocabulary: int) -> tuple[int, str | None]:
    """Return the number of tokens that two models share, and a note if logits are cut to it.

    Args:
        reference: Width of the reference's logits.
        aligned: Width of the aligned model's logits.
        vocabulary: Number of tokens of the tokenizer.
    """
    width = min(reference, aligned, vocabulary)
    if reference == aligned == width:
        return width, None
    return width, (
        f"logits are {reference} wide in the reference and {aligned} in the aligned model, "
        f"for a vocabulary of {vocabulary}; both are cut to {width}."
    )


def _render(tokenizer: PreTrainedTokenizerBase) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            _CONVERSATION, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        return f"({error})"


# Memory: what weights need, and what is free.

_STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_LOADED_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_ACROSS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of transformers' ``device_map`` that spread a model over the devices and the host."""

_CGROUP = Path("/sys/fs/cgroup")


def weight_bytes(source: Source, config: Any, dtype: "torch.dtype | str") -> int:
    """Return the bytes of a model's (or an adapter's) weights once loaded.

    Args:
        source: Where it is.
        config: Its configuration; parameters are counted from it if weights are GGUF or pickled.
        dtype: The data type that it is loaded in; ``"auto"`` is the stored one.
    """
    size = _itemsize(dtype)
    try:
        infos = None if source.gguf_file else tensor_infos(source.path).values()
    except ConfigError:
        infos = None
    if infos is None:
        return _count_parameters(config) * (size or _LOADED_BYTES["float32"])
    return sum(info.size * (size or _STORED_BYTES.get(info.dtype, 1)) for info in infos)


def available_bytes(device_map: Any) -> int:
    """Return the bytes that are free for weights on the devices of a ``device_map``."""
    import torch

    if device_map in (None, "cpu") or not torch.cuda.is_available():
        return _available_on_cpu()

    devices = range(torch.cuda.device_count())
    is_spread = device_map in _ACROSS
    if not is_spread and isinstance(device_map, str | int | torch.device):
        index = torch.device(device_map).index
        devices = range(index or 0, (index or 0) + 1)
    free = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    return free + (_available_on_cpu() if is_spread else 0)


def _itemsize(dtype: "torch.dtype | str") -> int | None:
    if dtype == "auto":
        return None
    if isinstance(dtype, str) and dtype in _LOADED_BYTES:
        return _LOADED_BYTES[dtype]
    import torch

    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return int(named.itemsize)


def _count_parameters(config: Any) -> int:
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def _available_on_cpu() -> int:
    free = _free_on_host()
    # psutil does not read the limit of a container.
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def _free_on_host() -> int:
    import psutil

    try:
        return int(psutil.virtual_memory().available)
    except (OSError, KeyError, ValueError):  # a sandbox without /proc, or with half of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
