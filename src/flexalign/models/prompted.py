"""One model under a prompt of its own, and one model under two prompts.

A side of a pair may be a model with a system message, with arguments of its chat template, or with
both (:class:`PromptedModel`). If both sides are the same model, the pair is one model under two
prompts (:class:`PromptPair`). A :class:`PairRendering` renders each conversation once for each side,
the history included; the response is common to both.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexalign._spelling import nearest
from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import (
    Opening,
    Prompt,
    RenderedPrompt,
    Rendering,
    render_chat,
    stop_ids,
)
from flexalign.data.template_arguments import require_read
from flexalign.data.thinking import ThinkingTags
from flexalign.data.tools import Tools
from flexalign.errors import ConfigError, DataError
from flexalign.models.pair import SIDES, Side

_KEYS = ("model", "system", "template")
_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class PromptedModel:
    """A model and the prompt settings under which it is asked.

    Attributes:
        model: A path or a known name.
        prompt: Its system message and template arguments; empty by default.
    """

    model: str
    prompt: PromptSettings = field(default_factory=PromptSettings)

    @classmethod
    def parse(cls, given: Any, key: str = "aligned") -> "PromptedModel":
        """Read a side of a pair, as a recipe gives it.

        Args:
            given: A path or a known name, or ``{model, system, template}``.
            key: The recipe's key, for messages.

        Raises:
            ConfigError: If it has another form, an unknown key, or no model.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str | Path):
            return cls(str(given))
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"{key} must be a model or {{model, system, template}}, got {given!r}."
            )

        for name in given:
            if name not in _KEYS:
                raise ConfigError(
                    f"{key} has the unknown key {name!r}{nearest(name, _KEYS, prefix=f'{key}.')}"
                )
        model = given.get("model")
        if not isinstance(model, str | Path) or not str(model):
            raise ConfigError(f"{key}.model is missing; name the model, a path or a known name.")
        system = given.get("system")
        if system is not None and not isinstance(system, str):
            raise ConfigError(f"{key}.system must be text, got {system!r}.")
        return cls(str(model), PromptSettings.parse(given.get("template"), system))

    @property
    def has_prompt(self) -> bool:
        """Whether it has a system message or template arguments of its own."""
        return bool(self.prompt.template) or self.prompt.system is not None

    @property
    def text(self) -> str:
        """The model and its prompt, for messages and cards."""
        told = prompt_text(self.prompt)
        return f"{self.model} ({told})" if told else self.model

    def to_json(self) -> str | dict[str, Any]:
        """Return what :meth:`parse` reads: the model alone, or a mapping if it has a prompt."""
        if not self.has_prompt:
            return self.model
        return {"model": self.model, **prompt_json(self.prompt)}


def prompt_json(prompt: PromptSettings) -> dict[str, Any]:
    """Return the keys ``system`` and ``template`` of a prompt, each only if it is set."""
    told: dict[str, Any] = {}
    if prompt.system is not None:
        told["system"] = prompt.system
    if prompt.template:
        told["template"] = dict(prompt.template)
    return told


def prompt_text(prompt: PromptSettings) -> str:
    """Return a prompt as ``KEY=VALUE`` parts with commas between; empty if nothing is set."""
    parts = [] if prompt.system is None else [f"system={prompt.system!r}"]
    return ", ".join([*parts, *(f"{name}={value!r}" for name, value in prompt.template.items())])


@dataclass(frozen=True)
class PromptPair:
    """The two prompts of one model.

    Attributes:
        reference: The prompt of λ = 0.
        aligned: The prompt of λ = 1.
    """

    reference: PromptSettings = field(default_factory=PromptSettings)
    aligned: PromptSettings = field(default_factory=PromptSettings)

    def to_json(self) -> dict[str, Any]:
        """Return ``{reference: …, aligned: …}`` of :func:`prompt_json`."""
        return {side: prompt_json(getattr(self, side)) for side in SIDES}

    def with_template(self, template: Mapping[str, Any]) -> "PromptPair":
        """Return the pair with template arguments on both sides; a side's own go before them."""
        sides = (getattr(self, side) for side in SIDES)
        return PromptPair(*(replace(one, template={**template, **one.template}) for one in sides))


def prompted_messages(
    prompt: PromptSettings, messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a conversation with a prompt's system message.

    A conversation without a system message gets it as its first message. If it has one of its own,
    the prompt's follows in the same message, after an empty line. So both sides keep what the
    conversation says, and differ in the prompts alone. It is not added twice.

    Args:
        prompt: The prompt.
        messages: The conversation; not changed.
    """
    if prompt.system is None:
        return list(messages)
    if not messages or messages[0]["role"] not in _SYSTEM_ROLES:
        return [{"role": "system", "content": prompt.system}, *messages]

    first, *rest = messages
    content = first.get("content") or ""
    if not isinstance(content, str):
        if content[-1].get("text") == prompt.system:
            return list(messages)
        added = [*content, {"type": "text", "text": prompt.system}]
        return [{**first, "content": added}, *rest]
    if content == prompt.system or content.endswith(f"\n\n{prompt.system}"):
        return list(messages)
    joined = f"{content}\n\n{prompt.system}" if content.strip() else prompt.system
    return [{**first, "content": joined}, *rest]


def without_system(prompt: PromptSettings, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Undo :func:`prompted_messages`: take a prompt's system message out of a conversation.

    Args:
        prompt: The prompt.
        messages: A conversation, with its system message or without; not changed.
    """
    # A user may write the same words: only a system message is the prompt's.
    if prompt.system is None or not messages or messages[0]["role"] not in _SYSTEM_ROLES:
        return list(messages)
    first, *rest = messages
    content = first.get("content")
    if content == prompt.system:
        return rest
    if isinstance(content, str):
        return [{**first, "content": content.removesuffix(f"\n\n{prompt.system}")}, *rest]
    parts = [part for part in content or [] if part.get("text") != prompt.system]
    return [{**first, "content": parts}, *rest]


@dataclass(frozen=True)
class TwoPrompts:
    """A conversation rendered under both prompts.

    Attributes:
        reference: The prompt of λ = 0.
        aligned: The prompt of λ = 1.
    """

    reference: RenderedPrompt
    aligned: RenderedPrompt

    @property
    def longest(self) -> int:
        """The number of tokens of the longer one."""
        return max(len(self.reference.ids), len(self.aligned.ids))

    @property
    def is_opened(self) -> bool | None:
        """Whether the prompts leave the thinking open; None if only one of the two does."""
        opened = {getattr(self, side).opening is Opening.OPENED for side in SIDES}
        return opened.pop() if len(opened) == 1 else None

    def opens_at(self, lam: float | None) -> bool:
        """Return whether a response begins inside the thinking, by the prompt that is nearer to λ.

        Args:
            lam: λ of the response; None, where it is no one number, for the reference's prompt.
        """
        nearer = self.reference if lam is None or lam < 0.5 else self.aligned
        return nearer.opening is Opening.OPENED


def context_of(config: Any) -> int | None:
    """Return the most tokens that a model was made for; None if its configuration has no limit."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def require_context(reference: int, aligned: int, context: int | None) -> None:
    """Check that both prompts of a row fit in the model's context.

    Args:
        reference: The tokens of the reference's prompt.
        aligned: The tokens of the aligned prompt.
        context: The most tokens that the model takes; None for no limit.

    Raises:
        DataError: If one of them, or both, is longer.
    """
    lengths = {"reference": reference, "aligned": aligned}
    too_long = [side for side, tokens in lengths.items() if context and tokens > context]
    if len(too_long) == 2:
        raise DataError(
            f"the prompt has {reference} tokens for the reference and {aligned} for the aligned "
            f"side, and the model's context is {context}; shorten it."
        )
    if too_long:
        (side,) = too_long
        raise DataError(
            f"the prompt has {lengths[side]} tokens under the {side} prompt alone, and the model's "
            f"context is {context} (the other side has {min(lengths.values())}); shorten it, or "
            f"the {side} prompt's system message."
        )


class PairRendering:
    """Renders conversations under two prompts of one model.

    Attributes:
        prompts: The two prompts.
        context: The most tokens that a rendered prompt may have; None for no limit.
        tokenizers: The tokenizer of each side: that of the model, with the side's template
            arguments bound to its chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptPair,
        tags: ThinkingTags | None = None,
        context: int | None = None,
    ) -> None:
        """Check both prompts against a tokenizer's chat template, and bind them.

        Warns if both prompts render the same text: then there is nothing to turn.

        Args:
            tokenizer: The model's; not changed. Arguments that are bound to it are both sides'.
            prompts: The two prompts.
            tags: The thinking tags; those of each side's tokenizer if not given.
            context: The most tokens that a rendered prompt may have; None for no limit.

        Raises:
            ConfigError: If there is no chat template, the template does not read one of the
                arguments, it has no place for a system message that is given, or a prompt alone is
                longer than the context.
        """
        self.prompts = prompts
        self.context = context
        self.tokenizers: dict[Side, PreTrainedTokenizerBase] = {}
        for side in SIDES:
            prompt = getattr(prompts, side)
            check_prompt(tokenizer, prompt, side)
            own = copy.deepcopy(tokenizer)
            prompt.bind(own)
            self.tokenizers[side] = own
        self._renderings = {side: Rendering(own, tags) for side, own in self.tokenizers.items()}

        probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        for side in SIDES:
            self._require_room(side, probe[:1])
        texts = [self.render(side, [*probe, probe[0]]).text for side in SIDES]
        if texts[0] == texts[1]:
            warnings.warn(
                "the reference's prompt and the aligned prompt render the same text: there is "
                "nothing to turn, and every λ is the plain model.",
                stacklevel=3,
            )

    def _require_room(self, side: Side, shortest: list[dict[str, Any]]) -> None:
        """Refuse a prompt that leaves no room in the context for the shortest question."""
        tokens = len(self.render(side, shortest).ids)
        if self.context is not None and tokens > self.context:
            raise ConfigError(
                f"the {side} prompt has {tokens} tokens with a question of one character, and the "
                f"model's context is {self.context}; shorten its system message."
            )

    def messages(self, side: Side, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation with the system message of a side."""
        return prompted_messages(getattr(self.prompts, side), messages)

    def render(self, side: Side, messages: Prompt, *, tools: Tools | None = None) -> RenderedPrompt:
        """Render a conversation under one side's prompt.

        Args:
            side: The side.
            messages: The conversation.
            tools: Definitions of the tools that a response may call.

        Raises:
            DataError: If it is plain text, which no chat template renders, or the chat template
                refuses it.
        """
        if isinstance(messages, str):
            raise DataError(
                "the prompt is plain text, which is the same under both prompts; give messages, "
                "which the chat template renders for each."
            )
        return self._renderings[side].prompt(self.messages(side, messages), tools=tools)

    def both(self, messages: Prompt, *, tools: Tools | None = None) -> TwoPrompts:
        """Render a conversation under both prompts.

        Args:
            messages: The conversation.
            tools: As in :meth:`render`.

        Raises:
            DataError: As in :meth:`render`, or if it is longer than the context.
        """
        both = TwoPrompts(*(self.render(side, messages, tools=tools) for side in SIDES))
        require_context(len(both.reference.ids), len(both.aligned.ids), self.context)
        return both

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a response under either prompt."""
        ends = [end for own in self.tokenizers.values() for end in stop_ids(own)]
        return list(dict.fromkeys(ends))


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptSettings, side: str) -> None:
    """Check that a chat template takes a prompt's settings.

    Args:
        tokenizer: The model's.
        prompt: The prompt.
        side: ``reference`` or ``aligned``, for messages.

    Raises:
        ConfigError: If there is no chat template, it does not read an argument, or it has no place
            for the system message.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the {side} prompt needs a chat template, and the tokenizer has none; give a model "
            "that has one."
        )

    require_read(tokenizer, prompt.template, f"the {side} prompt")
    if prompt.system is not None:
        system = {"role": "system", "content": prompt.system}
        question = {"role": "user", "content": "1"}
        try:
            render_chat(
                tokenizer, [system, question], add_generation_prompt=True, **prompt.template
            )
        except DataError as error:
            raise ConfigError(
                f"the {side} prompt has a system message, and the chat template has no place for "
                "one; leave system out, or give a template that renders it."
            ) from error
