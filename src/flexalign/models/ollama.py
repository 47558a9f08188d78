"""Ollama's Modelfile for a GGUF file.

A Modelfile without TEMPLATE leaves the chat template to Ollama, which takes the one inside the GGUF
file, or one of its own that is nearly the same text; older versions know only their own. So TEMPLATE is
written, in Go's template language, where that language says the same: where a conversation is its
messages one after another, each between two fixed texts. Whether it is so, is found by rendering.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexalign.data.template import Messages, call_template
from flexalign.data.thinking import ThinkingTags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _FIRST, _ANSWER, _SECOND = "xs7x", "xq7x", "xa7x", "xo7x"
"""Sentinel texts, which occur in no template."""

_TRIED = (" one\n\n two  ", "\n- 三 «four»\n")
"""Contents that a conversation is rendered with, to see whether a template changes them."""


def modelfile(
    name: str, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str], *, adds_bos: bool
) -> str:
    """Return the Modelfile of a GGUF file in the same folder.

    Args:
        name: The file's name.
        tokenizer: The model's tokenizer.
        stops: The tokens that end a response.
        adds_bos: Whether llama.cpp puts the BOS token before each prompt.
    """
    lines = [f"FROM ./{name}"]
    found = _Conversation.of(tokenizer)
    if found is None or not found.is_plain:
        lines.append("# No TEMPLATE: the chat template inside the GGUF file is used.")
    else:
        bos = tokenizer.bos_token if adds_bos else None
        lines.append(f'TEMPLATE """{found.as_go(bos)}"""')
        if found.system is not None:
            lines.append(f'SYSTEM """{found.system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Conversation:
    """What a chat template writes around the messages of a conversation.

    Attributes:
        start: Before the first message.
        before: Before a message of each role.
        after: After a message of each role.
        opening: After the last message, where a response is asked for.
        system: The system message where none is given; None for none.
    """

    start: str
    before: dict[str, str]
    after: dict[str, str]
    opening: str
    system: str | None

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "_Conversation | None":
        """Find the texts; None if the template thinks, or does anything else with the messages."""
        if not isinstance(tokenizer.chat_template, str) or ThinkingTags.detect(tokenizer):
            return None
        try:
            found = cls._find(tokenizer)
            is_same = found is not None and all(
                found.render(messages)
                == call_template(tokenizer, messages, add_generation_prompt=True)
                for messages in _conversations()
            )
        except Exception:  # a template is a program, and may fail in any way
            return None
        return found if is_same else None

    @classmethod
    def _find(cls, tokenizer: "PreTrainedTokenizerBase") -> "_Conversation | None":
        roles = ("system", "user", "assistant", "user")
        texts = (_SYSTEM, _FIRST, _ANSWER, _SECOND)
        whole = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        rest = call_template(tokenizer, whole, add_generation_prompt=True)
        between = []
        for text in texts:
            piece, _, rest = rest.partition(text)
            between.append(piece)
        first, to_user, to_assistant, again = between

        alone = call_template(tokenizer, [whole[1]], add_generation_prompt=True)
        head = alone.partition(_FIRST)[0]
        bos = tokenizer.bos_token or ""
        is_once = bos and first.startswith(bos) and head.startswith(bos) and bos not in to_user
        start = bos if is_once else ""
        first, head = first.removeprefix(start), head.removeprefix(start)

        if to_user.endswith(head) and again.endswith(head):  # nothing stands for a system message
            asking, system = head, None
        elif to_user == again and head.startswith(first) and head.endswith(to_user):
            asking = to_user[_beginning(first, to_user) :]
            system = head[len(first) : len(head) - len(to_user)]
        else:
            return None
        place = _beginning(first, to_assistant)
        answering = to_assistant[:place]
        before = {"system": first, "user": asking, "assistant": to_assistant[place:]}
        after = {
            "system": to_user[: len(to_user) - len(asking)],
            "user": answering,
            "assistant": again[: len(again) - len(asking)],
        }
        return cls(start, before, after, rest.removeprefix(answering), system)

    def render(self, messages: Messages) -> str:
        """Render a conversation as the Go template does."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        written = [
            self.before[message["role"]] + message["content"] + self.after[message["role"]]
            for message in messages
        ]
        return self.start + "".join(written) + self.opening

    @property
    def is_plain(self) -> bool:
        """Whether a Modelfile can hold the texts: no brackets of Go's, quotes or hidden signs."""
        texts = (self.start, *self.before.values(), *self.after.values(), self.opening)
        text = "".join(texts) + (self.system or "")
        marks = ("{{", "}}", '"""')
        return text.replace("\n", "").isprintable() and not any(mark in text for mark in marks)

    def as_go(self, added: str | None) -> str:
        """Return the template in Go's language.

        Args:
            added: The BOS token that llama.cpp adds itself; it is left out.
        """
        roles = [
            f'eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            for role in ("system", "user", "assistant")
        ]
        start = "" if self.start == added else self.start
        body = "{{ else if ".join(roles)
        return f"{start}{{{{ range .Messages }}}}{{{{ if {body}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def _beginning(first: str, text: str) -> int:
    """Return where a message begins in the text between two contents.

    Args:
        first: What begins the first message.
        text: The text between the contents of two others.

    Returns:
        The place of the longest beginning of `first` that is in the text; 0 if there is none.
    """
    for length in range(len(first), 0, -1):
        if first[:length] in text:
            return text.index(first[:length])
    return 0


def _conversations() -> list[Messages]:
    """Return conversations of every shape that the rule has to hold for."""

    def say(*roles: str) -> list[dict[str, Any]]:
        return [
            {"role": role, "content": _TRIED[place % len(_TRIED)]}
            for place, role in enumerate(roles)
        ]

    turns = ("user", "assistant", "user", "assistant", "user")
    return [say(*turns[:count]) for count in (1, 3, 5)] + [
        say("system", *turns[:count]) for count in (1, 3, 5)
    ]
