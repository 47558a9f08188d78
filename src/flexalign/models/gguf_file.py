"""A model's folder as one GGUF file, the format of llama.cpp, Ollama and LM Studio.

Names and layouts are those of llama.cpp's own script (``convert_hf_to_gguf.py``); tensors' names and
the file's format are the `gguf` package's. Only families and tokenizers whose result was compared
with transformers are written, and all others are refused by name.

Weights are copied one tensor at a time, so that memory is needed for the largest one only.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexalign._storage import flush, free_bytes, replacing, write_text
from flexalign.data.rendering import stop_ids
from flexalign.data.template import fixed_template
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import CheckpointError, ConfigError, UnsupportedModelError
from flexalign.models.hub import as_size, fetch_weights
from flexalign.models.loading import load_config, load_tokenizer, skeleton
from flexalign.models.ollama import modelfile
from flexalign.models.sources import (
    INRA_FILE,
    Model,
    Source,
    read_json,
    require_gguf,
    resolve,
    resolve_adapter,
)
from flexalign.models.weights import stored_tensors, tensor_infos

OUTTYPES = ("auto", "f32", "f16", "bf16")
"""Types of the weight matrices, by llama.cpp's names; ``auto`` is the type that each one has."""

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_STORED = {"F16": "f16", "BF16": "bf16"}
_SCRIPT = "python convert_hf_to_gguf.py"


# Families.


@dataclass(frozen=True)
class _Family:
    """How a family of transformers is named and laid out in GGUF.

    Attributes:
        architecture: Its name in GGUF.
        is_interleaved: Whether llama.cpp rotates neighbouring pairs of a head's values, where
            transformers rotates the two halves of a head. Rows of q and k are then reordered.
        biases: Layers that may have a bias; all if None.
    """

    architecture: str
    is_interleaved: bool = False
    biases: tuple[str, ...] | None = None


_FAMILIES = {
    "llama": _Family("llama", is_interleaved=True),
    "mistral": _Family("llama", is_interleaved=True),
    "qwen2": _Family("qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": _Family("qwen3", biases=()),
    "smollm3": _Family("smollm3", is_interleaved=True, biases=()),
}
_ROTATED = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")

_NOPE_STEP = 4
"""In SmolLM3, llama.cpp leaves out the rotation in every fourth layer."""


# Tokenizers: GGUF names the rule that splits a text before byte-pair encoding. The rules are those of
# llama.cpp's src/llama-vocab.cpp, by the regular expressions of tokenizer.json.

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_SPLITS: dict[tuple[tuple[str | None, ...], bool], str] = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    (_DEEPSEEK, False): "deepseek-v3",
}
"""Names by the regular expressions and by whether a word that is a token is taken before any merge."""


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer as GGUF has it.

    Attributes:
        split: The name of the rule that splits a text before byte-pair encoding.
        tokens: The text of each row of the embedding.
        types: The type of each row, a value of `gguf.TokenType`.
        merges: The merges, best first; each is two texts with a space between.
        special: Ids by their role, such as ``eos``.
        begins: Whether the tokenizer puts the BOS token before a text.
        ends: Whether it puts the EOS token after it.
    """

    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    begins: bool
    ends: bool


@dataclass(frozen=True)
class GGUFExport:
    """A checked export of a model; :meth:`write` writes it.

    Attributes:
        source: The model.
        output: The GGUF file.
        modelfile: Ollama's Modelfile, beside it.
        outtype: The type of the weight matrices.
        tensors: Shape and type of each tensor, by its name in the model's own files.
        size: Bytes of the weights.
        stops: The tokens that end a response.
        thinking: The tags around the model's thinking; None if it has none.
        context: Tokens of the longest context that is written.
        config: The model's configuration.
        tokenizer: Its tokenizer.
        vocabulary: The tokenizer as GGUF has it.
    """

    source: Source
    output: Path
    modelfile: Path
    outtype: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    size: int
    stops: tuple[str, ...]
    thinking: ThinkingTags | None
    context: int
    config: Any
    tokenizer: Any
    vocabulary: _Vocabulary

    @classmethod
    def of(cls, model: Model, output: str | Path, *, outtype: str = "auto") -> "GGUFExport":
        """Check a model and where it is to be written; no weights are read.

        Args:
            model: A model's folder, a known name, or a hub id.
            output: The file to write; its name ends with ``.gguf`` and it must not exist.
            outtype: The type of the weight matrices, one of `OUTTYPES`. Vectors are always f32, as
                llama.cpp requires it.

        Raises:
            ConfigError: If there is no such model, the output is there already or has another
                ending, the type is unknown, the `gguf` package is missing, or the disk has too
                little room.
            UnsupportedModelError: If it is an adapter or a GGUF file already, or its family, a
                setting of it or its tokenizer has no known form in GGUF.
            CheckpointError: If a file is missing or damaged.
        """
        require_gguf("writing GGUF")
        if outtype not in OUTTYPES:
            raise ConfigError(f"outtype is {outtype!r}; give one of {', '.join(OUTTYPES)}.")
        output = Path(output).expanduser()
        beside = output.with_suffix(".Modelfile")
        if output.suffix != ".gguf":
            raise ConfigError(f"the output {output} is no GGUF file; end its name with .gguf.")
        for path in (output, beside):
            if path.exists():
                raise ConfigError(f"{path} is there already; move it away or name another output.")

        source = _plain_model(model)
        config = load_config(source)
        family = _family_of(source, config)
        tokenizer = load_tokenizer(source)
        vocabulary = _vocabulary_of(source, config, tokenizer)

        tensors = _forms(source, config, family, outtype)
        size = sum(math.prod(shape) * _DTYPES[kind].itemsize for shape, kind in tensors.values())
        _require_room(output, size)
        return cls(
            source,
            output,
            beside,
            outtype,
            tensors,
            size,
            tuple(
                str(tokenizer.convert_ids_to_tokens(end))
                for end in _ends(source, config, tokenizer)
            ),
            ThinkingTags.detect(tokenizer),
            _context(config),
            config,
            tokenizer,
            vocabulary,
        )

    def write(self, advance: Callable[[int], None] | None = None) -> None:
        """Write the GGUF file and the Modelfile; neither has its name before both are whole.

        Args:
            advance: Called with the number of complete tensors.

        Raises:
            UnsupportedModelError: If a weight is too large for float16.
            OSError: If a file cannot be written.
        """
        import gguf

        self.output.parent.mkdir(parents=True, exist_ok=True)
        family = _FAMILIES[self.config.model_type]
        names = gguf.get_tensor_name_map(_architecture(family), self.config.num_hidden_layers)
        writer = gguf.GGUFWriter(path=None, arch=family.architecture)
        self._add_keys(writer)
        for name, (shape, kind) in self.tensors.items():
            self._announce(writer, names.get_name(name, (".weight", ".bias")), shape, kind)
        factors = _rope_factors(self.config)
        if factors is not None:
            self._announce(writer, "rope_freqs.weight", tuple(factors.shape), "f32")

        with replacing(self.modelfile) as beside, replacing(self.output) as partial:
            text = modelfile(
                self.output.name, self.tokenizer, self.stops, adds_bos=self.vocabulary.begins
            )
            try:
                writer.write_header_to_file(partial)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for count, tensor in enumerate(self._converted(family), 1):
                    writer.write_tensor_data(tensor)
                    if advance is not None:
                        advance(count)
                if factors is not None:
                    writer.write_tensor_data(factors.numpy())
            finally:
                writer.close()
            flush(partial)
            write_text(beside, text)

    def to_json(self) -> dict[str, Any]:
        """Return it as the command line prints it."""
        tags = self.thinking
        return {
            "format": "gguf",
            "output": str(self.output),
            "modelfile": str(self.modelfile),
            "outtype": self.outtype,
            "bytes": self.size,
            "stops": list(self.stops),
            "thinking": None if tags is None else [tags.open, tags.close],
        }

    @staticmethod
    def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
        """Write a tensor's name, shape and type, before the values of any tensor."""
        import gguf
        import numpy

        form = gguf.GGMLQuantizationType[kind.upper()]
        size = math.prod(shape) * _DTYPES[kind].itemsize
        writer.add_tensor_info(name, shape, numpy.dtype("<u2"), size, raw_dtype=form)

    def _converted(self, family: _Family) -> Iterator[Any]:
        """Read each tensor, in the order of its announcement, as llama.cpp has it."""
        config = self.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, tensor in stored_tensors(self.source.path):
            if name not in self.tensors:
                continue
            if family.is_interleaved and name.endswith(_ROTATED):
                tensor = interleave(tensor, heads[name.split(".")[-2]])

            kind = self.tensors[name][1]
            values = tensor.to(_DTYPES[kind]).contiguous()
            if kind == "f16" and not torch.isfinite(values).all():
                raise UnsupportedModelError(
                    f"{self.source}: {name} has values that float16 cannot hold; give --outtype "
                    "bf16 or f32."
                )
            # numpy has no bfloat16; the file holds its 16 bits.
            yield (values.view(torch.int16) if kind == "bf16" else values).numpy()

    def _add_keys(self, writer: Any) -> None:
        """Add what the file says of the model and of its tokenizer."""
        import gguf

        config, vocabulary = self.config, self.vocabulary
        width = _head_width(config)
        total = sum(math.prod(shape) for shape, _ in self.tensors.values())

        metadata = gguf.Metadata.load(model_path=self.source.path, total_params=total)
        metadata.name = metadata.name or self.output.stem
        metadata.size_label = metadata.size_label or gguf.size_label(total, 0, 0, 0)
        writer.add_type(gguf.GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(self.tensors))

        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        _add_rope(writer, config)

        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.split)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        writer.add_token_merges(vocabulary.merges)
        for role, token in vocabulary.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(vocabulary.begins)
        writer.add_add_eos_token(vocabulary.ends)

        template = fixed_template(self.tokenizer)
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        if template:
            writer.add_chat_template(template)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a q or k projection from transformers' rotation to llama.cpp's.

    transformers rotates value i of a head with value i + D/2; llama.cpp rotates value 2i with
    value 2i + 1. Scores are sums over a head's values, so they are equal.

    Args:
        tensor: A weight [heads × D, width] or a bias [heads × D].
        heads: The number of heads.

    Returns:
        The same rows in the other order.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _plain_model(model: Model) -> Source:
    """Find a model, and refuse what has to be baked into one first.

    Raises:
        UnsupportedModelError: If it is an adapter, or a GGUF file.
    """
    advice = (
        "bake one λ of it into a plain model first: flexalign bake recipe.yaml --lambda 0.5 "
        "(keys: base, adapter, output), then export that."
    )
    if not isinstance(model, Source) and (resolve_adapter(str(model)) / INRA_FILE).is_file():
        raise UnsupportedModelError(f"{model} is an InRa adapter and no model; {advice}")
    source = resolve(model)
    if source.is_adapter:
        raise UnsupportedModelError(f"{source} is a LoRA and no model; {advice}")
    if source.gguf_file is not None:
        raise UnsupportedModelError(
            f"{source} is a GGUF file already ({source.path / source.gguf_file}); use it as it is."
        )
    return source


def _family_of(source: Source, config: Any) -> _Family:
    """Return a model's family, if every setting of it has a form in GGUF.

    Raises:
        UnsupportedModelError: If not.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise _refused(
            source,
            f"the family {config.model_type!r} is not written here (only {', '.join(_FAMILIES)})",
        )
    if config.hidden_act != "silu":
        raise _refused(source, f"its activation is {config.hidden_act}, and llama.cpp's is silu")
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise _refused(source, f"its rope_type {rope['rope_type']!r} is not written here")
    if config.model_type == "smollm3" and list(config.no_rope_layers) != [
        int((layer + 1) % _NOPE_STEP != 0) for layer in range(config.num_hidden_layers)
    ]:
        raise _refused(source, "its no_rope_layers are not every fourth layer")
    return family


def _refused(source: Source, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source}: {why}; convert it with llama.cpp's own script: {_SCRIPT} {source.path} "
        "--outfile model.gguf."
    )


def _rope(config: Any) -> dict[str, Any]:
    """Return the settings of the rotation, all layers having the same."""
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _add_rope(writer: Any, config: Any) -> None:
    """Add the settings of the rotation; llama3's is a tensor of factors instead."""
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        first = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(first)


def _rope_factors(config: Any) -> Tensor | None:
    """Return what llama3's rotation divides each frequency by; None for any other rotation.

    It is computed by transformers: the plain frequencies over the scaled ones.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = _head_width(config)
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors: Tensor = rope["rope_theta"] ** -steps / scaled
    return factors


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _context(config: Any) -> int:
    """Return the longest context in which the model has full attention.

    These architectures have no sliding window in llama.cpp. Inside one window nothing differs.
    """
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return min(longest, window) if window else longest


def _architecture(family: _Family) -> Any:
    import gguf

    return next(
        known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture
    )


def _file_type(tensors: dict[str, tuple[tuple[int, ...], str]]) -> Any:
    """Return the file's type: that of the embedding."""
    import gguf

    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    return gguf.LlamaFileType[names[tensors["model.embed_tokens.weight"][1]]]


def _forms(
    source: Source, config: Any, family: _Family, outtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type of each tensor to write, in the order of the stored ones.

    Raises:
        CheckpointError: If a tensor of the model is missing, or has another shape.
        UnsupportedModelError: If one has no name in GGUF.
    """
    import gguf

    wanted = {name: tuple(held.shape) for name, held in skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    names = gguf.get_tensor_name_map(_architecture(family), config.num_hidden_layers)
    for name in wanted:
        layer, _, end = name.rpartition(".")
        is_known = names.get_name(name, (".weight", ".bias")) is not None
        if end == "bias" and family.biases is not None:
            is_known = is_known and layer.rpartition(".")[2] in family.biases
        if not is_known:
            raise _refused(source, f"its tensor {name} has no place in a GGUF file of its family")

    # What is left at the hub, in a dry run, has the type that the configuration names.
    are_there = fetch_weights(source.path)
    stored = tensor_infos(source.path) if are_there else {}
    default = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(config.dtype, "f32")
    forms = {}
    for name, shape in sorted(wanted.items()):
        found = stored.get(name)
        if are_there and (found is None or found.shape != shape):
            what = "is missing" if found is None else f"has the shape {list(found.shape)}"
            raise CheckpointError(
                f"{source}: the tensor {name} {what}, and config.json asks for {list(shape)}; copy "
                "the model again."
            )
        own = default if found is None else _STORED.get(found.dtype, "f32")
        kind = own if outtype == "auto" else outtype
        forms[name] = (shape, "f32" if len(shape) == 1 else kind)
    return forms


def _require_room(output: Path, size: int) -> None:
    """Require the bytes of the weights to be free where the file will be.

    Raises:
        ConfigError: If they are not.
    """
    free = free_bytes(output.parent)
    if size > free:
        raise ConfigError(
            f"{output} takes {as_size(size)}, and {as_size(free)} are free there; name another "
            "output, or give --outtype bf16 where the weights are float32."
        )


def _ends(source: Source, config: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end a response, those of the tokenizer first."""
    file = source.path / "generation_config.json"
    own = (read_json(file) if file.is_file() else {}).get("eos_token_id")
    ends = dict.fromkeys([*stop_ids(tokenizer), *(own if isinstance(own, list) else [own])])
    return [end for end in ends if end is not None and end < config.vocab_size]


def _vocabulary_of(source: Source, config: Any, tokenizer: Any) -> _Vocabulary:
    """Return a tokenizer as GGUF has it.

    Raises:
        UnsupportedModelError: If it is no byte-level BPE whose rules llama.cpp has.
    """
    if not tokenizer.is_fast:
        raise _refused(source, f"its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _split_of(source, parts)
    tokens, types = _rows(source, config, tokenizer)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]
    ]

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins, ends = whole[:1] == [bos], whole[-1:] == [eos]
    if whole != [bos] * begins + plain + [eos] * ends:
        raise _refused(source, f"its tokenizer puts other tokens around a text: {whole}")

    special = _special(source, config, tokenizer)
    return _Vocabulary(split, tokens, types, merges, special, begins, ends)


def _split_of(source: Source, parts: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits a text.

    Args:
        source: The model, for messages.
        parts: The content of tokenizer.json.
    """
    model = parts["model"]
    if model["type"] == "WordLevel":
        raise UnsupportedModelError(
            f"{source}: its tokenizer is WordLevel (whole words), and llama.cpp has none of that "
            "kind, so it could not read the file; serve the model with flexalign serve."
        )
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece's" if model["type"] == "BPE" else model["type"]
        raise _refused(source, f"its tokenizer is {kind}, and only byte-level BPE is written here")
    changes = [step["type"] for step in _steps(parts["normalizer"], "normalizers")]
    if set(changes) - {"NFC"}:
        raise _refused(source, f"its tokenizer changes texts ({', '.join(changes)})")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(source, "its tokenizer marks the ends of words, which is no byte-level BPE")

    *first, last = _steps(parts["pre_tokenizer"], "pretokenizers") or [{"type": "none"}]
    words_first = bool(model.get("ignore_merges"))
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if not last["use_regex"]:
            patterns = tuple(map(_pattern_of, first))
            if (patterns, words_first) in _SPLITS:
                return _SPLITS[patterns, words_first]
        elif not words_first and not first:
            return "gpt-2"
        elif not words_first and first == [{"type": "Digits", "individual_digits": True}]:
            return "smollm"
    raise _refused(source, "its tokenizer splits texts by a rule that is not known here")


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json, which may be a sequence, one step or none."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _pattern_of(step: dict[str, Any]) -> str | None:
    """Return the regular expression whose matches a step makes words of their own."""
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return None
    found: str | None = step["pattern"].get("Regex")
    return found


def _rows(source: Source, config: Any, tokenizer: Any) -> tuple[list[str], list[int]]:
    """Return the text and the type of each row of the embedding.

    llama.cpp leaves control tokens out of what it shows. Thinking tags are shown, also where the
    tokenizer calls them special, because clients look for them in the text.

    An added token without a row is left out: the model knows no such token. transformers adds
    ``<|endoftext|>`` to Qwen's tokenizers that do not have it.

    Raises:
        CheckpointError: If another token has no row.
        UnsupportedModelError: If an added token takes the white space beside it.
    """
    import gguf

    kinds = gguf.TokenType
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    rows = config.vocab_size
    largest = max((row for row in vocabulary.values() if row not in added), default=-1)
    if largest >= rows:
        raise CheckpointError(
            f"{source}: its tokenizer has the id {largest}, and the model has {rows} rows of "
            "embeddings; copy the model again."
        )
    tags = ThinkingTags.detect(tokenizer)
    shown = () if tags is None else (tags.open, tags.close)

    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(kinds.UNUSED)] * rows
    for token, row in vocabulary.items():
        if row < rows:
            tokens[row], types[row] = token, int(kinds.NORMAL)
    for row, token in added.items():
        if row >= rows:
            continue
        if token.lstrip or token.rstrip or token.single_word:
            raise _refused(source, f"its token {token.content!r} takes the white space beside it")
        looks_special = token.content.startswith("<|") and token.content.endswith("|>")
        is_control = (token.special or looks_special) and token.content not in shown
        types[row] = int(kinds.CONTROL if is_control else kinds.USER_DEFINED)
    return tokens, types


def _special(source: Source, config: Any, tokenizer: Any) -> dict[str, int]:
    """Return ids by their role in GGUF.

    A response may end with several tokens, and GGUF has three roles for them: the end of the text,
    of the turn and of the message. llama.cpp stops at each.
    """
    ends = _ends(source, config, tokenizer)
    if tokenizer.eos_token_id in ends:
        ends.remove(tokenizer.eos_token_id)
        ends.insert(0, tokenizer.eos_token_id)
    if len(ends) > 3:
        raise _refused(source, f"it ends a response with {len(ends)} tokens, and GGUF names three")
    roles = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    known = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}
    known["unk"] = tokenizer.unk_token_id
    rows = config.vocab_size
    return roles | {
        role: token for role, token in known.items() if token is not None and token < rows
    }
