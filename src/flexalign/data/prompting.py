"""Prompt settings of a recipe or a command: template arguments, system message, thinking markers.

They are part of the prompt, so they must be the same in sampling, training, generation and serving.
Arguments and markers are bound to the tokenizer's chat template; the system message is put into
the messages. Traces and trained models keep a record of them, which is compared on later use.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from flexalign.data.files import place_of
from flexalign.data.template import bind_template, bound_thinking, template_arguments
from flexalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are rendered, beside the chat template itself.

    Attributes:
        template: Arguments of the chat template, such as ``{"enable_thinking": False}``.
        system: The system message for conversations that have none; None to add none.
        thinking: The opening and the closing marker of the thinking; None to read them from the
            template or the vocabulary.

    Raises:
        ConfigError: If a value has the wrong form.
    """

    template: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    thinking: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.template, Mapping):
            raise ConfigError(
                f"template must be a mapping such as {{enable_thinking: false}}, "
                f"got {self.template!r}."
            )
        if self.system is not None and not str(self.system).strip():
            raise ConfigError("system is empty; give the message's text, or leave it out.")

    @classmethod
    def parse(
        cls,
        template: Mapping[str, Any] | None = None,
        system: str | None = None,
        thinking: Any = None,
    ) -> "PromptSettings":
        """Read the keys `template`, `system` and `thinking` of a recipe.

        Args:
            template: A mapping, or None.
            system: Text, or None.
            thinking: ``{open: …, close: …}``, a pair, or None.

        Raises:
            ConfigError: If a value has the wrong form.
        """
        markers = None
        if thinking is not None:
            # A mapping's values may be in any order here; they are read by key below.
            given = thinking.values() if isinstance(thinking, Mapping) else thinking
            names = set(thinking) if isinstance(thinking, Mapping) else {"open", "close"}
            texts = list(given) if isinstance(given, Iterable) else []
            if names != {"open", "close"} or len(texts) != 2 or isinstance(thinking, str):
                raise ConfigError(
                    f"thinking must be {{open: TEXT, close: TEXT}}, the markers, got {thinking!r}."
                )
            if isinstance(thinking, Mapping):
                texts = [thinking["open"], thinking["close"]]
            if not all(isinstance(text, str) and text for text in texts) or texts[0] == texts[1]:
                raise ConfigError(
                    f"thinking must name two different markers as text, got {thinking!r}."
                )
            markers = (texts[0], texts[1])
        return cls(template or {}, system, markers)

    def bind(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Bind template arguments and markers to a tokenizer; changes nothing if there are none.

        Arguments and markers that are already bound, as in a trained model's template, stay bound
        unless these settings name them.

        Raises:
            ConfigError: If the template does not read an argument, or as in
                :func:`flexalign.data.template.bind_template`.
        """
        if self.template or self.thinking:
            arguments = {**template_arguments(tokenizer), **self.template}
            bind_template(tokenizer, arguments, self.thinking or bound_thinking(tokenizer))

            # Reads templates with jinja2, which is not loaded for help.
            from flexalign.data.template_arguments import require_read

            require_read(tokenizer, self.template, "template")

    def apply(self, dataset: "Dataset") -> "Dataset":
        """Put the system message before conversations that have none.

        Args:
            dataset: Rows with `prompt`, as `load_prompts` or `load_traces` returns them.

        Returns:
            A new data set; the one given if the settings have no system message.

        Raises:
            DataError: If prompts are plain text, a conversation has another system message, or a
                response was sampled without this one.
        """
        if self.system is None:
            return dataset
        rows = dataset.to_list()
        for number, row in enumerate(rows, start=1):
            row["prompt"] = self.with_system(row, number)
        return type(dataset).from_list(rows)

    def with_system(self, row: dict[str, Any], number: int) -> Any:
        """Return a row's prompt with the system message; raises as :meth:`apply` does."""
        prompt: Any = row["prompt"]
        if self.system is None:
            return prompt

        place = place_of(row, number)
        if isinstance(prompt, str):
            raise DataError(
                f"{place}: the prompt is plain text, which has no place for a system message; "
                "leave system out, or give messages."
            )

        own = [message["content"] for message in prompt if message["role"] == "system"]
        if own == [self.system]:
            return list(prompt)
        if own:
            raise DataError(
                f"{place}: it has a system message of its own, {own[0][:60]!r}, and `system` "
                "is another; leave one of the two out."
            )
        if row.get("response_ids") is not None:
            raise DataError(
                f"{place}: its response was sampled without the system message that `system` "
                "sets; leave system out, or sample again with it."
            )
        return [{"role": "system", "content": self.system}, *prompt]


def parse_template(texts: Iterable[str], option: str = "--template") -> dict[str, Any]:
    """Read template arguments from ``KEY=VALUE`` texts, each value as YAML.

    Args:
        texts: The texts.
        option: The option that they were given with, for messages.

    Raises:
        ConfigError: If a text has no ``=``, or its value is not YAML.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option} {text!r}: write KEY=VALUE, such as enable_thinking=false.")
        try:
            arguments[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{option} {text!r}: the value {value!r} is not YAML.") from None
    return arguments


def parse_prompt(texts: Iterable[str], option: str) -> PromptSettings:
    """Read one side's prompt from ``system=TEXT`` and ``KEY=VALUE`` texts.

    Args:
        texts: The texts; ``system=`` is the system message, every other key a template argument.
        option: The option that they were given with, such as ``--aligned-prompt``.

    Raises:
        ConfigError: If a text has another form, or there are two system messages.
    """
    given = list(texts)
    systems = [text.partition("=")[2] for text in given if text.startswith("system=")]
    if len(systems) > 1:
        raise ConfigError(f"{option} has {len(systems)} system messages; give one.")
    if systems and not systems[0].strip():
        raise ConfigError(f"{option} system= is empty; give the message's text, or leave it out.")
    arguments = [text for text in given if not text.startswith("system=")]
    return PromptSettings(parse_template(arguments, option), systems[0] if systems else None)
