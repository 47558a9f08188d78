"""Facts of a model and of a pair, before any weights are loaded, and whether two models fit.

Configurations, tokenizers and the headers of weight files are read. The facts of one model are a
:class:`ModelFacts`, those of two a :class:`PairFacts`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from flexalign.errors import ConfigError, PairMismatchError, UnsupportedModelError
from flexalign.models.hub import check_before_download, fetch_weights, name_of
from flexalign.models.loading import fingerprint, load_config, load_tokenizer, skeleton
from flexalign.models.sources import Model, Source, hub_id, resolve
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
        fingerprint: Of its weights; None if they are pickled, or still at the hub.
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


class RenamedToken(NamedTuple):
    """A special token of two tokenizers that has one id and two names.

    Attributes:
        id: Its id in both.
        reference: Its name in the reference's tokenizer.
        aligned: Its name in the aligned model's.
    """

    id: int
    reference: str
    aligned: str


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
        renamed: The special tokens that have other names in the aligned model, if the pair is read
            by id; else none.
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
    renamed: tuple[RenamedToken, ...] = ()

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
        renamed = [token._asdict() for token in self.renamed]
        return {"fits": self.fits, **vars(self), **models, "renamed": renamed}


def examine(
    model: Model, *, dtype: "torch.dtype | str" = "auto", trust_remote_code: bool = False
) -> ModelFacts:
    """Return the facts of a model without loading its weights.

    Args:
        model: A known name, a folder, a GGUF file, a hub id, or a `Source`.
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
    by_id: bool = False,
) -> PairFacts:
    """Compare two models by their configurations, tokenizers and tensor headers.

    What needs no weights is compared before weights are fetched from the hub.

    Args:
        reference: The model of λ=0.
        aligned: The model of λ=1, or a PEFT adapter on the reference.
        dtype: The data type that they will be loaded in.
        trust_remote_code: As in `flexalign.models.loading.load_model`.
        prompted: The two are asked under different prompts, so they may be equal.
        by_id: Special tokens may have other names in the aligned model, at equal ids: each id is
            taken for one token of both, and the reference's name is used.

    Raises:
        ConfigError: If one of them does not exist, or the reference is an adapter.
        CheckpointError: If one is damaged.
        UnsupportedModelError: If one cannot be realigned.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    return check_before_download(
        lambda: _compare_models(reference, aligned, prompted=prompted, by_id=by_id, **options)
    )


def _compare_models(
    reference: Model, aligned: Model, *, prompted: bool, by_id: bool, **options: Any
) -> PairFacts:
    one = examine(reference, **options)
    if one.kind == "adapter":
        raise ConfigError(
            f"the reference, {one.name}, is a PEFT adapter; merge it into its base first "
            "(merge_and_unload), or give its base as the reference."
        )

    source = resolve(aligned)
    other = _examine_adapter(source, one) if source.is_adapter else examine(source, **options)
    shared = other.kind == "adapter"

    renamed = renamed_tokens(one.tokenizer, other.tokenizer) if by_id else ()
    problems, warnings = _compare(one, other, by_id=by_id)
    if shared:
        from flexalign.models.adapters import adds_nothing

        problem, doubt = _compare_base(one, other)
        problems += [problem] if problem else []
        warnings += [doubt] if doubt else []

    if shared:
        identical = fetch_weights(source.path) and adds_nothing(source.path)
    else:
        identical = _is_same(one, other)
    if identical and not prompted:
        warnings.append(
            f"{other.name} equals the reference, {one.name}: there is nothing to realign."
        )

    one_model = prompted and _one_source(one, other)
    width, note = shared_width(one.width, other.width, min(one.vocabulary, other.vocabulary))
    facts = PairFacts(
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
        renamed=renamed,
    )
    return _with_names(facts) if renamed and not problems else facts


def _with_names(facts: PairFacts) -> PairFacts:
    """Add which names a pair that is read by id uses, and a warning if thinking is lost by it."""
    side = "reference" if facts.tokenizer is facts.reference.tokenizer else "aligned model"
    note = describe_renamed(facts.renamed, side)

    used, unused = facts.reference, facts.aligned
    if side != "reference":
        used, unused = unused, used
    names = {name for token in facts.renamed for name in (token.reference, token.aligned)}
    lost = names.intersection(unused.thinking_tags or ()) - used.tokenizer.get_vocab().keys()
    if not lost:
        return replace(facts, notes=(*facts.notes, note))
    warning = (
        f"the thinking tags of {unused.name}, {' and '.join(unused.thinking_tags or ())}, have other "
        f"names in the tokenizer of {used.name}, which is used for both, so that thinking is not "
        "recognised in a text"
        + ("; give the aligned model as the reference." if side == "reference" else ".")
    )
    return replace(facts, notes=(*facts.notes, note), warnings=(*facts.warnings, warning))


def _one_source(one: ModelFacts, other: ModelFacts) -> bool:
    files = [
        (facts.kind, facts.source.path.resolve(), facts.source.gguf_file) for facts in (one, other)
    ]
    return files[0] == files[1]


def _examine_adapter(source: Source, base: ModelFacts) -> ModelFacts:
    """Examine an adapter as one on the reference; the base that it names is not read."""
    is_here = fetch_weights(source.path)
    infos = tensor_infos(source.path) if is_here else {}
    changed = [name for name in infos if ".lm_head." in name]
    if is_here and (changed or not infos):
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
        gib=weight_bytes(source, base.config, "auto") / GIB if is_here else 0.0,
        fingerprint=fingerprint(source) if is_here else None,
        eos_token=tokenizer.eos_token,
        vocabulary=vocabulary_size(tokenizer),
        has_chat_template=bool(tokenizer.chat_template),
        source=source,
        tokenizer=tokenizer,
    )


def _compare(one: ModelFacts, other: ModelFacts, *, by_id: bool) -> tuple[list[str], list[str]]:
    """Return the problems and the warnings of two models' tokenizers."""
    problems = [compare_tokens(one.tokenizer, other.tokenizer, by_id=by_id)]
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
    unfit = None
    if fetch_weights(adapter.source.path):
        unfit = unfit_tensor(base.config, config, tensor_infos(adapter.source.path))
    if unfit is not None:
        return f"the adapter {adapter.name} is not of the base {base.name}: {unfit}.", None

    named = str(config.base_model_name_or_path)
    at_hub = hub_id(named)
    if at_hub is not None and at_hub == hub_id(base.source):
        return None, None
    try:
        # Nothing is fetched only to compare it.
        meant = None if at_hub is not None else resolve(named)
    except ConfigError:
        meant = None
    if meant is None:
        if Path(named).name in (Path(base.name).name, base.source.path.name):
            return None, None
        return None, (
            f"the adapter {adapter.name} says that its base is {named}, which is not here to "
            f"compare; its shapes fit {base.name}."
        )

    # The fingerprints of two file formats cannot be compared.
    if (meant.gguf_file is None) != (base.source.gguf_file is None):
        return None, None
    if not fetch_weights(base.source.path) or fingerprint(meant) == base.fingerprint:
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


def renamed_tokens(
    reference: PreTrainedTokenizerBase, aligned: PreTrainedTokenizerBase
) -> tuple[RenamedToken, ...]:
    """Return the special tokens that have other names in the aligned model, at equal ids.

    Special are the tokens that a tokenizer lists beside its vocabulary (``added_tokens``), as
    ``<think>`` is, whether or not they are left out of a decoded text.

    Returns:
        The tokens in the order of their ids; none if the two token→id maps are equal, or differ in
        anything else.
    """
    one, other = reference.get_vocab(), aligned.get_vocab()
    # A name that both have, at two ids, is of a token that was moved and not renamed.
    if any(other[name] != one[name] for name in one.keys() & other.keys()):
        return ()

    ids: dict[int, set[str]] = {}
    for name, id_ in one.items() ^ other.items():
        ids.setdefault(id_, set()).add(name)
    lists = [tokenizer.added_tokens_decoder for tokenizer in (reference, aligned)]
    renamed = []
    for id_, names in sorted(ids.items()):
        if any(id_ not in listed for listed in lists):
            return ()
        token = RenamedToken(id_, *(str(listed[id_].content) for listed in lists))
        if names != {token.reference, token.aligned}:
            return ()
        renamed.append(token)
    return tuple(renamed)


def describe_renamed(renamed: Sequence[RenamedToken], used: str) -> str:
    """Return a note that names all tokens of a pair that is read by id.

    Args:
        renamed: The tokens.
        used: The side whose names are used, such as ``"reference"``.
    """
    return f"read by id, the names of the {used} used for both: {_list_renamed(renamed)}."


def _list_renamed(renamed: Sequence[RenamedToken]) -> str:
    first, *others = renamed
    listed = [
        f"{first.id} is {first.reference!r} in the reference and {first.aligned!r} in the aligned "
        "model",
        *(f"{id_} {one!r} and {other!r}" for id_, one, other in others),
    ]
    return "; ".join(listed)


def compare_tokens(
    reference: PreTrainedTokenizerBase,
    aligned: PreTrainedTokenizerBase,
    *,
    by_id: bool = False,
) -> str | None:
    """Return how two token→id maps differ, with the first tokens; None if they are equal.

    Args:
        reference: The reference's tokenizer.
        aligned: The aligned model's.
        by_id: Names of special tokens at equal ids may differ (see `renamed_tokens`).
    """
    one, other = reference.get_vocab(), aligned.get_vocab()
    if one == other:
        return None
    renamed = renamed_tokens(reference, aligned)
    if renamed and by_id:
        return None
    if renamed:
        return (
            f"the tokenizers differ in the names of special tokens alone: {_list_renamed(renamed)}. "
            "If each of these ids means one thing to both models, go on with --by-id (by_id: true "
            "in a recipe, by_id=True in Python)."
        )

    moved = sorted((one[token], token) for token in one.keys() & other.keys())
    differences = [
        f"{token!r} is {id_} in the reference and {other[token]} in the aligned model"
        for id_, token in moved
        if other[token] != id_
    ]
    # By id, names of special tokens are no difference, so that the message begins with what is one.
    special = set[int]()
    if by_id:
        special = reference.added_tokens_decoder.keys() & aligned.added_tokens_decoder.keys()
    for here, there, name in ((one, other, "reference"), (other, one, "aligned model")):
        alone = sorted(
            (here[token], token)
            for token in here.keys() - there.keys()
            if here[token] not in special
        )
        differences += [f"{token!r} ({id_}) is in the {name} alone" for id_, token in alone]

    more = len(differences) - _SHOWN
    return (
        f"the tokenizers differ: {'; '.join(differences[:_SHOWN])}"
        + (f"; and {more} tokens more" if more > 0 else "")
        + ". Their logits are of different things and cannot be mixed"
        + (", by id neither: more than the names of special tokens differs" if by_id else "")
        + "; take two models with one tokenizer (for others, see TRL's GOLD trainer)."
    )


def compare_ends(
    reference: PreTrainedTokenizerBase, aligned: PreTrainedTokenizerBase
) -> tuple[str | None, str | None]:
    """Compare the tokens that begin and end a text, by their ids.

    Returns:
        A problem (the two end a response differently) and a warning (they begin it differently),
        each None if there is none.
    """
    problem = warning = None
    if reference.eos_token_id != aligned.eos_token_id:
        problem = (
            f"the reference ends a response with {reference.eos_token!r}, the aligned model with "
            f"{aligned.eos_token!r}; between the two it may not end at all. If this pair is "
            "meant, set one eos_token in both tokenizer_config.json."
        )
    if reference.bos_token_id != aligned.bos_token_id:
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
        stored = "float32" if name_of(source.path) is None else str(config.dtype)
        itemsize = _LOADED_BYTES.get(stored.removeprefix("torch."), _LOADED_BYTES["float32"])
        return _count_parameters(config) * (size or itemsize)
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
