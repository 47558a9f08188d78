"""Weights between two models: (1−λ)·θ_ref + λ·θ_al, one file at a time.

Two models of one architecture may differ in four ways that the result settles, and says:

- *Names of special tokens*, if they are read by id: the reference's tokenizer is used.
- *Tied and untied embeddings*: the result is untied. The head of a tied model is its embedding.
- *Width*: rows of the embedding and of the head that both have are interpolated. Rows that only the
  reference has (its padding, or tokens of its own) stay as they are at every λ. Rows that only the
  aligned model has are left out. The result is as wide as the reference.
- *Length*, ``max_position_embeddings``, where positions are plain rotations: the reference's.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexalign._storage import replacing, write_json
from flexalign.errors import ConfigError, LambdaError, PairMismatchError
from flexalign.fusion import as_lambda
from flexalign.models.compatibility import (
    RenamedToken,
    compare_tokens,
    describe_renamed,
    renamed_tokens,
)
from flexalign.models.loading import (
    has_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
)
from flexalign.models.sources import Model, Source, read_json, resolve
from flexalign.models.weights import TensorInfo, tensor_infos, write_tensors

RECORD = "interpolation.json"
"""The file that says how differences of the two models were settled; absent if there were none."""

_MIX_LOGITS = "Mix their logits instead, with pair:REF,ALIGNED (in Python, TwoModelDecoder)."

_OF_NO_MATTER = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
"""Entries of a configuration that may differ: shapes and the meaning of weights do not depend on them."""

_SETTLED = {"tie_word_embeddings", "vocab_size"}
"""Entries that may differ because the tensors say what is to be done."""

_TIE, _LENGTH = "tie_word_embeddings", "max_position_embeddings"

_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth", RECORD)


class _Part(NamedTuple):
    """A tensor of one model, by the name that its file has it under."""

    name: str
    info: TensorInfo


@dataclass(frozen=True)
class _Settled:
    """How the differences of two models were settled.

    Attributes:
        renamed: The special tokens that were read by id.
        extra: Tokens that one of the two tokenizers has alone, by name.
        untied: Whether a head was written beside an embedding that one of the two ties it to.
        widths: Rows of the reference's and the aligned model's embedding, if they differ.
        lengths: The largest numbers of positions of both, if they differ.
    """

    renamed: tuple[RenamedToken, ...]
    extra: tuple[str, ...]
    untied: bool
    widths: tuple[int, int] | None
    lengths: tuple[int, int] | None

    def notes(self) -> Iterator[str]:
        """Yield a sentence for each difference."""
        if self.renamed:
            yield describe_renamed(self.renamed, "reference")
        if self.extra:
            shown = ", ".join(map(repr, self.extra[:3])) + (", …" if len(self.extra) > 3 else "")
            yield f"{len(self.extra)} tokens are in one of the two tokenizers alone ({shown})."
        if self.untied:
            yield "one of the two ties its head to its embedding; the result's are untied."
        if self.widths is not None:
            one, other = self.widths
            kept = f"the last {one - other} are the reference's"
            left = f"the aligned model's last {other - one} are left out"
            yield (
                f"the embedding has {one} rows in the reference and {other} in the aligned model; "
                f"{min(one, other)} are interpolated, and {kept if one > other else left}."
            )
        if self.lengths is not None:
            one, other = self.lengths
            yield f"{_LENGTH} is {one}, the reference's; it is {other} in the aligned model."

    def to_json(self) -> dict[str, Any]:
        """Return what was settled, by name; empty if nothing was."""
        named = {
            "renamed": [token._asdict() for token in self.renamed],
            "extra_tokens": list(self.extra),
            "untied": self.untied,
            "rows": self.widths and dict(zip(("reference", "aligned"), self.widths, strict=True)),
            _LENGTH: self.lengths
            and dict(zip(("reference", "aligned"), self.lengths, strict=True)),
        }
        return {name: value for name, value in named.items() if value}


def interpolate(
    reference: Model, aligned: Model, lam: float, output: str | Path, *, by_id: bool = False
) -> Path:
    """Write a model whose weights are between those of two models, or beyond one of them.

    Every tensor is (1−λ)·θ_ref + λ·θ_al, computed in float32 and stored in its own data type
    (in float32 where the two differ). λ=0 and λ=1 give the two models' values bit for bit. One
    file of the reference is in memory at a time; a GGUF file or a PEFT adapter is first written
    as a whole model (the adapter merged into its base). The rest of the folder is copied from the
    reference: configuration, tokenizer, chat template.

    The two may differ in the names of special tokens, in tying, in width and in length. How each
    is settled is described at the top of this module, printed on stderr, and written to
    ``interpolation.json`` in the output.

    Args:
        reference: The model of λ=0.
        aligned: The model of λ=1, of the same architecture and sizes, or a PEFT adapter.
        lam: Any finite λ.
        output: The folder to write; it must not exist, or must be empty. Nothing appears under
            this name before all of it is written.
        by_id: Special tokens may have other names in the aligned model, at equal ids: each id is
            taken for one token of both, and the reference's name is used.

    Returns:
        The folder.

    Raises:
        LambdaError: If λ is not a finite number.
        ConfigError: If a model does not exist, or the output is not empty.
        PairMismatchError: If the two differ in what a token id means, in tensors, in other shapes,
            or in a configuration that changes what weights mean.
    """
    lam = _number(lam)
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; move it away or name another output.")

    with ExitStack() as stack:
        first, second = (
            stack.enter_context(_as_folder(resolve(model))) for model in (reference, aligned)
        )
        names = f"{reference} and {aligned}"

        configs = [load_config(Source(str(folder), folder)) for folder in (first, second)]
        lengths = _require_one_meaning(configs, names)
        widths = _widths(configs)
        renamed, extra = _compare_tokenizers((first, second), widths, names, by_id=by_id)
        tensors = [tensor_infos(folder) for folder in (first, second)]
        pairs, untied = _paired(tensors, configs, names)
        _require_shapes(pairs, widths, names)
        settled = _Settled(renamed, extra, untied, widths, lengths)

        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as written:
            _write(first, pairs, lam, written)
            if untied:
                _untie(written / "config.json")
            if told := settled.to_json():
                ends = {"reference": str(reference), "aligned": str(aligned), "lambda": lam}
                write_json(written / RECORD, ends | told)
    for note in settled.notes():
        print(f"note: {note}", file=sys.stderr)
    return output


def _number(lam: object) -> float:
    value = as_lambda(lam)
    if isinstance(value, Tensor):
        raise LambdaError("weights are interpolated at one λ; give a number.")
    return value


@contextmanager
def _as_folder(source: Source) -> Iterator[Path]:
    """Yield a model's folder of safetensors; another format is written to a temporary folder."""
    load_config(source)
    if source.gguf_file is None and not source.is_adapter:
        yield source.path
        return

    with TemporaryDirectory(prefix="flexalign-") as scratch:
        model: Any = load_model(source)
        if source.is_adapter:
            model = model.merge_and_unload()
        model.save_pretrained(scratch)
        load_tokenizer(source).save_pretrained(scratch)
        del model
        yield Path(scratch)


# What the two may differ in, and what not.


def _require_one_meaning(configs: Sequence[Any], names: str) -> tuple[int, int] | None:
    """Compare two configurations.

    Returns:
        Both numbers of positions, if they differ and weights do not depend on them.
    """
    one, other = (dict(_entries(config.to_dict())) for config in configs)
    # An entry that is absent in one is a switch that the other has off.
    different = {
        key: (one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key) and not (one.get(key) in _OFF and other.get(key) in _OFF)
    }
    lengths: Any = None
    if _rotates_plainly(one) and _rotates_plainly(other):
        lengths = different.pop(_LENGTH, None)
    # Which layers have a window is what `layer_types` says.
    if "layer_types" in one and "layer_types" in other:
        different.pop("max_window_layers", None)

    if different:
        details = "; ".join(f"{key}: {a!r} and {b!r}" for key, (a, b) in different.items())
        raise PairMismatchError(
            f"{names} are not of one shape ({details}); weights can be interpolated only between "
            f"models of one architecture. {_MIX_LOGITS}"
        )
    return None if lengths is None else (int(lengths[0]), int(lengths[1]))


_OFF = (None, False)


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a configuration that must be equal; those of a part as ``part.entry``."""
    for key, value in config.items():
        if key in _OF_NO_MATTER or key in _SETTLED:
            continue
        if key.endswith("_config") and isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rotates_plainly(entries: Mapping[str, Any]) -> bool:
    """Whether positions are rotations whose angles do not depend on the number of positions."""
    parameters = entries.get("rope_parameters")
    return isinstance(parameters, Mapping) and parameters.get("rope_type") == "default"


def _widths(configs: Sequence[Any]) -> tuple[int, int] | None:
    """Return how many rows both embeddings have; None if as many."""
    one, other = (int(config.get_text_config().vocab_size) for config in configs)
    return None if one == other else (one, other)


def _compare_tokenizers(
    folders: Sequence[Path], widths: tuple[int, int] | None, names: str, *, by_id: bool
) -> tuple[tuple[RenamedToken, ...], tuple[str, ...]]:
    """Check that no id is of two tokens.

    A folder without a tokenizer is not compared, unless the widths differ: what the rows are of is
    then not known.

    Returns:
        The special tokens that are read by id, and the tokens that one of the two has alone.
    """
    sources = [Source(str(folder), folder) for folder in folders]
    if widths is None and not all(map(has_tokenizer, sources)):
        return (), ()
    one, other = map(load_tokenizer, sources)
    problem, extra = compare_rows(one, other, by_id=by_id)
    if problem is not None:
        raise PairMismatchError(f"{names} do not fit: {problem}")
    return renamed_tokens(one, other) if by_id else (), extra


def compare_rows(
    reference: PreTrainedTokenizerBase, aligned: PreTrainedTokenizerBase, *, by_id: bool = False
) -> tuple[str | None, tuple[str, ...]]:
    """Compare what the rows of two embeddings are of.

    Unlike logits, rows can be interpolated where one tokenizer has tokens that the other has not,
    as long as no id is of two tokens.

    Args:
        reference: The reference's tokenizer.
        aligned: The aligned model's.
        by_id: As in `interpolate`.

    Returns:
        How they do not fit, None if they do; and the tokens that one of the two has alone.
    """
    problem = compare_tokens(reference, aligned, by_id=by_id)
    if problem is None:
        return None, ()
    ids, others = reference.get_vocab(), aligned.get_vocab()
    alone = [name for name, _ in sorted(ids.items() ^ others.items(), key=lambda item: item[1])]
    shared = set(ids.values()) & set(others.values())
    if any((ids | others)[name] in shared for name in alone):
        return problem, ()
    return None, tuple(alone)


def _paired(
    tensors: list[dict[str, TensorInfo]], configs: list[Any], names: str
) -> tuple[dict[str, tuple[_Part, _Part]], bool]:
    """Return the tensors of both by name, and whether a tied head was untied.

    A tied head that one of the two stores all the same is left out, if it equals its embedding.
    """
    parts = [{name: _Part(name, info) for name, info in infos.items()} for infos in tensors]
    untied = _settle_heads(parts, configs, names)
    reference, aligned = parts
    alone = reference.keys() ^ aligned.keys()
    if alone:
        first = min(alone)
        where = "the reference" if first in reference else "the aligned model"
        raise PairMismatchError(
            f"{names} have other tensors: {first} is in {where} alone"
            + (f", and {len(alone) - 1} more" if len(alone) > 1 else "")
            + ". Give two models of one architecture."
        )
    return {name: (part, aligned[name]) for name, part in reference.items()}, untied


def _settle_heads(parts: list[dict[str, _Part]], configs: Sequence[Any], names: str) -> bool:
    """Add or remove tied heads, in place, so that both models store one or neither does.

    Returns:
        Whether a tied head was untied.
    """
    tied = [bool(config.get_text_config().tie_word_embeddings) for config in configs]
    if not any(tied):
        return False

    embedding, head = _ends(configs[0])
    for held, is_tied in zip(parts, tied, strict=True):
        if is_tied and head in held:
            held.setdefault(embedding, held[head])  # stored under the head's name alone
    own = [
        not is_tied or (head in held and not _equal(held[head], held[embedding]))
        for held, is_tied in zip(parts, tied, strict=True)
    ]
    untied = any(own)
    if untied and not all(embedding in held for held in parts):
        raise PairMismatchError(
            f"{names}: one ties its head to its embedding, and {embedding or 'no embedding'} is "
            f"not stored in both. {_MIX_LOGITS}"
        )

    is_stored = all(head in held for held in parts)
    for held, has_own in zip(parts, own, strict=True):
        if untied and not has_own:
            held[head] = held[embedding]
        elif not untied and not is_stored:
            held.pop(head, None)
    return untied


def _ends(config: Any) -> tuple[str, str]:
    """Return the names that files have the embedding and the head under; empty if there is none."""
    from transformers.core_model_loading import revert_weight_conversion

    model = skeleton(config)
    modules = {module: name for name, module in model.named_modules()}

    def stored_name(module: Any) -> str:
        if module not in modules:
            return ""
        # In some families the names in the module differ from those in the file.
        held = {f"{modules[module]}.weight": module.weight}
        return str(next(iter(revert_weight_conversion(model, held))))

    return stored_name(model.get_input_embeddings()), stored_name(model.get_output_embeddings())


def _equal(one: _Part, other: _Part) -> bool:
    with ExitStack() as stack:
        reading = _TensorReader(stack)
        return torch.equal(reading.read(one), reading.read(other))


def _require_shapes(
    pairs: Mapping[str, tuple[_Part, _Part]], widths: tuple[int, int] | None, names: str
) -> None:
    """Check that shapes are equal, but for the rows of the vocabulary where the widths differ."""
    for name, parts in pairs.items():
        one, other = (part.info.shape for part in parts)
        is_vocabulary = widths is not None and (one[:1], other[:1]) == (widths[:1], widths[1:])
        if one != other and not (is_vocabulary and one[1:] == other[1:]):
            raise PairMismatchError(
                f"{names}: {name} is {one} in the reference and {other} in the "
                f"aligned model. {_MIX_LOGITS}"
            )


# The new folder.


def _write(
    reference: Path, pairs: Mapping[str, tuple[_Part, _Part]], lam: float, output: Path
) -> None:
    """Write a copy of the reference's folder with the new weights, in files of the same names."""
    output.mkdir()
    for path in reference.iterdir():
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, output / path.name)  # not the permissions of the reference

    by_file: dict[Path, list[str]] = {}
    for name, (one, _) in pairs.items():
        by_file.setdefault(one.info.file, []).append(name)

    size = 0
    places: dict[str, str] = {}
    for file, names in by_file.items():
        with ExitStack() as stack:
            reading = _TensorReader(stack)
            tensors = {}
            for name in names:
                reference_part, aligned_part = pairs[name]
                tensors[name] = _between(
                    reading.read(reference_part), reading.read(aligned_part), lam, name
                )
        write_tensors(output / file.name, tensors)
        size += sum(tensor.nbytes for tensor in tensors.values())
        places |= dict.fromkeys(names, file.name)

    if len(by_file) > 1 or "model.safetensors" not in places.values():
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


class _TensorReader:
    """Reads tensors; each file is opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def read(self, part: _Part) -> Tensor:
        file = part.info.file
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(file, "pt"))
        tensor: Tensor = self._files[file].get_tensor(part.name)
        return tensor


def _untie(file: Path) -> None:
    """Write into a configuration that the head is a matrix of its own."""
    config = read_json(file)
    config[_TIE] = False
    text = config.get("text_config")
    if isinstance(text, dict):
        text[_TIE] = False
    write_json(file, config)


def _between(reference: Tensor, aligned: Tensor, lam: float, name: str) -> Tensor:
    """Interpolate one tensor; rows of the reference alone stay, those of the aligned one go."""
    if reference.shape != aligned.shape:
        rows = min(len(reference), len(aligned))
        shared = _between(reference[:rows], aligned[:rows], lam, name)
        return torch.cat([shared, reference[rows:].to(shared.dtype)])
    if lam in (0.0, 1.0):
        return (aligned if lam else reference).clone()
    if not reference.is_floating_point():
        if torch.equal(reference, aligned):
            return reference.clone()
        raise PairMismatchError(
            f"{name} holds whole numbers and differs between the two; there is nothing between."
        )

    dtype = torch.promote_types(reference.dtype, aligned.dtype)
    working = torch.promote_types(dtype, torch.float32)
    stored = reference.dtype if reference.dtype == aligned.dtype else working
    return torch.lerp(reference.to(working), aligned.to(working), lam).to(stored)
