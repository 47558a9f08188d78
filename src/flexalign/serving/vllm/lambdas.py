"""λ of every token of a vLLM batch, from what each request asked for.

:class:`DialSettings` is what a prepared folder's ``config.json`` tells the engine; :func:`read_lambda`
reads a request; :class:`RequestDial` follows it through its sequence; :class:`TokenLambdas` writes a
batch.

λ belongs to a position. At position p the model chooses token p + 1, whose index among the
generated tokens is p + 1 − (length of the prompt), and 0 for the prompt's own tokens. That is so
in a prompt that comes in chunks, in a request that is computed again after it was preempted, and
in drafts of which several are verified at once; so a schedule is right in all of them.

With a LoRA dial λ is also in the keys and values of the prompt. As in the local engine, the whole
prompt is read at the λ of the first generated token.
"""

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flexalign._spelling import misspelt
from flexalign.errors import ConfigError, ServingError
from flexalign.lambdas import Schedule

CONFIG_KEY = "flexalign"
"""The key of ``config.json`` under which the settings stand."""

SALT_KEY = "flexalign_salted"
"""The key of ``extra_args`` that says that the request's prefix is told apart by λ."""

LAMBDA_KEY = "lambda"
"""The key of ``SamplingParams.extra_args``; over HTTP, of ``vllm_xargs``."""

ARCHITECTURES = {
    "llama": "InRaLlamaForCausalLM",
    "mistral": "InRaMistralForCausalLM",
    "qwen2": "InRaQwen2ForCausalLM",
    "qwen3": "InRaQwen3ForCausalLM",
}
"""The class of ``flexalign.serving.vllm.models`` that serves a family with InRa, by ``model_type``."""

LORA_ARCHITECTURES = {
    "llama": "LoRADialLlamaForCausalLM",
    "mistral": "LoRADialMistralForCausalLM",
    "qwen2": "LoRADialQwen2ForCausalLM",
    "qwen3": "LoRADialQwen3ForCausalLM",
}
"""The class that serves a family with a LoRA dial."""


@dataclass(frozen=True)
class DialSettings:
    """An adapter's settings, as far as the engine needs them.

    Attributes:
        adapter_layers: Number of layers in an InRa adapter.
        default_lambda: λ where a request gives none.
        thinking_tokens: The tokens that open and close the thinking; None where the tags are not
            one token each, so that schedules that follow the thinking are refused.
        ranks: Of a LoRA dial, by the name of a linear layer of vLLM's model, such as
            ``model.layers.0.self_attn.qkv_proj``: the rank of each of its parts, 0 for one without
            LoRA. None for an InRa adapter.
    """

    adapter_layers: int = 1
    default_lambda: float = 0.0
    thinking_tokens: tuple[int, int] | None = None
    ranks: Mapping[str, Sequence[int]] | None = None

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA dial, whose keys and values depend on λ."""
        return self.ranks is not None

    def to_json(self) -> dict[str, Any]:
        """Return what stands under the key."""
        unused = "adapter_layers" if self.is_lora else "ranks"
        return {name: value for name, value in asdict(self).items() if name != unused}

    @classmethod
    def of(cls, config: Any) -> "DialSettings":
        """Read the settings from a model's configuration.

        Raises:
            ConfigError: If it has none.
        """
        given = getattr(config, CONFIG_KEY, None)
        if not isinstance(given, dict):
            raise ConfigError(
                f"config.json has no {CONFIG_KEY!r} key, so that it is no folder for a dial; make "
                "one with flexalign.serving.vllm.folder.prepare_folder."
            )
        tokens = given["thinking_tokens"]
        return cls(
            given.get("adapter_layers", 1),
            given["default_lambda"],
            tuple(tokens) if tokens else None,
            given.get("ranks"),
        )


def read_lambda(extra_args: Mapping[str, Any] | None, settings: DialSettings) -> Schedule:
    """Read what a request's λ follows.

    Args:
        extra_args: Of its ``SamplingParams``: under ``"lambda"`` a number, a schedule's JSON
            object, or its JSON text.
        settings: The folder's; its default counts where the request gives no λ.

    Raises:
        ConfigError: If it is malformed or misspelt, or follows the thinking of a model whose tags
            are not tokens.
        LambdaError: If a λ in it is not a finite number.
    """
    given = dict(extra_args or {})
    value = given.pop(LAMBDA_KEY, None)
    # vLLM's own extras pass; only what is almost λ would otherwise be served at the default.
    for name in given:
        if misspelt(name, [LAMBDA_KEY]):
            raise ConfigError(f"{name[:80]!r} is no dial; did you mean {LAMBDA_KEY!r}?")
    schedule = Schedule.parse(settings.default_lambda if value is None else value)
    if schedule.follows_thinking and settings.thinking_tokens is None:
        raise ConfigError(
            "a thinking schedule needs tags that are one token each, and this model's are not; "
            "use a schedule over the token index."
        )
    return schedule


class RequestDial:
    """What the λ of one request follows, and how far it has come.

    Attributes:
        constant: Its λ, if that is the same for every token; else None.
        schedule: Its λ by token.
        first: The λ of its whole prompt; None where every position has its own.
    """

    def __init__(
        self,
        schedule: Schedule,
        prompt_length: int,
        thinking_tokens: tuple[int, int] | None = None,
        known: Sequence[int] = (),
        *,
        whole_prompt: bool = False,
    ) -> None:
        """Start a request.

        Args:
            schedule: Of :func:`read_lambda`.
            prompt_length: Tokens in its prompt.
            thinking_tokens: The tokens that open and close the thinking.
            known: Its first tokens: the prompt, and what was generated before it was preempted.
                They are looked at where the engine has them cached and does not run them again.
            whole_prompt: Read the prompt at the λ of the first generated token; ``known`` must then
                hold all of it.
        """
        self.schedule = schedule
        self.constant = schedule.at(0) if schedule.kind == "constant" else None
        self._prompt_length = prompt_length
        self._tokens = thinking_tokens
        self._known = known
        self._seen = 0
        self._tags: list[tuple[int, bool]] = []
        """Positions of the tags so far, and whether each opens the thinking."""
        self.first: float | None = None
        if whole_prompt and prompt_length:
            last = prompt_length - 1
            [self.first] = RequestDial(schedule, prompt_length, thinking_tokens, known).at(
                last, 1, known[last:prompt_length]
            )

    def at(self, start: int, count: int, token_ids: Sequence[int] = ()) -> list[float]:
        """Return λ at the positions from ``start`` on.

        Args:
            start: The first position that the engine runs in this step.
            count: How many.
            token_ids: The tokens there; only a schedule that follows the thinking asks.
        """
        values = self._values(start, count, token_ids)
        if self.first is not None:
            inside = min(count, max(0, self._prompt_length - 1 - start))
            values[:inside] = [self.first] * inside
        return values

    def salt(self, given: str | None) -> str:
        """Return what two requests must share, beside their tokens, to share keys and values.

        That is λ at every position. Under a schedule it follows from the schedule, the length of
        the prompt, the λ that the prompt is read at, and the tokens.

        Args:
            given: The request's own salt, which it must share too.
        """
        if self.constant is not None:
            lams: list[Any] = [float(np.float32(self.constant)) + 0.0]  # −0 is 0
        else:
            lams = [self.schedule.to_json(), self._prompt_length, self.first]
        return json.dumps([*lams, given])

    def _values(self, start: int, count: int, token_ids: Sequence[int]) -> list[float]:
        """Return each position's own λ."""
        positions = range(start, start + count)
        if not self.schedule.follows_thinking:
            return [self.schedule.at(self._index(position)) for position in positions]

        # The engine may start behind what was seen (a cached prefix) or before it (rejected drafts).
        self._look(range(self._seen, start), self._known[self._seen : start])
        self._tags = [tag for tag in self._tags if tag[0] < start]

        values = []
        for position, token in zip(positions, token_ids, strict=True):
            self._look((position,), (token,))
            values.append(self._in_thinking(position))
        self._seen = start + count
        return values

    def _index(self, position: int) -> int:
        """Return the index, among the generated tokens, of the token chosen at a position."""
        return max(0, position + 1 - self._prompt_length)

    def _look(self, positions: Sequence[int], token_ids: Sequence[int]) -> None:
        """Note the tags among tokens."""
        opening, closing = cast("tuple[int, int]", self._tokens)  # read_lambda has seen to them
        for position, token in zip(positions, token_ids, strict=True):
            if token in (opening, closing):
                self._tags.append((position, token == opening))

    def _in_thinking(self, position: int) -> float:
        """Return λ of the token after ``position``.

        As everywhere in the library, it lies inside if the last opening tag is the last tag, and
        is counted from the first token after that.
        """
        opened, inside = self._tags[-1] if self._tags else (-1, False)
        return self.schedule.at(
            self._index(position), inside=inside, thinking_tokens=position - opened
        )


class TokenLambdas:
    """λ of every token of the batch that the model runs next.

    Attributes:
        values: λ by token, shape ``(N,)``, float32, as long as the largest batch. Its address
            never changes: graphs that were captured read it there.
        settings: The folder's.
    """

    def __init__(self, values: Tensor, settings: DialSettings, *, needs_salt: bool = False) -> None:
        """Start without requests.

        Args:
            values: As above, of any content.
            settings: The folder's.
            needs_salt: Refuse a request whose prefix is not told apart by λ.
        """
        self.values = values
        self.settings = settings
        self._needs_salt = needs_salt
        self._requests: dict[str, tuple[Any, RequestDial]] = {}

    def start(
        self, sampling_params: Any, prompt_length: int, *known: Sequence[int] | None
    ) -> RequestDial:
        """Return the dial of a request that starts, or starts again.

        Args:
            sampling_params: Its ``SamplingParams``.
            prompt_length: As in :class:`RequestDial`.
            *known: Its first tokens, in parts.

        Raises:
            ServingError: If it could share a prefix with a request of another λ.
        """
        extra_args = sampling_params.extra_args
        if self._needs_salt and not (extra_args or {}).get(SALT_KEY):
            raise ServingError(
                "a request came past vLLM's InputProcessor, so that its prefix is not told apart by "
                "λ; start the engine with --no-enable-prefix-caching."
            )
        return RequestDial(
            read_lambda(extra_args, self.settings),
            prompt_length,
            self.settings.thinking_tokens,
            list(itertools.chain.from_iterable(part or () for part in known)),
            whole_prompt=self.settings.is_lora,
        )

    def dial(
        self,
        request_id: str,
        sampling_params: Any,
        prompt_length: int,
        *known: Sequence[int] | None,
    ) -> RequestDial:
        """Return a request's dial: the same for as long as it has the same sampling parameters.

        Args:
            request_id: vLLM's.
            sampling_params: As in :meth:`start`, as are the others.
            prompt_length: As in :class:`RequestDial`.
            *known: Its first tokens, in parts.
        """
        params, dial = self._requests.get(request_id, (None, None))
        if dial is None or params is not sampling_params:
            dial = self.start(sampling_params, prompt_length, *known)
            self._requests[request_id] = sampling_params, dial
        return dial

    def forget_others(self, request_ids: Collection[str]) -> None:
        """Drop every request that is not one of these."""
        for request_id in self._requests.keys() - request_ids:
            del self._requests[request_id]

    def write(
        self,
        dials: Sequence[RequestDial],
        starts: Any,
        positions: Tensor,
        input_ids: Tensor | None,
    ) -> None:
        """Write the λ of a batch.

        Nothing is read from the device unless a λ moves.

        Args:
            dials: One per request, in the order of the batch.
            starts: Where each request's tokens start in the batch, and where the last one's end:
                a NumPy array, shape ``(len(dials) + 1,)``.
            positions: Of the batch's tokens in their sequences, on the model's device.
            input_ids: The batch's tokens, likewise.
        """
        constants = np.array([dial.constant or 0.0 for dial in dials], dtype=np.float32)
        values = np.repeat(constants, np.diff(starts))

        moving = [row for row, dial in enumerate(dials) if dial.constant is None]
        if moving:
            firsts = positions[torch.as_tensor(starts[moving]).long()].tolist()
            follow = any(dials[row].schedule.follows_thinking for row in moving)
            tokens = input_ids.tolist() if follow and input_ids is not None else []
            for row, first in zip(moving, firsts, strict=True):
                begin, end = int(starts[row]), int(starts[row + 1])
                values[begin:end] = dials[row].at(first, end - begin, tokens[begin:end])

        self.values[: len(values)].copy_(torch.from_numpy(values), non_blocking=True)
