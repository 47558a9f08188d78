"""How long the rows are, in tokens, and what a cut-off does to them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from flexalign.data.rendering import check_rendering, render_chat
from flexalign.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Lengths", "measure_lengths", "split_tokens"]


@dataclass(frozen=True)
class Lengths:
    """The lengths of a data set's rows, in tokens.

    Attributes:
        rows: Rows measured.
        kept: Rows of which at least one response token lies within the cut-off.
        truncated: Of those, the rows whose response the cut-off shortens.
        prompt_tokens: All prompt tokens within the cut-off.
        response_tokens: All response tokens within the cut-off: what the loss counts.
        longest: Tokens of the longest row, before the cut-off.
        shortest: Tokens of the shortest row, before the cut-off.
    """

    rows: int
    kept: int
    truncated: int
    prompt_tokens: int
    response_tokens: int
    longest: int
    shortest: int

    def to_json(self) -> dict[str, int]:
        """The figures by name, for JSON."""
        return asdict(self)


def measure_lengths(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> Lengths:
    """Count tokens as TRL's trainer will: with the chat template, or plain text with EOS.

    Args:
        dataset: Prompts and completions, as `load_traces` returns them.
        tokenizer: The model's own.
        max_length: The cut-off in tokens, prompt and response together; None for none.

    Raises:
        DataError: If no row fits the cut-off whole, or if the chat template leaves a part of a
            response out.
    """
    if len(dataset) == 0:
        raise DataError("the data set is empty; nothing to work on.")
    parts = split_tokens(dataset, tokenizer)
    sizes = [(len(prompt), len(response)) for prompt, response in parts]
    lengths = [prompt + response for prompt, response in sizes]
    cut = max_length if max_length is not None else max(lengths)
    if min(lengths) > cut:
        raise DataError(
            f"all {len(sizes)} rows are longer than the cut-off of {cut} tokens "
            f"(the shortest has {min(lengths)}, the longest {max(lengths)}); "
            "raise max_length or use shorter data."
        )
    return Lengths(
        rows=len(sizes),
        kept=sum(prompt < cut for prompt, _ in sizes),
        truncated=sum(prompt < cut < prompt + response for prompt, response in sizes),
        prompt_tokens=sum(min(prompt, cut) for prompt, _ in sizes),
        response_tokens=sum(max(min(prompt + size, cut) - prompt, 0) for prompt, size in sizes),
        longest=max(lengths),
        shortest=min(lengths),
    )


def split_tokens(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokenize rows as TRL's trainer will, and split each into prompt and response.

    Args:
        dataset: As in `measure_lengths`.
        tokenizer: The model's own.

    Yields:
        The prompt's token ids (which the loss leaves out) and the response's (which it counts).

    Raises:
        DataError: If the chat template leaves a part of a response out.
    """
    from trl.data_utils import common_prefix_length

    for number, row in enumerate(dataset, start=1):
        if isinstance(row["prompt"], str):
            eos = tokenizer.eos_token or ""
            prompt = _token_ids(tokenizer, row["prompt"])
            whole = _token_ids(tokenizer, row["prompt"] + row["completion"].removesuffix(eos) + eos)
        else:
            rendered = render_chat(tokenizer, row["prompt"] + row["completion"])
            check_rendering(number, rendered, row["completion"])
            opening = render_chat(tokenizer, row["prompt"], add_generation_prompt=True)
            prompt = _token_ids(tokenizer, opening, add_special_tokens=False)
            whole = _token_ids(tokenizer, rendered, add_special_tokens=False)
        start = common_prefix_length(prompt, whole)
        yield whole[:start], whole[start:]


def _token_ids(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool = True
) -> list[int]:
    return cast("list[int]", tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
