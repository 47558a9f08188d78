"""Policies that choose between the fast and the slow stream, in a batch with a dial for each row.

1. The prompts are prefilled once, in every stream that one of the next steps needs.
2. For rows with an adaptive policy, the fast answer is generated greedily from a copy of the cache
   (:mod:`flexalign.generation.adaptive`). Rows whose confidence reaches their threshold are done.
3. Rows with an exit policy think in parts (:mod:`flexalign.generation.early_exit`).
4. All other rows, including those without a policy, are generated from the prefilled cache with
   the caller's sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from flexalign.errors import ConfigError
from flexalign.generation.adaptive import (
    FastAnswer,
    PromptBatch,
    with_settings,
    write_fast_answers,
)
from flexalign.generation.early_exit import (
    ExitResponse,
    check_exit_options,
    write_with_exits,
)
from flexalign.generation.interface import DialModel
from flexalign.lambdas import Adaptive, Dial, Exit, Policy, Route, Way, way_dial

_REFUSED = ("past_key_values", "inputs_embeds", "output_scores", "output_logits")


@dataclass
class RoutedOutput(ModelOutput):  # type: ignore[misc]
    """The output of ``generate`` with a policy that chooses a stream: one entry per returned row.

    Attributes:
        sequences: Prompts and responses, right padded, as ``generate`` returns them.
        route: ``"fast"`` or ``"slow"``, the stream that answers; None for rows without such a policy.
        confidence: The confidence of the fast answer; None for rows without one. If generation was
            stopped because a probability fell below the threshold, its value at that token. With an
            exit policy, that of the last trial answer.
        rejected_tokens: Number of generated tokens that are not in the response: those of rejected
            fast or trial answers, and those of samples for comparison. Tokens that end a response,
            and those that close the thinking on trial, are not counted.
    """

    sequences: Tensor | None = None
    route: list[Way | None] | None = None
    confidence: list[float | None] | None = None
    rejected_tokens: list[int] | None = None


def chooses_stream(dials: Sequence[Dial]) -> bool:
    """Return whether any of the dials is a policy that chooses a stream for a whole response."""
    return any(isinstance(dial, Policy) for dial in dials)


@dataclass
class _Row:
    """What is known of one prompt's responses, of which there may be several.

    Attributes:
        tokens: Per response its new tokens; rows may be padded on the right.
        routes: Per response, as the other two.
        confidence: Of the fast answers.
        rejected_tokens: Those that are not in the response.
    """

    tokens: Sequence[Tensor]
    routes: Sequence[Way | None]
    confidence: Sequence[float | None]
    rejected_tokens: Sequence[int]

    @classmethod
    def same(cls, tokens: Sequence[Tensor], route: Way | None, tried: FastAnswer | None) -> "_Row":
        """Return responses that follow one decision; a fast answer, if any, has been tried."""
        repeats = len(tokens)
        return cls(
            tokens,
            [route] * repeats,
            [tried.confidence if tried else None] * repeats,
            [tried.rejected_tokens if tried else 0] * repeats,
        )

    @classmethod
    def of_exits(cls, responses: Sequence[ExitResponse]) -> "_Row":
        """Return the responses of an exit policy."""
        return cls(
            [one.tokens for one in responses],
            [one.route for one in responses],
            [one.confidence for one in responses],
            [one.rejected_tokens for one in responses],
        )


def generate_with_policies(
    model: DialModel, dials: Sequence[Dial], gate: float | None, options: dict[str, Any]
) -> Any:
    """Generate for prompts of which some have a policy that chooses a stream.

    Args:
        model: The model.
        dials: One per prompt.
        gate: As in ``generate``.
        options: The other arguments of ``generate``.

    Returns:
        A :class:`RoutedOutput` if ``return_dict_in_generate`` is set, else its sequences.

    Raises:
        ConfigError: If an option is not available with such a policy.
    """
    _check_options(model, dials, options)
    own = {name: options.pop(name) for name in model.row_inputs if name in options}
    prompts = PromptBatch(
        model, options.pop("input_ids"), options.pop("attention_mask", None), gate, own
    )
    streamer = options.pop("streamer", None)
    repeats = model.generation_option("num_return_sequences", options) or 1
    is_whole = model.generation_option("return_dict_in_generate", options)
    options = with_settings(options, {"return_dict_in_generate": False})
    found: dict[int, _Row] = {}

    exits = {row: dial for row, dial in enumerate(dials) if isinstance(dial, Exit)}
    if exits:
        responses = write_with_exits(prompts, exits, options, streamer)
        found = {row: _Row.of_exits(own) for row, own in responses.items()}

    others = {row: dial for row, dial in enumerate(dials) if row not in exits}
    routes = {row: dial.draw() for row, dial in others.items() if isinstance(dial, Route)}
    rest = {row: _slow_part(dial, routes.get(row)) for row, dial in others.items()}

    policies = {row: dial for row, dial in others.items() if isinstance(dial, Adaptive)}
    answers: dict[int, FastAnswer] = {}
    if policies:
        fast: dict[int, Dial] = {row: way_dial(dial, "fast") for row, dial in policies.items()}
        prompts.prefill([fast, rest], options)
        thresholds = [model.threshold(policy) for policy in policies.values()]
        answers = write_fast_answers(prompts, policies, thresholds, options)

    # Rows whose fast answer is accepted are done; they leave the batch.
    for row, answer in answers.items():
        routes[row] = "slow" if answer.accepted is None else "fast"
        if answer.accepted is not None:
            found[row] = _Row.same([answer.accepted] * repeats, "fast", answer)
            del rest[row]
            if streamer is not None:
                _stream(streamer, prompts.ids, answer.accepted)

    if rest:
        if streamer is not None:
            options["streamer"] = streamer
        sequences = prompts.generate(rest, options, is_last=True)
        for row, own_tokens in zip(rest, torch.split(sequences, repeats), strict=True):
            found[row] = _Row.same(list(own_tokens), routes.get(row), answers.get(row))

    rows = [found[row] for row in range(len(dials))]
    sequences = _joined(prompts.ids, [row.tokens for row in rows], model.pad_token(options))
    if not is_whole:
        return sequences
    return RoutedOutput(
        sequences=sequences,
        route=[route for row in rows for route in row.routes],
        confidence=[one for row in rows for one in row.confidence],
        rejected_tokens=[count for row in rows for count in row.rejected_tokens],
    )


def generate_fast_answers(
    model: DialModel, policy: Adaptive, options: dict[str, Any]
) -> RoutedOutput:
    """Generate the fast answers of an adaptive policy, and no slow ones.

    Args:
        model: The model.
        policy: The policy, with a threshold of its own.
        options: The arguments of ``generate`` but λ.

    Returns:
        An accepted answer has the route ``"fast"``. A rejected one has the route ``"slow"`` and no
        tokens, which are counted among the rejected ones.

    Raises:
        ConfigError: If an option is not available with such a policy.
    """
    _check_options(model, [policy], options)
    prompts = PromptBatch(
        model, options.pop("input_ids"), options.pop("attention_mask", None), gate=None
    )
    policies = dict.fromkeys(range(len(prompts.ids)), policy)
    fast: dict[int, Dial] = {row: way_dial(policy, "fast") for row in policies}
    prompts.prefill([fast], options)
    thresholds = [model.threshold(policy)] * len(policies)
    options = with_settings(options, {"return_dict_in_generate": False})
    answers = write_fast_answers(prompts, policies, thresholds, options)

    found = [answers[row] for row in policies]
    nothing = prompts.ids.new_empty(0)
    written = [[nothing if one.accepted is None else one.accepted] for one in found]
    return RoutedOutput(
        sequences=_joined(prompts.ids, written, model.pad_token(options)),
        route=["slow" if one.accepted is None else "fast" for one in found],
        confidence=[one.confidence for one in found],
        rejected_tokens=[one.rejected_tokens for one in found],
    )


def _check_options(model: DialModel, dials: Sequence[Dial], options: dict[str, Any]) -> None:
    model.check_options(options)
    for name in _REFUSED:
        value = options.get(name)
        if value is not None and value is not False:
            raise ConfigError(
                f"{name} is not available with an adaptive, exit or route policy, whose rows go "
                "different ways; leave it out, or give λ as a number or a schedule."
            )

    rows = len(dials) * (model.generation_option("num_return_sequences", options) or 1)
    if options.get("streamer") is not None and rows > 1:
        raise ConfigError(
            f"a streamer follows one response, and this policy was given {rows} to write; "
            "stream one prompt at a time."
        )
    judging = [dial for dial in dials if isinstance(dial, Adaptive | Exit)]
    if any(policy.measure == "agreement" for policy in judging):
        model.require_tokenizer("agreement", options)
    if any(isinstance(dial, Exit) for dial in dials):
        check_exit_options(model, options)


def _slow_part(dial: Dial, route: Way | None) -> Dial:
    """Return the dial of a row whose response is not the fast answer."""
    if isinstance(dial, Adaptive):
        return way_dial(dial, "slow")
    if isinstance(dial, Route):
        return way_dial(dial, route or "fast")
    return dial


def _stream(streamer: Any, ids: Tensor, answer: Tensor) -> None:
    """Send an accepted answer to a streamer in the way ``generate`` does."""
    streamer.put(ids.cpu())
    for token in answer.cpu():
        streamer.put(token[None])
    streamer.end()


def _joined(ids: Tensor, written: Sequence[Sequence[Tensor]], pad: int) -> Tensor:
    """Append responses, per prompt several ``(tokens,)``, to their prompts, padded on the right."""
    rows = [part for parts in written for part in parts]
    responses = ids.new_full((len(rows), max(map(len, rows))), pad)
    for row, part in enumerate(rows):
        responses[row, : len(part)] = part
    return torch.cat([ids.repeat_interleave(len(written[0]), 0), responses], -1)
