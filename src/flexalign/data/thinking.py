"""Thinking tags: where a response's thinking ends and its answer begins."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flexalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Split(NamedTuple):
    """A response in two parts.

    Attributes:
        thinking: What stands between the tags, without them.
        answer: What stands after the closing tag; the whole text if there is no thinking; empty
            if the thinking never ends.
        closed: Whether the thinking, if there is any, has its closing tag.
    """

    thinking: str
    answer: str
    closed: bool


@dataclass(frozen=True)
class ThinkingTags:
    """The two tags around a model's thinking.

    Attributes:
        open: The opening tag.
        close: The closing tag.
    """

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self) -> None:
        """Check that the two can be told apart."""
        if not self.open or not self.close or self.open == self.close:
            raise ConfigError(
                f"thinking tags must be two different texts, got {self.open!r} and {self.close!r}."
            )

    @classmethod
    def detect(cls, tokenizer: "PreTrainedTokenizerBase") -> "ThinkingTags | None":
        """Find the tags that a tokenizer has as tokens, or names in its chat template.

        Returns:
            The first known pair found, or None if the model shows no sign of thinking.
        """
        template = tokenizer.chat_template or ""
        rendered = template if isinstance(template, str) else " ".join(template.values())
        vocabulary = tokenizer.get_vocab()
        for tags in _KNOWN:
            if tags.close in vocabulary or tags.close in rendered:
                return tags
        return None

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "ThinkingTags":
        """Return the tags that a tokenizer shows, else ``<think>`` and ``</think>``."""
        return cls.detect(tokenizer) or cls()

    def opened_by(self, prompt: str) -> bool:
        """Whether a rendered prompt leaves the tag open, so that the response starts inside it."""
        return prompt.rfind(self.open) > prompt.rfind(self.close)

    def split(self, text: str, *, opened: bool = False) -> Split:
        """Split a response at the end of its thinking.

        A closing tag without an opening one counts too: chat templates often put the opening tag
        into the prompt.

        Args:
            text: The response.
            opened: Whether the prompt had already opened the tag; without it a response that
                shows neither tag is taken for an answer.
        """
        before, closed, after = text.partition(self.close)
        start = before.lstrip()
        inside = opened or bool(closed) or start.startswith(self.open)
        if not inside:
            return Split("", text, True)
        return Split(start.removeprefix(self.open), after, bool(closed))

    def count_tokens(
        self, text: str, tokenizer: "PreTrainedTokenizerBase", *, opened: bool = False
    ) -> int:
        """Count the tokens of a response's thinking, the tags themselves left out."""
        thinking = self.split(text, opened=opened).thinking
        return len(tokenizer(thinking, add_special_tokens=False)["input_ids"])


_KNOWN = (
    ThinkingTags(),
    ThinkingTags("<thinking>", "</thinking>"),
    ThinkingTags("[THINK]", "[/THINK]"),
    ThinkingTags("<|begin_of_thought|>", "<|end_of_thought|>"),
    ThinkingTags("<seed:think>", "</seed:think>"),
    ThinkingTags("<reasoning>", "</reasoning>"),
)


def strip_thinking(dataset: "Dataset", tags: ThinkingTags | None = None) -> "Dataset":
    """Keep of every response the answer alone (the data InRa's fast stream learns from).

    Rows whose thinking is cut off before its end have no answer and are left out. Rows without
    thinking stay as they are.

    Args:
        dataset: Prompts and completions, as `load_traces` returns them.
        tags: The tags to look for; `<think>` and `</think>` if not given.

    Raises:
        DataError: If no row has the closing tag, or no row has an answer after it.
    """
    tags = tags or ThinkingTags()
    responses = [_response_text(completion) for completion in dataset["completion"]]
    if not any(tags.close in text for text in responses):
        raise DataError(
            f"no response of the {len(dataset)} has the thinking tag {tags.close!r}; "
            "leave strip_thinking out, or give traces that think."
        )
    answered = [index for index, text in enumerate(responses) if tags.split(text).answer.strip()]
    if not answered:
        raise DataError(f"no response of the {len(dataset)} has text after {tags.close!r}.")
    return dataset.select(answered).map(
        lambda row: {"completion": _answer_only(row["completion"], tags)},
        load_from_cache_file=False,
    )


def _response_text(completion: str | list[dict[str, Any]]) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _answer_only(completion: Any, tags: ThinkingTags) -> Any:
    if isinstance(completion, str):
        return tags.split(completion).answer.lstrip()
    *earlier, last = completion
    answer = tags.split(last["content"]).answer.lstrip()
    return [*earlier, {"role": last["role"], "content": answer}]
