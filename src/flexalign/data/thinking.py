"""Thinking tags: the texts around a response's thinking, and how a response is split by them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flexalign.data.template import REASONING_KEYS, bound_thinking, reasoning_of, shape_of
from flexalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Split(NamedTuple):
    """A response in two parts.

    Attributes:
        thinking: The text between the tags, without them; of several thinkings, all.
        answer: The rest of the text; empty if the first thinking has no closing tag.
        closed: Whether every thinking has its closing tag.
    """

    thinking: str
    answer: str
    closed: bool


@dataclass(frozen=True)
class ThinkingTags:
    """The two tags around a model's thinking.

    A tag is any text: ``<think>``, or the beginning of a channel that is several tokens long.

    Attributes:
        open: The opening tag.
        close: The closing tag.
    """

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self) -> None:
        """Check that the tags are two different texts."""
        if not self.open or not self.close or self.open == self.close:
            raise ConfigError(
                f"thinking tags must be two different texts, got {self.open!r} and {self.close!r}."
            )

    @classmethod
    def detect(cls, tokenizer: "PreTrainedTokenizerBase") -> "ThinkingTags | None":
        """Find the tags around a model's thinking.

        The sources, in order: the markers bound to the tokenizer (a recipe's `thinking`); the
        texts that its chat template renders around a thinking; a known pair whose closing tag is
        in the chat template; a known pair whose closing tag is a token of the vocabulary.

        Returns:
            The first pair found; None if there is none.
        """
        bound = bound_thinking(tokenizer)
        if bound is not None:
            return cls(*bound)

        template = tokenizer.chat_template or ""
        rendered = template if isinstance(template, str) else " ".join(template.values())
        if template and (shown := _shown_by_rendering(tokenizer)):
            return shown

        vocabulary = tokenizer.get_vocab()
        named = [tags for tags in _KNOWN if tags.close in rendered]
        known = named + [tags for tags in _KNOWN if tags.close in vocabulary]
        return known[0] if known else None

    @property
    def answer(self) -> str:
        """The text before an answer without thinking; empty for most tags.

        It is not empty only for a closing tag that ends one assistant message and begins the next:
        it is then the part of that tag after the next message's role.
        """
        return (
            self.close.rpartition(_NEXT_MESSAGE)[2].strip() if _NEXT_MESSAGE in self.close else ""
        )

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "ThinkingTags":
        """Return the tags that a tokenizer shows, else ``<think>`` and ``</think>``."""
        return cls.detect(tokenizer) or cls()

    def opened_by(self, prompt: str) -> bool:
        """Return whether a rendered prompt ends inside a thinking, with the tag not closed."""
        return prompt.rfind(self.open) > prompt.rfind(self.close)

    def split(self, text: str, *, opened: bool = False) -> Split:
        """Split a response into its thinking and its answer.

        What stands between an opening and a closing tag is thinking, wherever it stands and however
        often; the rest is the answer. A closing tag before any opening one also ends a thinking,
        because many chat templates put the opening tag into the prompt. A tag without its partner
        in what follows is text, unless it begins the response.

        Args:
            text: The response.
            opened: Whether the prompt has opened the tag. If not, a response with neither tag is
                an answer.
        """
        thinking, answer = "", ""
        inside = opened
        if not opened:
            text = self.begun(text)
            before, closed, after = text.partition(self.close)
            if text.startswith(self.open):
                inside, text = True, text.removeprefix(self.open)
            elif closed and self.open not in before:
                thinking, text = before.lstrip(), after

        # After a tag in the prompt the thinking keeps the white space at its beginning.
        while text:
            part, found, rest = text.partition(self.close if inside else self.open)
            if inside:
                thinking, text, inside = thinking + part, rest, not found
            elif self.close in rest:
                answer, text, inside = answer + part, rest, True
            else:
                answer, text = answer + text, ""
        return Split(thinking, answer, not inside)

    def begun(self, text: str) -> str:
        """Return a response without what stands before its first text.

        That is white space before an opening tag, or the mark before an answer without thinking
        (:attr:`answer`).
        """
        start = text.lstrip()
        if start.startswith(self.open):
            return start
        if self.answer and start.startswith(self.answer):
            return start.removeprefix(self.answer)
        return text

    def count_tokens(
        self, text: str, tokenizer: "PreTrainedTokenizerBase", *, opened: bool = False
    ) -> int:
        """Count the tokens of a response's thinking, without the tags."""
        thinking = self.split(text, opened=opened).thinking
        return len(tokenizer(thinking, add_special_tokens=False)["input_ids"])


_NEXT_MESSAGE = "<|start|>assistant"
"""The token and role that begin an assistant message in the Harmony format (gpt-oss)."""

_KNOWN = (
    ThinkingTags(),
    ThinkingTags("<thinking>", "</thinking>"),
    ThinkingTags("[THINK]", "[/THINK]"),
    ThinkingTags("<|begin_of_thought|>", "<|end_of_thought|>"),
    ThinkingTags("<seed:think>", "</seed:think>"),
    ThinkingTags("<reasoning>", "</reasoning>"),
    ThinkingTags("<|channel>thought", "<channel|>"),
    ThinkingTags(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
)


def _shown_by_rendering(tokenizer: "PreTrainedTokenizerBase") -> ThinkingTags | None:
    """Read the tags from a rendered conversation whose thinking is given beside the content."""
    try:
        shape = shape_of(tokenizer)
    except Exception:  # a template is a program; one that fails shows nothing
        return None
    if shape.thinking_end is None or not (close := shape.thinking_end.strip()):
        return None
    opened = (shape.thinking_start or "").strip()
    if not opened:
        # The prompt has opened the thinking, or opened and closed it: the tag is in the opening.
        known = next((tags.open for tags in _KNOWN if tags.close == close), None)
        ids = tokenizer(shape.opening.partition(close)[0].rstrip(), add_special_tokens=False)
        last = ids["input_ids"][-1:]
        opened = known or str(tokenizer.decode(last)).strip()
    return ThinkingTags(opened, close) if opened and opened != close else None


def text_after_closing(tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags) -> str:
    """Return the text that a chat template writes between the closing tag and the answer.

    It is white space in most templates. It is empty if the template shows no thinking.
    """
    if not tokenizer.chat_template:
        return ""
    try:
        shape = shape_of(tokenizer)
    except Exception:  # a template is a program; one that fails shows nothing
        return ""
    return (shape.thinking_end or "").partition(tags.close)[2]


# Responses without their thinking, the training data of InRa's fast stream.


def strip_thinking(dataset: "Dataset", tags: ThinkingTags | None = None) -> "Dataset":
    """Remove the thinking from every response (the training data of InRa's fast stream).

    Rows whose thinking has no end have no answer and are left out. Rows without thinking are not
    changed. The columns `response_ids` and `rendering` are removed, because they describe the
    response as it was sampled; the answers are rendered and tokenized again.

    Args:
        dataset: Prompts and completions, as `load_traces` returns them.
        tags: The tags to look for; `<think>` and `</think>` if not given.

    Returns:
        A data set of the rows that have an answer.

    Raises:
        DataError: If no row has a closing tag or a thinking beside its content, or no row has an
            answer.
    """
    tags = tags or ThinkingTags()
    rows = dataset.to_list()
    texts = [_response_text(row["completion"]) for row in rows]
    apart = [_has_thinking_apart(row["completion"]) for row in rows]
    if not any(apart) and not any(_closed_in(text, tags) for text in texts):
        raise DataError(
            f"no response of the {len(dataset)} has the thinking tag {tags.close!r}; "
            "leave strip_thinking out, or give traces that think."
        )

    # A truncated response without a closing tag may be all thinking, after a tag in the prompt.
    answered = [
        index
        for index, text in enumerate(texts)
        if (split_any(text, tags).answer.strip() or _calls_tools(rows[index]["completion"]))
        and not (rows[index].get("truncated") and not _closed_in(text, tags) and not apart[index])
    ]
    if not answered:
        raise DataError(f"no response of the {len(dataset)} has text after {tags.close!r}.")

    sampled = [name for name in _SAMPLED if name in dataset.column_names]
    return (
        dataset.select(answered)
        .map(
            lambda row: {"completion": _answer_only(row["completion"], tags)},
            load_from_cache_file=False,
        )
        .remove_columns(sampled)
    )


_SAMPLED = ("response_ids", "rendering")
"""Columns of a data set that describe the response as it was sampled."""


def split_any(text: str, tags: ThinkingTags, *, opened: bool = False) -> Split:
    """Split a response by a model's tags, or, if it has none of them, by ``<think>``.

    Responses of another model may have other tags, and may begin with an opening tag that the
    prompt also has; `opened` is then ignored.
    """
    default = ThinkingTags()
    is_foreign = not _shows(text, tags) and _shows(text, default)
    chosen = default if is_foreign else tags
    return chosen.split(text, opened=opened and not text.lstrip().startswith(chosen.open))


def _shows(text: str, tags: ThinkingTags) -> bool:
    """Return whether a response has a thinking in these tags."""
    return tags.close in text or text.lstrip().startswith(tags.open)


def _closed_in(text: str, tags: ThinkingTags) -> bool:
    """Return whether a response has the closing tag, the model's or ``</think>``."""
    return tags.close in text or ThinkingTags().close in text


def _response_text(completion: str | list[dict[str, Any]]) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _has_thinking_apart(completion: str | list[dict[str, Any]]) -> bool:
    """Return whether a response's message carries its thinking beside the content."""
    return not isinstance(completion, str) and bool(reasoning_of(completion[-1]))


def _calls_tools(completion: str | list[dict[str, Any]]) -> bool:
    """Return whether a response's message calls tools, which is an answer without text."""
    return not isinstance(completion, str) and bool(completion[-1].get("tool_calls"))


def _answer_only(completion: Any, tags: ThinkingTags) -> Any:
    if isinstance(completion, str):
        return split_any(completion, tags).answer.lstrip()
    *earlier, last = completion
    answer = split_any(last["content"], tags).answer.lstrip()
    kept = {key: value for key, value in last.items() if key not in REASONING_KEYS}
    return [*earlier, {**kept, "content": answer}]
