"""Whether two models speak of the same tokens: comparisons of tokenizers and of widths."""

from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = [
    "compare_ends",
    "compare_templates",
    "compare_tokens",
    "shared_width",
    "vocabulary_size",
]

_SHOWN = 3
_CONVERSATION = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that a tokenizer knows: its largest id, plus 1."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return max(ids.values()) + 1


def compare_tokens(
    reference: PreTrainedTokenizerBase, aligned: PreTrainedTokenizerBase
) -> str | None:
    """Say where the two token→id maps differ, naming the first tokens; None if nowhere."""
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
    """Say, with both renderings, how the chat templates differ; None if they do not."""
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
    """Return the number of tokens that two models share, and what to say of it.

    Args:
        reference: Width of the reference's logits.
        aligned: Width of the aligned model's logits.
        vocabulary: Tokens that the tokenizer knows.
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
