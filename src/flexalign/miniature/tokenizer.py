"""The miniature's tokenizer, a transformers one: each word, number or sign is one token."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexalign.miniature.world import LARGEST_NUMBER, TERMS

_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
_WORDS = ["<think>", "</think>", "check", "again", "+", "=", "?", ";"]
_LABELS = [f"#{line}" for line in range(1, max(TERMS))]

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""A question, followed by its trace; ``<think>`` is part of the trace, not of the prompt."""


def build_tokenizer(context_tokens: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer: each number from 0 to 49 is one token; white space is ignored.

    Args:
        context_tokens: The model's longest context.
    """
    vocabulary = _SPECIAL + _WORDS + _LABELS + [str(number) for number in range(LARGEST_NUMBER + 1)]
    backend = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"</?[a-z]+>|#?[0-9]+|[a-z]+|."), behavior="isolated"),
        ]
    )

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
